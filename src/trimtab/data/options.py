"""How data sets, chats and records that are too long are read: options that several commands share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.data.prompts import is_chat
from trimtab.data.sources import is_local
from trimtab.errors import InvalidOption
from trimtab.files import expand_home
from trimtab.options import option

__all__ = ["DataOptions", "LengthOptions", "TemplateOptions", "check_chats", "idle_for_files"]


@dataclass(frozen=True)
class TemplateOptions:
    """How chats become texts."""

    chat_template_path: str | None = option(
        None, "a Jinja file: the chat template, as the aligner was trained with it [default: the proposal's]", metavar="FILE"
    )
    date: str | None = option(
        None,
        "what a chat template that writes the date takes for today, YYYY-MM-DD [default: today; a resumed run keeps its own]",
    )


@dataclass(frozen=True)
class DataOptions:
    """How a data set is read: `trimtab.data.sources.DataOptions`."""

    dataset_split: str = option("train", "split of a hub data set; 'train[:1000]' is a part of it", kept=True)
    dataset_config: str | None = option(None, "configuration of a hub data set that has several", kept=True)
    dataset_data_dir: str | None = option(None, "folder of a hub data set that is sorted into folders", kept=True)
    columns: tuple[str, ...] = option(
        (),
        "the column to read a field of the layout from, such as prompt=post; others are then not looked at; may repeat",
        metavar="FIELD=COLUMN",
    )

    def idle(self) -> dict[str, str]:
        """What says nothing of files."""
        return idle_for_files(*(getattr(self, name, None) for name in ("dataset", "dev_dataset", "eval_dataset")))


def idle_for_files(*datasets: str | None) -> dict[str, str]:
    """The options of a hub's data set that have no effect, and why, where all data sets are files, or none is given."""
    if any(name and not is_local(name) and not expand_home(name).exists() for name in datasets):
        return {}
    names = ("dataset_split", "dataset_config", "dataset_data_dir")
    return dict.fromkeys(names, "is for a data set of the hub, and none is read")


@dataclass(frozen=True)
class LengthOptions:
    """What becomes of records that are too long."""

    leave_out_long: bool = option(
        False, "leave out records that do not fit into the context, and say how many [default: they are an error]"
    )


def check_chats(options: TemplateOptions, prompts: Sequence[Any]) -> None:
    """Refuse a chat template where no prompt is a chat."""
    if options.chat_template_path is not None and not any(map(is_chat, prompts)):
        raise InvalidOption("--chat_template_path is for chats, and no prompt is one")

"""What `trimtab propose` and `trimtab.propose` can be told."""

from dataclasses import dataclass

from trimtab.data.options import DataOptions, LengthOptions, TemplateOptions
from trimtab.decode.options import SamplingOptions
from trimtab.endpoints.options import AskingOptions
from trimtab.errors import InvalidOption
from trimtab.judges.rewards.base import Reward, RewardFunction
from trimtab.judges.rewards.kinds import parse_reward, reward_help
from trimtab.models.estimates import DryRunOptions
from trimtab.options import option, same

__all__ = ["ProposeOptions"]


def _reward_help() -> str:
    return (
        "write pairs: of the --n samples of a prompt the best against the worst, by this"
        f" [default: every sample is written]. {reward_help()}"
    )


@dataclass(frozen=True)
class ProposeOptions(AskingOptions, DryRunOptions, DataOptions, LengthOptions, TemplateOptions, SamplingOptions):
    """Options of `trimtab propose` and `trimtab.propose`."""

    proposal: str = option(
        "",
        "the model to sample from: a folder or a hub id (required without --endpoint); with --endpoint, its name there"
        " [default: the first that is served]",
        metavar="P",
    )
    aligner: tuple[str, ...] = option(
        (),
        "sample from the proposal with this aligner, as its manifest says; may repeat [default: the bare proposal]",
        metavar="A",
    )
    reward: str | Reward | RewardFunction | None = option(None, _reward_help, metavar="R")  # noqa: RUF009 - a field, like the others
    reward_model: str | None = option(None, "the same as --reward model:RM", metavar="RM")
    pairs: int | None = option(None, "pairs of each prompt for --reward, at most half of --n [default: 1]")
    dataset: str = option("", "data with a 'prompt' or 'messages'", required=True, metavar="D")
    max_examples: int | None = option(None, "take only the first so many records [default: all]", low=1)
    seed: int = same(SamplingOptions, "seed", default=0, help="of the first prompt; each further one adds to it [default: 0]")
    out: str = option("", "the data set to write; an interrupted run goes on", required=True, metavar="FILE")
    dtype: str | None = option(None, "auto, float32, bfloat16 or float16 [default: auto]")
    device: str | None = option(None, "cpu, cuda, cuda:1, or auto to spread [default: the first GPU, or the CPU]")
    backend: str | None = option(None, "who runs GGUF files [default: torch, in float32]", choices=("llamacpp",))
    max_num_seqs: int | None = option(None, "most completions drawn at once [default: 32]", low=1)
    endpoint: tuple[str, ...] = option(
        (), "an OpenAI-compatible server to sample from instead, such as http://localhost:8000/v1; may repeat", metavar="URL"
    )

    @property
    def ranked(self) -> bool:
        """Whether samples become pairs."""
        return self.reward is not None or self.reward_model is not None

    def idle(self) -> dict[str, str]:
        """What takes other models than are named."""
        idle = {} if self.ranked else {"pairs": "needs --reward_model, or --reward"}
        if self.reward is not None:
            idle["reward_model"] = "is --reward model:RM, and there is another --reward: give one of them"
        everywhere = [name for name in ("dtype", "device", "date") if name not in self._read_by_reward()]
        local = ("aligner", "backend", "max_num_seqs", "leave_out_long", "chat_template_path", *everywhere)
        remote = ("concurrency", "request_timeout", "max_retries")
        here = dict.fromkeys(local, "is for a model that runs here, not for --endpoint")
        return idle | (here if self.endpoint else dict.fromkeys(remote, "needs --endpoint"))

    def _read_by_reward(self) -> tuple[str, ...]:
        """Which of its options a reward reads that is to be made."""
        text = self.reward if self.reward_model is None else f"model:{self.reward_model}"
        if not isinstance(text, str):
            return ()
        try:
            kind, argument = parse_reward(text)
        except InvalidOption as error:
            raise InvalidOption(f"--reward: {error}") from error
        return tuple(kind.reads(argument))

"""A reward model: one score for one answer to a prompt.

`RewardModel` feeds a prompt with its answer to a sequence classifier as the classifier was trained:

- a tokenizer with a chat template: the conversation, answer included, as the template renders it. Its text has all special
  tokens already (transformers' rule, and TRL's), so none are added; only an encoder whose template leaves out the leading
  `[CLS]`, where its score is read, gets its special tokens added;
- an encoder (BERT, DeBERTa, …) without one: prompt and answer as a pair of sequences;
- a decoder without one: prompt and answer as one text.

What is too long loses the beginning of its prompt, as in RewardBench (`truncation_side = "left"`): the answer is what is
judged, and a decoder's score is read at its end. (An answer that is too long by itself loses its own beginning then.) Leading
and separating special tokens stay.

A decoder's score is read, as transformers does, at the last token that is not the configuration's padding; without padding in
the configuration, at the last token. Rows are padded on the right, by that same id, so that a batch gives what each row gives
alone.
"""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.data.encoding import Encoder
from trimtab.data.prompts import Prompt, as_list, is_chat, read_chat
from trimtab.decode.scoring import by_length
from trimtab.errors import CheckpointError, InvalidOption, InvalidRequest, ModelError, UnsupportedModel
from trimtab.models.attention import without_cudnn
from trimtab.models.fingerprint import Files, fingerprint_model
from trimtab.models.loading import (
    check_finite,
    check_placeable,
    expand,
    load_tokenizer,
    loading_arguments,
    placed,
    quietly_reported,
    readable,
)
from trimtab.models.stored import check_filled
from trimtab.models.weight_files import folder_of

__all__ = ["RewardModel"]

logger = logging.getLogger(__name__)

_REFUSED = {"xlnet": "XLNet reads its score at the last position, padding or not", "canine": "CANINE has no table of tokens"}
"""By `model_type`."""


class _Row(NamedTuple):
    """What goes into the classifier for one answer; the lists are of one length."""

    ids: list[int]
    types: list[int]
    """0 in the first sequence of a pair, 1 in the second."""
    special: list[bool]
    """Which tokens truncation must keep."""


class RewardModel:
    """A sequence classifier that scores answers. It is put into evaluation mode.

    Args:
        model: a transformers module for sequence classification with one label, or with two.
        tokenizer: its tokenizer, with or without a padding token.
        batch_size: rows of a forward pass.
        max_length: tokens of a row; longer ones are truncated. Default: the least of what model and tokenizer state.
        date: what a chat template that writes the date takes for today, `YYYY-MM-DD`; None takes the clock's.

    Attributes:
        truncated: how many rows `score` has truncated so far.

    Raises:
        ModelError: a classifier with more labels.
        UnsupportedModel: XLNet or CANINE.
        InvalidOption: `batch_size` or `max_length` is no positive number, or the model has fewer positions.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_size: int = 16, max_length: int | None = None, date: str | None = None
    ) -> None:
        config = model.config
        _check_labels(config, getattr(config, "_name_or_path", "") or type(model).__name__)
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InvalidOption(f"{name} must be a positive number, not {value!r}")
        positions = _positions(model)
        if max_length is not None and positions is not None and max_length > positions:
            raise InvalidOption(f"max_length is {max_length}, but the reward model has {positions} positions")
        # A tokenizer that knows no limit says 10^30.
        stated = [
            size for size in (positions, getattr(tokenizer, "model_max_length", None)) if size is not None and size < 10**9
        ]
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length: int | None = max_length if max_length is not None else min(stated, default=None)
        self.truncated = 0
        self._files: Files | None = None
        self._decoder = _is_decoder(config)
        self._embeddings: Tensor = model.get_input_embeddings().weight
        self._encoder = Encoder(tokenizer, len(self._embeddings), date=date)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        tokenizer: Any = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        revision: str | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
        date: str | None = None,
    ) -> "RewardModel":
        """A folder or hub id that `AutoModelForSequenceClassification` loads.

        Args:
            source: a folder, or a hub id; safetensors only, and no code of it is run.
            tokenizer: a loaded one. Default: the one in `source`.
            dtype: `"auto"` takes the checkpoint's own; otherwise a torch dtype or its name.
            device: where to put it; `"auto"` spreads a large model with accelerate. Default: the first GPU, or the CPU.
            revision: a hub revision.
            batch_size: rows of a forward pass.
            max_length: tokens of a row; see the class.
            date: see the class.

        Raises:
            CheckpointError: missing, pickled, incomplete or non-finite weights, or no classification head.
            ModelError: whatever else cannot be loaded, or has more than two labels.
            InvalidOption: an unknown dtype or device, or a wrong number.
        """
        model, files = Files.of(partial(_load_classifier, source, dtype, device, revision), (source, revision))
        tokenizer = load_tokenizer(source, revision=revision) if tokenizer is None else tokenizer
        made = cls(model, tokenizer, batch_size=batch_size, max_length=max_length, date=date)
        made._files = files
        return made

    @property
    def fingerprint(self) -> str:
        """`sha256:…` of all that decides the classifier's numbers, see `trimtab.models.fingerprint`."""
        return fingerprint_model(self.model) if self._files is None else self._files.fingerprint

    @property
    def chat_settings(self) -> dict[str, Any]:
        """What decides how conversations become texts, see `trimtab.data.encoding`; empty without a chat template."""
        return self._encoder.chat_settings if getattr(self.tokenizer, "chat_template", None) else {}

    def score(self, prompts: Prompt | Sequence[Prompt], answers: str | Sequence[str]) -> list[float]:
        """One score for each prompt with its answer, in their order; higher is better.

        With one label, the logit; with two, logit 1 − logit 0, the log-odds of label 1. Truncated rows are counted in
        `truncated` and warned of.

        Args:
            prompts: texts or lists of messages; with a chat template, a text is one user message. For an encoder without
                one, a conversation of a single user message is that message's text.
            answers: a text for each prompt.

        Raises:
            InvalidRequest: a prompt or answer that is malformed, or not as many of one as of the other.
            InvalidOption: `max_length` has no room for any text.
            ModelError: a score that is not finite, named by its pair, or an output that is no classifier's.
        """
        items, texts = as_list(prompts), [answers] if isinstance(answers, str) else list(answers)
        if len(items) != len(texts):
            raise InvalidRequest(f"there are {len(items)} prompts, but {len(texts)} answers")
        whole = [self._encode(prompt, answer, i) for i, (prompt, answer) in enumerate(zip(items, texts, strict=True))]
        rows = [self._cut(row) for row in whole]
        cut = sum(len(short.ids) < len(long.ids) for short, long in zip(rows, whole, strict=True))
        if cut:
            logger.warning(
                "%d of %d prompts with their answers lost their beginning to fit %d tokens", cut, len(rows), self.max_length
            )
        self.truncated += cut
        scores = [0.0] * len(rows)
        size = min(self.batch_size, max(1, len(self._embeddings) - 1))  # see `_padding`
        for chosen in by_length([len(row.ids) for row in rows], size):
            for i, value in zip(chosen, self._forward([rows[i] for i in chosen]), strict=True):
                if not math.isfinite(value):
                    raise ModelError(f"the reward of prompts[{i}] and answers[{i}] is {value}")
                scores[i] = value
        return scores

    def check(self, prompt: Prompt) -> None:
        """Raise the `InvalidRequest` that `score` would raise for this prompt, if any."""
        self._encode(prompt, "", 0)

    def _encode(self, prompt: Prompt, answer: Any, i: int) -> _Row:
        name = f"prompts[{i}]"
        if not isinstance(answer, str):
            raise InvalidRequest(f"answers[{i}] must be a text, not {answer!r}")
        if not prompt or not (isinstance(prompt, str) or is_chat(prompt)):
            raise InvalidRequest(f"{name} must be a text that is not empty, or messages, not {prompt!r}")
        tokenizer, pair = self.tokenizer, f"{name} with its answer"
        if getattr(tokenizer, "chat_template", None):
            chat = read_chat([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, name)
            whole = chat._replace(messages=[*chat.messages, {"role": "assistant", "content": answer}])
            text = self._encoder.render(whole, pair, answer=False)
            if not self._decoder and not text.startswith(getattr(tokenizer, "cls_token", None) or ""):
                return self._encode_pair(text, None, pair)
            ids = self._encoder.text(text, pair, special=False)
        elif self._decoder:
            if not isinstance(prompt, str):
                raise InvalidRequest(f"{name} is a chat, but the reward model's tokenizer has no chat template: give a text")
            ids = self._encoder.text(prompt + answer, pair) + self._encoder.around[1]  # all that it was trained with
        else:
            return self._encode_pair(_plain(prompt, name), answer, pair)
        first = ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id)
        return self._checked(_Row(ids, [0] * len(ids), [first] + [False] * (len(ids) - 1)), pair)

    def _encode_pair(self, first: str, second: str | None, name: str) -> _Row:
        for text in (first, second or ""):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InvalidRequest(f"{name} is no valid Unicode: a lone surrogate at character {error.start}") from None
        # As lists of one: a second text that is empty and no list would not count as a sequence.
        pair = [first], None if second is None else [second]
        coded = {key: value[0] for key, value in self.tokenizer(*pair, return_special_tokens_mask=True, verbose=False).items()}
        ids = list(coded["input_ids"])
        types = list(coded.get("token_type_ids") or [0] * len(ids))  # a tokenizer that gives none trained its model without
        return self._checked(_Row(ids, types, [bool(flag) for flag in coded["special_tokens_mask"]]), name)

    def _checked(self, row: _Row, name: str) -> _Row:
        if max(row.ids) >= len(self._embeddings):
            raise ModelError(
                f"{name} has token {max(row.ids)}, but the reward model knows {len(self._embeddings)}: "
                "the tokenizer is another model's"
            )
        return row

    def _cut(self, row: _Row) -> _Row:
        """The row without as many of its first ordinary tokens as are too many."""
        over = len(row.ids) - self.max_length if self.max_length is not None else 0
        if over <= 0:
            return row
        ordinary = [i for i, special in enumerate(row.special) if not special]
        if over >= len(ordinary):
            raise InvalidOption(f"max_length is {self.max_length}: that is no room for anything but special tokens")
        gone = set(ordinary[:over])
        kept = [i for i in range(len(row.ids)) if i not in gone]
        return _Row([row.ids[i] for i in kept], [row.types[i] for i in kept], [row.special[i] for i in kept])

    @torch.no_grad()
    def _forward(self, rows: Sequence[_Row]) -> list[float]:
        shape = len(rows), max(len(row.ids) for row in rows)
        with self._padding({row.ids[-1] for row in rows}) as padding:
            ids, mask = torch.full(shape, padding), torch.zeros(shape, dtype=torch.long)
            types = torch.zeros_like(mask)
            for i, row in enumerate(rows):
                ids[i, : len(row.ids)] = torch.tensor(row.ids)
                types[i, : len(row.ids)] = torch.tensor(row.types)
                mask[i, : len(row.ids)] = 1
            inputs = {"input_ids": ids, "attention_mask": mask}
            config = self.model.config
            # GPT-2 would take them for words, and a RoBERTa has a row for only one of the two.
            if not self._decoder and (getattr(config, "type_vocab_size", None) or 0) > 1:
                inputs["token_type_ids"] = types
            inputs = {name: value.to(self._embeddings.device) for name, value in inputs.items()}
            options = {"use_cache": False} if self._decoder and hasattr(config, "use_cache") else {}
            with without_cudnn(self._embeddings.device):
                logits = getattr(self.model(**inputs, **options), "logits", None)
        if not isinstance(logits, Tensor) or logits.shape != (len(rows), config.num_labels):
            what = tuple(logits.shape) if isinstance(logits, Tensor) else logits
            raise ModelError(
                f"{type(self.model).__name__} is no sequence classifier: it gave logits {what} for {len(rows)} texts"
            )
        values = logits.float().cpu()
        return [float(value) for value in (values[:, 0] if config.num_labels == 1 else values[:, 1] - values[:, 0])]

    @contextlib.contextmanager
    def _padding(self, last: set[int]) -> Iterator[int]:
        """The id to pad with.

        transformers looks for the last token that is not `config.pad_token_id`. Where that is missing, or none of the model's
        (LLaMA had −1), any id will do with which no row of the batch ends (`last`); it is put there for the time of the pass.
        """
        config = self.model.config.get_text_config()
        own = config.pad_token_id
        if own is not None and 0 <= own < len(self._embeddings):
            yield own
            return
        config.pad_token_id = next(i for i in range(len(last) + 1) if i not in last)
        try:
            yield config.pad_token_id
        finally:
            config.pad_token_id = own


def _plain(prompt: Prompt, name: str) -> str:
    """The text of a prompt for an encoder that has no chat template."""
    if isinstance(prompt, str):
        return prompt
    messages: Any = prompt["messages"] if isinstance(prompt, Mapping) else list(prompt)
    text = messages[0].get("content") if len(messages) == 1 and messages[0].get("role") == "user" else None
    if not isinstance(text, str):
        raise InvalidRequest(
            f"{name} is a chat, but the reward model's tokenizer has no chat template: give a text or one user message"
        )
    return text


def _load_classifier(
    source: str | Path, dtype: str | torch.dtype, device: str | torch.device | None, revision: str | None
) -> Any:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    how = loading_arguments(dtype, device, revision)
    with readable(source, "model"):
        source = expand(source)
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        _check_labels(config, source)
        check_placeable(config, source)
        with quietly_reported():
            model, report = AutoModelForSequenceClassification.from_pretrained(source, **how)
    model = placed(model, device)
    missing = sorted(str(key) for key in report.get("missing_keys") or ())
    head = [key for key in missing if not key.startswith(f"{model.base_model_prefix}.")]
    if head:  # transformers would go on with a random one
        raise CheckpointError(f"'{source}' is no sequence classifier: its head is missing ({', '.join(head)})")
    check_filled(model, report, source, folder_of(source, revision))
    check_finite(model, source)
    return model


def _check_labels(config: Any, source: object) -> None:
    if config.model_type in _REFUSED:
        raise UnsupportedModel(f"'{source}' is no reward model we can use: {_REFUSED[config.model_type]}")
    if config.num_labels not in (1, 2):
        names = ", ".join(str(name) for name in list((config.id2label or {}).values())[:8])
        raise ModelError(
            f"'{source}' has {config.num_labels} labels ({names}); a reward model has one, or two of which the second is better"
        )


def _is_decoder(config: Any) -> bool:
    """Whether transformers has the architecture as a causal language model and not as a masked one (BERT is there as both)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind = config.model_type
    masked = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or getattr(config, "is_encoder_decoder", False)
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not masked


def _positions(model: Any) -> int | None:
    """How many tokens a row can have; None if nothing limits it."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return positions - int(module.padding_idx) - 1  # RoBERTa counts from there
    return positions

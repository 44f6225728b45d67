"""`trimtab` as a model of EleutherAI's lm-evaluation-harness, in process; docs/harnesses.md shows how to use it.

`TrimtabLM` is the class that the harness asks for log-likelihoods and texts. The harness has no entry point for models of other
packages, so `main` registers the class and hands over to the harness's own command line:

    python -m trimtab.evaluate.harness run --model trimtab --model_args proposal=P,aligner=A --tasks T

Texts become tokens, and long ones are cut, as the harness's own `hf` model does it; the rows are the aligned model's. Only this
module imports `lm_eval`, which comes with `pip install 'trimtab[eval]'`.
"""

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from trimtab.core.logprobs import gather
from trimtab.data.prompts import read_chat
from trimtab.data.template import pick_date
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.request import SamplingParams
from trimtab.decode.scoring import Following, completion_rows
from trimtab.errors import DeadRow, InvalidOption, InvalidRequest, TrimtabError
from trimtab.extras import how_to_install
from trimtab.knobs import KNOBS, SHAPING

try:
    from lm_eval import utils
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS, DEFAULT_MAX_LENGTH, DEFAULT_OTHER_SEED
    from lm_eval.models.utils import Collator, handle_stop_sequences, normalize_gen_kwargs
    from tqdm import tqdm
except ModuleNotFoundError as error:
    if error.name != "lm_eval":
        raise
    reason = f"lm-evaluation-harness is not installed: {how_to_install('eval')}"
    raise ModuleNotFoundError(reason, name="lm_eval") from None

__all__ = ["TrimtabLM", "main"]

DRAFTING = {"draft", "draft_temperature", "num_speculative_tokens"}
LOADING = {"aligner", "tokenizer", "dtype", "revision", "date", *SHAPING} | DRAFTING
"""Options that are `AlignedModel.from_pretrained`'s."""
OWN = {"add_bos_token", "batch_size", "device", "max_gen_toks", "max_length", "max_num_seqs", "prefix_token_id", "seed"}
SAMPLING = {name for name, knob in KNOBS.items() if knob.said.get("harness", True)}
"""Generation settings that are `SamplingParams`' under their own names."""

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""What the harness calls the request in its cache, or None; the context's ids; the continuation's ids."""


class _Scored(NamedTuple):
    """A continuation after its context.

    Attributes:
        logps: natural-log probability of each token.
        greedy: whether each token is the most probable one.
        last: the row `[V]` of the last token.
    """

    logps: list[float]
    greedy: list[bool]
    last: Tensor

    def answer(self, continuation: Sequence[int]) -> tuple[float, bool]:
        """Log-likelihood and greediness of a continuation that ends where this one does, its last token apart."""
        start, token = len(self.logps) - len(continuation), continuation[-1]
        logp = math.fsum(self.logps[start:-1]) + self.last[token].item()
        return logp, all(self.greedy[start:-1]) and self.last.argmax().item() == token


@register_model("trimtab")
class TrimtabLM(TemplateLM):  # type: ignore[misc]  # lm-eval is untyped here
    """An aligned model for lm-evaluation-harness.

    Args:
        proposal: an `AlignedModel` with a tokenizer, or the folder or hub id of a proposal to load.
        add_bos_token: whether texts begin with the special tokens that the tokenizer puts first; None leaves that to the
            tokenizer. A text that begins with the token already gets no second one.
        prefix_token_id: what stands before a text that has nothing before it; default: the tokenizer's BOS, or else its EOS.
        max_length: tokens of context, at most and by default as many as all the models take. What is longer is cut from the
            left.
        max_gen_toks: tokens to generate where a task does not say.
        max_num_seqs: the most texts in the models at once; default: 32.
        seed: of the first sample for a prompt; further samples for the same prompt count up from it.
        device: where to put what is loaded; default: the first GPU, or the CPU.
        batch_size: the harness's own flag: a number above 1 is `max_num_seqs` if that is not given. 1 is what the harness
            says when nobody said anything, so it means nothing.
        options: further arguments of `AlignedModel.from_pretrained`. Where one line has to hold several aligners or weights,
            they are joined by a plus sign: `aligner=A+B,weight=1+0.5`; and a rule's settings by semicolons.

    Raises:
        InvalidOption: there is no such option, or its value does not fit.
        TrimtabError: a model cannot be loaded, see `trimtab.errors`.
    """

    def __init__(
        self,
        proposal: str | Path | AlignedModel = "",
        *,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = DEFAULT_MAX_GEN_TOKS,
        max_num_seqs: int | None = None,
        seed: int = DEFAULT_OTHER_SEED,
        device: Any = None,
        batch_size: int | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if unknown := set(options) - LOADING:
            raise InvalidOption(f"there is no option '{min(unknown)}'; choose from {', '.join(sorted(LOADING | OWN))}")
        size = _read_batch_size(batch_size) if max_num_seqs is None else max_num_seqs
        options = {name: value for name, value in options.items() if value is not None}
        options |= {name: value for name, value in (("device", device), ("max_num_seqs", size)) if value is not None}
        if isinstance(proposal, AlignedModel) and options:
            raise InvalidOption(f"{min(options)} belongs to loading a model, but this one is loaded")
        self.model = proposal if isinstance(proposal, AlignedModel) else _load(proposal, options)
        self.tokenizer = self.model.tokenizer
        if self.tokenizer is None:
            raise InvalidOption("the harness works on texts: give the model a tokenizer")
        if add_bos_token is not None and not isinstance(add_bos_token, bool):
            raise InvalidOption(f"add_bos_token must be true or false, not {add_bos_token!r}")
        longest, vocab_size = self.model.max_length, self.model.proposal.vocab_size
        _check_integer("max_length", max_length, 1, longest)
        _check_integer("max_gen_toks", max_gen_toks, 1)
        _check_integer("prefix_token_id", prefix_token_id, 0, vocab_size - 1)
        _check_integer("seed", seed)
        self.add_bos_token, self.max_gen_toks, self.seed = add_bos_token, max_gen_toks, seed
        self.max_length = max_length or longest or DEFAULT_MAX_LENGTH
        candidates = (prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        self._prefix_token_id: int | None = next((token for token in candidates if token is not None), None)
        self._rendered: set[str] = set()
        self._shaping = self.model.shaping(self.model.defaults)
        self._device = self.model.proposal.device

    @classmethod
    def create_from_arg_obj(cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None) -> Self:
        """From `--model_args`, which win over the harness's flags: those have values even if nobody gave them."""
        flags = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**flags, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> Self:
        """From `--model_args` in one line."""
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    # ---- tokens

    @property
    def eot_token_id(self) -> int | None:
        """The tokenizer's end of sequence."""
        token: int | None = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        if self._prefix_token_id is None:
            raise InvalidOption("the tokenizer has neither BOS nor EOS to stand before a text: say which, prefix_token_id=")
        return self._prefix_token_id

    @property
    def tokenizer_name(self) -> str:
        """What the harness calls the tokenizer in its cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, which has one BOS at most; what the chat template has written gets none."""
        if add_special_tokens is None:
            add_special_tokens = self._begins_anew(string)
        encoder = self.model.encoder
        if not string:
            return list(encoder.around[0]) if add_special_tokens else []
        return encoder.text(string, "a text", special=add_special_tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context and of its continuation, which takes the context's last spaces, as the harness has it."""
        special, before = self._begins_anew(context), context.rstrip()
        prompt: Any = before or self.model.encoder.around[0] or [self.prefix_token_id]
        return self.model.encoder.split(prompt, context[len(before) :] + continuation, special=special)

    def _begins_anew(self, text: str) -> bool:
        """Whether the tokenizer's first tokens come before a text."""
        return self.add_bos_token is not False and text not in self._rendered

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without `add_generation_prompt` it ends inside the last message."""
        chat = read_chat(chat_history, "the conversation")
        unfinished = not add_generation_prompt
        rendered = self.model.encoder.render(chat, "the conversation", answer=add_generation_prompt, unfinished=unfinished)
        self._rendered.add(rendered)
        return rendered

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes down beside the results."""
        weights = list(self._shaping.weights)
        rows: dict[str, Any] = {"rule": str(self._shaping.rule), "weight": weights, "max_length": self.max_length}
        rows["date"] = self.model.encoder.chat_settings["date"]
        return {"trimtab": rows | {"max_num_seqs": self.model.max_num_seqs}}

    # ---- log-likelihoods

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that do not overlap but for one token of context."""
        windows: list[Request] = []
        counts = []
        for request in requests:
            (text,) = request.args
            tokens = self.tok_encode(text)
            cut = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            pairs = [utils.make_disjoint_window(window) for window in cut]
            windows += [(None, context, continuation) for context, continuation in pairs]
            counts.append(len(pairs))
        parts = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = [math.fsum(next(parts)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would write it.

        Raises:
            InvalidOption: the rule has no row.
            InvalidRequest: a continuation is empty or does not fit the context.
            DeadRow: a row is NaN or has no mass.
        """
        if not self._shaping.rule.has_row:
            raise InvalidOption(f"rule '{self._shaping.rule}' has no next-token row in closed form: it cannot score")
        for key, _context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                text = "a text" if key is None else f"{key[1]!r}"
                raise InvalidRequest(f"{text} has {len(continuation)} tokens to score: 1 to {self.max_length} can be")
        # Continuations that differ in their last token alone, such as A, B, C and D, share one row: unless the rule looks back,
        # for it may tell apart where they begin.
        order = Collator(
            requests,
            sort_fn=lambda r: (-len(r[1] + r[2]), r[1] + r[2]),
            group_by=None if self._shaping.rule.looks_back else "contexts",
            group_fn=lambda r: r[1] + r[2][:-1],
        )
        answers = []
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for batch in order.get_batched(n=self.model.max_num_seqs):
                for (key, context, continuation), scored in zip(batch, self._score(batch), strict=True):
                    row = scored.last[None, None]
                    for name, tokens, _row in order.get_cache(key, context, continuation, row):
                        answers.append(scored.answer(tokens))
                        if name is not None:
                            self.cache_hook.add_partial("loglikelihood", name, answers[-1])
                        bar.update()
        return list(order.get_original(answers))

    @torch.no_grad()
    def _score(self, requests: Sequence[Request]) -> list[_Scored]:
        """Score continuations in one batch; contexts that are too long lose their left end."""
        model, pairs = self.model, []
        for _, context, continuation in requests:
            whole = (context + continuation)[-self.max_length - 1 :]  # the last one is predicted, and never read
            pairs.append((whole[: -len(continuation)], continuation))
        following = Following(self._shaping, [context for context, _ in pairs], model.proposal.device)
        logps: list[list[float]] = [[] for _ in pairs]
        greedy: list[list[bool]] = [[] for _ in pairs]
        last: list[Tensor] = [torch.empty(0)] * len(pairs)
        for rows, tokens, counts in completion_rows([model.proposal, *model.aligners_of(self._shaping)], pairs):
            target = following.align(rows, tokens, counts).target
            found, best = gather(target, tokens).tolist(), target.argmax(-1).eq(tokens).tolist()
            for i, count in enumerate(counts):
                if any(map(math.isnan, found[i][:count])):
                    raise DeadRow(f"rule '{self._shaping.rule}' leaves no possible token, or a model gives NaN")
                if count:
                    logps[i] += found[i][:count]
                    greedy[i] += best[i][:count]
                    last[i] = target[i, count - 1].clone()  # a view would keep all rows
        return [_Scored(*scored) for scored in zip(logps, greedy, last, strict=True)]

    # ---- texts

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts until a stop text, an end of sequence or the most tokens.

        Raises:
            InvalidRequest: a generation setting is unknown or does not fit.
            DeadRow: a row is NaN or has no mass; what was answered before is in lm-eval's cache, if it has one.
        """
        order = Collator(
            [request.args for request in requests],
            sort_fn=lambda r: (-len(self.tok_encode(r[0])), r[0]),
            group_by="gen_kwargs",
            group_fn=lambda r: r[1],
        )
        texts: list[str] = []
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for group in order.get_batched(n=0):  # all with the same settings: the engine batches them itself
                contexts, settings = [context for context, _ in group], group[0][1]
                done = [""] * len(group)
                prompts, params = self._prompts(contexts, settings)
                for event in self.model.stream(prompts, params):
                    if event.completion is not None:
                        if event.completion.error is not None:
                            raise DeadRow(event.completion.error)  # lm-eval would take what there is for the answer
                        done[event.prompt_index] = event.completion.text
                        self.cache_hook.add_partial(
                            "generate_until", (contexts[event.prompt_index], settings), event.completion.text
                        )
                        bar.update()
                texts += done
        return list(order.get_original(texts))

    def _prompts(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> tuple[list[list[int]], list[SamplingParams]]:
        """Ids of each context, cut to leave room for what is generated, and how to decode it."""
        asked = dict(normalize_gen_kwargs(dict(settings), self.max_gen_toks))
        end = None if asked.get("ignore_eos") else self.tokenizer.eos_token
        limit, until = asked.pop("max_gen_toks"), handle_stop_sequences(asked.pop("until"), eos=end)
        room = self.max_length - limit
        if room < 1:
            raise InvalidRequest(f"max_gen_toks={limit} leaves no room for a prompt: the context holds {self.max_length}")
        greedy = asked.pop("do_sample") is False or not asked.get("temperature")
        if asked.get("num_beams") == 1:
            del asked["num_beams"]
        if unknown := set(asked) - SAMPLING:
            known = ", ".join(sorted(SAMPLING))
            raise InvalidRequest(f"generation_kwargs: there is no '{min(unknown)}' here; choose from {known}")
        seed = asked.pop("seed", self.seed)
        asked |= {"temperature": 0.0} if greedy else {}
        seen: Counter[str] = Counter()
        prompts, params = [], []
        for context in contexts:
            tokens = self.tok_encode(context) or [self.prefix_token_id]
            prompts.append(tokens[-room:])
            stop = [text for text in until if text]
            params.append(SamplingParams(max_tokens=limit, stop=stop, seed=seed + seen[context], **asked))
            seen[context] += 1
        return prompts, params


def _load(proposal: Any, options: dict[str, Any]) -> AlignedModel:
    if not isinstance(proposal, (str, Path)) or not str(proposal):
        raise InvalidOption(f"proposal must be a folder, a hub id or an AlignedModel, not {proposal!r}")
    if isinstance(options.get("aligner"), str):
        options["aligner"] = options["aligner"].split("+")
    if isinstance(weight := options.get("weight"), str):
        try:
            options["weight"] = [float(number) for number in weight.split("+")]
        except ValueError:
            raise InvalidOption(f"weight must be numbers joined by '+', one for each aligner, not '{weight}'") from None
    if options.get("device") == "cuda:0" and not torch.cuda.is_available():
        del options["device"]  # what the harness's command line says unless told otherwise
    options["date"] = pick_date(options.get("date"))  # one for the whole run
    return AlignedModel.from_pretrained(proposal, options.pop("aligner", None), **options)


def _read_batch_size(batch_size: int | str | None) -> int | None:
    if batch_size is None or str(batch_size) in ("1", "auto"):
        return None
    try:
        return int(batch_size)
    except ValueError:
        raise InvalidOption(f"batch_size must be a number or auto, not {batch_size!r}") from None


def _check_integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> None:
    if value is None:
        return
    if type(value) is not int or (low is not None and value < low) or (high is not None and value > high):
        limits = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
        raise InvalidOption(f"{name} must be an integer {' and '.join(limits)}".rstrip() + f", not {value!r}")


def main() -> int:
    """The harness's command line, which knows `--model trimtab` now; the exit status, as of `trimtab`."""
    try:
        cli_evaluate()
    except TrimtabError as error:
        sys.stderr.write(f"trimtab: error: {error}\n")
        return 2 if isinstance(error, InvalidOption) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

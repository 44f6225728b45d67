"""`AlignedModel`: a frozen proposal and its aligners, as the one model that users hold."""

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Self, Unpack

import torch

from trimtab.core.noise import fresh_seed
from trimtab.core.rules import Rule, parse_rule
from trimtab.data.encoding import Encoder
from trimtab.data.prompts import Prompt, are_ids, as_list, as_pairs, is_chat
from trimtab.decode.assemble import AlignerLike, load_parts
from trimtab.decode.blending import Blends
from trimtab.decode.draft import Models, choose_drafter
from trimtab.decode.drafters import Drafter, Given, as_drafter
from trimtab.decode.engine import Engine
from trimtab.decode.pace import Pace
from trimtab.decode.particles import sample_sequences
from trimtab.decode.prefixes import PREFIX_CACHE_TOKENS, Prefixes
from trimtab.decode.request import (
    Completion,
    SamplingParams,
    TokenEvent,
    check_against,
    check_params,
    refuse_row_settings,
    with_params,
)
from trimtab.decode.scoring import Score, by_length, score_tokens
from trimtab.decode.sequence import Sequence as Growing
from trimtab.decode.sequence_level import SequenceLevel, parse_sequence_level
from trimtab.decode.settings import settle
from trimtab.decode.shaping import Shaping
from trimtab.errors import InvalidOption, InvalidRequest
from trimtab.knobs import WarpSettings, check_number
from trimtab.models.aligner import Manifest
from trimtab.models.base import LanguageModel
from trimtab.models.fingerprint import fingerprint_of

__all__ = ["AlignedModel"]


class ModelSettings(WarpSettings, total=False):
    """What `AlignedModel.from_pretrained` passes on to `AlignedModel`, which says what each is."""

    draft_temperature: float | None
    num_speculative_tokens: int | None
    max_num_seqs: int
    prefix_cache_tokens: int
    date: str | None
    handover: str | Rule | None


class AlignedModel:
    """P ∝ P_M·Q: generate from it, stream from it, score with it. Make one with `from_pretrained`.

    Args:
        proposal: P_M, frozen.
        aligners: Q_1 … Q_n over the same vocabulary; none for the bare proposal.
        tokenizer: the shared tokenizer, or None to work with token ids alone.
        eos_token_ids: ids that end a completion.
        manifests: how each aligner wants to be decoded; None for one that does not say.
        rule, weight, handover: as in `SamplingParams`, which overrides them for a request; they override the manifests.
        draft: who drafts: `"aligner"` (the first one), `"ngram"` (the text so far), `"none"`, another package's drafter
            (`"NAME"`, `"NAME:ARGUMENT"`), a `Drafter`, or a `LanguageModel` of the same vocabulary that only drafts. Default:
            the first aligner if there is one, and the text so far if its manifest says that it is a residual
            (`Manifest.is_residual`), whose drafts are rarely accepted, or it is a head, which cannot draft.
            `from_pretrained` takes the drafter in a residual's or a head's folder, if there is one.
        draft_temperature: of the row that drafts are drawn from, on top of the aligner's own; default: 1, or
            what suits the rule if an aligner drafts.
        num_speculative_tokens: tokens to draft ahead: None adapts to what pays, 0 decodes token by token. In float32 it
            changes no token.
        max_num_seqs: the most completions decoded at once.
        prefix_cache_tokens: tokens of finished requests to keep for prompts that begin alike; 0 for none. Models that were lent
            are not kept for, for their owners may train them.
        date: what chat templates that write the date take for today, `YYYY-MM-DD`; None takes the clock's.
        warps: `proposal_temperature`, `proposal_top_k`, `proposal_top_p`, `aligner_temperature`: as `rule` and `weight`.
    """

    def __init__(
        self,
        proposal: LanguageModel,
        aligners: Sequence[LanguageModel] = (),
        tokenizer: Any = None,
        eos_token_ids: Sequence[int] = (),
        *,
        manifests: Sequence[Manifest | None] | None = None,
        rule: str | Rule | None = None,
        weight: float | Sequence[float] | None = None,
        draft: str | LanguageModel | Drafter | None = None,
        draft_temperature: float | None = None,
        num_speculative_tokens: int | None = None,
        max_num_seqs: int = 32,
        prefix_cache_tokens: int = PREFIX_CACHE_TOKENS,
        date: str | None = None,
        handover: str | Rule | None = None,
        **warps: Unpack[WarpSettings],
    ) -> None:
        if unknown := warps.keys() - WarpSettings.__annotations__.keys():
            raise TypeError(f"AlignedModel() got an unexpected keyword argument '{min(unknown)}'")
        if not isinstance(max_num_seqs, int) or max_num_seqs < 1:
            raise InvalidOption(f"max_num_seqs must be an integer of at least 1, not {max_num_seqs!r}")
        for token in eos_token_ids:
            if not isinstance(token, int) or not 0 <= token < proposal.vocab_size:
                raise InvalidOption(f"eos_token_ids must be ids from 0 to {proposal.vocab_size - 1}, not {token!r}")
        self.proposal, self.tokenizer = proposal, tokenizer
        self._draft = as_drafter(draft, Given(tokenizer))
        self._take(aligners, manifests)
        self.eos_token_ids = tuple(eos_token_ids)
        self.max_num_seqs = max_num_seqs
        self.prefixes = Prefixes(prefix_cache_tokens)
        self.encoder = Encoder(tokenizer, proposal.vocab_size, self.eos_token_ids, date)
        self.pace = Pace(num_speculative_tokens)
        check_number("draft_temperature", 1.0 if draft_temperature is None else draft_temperature, above=0)
        self._draft_temperature = draft_temperature
        self.defaults = SamplingParams(
            rule=None if rule is None else parse_rule(rule), weight=weight, handover=handover, **warps
        )
        self.models_of(self.shaping(self.defaults))  # contradictions show now, not with the first request

    @classmethod
    def from_pretrained(
        cls,
        proposal: Any,
        aligner: AlignerLike | Sequence[AlignerLike] | None = None,
        *,
        rule: str | Rule | None = None,
        weight: float | Sequence[float] | None = None,
        tokenizer: Any = None,
        eos_token_ids: Sequence[int] | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        revision: str | None = None,
        draft: Any = None,
        cuda_graphs: bool | None = None,
        quantize: str | None = None,
        aligner_dtype: str | torch.dtype | None = None,
        backend: str | None = None,
        **settings: Unpack[ModelSettings],
    ) -> Self:
        """Load a proposal and its aligners.

        Args:
            proposal: a folder, a hub id, a loaded transformers model, or any `LanguageModel`.
            aligner: one of the same, an `Aligner`, a list of them, or None for the bare proposal. A folder may be an
                aligner's, a plain transformers model's or a PEFT adapter's.
            rule: decoding rule; default: what the manifests say, or `product`.
            weight: λ, or one for each aligner; default: what the manifests say, or the rule's own.
            tokenizer: a tokenizer or where to load it; default: the proposal's. Loaded models have none of their own:
                give it, or work with token ids.
            eos_token_ids: default: those of the proposal's generation config and of the tokenizer.
            dtype: of what is loaded here: a torch dtype, its name, or `"auto"` for the checkpoint's own.
            device: where to put what is loaded here; default: the first GPU, or the CPU.
            revision: hub revision of the proposal.
            draft: as for `AlignedModel`, or a model to load: a folder, a hub id, an `Aligner`, a transformers model.
            cuda_graphs: replay short passes of what is loaded here as CUDA graphs, adapters on a shared base apart; default: on
                one GPU, where a model has a lean pass. See docs/decoding.md.
            quantize: `"int8"` keeps the weights of what is loaded here in 8 bits, on a CPU; see docs/models.md.
            aligner_dtype: of the aligners and drafters that are loaded here; default: `dtype`. Heads, and their drafters, have
                the proposal's.
            backend: `"llamacpp"` lets llama.cpp run GGUF files, as they are; default: torch. See docs/models.md.
            settings: the further arguments of `AlignedModel`: `proposal_temperature`, `max_num_seqs`, …

        Raises:
            ModelError: something cannot be loaded, see `trimtab.errors`.
            VocabularyMismatch: an aligner's tokenizer is not the proposal's.
        """
        if unknown := settings.keys() - ModelSettings.__annotations__.keys():
            raise InvalidOption(f"from_pretrained: there is no option '{min(unknown)}'")
        how: dict[str, Any] = {
            "dtype": dtype,
            "device": device,
            "revision": revision,
            "cuda_graphs": cuda_graphs,
            "quantize": quantize,
            "aligner_dtype": aligner_dtype,
            "backend": backend,
        }
        parts = load_parts(proposal, aligner, draft, tokenizer, eos_token_ids, **how)
        models = parts.proposal, parts.aligners, parts.tokenizer, parts.eos_token_ids
        return cls(*models, manifests=parts.manifests, rule=rule, weight=weight, draft=parts.draft, **settings)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        sequence_level: str | SequenceLevel | None = None,
    ) -> list[Completion]:
        """Complete prompts.

        A completion that cannot go on, because a distribution is NaN or has no mass, ends with the `finish_reason` `"error"`
        and says why in `error`; the others are what they would be without it.

        Args:
            prompts: texts, chat message lists or id lists, of any lengths; or just one of them.
            params: one for all prompts, or a list with one for each.
            sequence_level: `"particles=16"`: draw each completion from the sequence-level law, by a run of sequential Monte
                Carlo of its own; its `particles` are the run's weighted set. See docs/sequence-level.md.

        Returns:
            A flat list in the order of the prompts, with `n` consecutive completions for each.

        Raises:
            InvalidRequest: a prompt or parameter cannot be decoded; nothing has been computed then.
        """
        sequences = self._sequences(prompts, params)
        if sequence_level is not None:
            return sample_sequences(sequences, parse_sequence_level(sequence_level), self.prefixes, self.max_num_seqs)
        done = {(e.prompt_index, e.index): e.completion for e in self.engine().run(sequences) if e.completion is not None}
        return [done[s.prompt_index, s.index] for s in sequences]

    def stream(
        self, prompts: Prompt | Iterable[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[TokenEvent]:
        """Complete a prompt, or several at once, yielding an event for each token as soon as it is drawn.

        The arguments and the tokens are those of `generate`. Closing the iterator stops the work.
        """
        sequences = self._sequences(prompts, params)
        return self.engine().run(sequences)

    def score(
        self,
        prompts: Prompt | Iterable[Prompt],
        completions: Any,
        params: SamplingParams | None = None,
    ) -> list[Score]:
        """The exact log-probability of each token of given completions under proposal, aligners and aligned model.

        Args:
            prompts: as in `generate`.
            completions: one for each prompt: a text or a message, to which the end of sequence is added and counted, or
                token ids, which are scored as they are.
            params: `rule`, `weight` and the warps of the rule's inputs are taken from it; sampling knobs play no part.

        Raises:
            InvalidRequest: a pair cannot be scored; nothing has been computed then.
            InvalidOption: the rule has no closed form.
            DeadRow: a distribution on the way is NaN or has no mass, so that there is nothing to score with.
        """
        if params is not None:
            check_params(params)
        pairs = self.encode_pairs(prompts, completions)
        shaping = self.shaping(params or self.defaults)
        scores: dict[int, Score] = {}
        for batch in by_length([len(prompt) + len(completion) for prompt, completion, _ in pairs], self.max_num_seqs):
            ids = [pairs[i][:2] for i in batch]
            rows = score_tokens(self.proposal, self.aligners_of(shaping), shaping, ids, batch)
            for i, row in zip(batch, rows, strict=True):
                scores[i] = dataclasses.replace(row, num_bytes=pairs[i][2])
        return [scores[i] for i in range(len(pairs))]

    def encode_pairs(
        self, prompts: Prompt | Iterable[Prompt], completions: Any
    ) -> list[tuple[list[int], list[int], int | None]]:
        """Ids of prompts and completions as `score` takes them, and each completion's length in bytes if it is a text.

        Raises:
            InvalidRequest: a pair cannot be scored.
        """
        return [self._pair(i, prompt, answer) for i, (prompt, answer) in enumerate(as_pairs(prompts, completions))]

    def with_draft_length(self, num_speculative_tokens: int | None) -> Self:
        """The same models and settings with another draft length, and with nothing learned about speed yet."""
        return self._with(pace=Pace(num_speculative_tokens))

    def with_drafter(self, draft: LanguageModel | Drafter | str) -> Self:
        """The same models with another drafter, also where one was named before; nothing is loaded or copied."""
        return self._with(_draft=None).with_aligners(self.aligners, self._manifests, draft)

    def with_prefix_cache(self, prefix_cache_tokens: int) -> Self:
        """The same models and settings with another cache of prefixes, which is empty."""
        return self._with(prefixes=Prefixes(prefix_cache_tokens))

    def with_aligners(
        self,
        aligners: Sequence[LanguageModel],
        manifests: Sequence[Manifest | None] | None = None,
        draft: LanguageModel | Drafter | str | None = None,
    ) -> Self:
        """The same proposal and settings with other aligners; nothing is loaded or copied.

        Whatever their manifests disagree about, each request must say. A model that drafts goes on drafting; `draft` is one
        that drafts where nobody was named.
        """
        other = self._with(_draft=as_drafter(draft, Given(self.tokenizer)) if self._draft is None else self._draft)
        other._take(aligners, manifests)
        return other

    def _with(self, **changes: Any) -> Self:
        vars(other := copy.copy(self)).update(changes)
        return other

    def _take(self, aligners: Sequence[LanguageModel], manifests: Sequence[Manifest | None] | None) -> None:
        self.aligners = list(aligners)
        self._manifests = list(manifests) if manifests is not None else [None] * len(self.aligners)
        residual = bool(self._manifests) and self._manifests[0] is not None and self._manifests[0].is_residual
        choose = partial(choose_drafter, self.proposal, drafter=self._draft, residual=residual)
        self.models, self._blends = choose(aligners), Blends(self.aligners, choose)
        self.models.check_vocabulary()
        self.max_length = min((m.max_length for m in self.models.all if m.max_length is not None), default=None)

    def fits(self, prompt: Prompt, completion: Any) -> bool:
        """Whether a prompt with its completion is short enough for the context; None stands for one more token.

        Raises:
            InvalidRequest: it could not be scored at any length.
        """
        if self.max_length is None:
            return True
        if completion is None:
            return len(self.encoder.prompt(prompt)) < self.max_length
        return sum(map(len, self.encoder.pair(prompt, completion))) <= self.max_length

    def check_pair(self, prompt: Prompt, completion: Any) -> None:
        """Raise the `InvalidRequest` that `score` would raise for this pair, if any."""
        self._pair(0, prompt, completion)

    @property
    def fingerprints(self) -> list[str]:
        """What tells the proposal and the aligners from others."""
        return [fingerprint_of(part) for part in (self.proposal, *self.aligners)]

    @property
    def names_drafter(self) -> bool:
        """Whether it was said who drafts."""
        return self._draft is not None

    @property
    def drafter(self) -> str:
        """Who drafts, as far as it decides which tokens a seed gives: `"none"` for whoever looks drafts up, too."""
        return self.models.drafter.identity

    def shaping(self, params: SamplingParams) -> Shaping:
        """How a request's aligned row comes about, see `trimtab.decode.settings.settle`."""
        shaping = settle(params, self.defaults, self._manifests, self.eos_token_ids)
        temperature = self.models.drafter.temperature(shaping, self._draft_temperature)
        return dataclasses.replace(shaping, draft_temperature=temperature)

    def aligners_of(self, shaping: Shaping) -> Sequence[LanguageModel]:
        """What a request with this shaping reads beside the proposal: the aligners, or their blend."""
        return self.aligners if shaping.blend is None else [self._blends(shaping.blend)[0]]

    def models_of(self, shaping: Shaping) -> Models:
        """All that is run for a request with this shaping."""
        return self.models if shaping.blend is None else self._blends(shaping.blend)[1]

    def _sequences(
        self, prompts: Prompt | Iterable[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Growing]:
        asked = enumerate(with_params(as_list(prompts), params))
        return [sequence for i, (item, p) in asked for sequence in self.prepare(item, p, i)]

    def prepare(self, prompt: Prompt, params: SamplingParams, i: int = 0, name: str | None = None) -> list[Growing]:
        """The `n` sequences of one request, checked, for an `Engine` over the same proposal.

        Args:
            prompt: a text, chat messages or ids.
            params: what is asked for.
            i: the prompt's number, which its events carry.
            name: what errors call the prompt; default: `prompts[i]`.

        Raises:
            InvalidRequest: the prompt or a parameter cannot be decoded.
        """
        name = name or f"prompts[{i}]"
        ids = self.encoder.prompt(prompt, name)
        limit = params.max_tokens
        if self.max_length is not None:
            if len(ids) >= self.max_length:
                room = f"the context holds {self.max_length} with at least one new one"
                raise InvalidRequest(f"{name} has {len(ids)} tokens, but {room}: shorten it")
            limit = min(limit, self.max_length - len(ids))
        check_against(params, self.proposal.vocab_size, has_tokenizer=self.tokenizer is not None)
        shaping = self.shaping(params)
        if not shaping.rule.has_row:
            refuse_row_settings(params, f"acts on the aligned row, which rule '{shaping.rule}' does not have")
        seeded = dataclasses.replace(params, seed=fresh_seed() if params.seed is None else params.seed)
        how = (self.models_of(shaping), seeded, shaping, limit, self.eos_token_ids, self.tokenizer)
        return [Growing(i, index, ids, *how, answers=is_chat(prompt)) for index in range(params.n)]

    def engine(self) -> Engine:
        """One to decode what `prepare` makes."""
        return Engine(self.proposal, self.pace, max_num_seqs=self.max_num_seqs, prefixes=self.prefixes)

    def _pair(self, i: int, item: Prompt, answer: Any) -> tuple[list[int], list[int], int | None]:
        """Ids of a prompt and its completion, and the completion's length in bytes."""
        prompt, completion = self.encoder.pair(item, answer, (f"prompts[{i}]", f"completions[{i}]"))
        num_bytes = None
        if not are_ids(answer):
            text = self.tokenizer.decode(completion, skip_special_tokens=True) if not isinstance(answer, str) else answer
            num_bytes = len(text.encode(errors="replace"))
        if self.max_length is not None and len(prompt) + len(completion) > self.max_length:
            total = f"{len(prompt)} + {len(completion)} tokens"
            raise InvalidRequest(f"prompts[{i}] and completions[{i}] have {total}, but the context holds {self.max_length}")
        return prompt, completion, num_bytes

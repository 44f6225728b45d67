"""The proposal's rows from vLLM: `prompt_logprobs` of `/v1/completions`, for a proposal that is too large to run here.

Each token position of a prompt comes with its k best tokens and the token that stands there, at temperature 1. That is what a
cache keeps, but for the tail, which is what is left of 1, and whose tokens are not known: it can only be spread evenly. With
every entry asked for (k = −1) the rows are exact, and may be given another temperature; without, what the cache loses cannot be
measured.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trimtab.core.logprobs import Warp, warp
from trimtab.data.examples import Example
from trimtab.endpoints.client import Endpoints
from trimtab.endpoints.settings import Limits
from trimtab.errors import EndpointError, InvalidOption
from trimtab.train.rows import CachedRows, Compressed, Layout, compress

__all__ = ["EndpointRows"]

IMPOSSIBLE = -9999.0
"""What vLLM says for −inf, which JSON has not."""

RESOLUTION = 2.0**-23
"""How far from 1 the sum of a row may be that was normalised in float32: what is left of 1 is not known more closely."""

ADVICE = {
    "logprobs": "--cache_top_k asks for {}; vLLM gives no more than it was started with as --max-logprobs, of which -1 is all",
    "context length": "--max_length must be below what the server holds",
    "max_tokens": "--max_length must be below what the server holds",  # of which nothing is left for the one token
}
"""What to say to a refusal with these words."""


class EndpointRows:
    """The rows of a proposal behind vLLM endpoints.

    Args:
        urls: where they are.
        limits: how much to ask of each.
        proposal: which model they are said to serve; asked for under this name if they list it, else under their first.
        vocab_size: V, of the tokenizer: a model may have more columns.
    """

    def __init__(self, urls: Sequence[str], limits: Limits, proposal: str, vocab_size: int) -> None:
        self._urls, self._limits, self._proposal, self.vocab_size = urls, limits, proposal, vocab_size
        self.fingerprint = f"endpoint:{proposal}"
        self._name = ""

    def who(self) -> str:
        """The name under which the model is served."""
        if not self._name:
            with Endpoints(self._urls, self._limits) as endpoints:
                self._name = str(endpoints.pick_model(self._proposal)["id"])
        return self._name

    def compress(self, examples: Sequence[Example], layout: Layout, temperature: float) -> Compressed:
        """The rows of the examples; their error is 0 where every entry is kept, and unknown else.

        Raises:
            InvalidOption: draws from the tail; or a temperature, which needs every entry.
            EndpointError: a request is refused, or no endpoint answers.
        """
        if layout.samples:
            raise InvalidOption("an endpoint does not say what is in the tail of its rows: nothing can be drawn from it")
        top_k = layout.top_k
        whole = top_k == self.vocab_size
        if temperature != 1 and not whole:
            raise InvalidOption("rows from an endpoint have proposal_temperature 1, unless every entry is kept (cache_top_k 0)")
        read = partial(_exact, self.vocab_size, temperature) if whole else partial(_best, self.vocab_size, top_k)
        name = self.who()

        def make(example: Example) -> tuple[str, dict[str, Any]]:
            prompt = [*example.prompt, *example.chosen]
            return "/v1/completions", {
                "model": name, "prompt": prompt, "max_tokens": 1, "prompt_logprobs": -1 if whole else top_k
            }  # fmt: skip

        def read_rows(example: Example, answer: Any) -> CachedRows:
            return read(torch.tensor(example.chosen), _entries(example, answer))

        try:
            with Endpoints(self._urls, self._limits) as endpoints:
                rows = [row for some in endpoints.map(examples, make, read_rows) for row in some]
        except EndpointError as error:
            advice = [text for words, text in ADVICE.items() if error.status == 400 and words in str(error).lower()]
            if not advice:
                raise
            raise EndpointError(f"{error} ({advice[0].format('all' if whole else top_k)})") from None
        return Compressed(rows, torch.full((4,), 0.0 if whole else math.nan, dtype=torch.float64))


def _entries(example: Example, answer: Any) -> list[dict[int, float]]:
    """For each token of the wanted answer: the log-probabilities by token id."""
    choice = answer["choices"][0]
    if choice.get("prompt_logprobs") is None:
        raise EndpointError("the endpoint answers without prompt_logprobs: it must be vLLM")
    positions: list[Mapping[str, Any]] = choice["prompt_logprobs"]
    if len(positions) != len(example.prompt) + len(example.chosen):
        raise ValueError(f"prompt_logprobs of {len(positions)} tokens for {len(example.prompt) + len(example.chosen)}")
    entries = [
        {int(token): float(entry["logprob"]) for token, entry in position.items()}
        for position in positions[len(example.prompt) :]
    ]
    for token, entry in zip(example.chosen, entries, strict=True):
        if token not in entry or any(math.isnan(value) for value in entry.values()):
            raise ValueError("prompt_logprobs with NaN" if token in entry else f"prompt_logprobs without token {token}")
    return entries


def _best(vocab_size: int, top_k: int, tokens: Tensor, entries: list[dict[int, float]]) -> CachedRows:
    """From the k best and the token's own entry, which may be one of them."""
    if any(len(entry) not in (top_k, top_k + 1) for entry in entries):
        raise ValueError(f"prompt_logprobs {top_k} with {sorted({len(entry) for entry in entries})} entries")
    strange = max(max(entry) for entry in entries)
    if strange >= vocab_size:
        raise EndpointError(
            f"the endpoint's model finds token {strange} likely, but the tokenizer ends at {vocab_size - 1}: is it another "
            "model's? If not, keep every entry with --cache_top_k 0"
        )
    logp = torch.full((len(entries), top_k + 1), -math.inf, dtype=torch.float64)
    ids = torch.zeros((len(entries), top_k + 1), dtype=torch.int32)
    for row, (token, entry) in enumerate(zip(tokens.tolist(), entries, strict=True)):
        names = [*(name for name in entry if name != token), token]  # among equals, the token's own entry goes last
        ids[row, : len(names)] = torch.tensor(names)
        logp[row, : len(names)] = torch.tensor([entry[name] for name in names], dtype=torch.float64)
    logp = torch.where(logp <= IMPOSSIBLE, -math.inf, logp)
    token_logp = logp.masked_fill(ids != tokens.unsqueeze(-1), -math.inf).amax(-1)
    listed = torch.tensor([len(entry) for entry in entries])
    order = logp.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    best = logp.gather(-1, order)
    left = (-torch.expm1(logp.logsumexp(-1))).clamp(min=RESOLUTION)
    at_most = (vocab_size - listed) * best[:, -1].exp()  # none of the others is likelier than the last of the best
    tail = torch.minimum(left, at_most).log()
    kept = ids.gather(-1, order)
    return CachedRows(kept, best.float(), tokens.int(), token_logp.float(), tail.float(), kept[:, :0])


def _exact(vocab_size: int, temperature: float, tokens: Tensor, entries: list[dict[int, float]]) -> CachedRows:
    """From every entry; the model's padding, beyond the tokenizer's ids, is left out, as it is of a model that runs here."""
    if any(len(entry) < vocab_size or not all(token in entry for token in range(vocab_size)) for entry in entries):
        raise ValueError("prompt_logprobs -1 with fewer entries than tokens")
    logp = torch.tensor([[entry[token] for token in range(vocab_size)] for entry in entries], dtype=torch.float64)
    rows = torch.where(logp <= IMPOSSIBLE, -math.inf, logp).log_softmax(-1).float()
    return compress(warp(rows, Warp(temperature)), tokens, vocab_size)

"""What gates may go by at every token of given answers, and what the aligner is worth there: one scoring pass gives all.

Columns hold a number for each token:

prompt     which prompt it answers: answers to one prompt are resampled together
position   how many tokens of the answer come before it
proposal, rule, other
           log-probability of the token under p̃ alone, under the rule, and under the rule with another aligner, if there is one
kl         from p̃ to what the aligner says, which is what `gate(by=kl)` goes by: it saves no call, for it asks the aligner
entropy, best, margin, end
           of p̃'s row: its entropy, its largest log-probability, by how much that is above the second largest, and
           the log-probability of an end of sequence
"""

from collections.abc import Sequence

import torch
from chats import Record
from rivals import wanted
from torch import Tensor

from trimtab.core.logprobs import entropy, gather, kl_divergence, log_normalize
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.scoring import Following, by_length, completion_rows

__all__ = ["ROW", "Columns", "of_row", "read_columns"]

Columns = dict[str, list[float]]

ROW = ("entropy", "best", "margin", "end")
"""What `of_row` says."""


def read_columns(model: AlignedModel, other: AlignedModel | None, records: Sequence[Record]) -> Columns:
    """The columns of the wanted answers, in the order of the records.

    Args:
        model: the proposal and one aligner, with its rule and weight.
        other: the same proposal with another aligner, or None.
        records: prompts and wanted answers.
    """
    models = [model] if other is None else [model, other]
    shaping = model.shaping(model.defaults)
    weights = torch.tensor(shaping.weights, device=model.proposal.device)
    chats, answers = [record["prompt"] for record in records], [wanted(record)[0] for record in records]
    pairs = [(prompt, answer) for prompt, answer, _ in model.encode_pairs(chats, answers)]
    found: list[list[list[float]]] = [[] for _ in pairs]
    for batch in by_length([len(prompt) + len(answer) for prompt, answer in pairs], model.max_num_seqs):
        members = [pairs[i] for i in batch]
        following = [Following(one.shaping(one.defaults), [p for p, _ in members], one.proposal.device) for one in models]
        readers = [model.proposal, *(one.aligners[0] for one in models)]
        for rows, tokens, counts in completion_rows(readers, members):
            aligned = [one.align([rows[0], row], tokens, counts) for one, row in zip(following, rows[1:], strict=True)]
            logp, logqs = aligned[0].inputs
            kl = kl_divergence(logp, log_normalize(shaping.rule.together(logqs, weights.to(logp.dtype))))
            says = [gather(row, tokens) for row in (logp, *(one.target for one in aligned))]
            values = torch.stack([kl, *of_row(logp, model.eos_token_ids), *says], dim=-1).tolist()
            for place, count, of_tokens in zip(batch, counts, values, strict=True):
                found[place] += of_tokens[:count]
    prompts = {text: i for i, text in enumerate(dict.fromkeys(map(str, chats)))}
    names = ["kl", *ROW, "proposal", "rule", *["other"] * (other is not None)]
    tokens_of = [(prompts[str(chat)], position, token) for chat, answer in zip(chats, found, strict=True)
                 for position, token in enumerate(answer)]  # fmt: skip
    columns = {name: [token[i] for _, _, token in tokens_of] for i, name in enumerate(names)}
    return columns | {"prompt": [p for p, _, _ in tokens_of], "position": [at for _, at, _ in tokens_of]}


def of_row(logp: Tensor, ends: Sequence[int]) -> list[Tensor]:
    """What rows `[..., V]` of p̃ say by themselves, each `[...]`: `ROW`."""
    first, second = logp.topk(2, dim=-1).values.unbind(-1)
    return [entropy(logp), first, first - second, logp[..., list(ends)].logsumexp(-1)]

"""Whether two models speak the same vocabulary.

The product of two next-token distributions means something only if token i is the same token in both. So we compare what
the tokenizers say, never the shapes of embedding matrices: those are padded, and differently (Qwen2.5 has 151,936 columns in
small models and 152,064 in large ones).
"""

import hashlib
from typing import Any

from trimtab.errors import VocabularyMismatch

__all__ = ["check_same_vocabulary", "find_eos_token_ids", "fingerprint_vocabulary", "vocabulary_size"]


def vocabulary_size(tokenizer: Any) -> int:
    """V: one more than the largest id that the tokenizer knows, added tokens included."""
    return int(max(tokenizer.get_vocab().values())) + 1


def fingerprint_vocabulary(tokenizer: Any) -> str:
    """`sha256:…` over the map from ids to tokens."""
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{index}\t{token}\n".encode(errors="surrogatepass"))
    return f"sha256:{digest.hexdigest()}"


def check_same_vocabulary(proposal: Any, aligner: Any, name: str) -> None:
    """Refuse an aligner whose tokenizer maps some token to another id than the proposal's.

    Args:
        proposal: the proposal's tokenizer.
        aligner: the aligner's tokenizer.
        name: what to call the aligner in the message.

    Raises:
        VocabularyMismatch: names the first token on which they differ.
    """
    if fingerprint_vocabulary(proposal) == fingerprint_vocabulary(aligner):
        return
    ours, theirs = proposal.get_vocab(), aligner.get_vocab()
    differing = sorted(ours.items() ^ theirs.items(), key=lambda item: (item[1], item[0]))
    token = differing[0][0]
    raise VocabularyMismatch(
        f"the aligner '{name}' does not share the proposal's vocabulary: token {token!r} is id {theirs.get(token, 'missing')} "
        f"in the aligner ({len(theirs)} tokens) and {ours.get(token, 'missing')} in the proposal ({len(ours)} tokens); "
        "train the aligner from a model of the same tokenizer family; or let it begin answers as texts, "
        "trimtab generate --leader"
    )


def find_eos_token_ids(proposal: Any, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end a completion: the tokenizer's own first, then those that the model names, or its generation config."""
    found = [getattr(tokenizer, "eos_token_id", None), *getattr(proposal, "eos_token_ids", ())]
    for config in (getattr(proposal, "generation_config", None), getattr(proposal, "config", None)):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            found += ids if isinstance(ids, (list, tuple)) else [ids]
            break
    return tuple(dict.fromkeys(token for token in found if token is not None))

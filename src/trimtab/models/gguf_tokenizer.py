"""The tokenizer in a GGUF file, as a transformers tokenizer.

A GGUF file holds the vocabulary, and names how a text is cut before merges are applied (`tokenizer.ggml.pre`). The names whose
rule we know are here. Others are refused: a guess would read texts as other tokens than the model was trained with.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from trimtab.errors import UnsupportedModel

__all__ = ["read_tokenizer"]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _CONTRACTIONS + r"|\p{N}{1,3}" + _REST
QWEN2 = _CONTRACTIONS + r"|\p{N}" + _REST

SPLITS: Mapping[str, str] = {"llama-bpe": LLAMA3, "llama3": LLAMA3, "qwen2": QWEN2}
"""Names of rules that are a regular expression."""
GPT2 = ("gpt-2", "default")
DIGITS = ("smollm",)
"""GPT-2's, behind a cut around every digit."""
CONTROL, USER_DEFINED, BYTE = 3, 4, 6
"""Kinds of tokens: special ones, added ones that are not special, and single bytes."""


def read_tokenizer(fields: Mapping[str, Any], source: str) -> Any:
    """A `PreTrainedTokenizerFast` with the file's special tokens and chat template.

    Args:
        fields: the file's metadata.
        source: what errors call the file.

    Raises:
        UnsupportedModel: the file has another kind of tokenizer than byte-level BPE and SentencePiece's BPE, or a rule that is
            not known here.
    """
    from transformers import PreTrainedTokenizerFast

    kind = fields.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModel(f"'{source}' has a tokenizer of kind '{kind}'; gpt2 and llama can be read")
    tokens = list(fields["tokenizer.ggml.tokens"])
    kinds = list(fields.get("tokenizer.ggml.token_type") or [1] * len(tokens))
    tokenizer = _byte_level(fields, tokens, source) if kind == "gpt2" else _sentence_piece(fields, tokens, kinds)
    added = [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    names = {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if fields.get(f"tokenizer.ggml.{key}_token_id") is not None
    }
    starts = fields.get("tokenizer.ggml.add_bos_token")
    if starts is None:
        starts = kind == "llama" or fields.get("tokenizer.ggml.pre") in ("llama-bpe", "llama3")
    if starts and "bos_token" in names:
        bos, place = names["bos_token"], fields["tokenizer.ggml.bos_token_id"]
        start = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, place)])
        bytes_too = [processors.ByteLevel(trim_offsets=False)] if kind == "gpt2" else []
        tokenizer.post_processor = processors.Sequence([*bytes_too, start])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **names,
    )


def _byte_level(fields: Mapping[str, Any], tokens: list[str], source: str) -> Tokenizer:
    """GPT-2's kind: every byte is a token."""
    rule = fields.get("tokenizer.ggml.pre", "default")
    if rule not in (*SPLITS, *GPT2, *DIGITS):
        known = ", ".join((*SPLITS, *GPT2, *DIGITS))
        raise UnsupportedModel(f"'{source}' cuts texts by the rule '{rule}', which is not known here; known are {known}")
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=rule in ("llama-bpe", "llama3")))
    if rule in SPLITS:
        cuts = [pre_tokenizers.Split(Regex(SPLITS[rule]), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    else:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if rule in DIGITS else []
        cuts = [*digits, pre_tokenizers.ByteLevel(False, use_regex=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer.normalizer = normalizers.NFC() if rule == "qwen2" else None
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(fields: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> Tokenizer:
    """SentencePiece's BPE, which merges the two neighbours whose union has the best score."""
    scores = list(fields["tokenizer.ggml.scores"])
    vocab = {token: i for i, token in enumerate(tokens)}
    plain = [i for i, kind in enumerate(kinds) if kind not in (CONTROL, USER_DEFINED, BYTE)]
    merges = []
    for place in sorted(plain, key=lambda i: (-scores[i], i)):
        token = tokens[place]
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(left, right) for left, right in halves if left in vocab and right in vocab]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    unknown = fields.get("tokenizer.ggml.unknown_token_id")
    unk = None if unknown is None else tokens[unknown]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=BYTE in kinds))
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return tokenizer

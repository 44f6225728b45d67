"""Small tokenizers of every kind, trained on a few texts. They differ in where spaces go and in what stands around a text."""

import json
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

TEXTS = [
    "The capital of France is Paris. The capital of Italy is Rome.",
    "User: what is it?\nAssistant: it is the word 42, and a naïve café in 北京",
    "def read(path):\n    return open(path)\n",
]
SPECIAL = ["<unk>", "<s>", "</s>"]
UNK, BOS, EOS = range(3)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""As Mistral's: the answer follows without a space."""
LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
STRIPPING = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def _wrap(tokenizer: Tokenizer, *, eos: bool = False) -> PreTrainedTokenizerFast:
    end = " </s>" if eos else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<s> $A{end}", pair=f"<s> $A{end} $B", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **names)


def _bpe(merges: int = 80, **parts: Any) -> Tokenizer:
    """BPE with byte fallback, as SentencePiece's; `parts` are set before it is trained."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 60 + merges, special_tokens=special, limit_alphabet=60, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    trained = json.loads(tokenizer.to_str())["model"]  # the bytes were special for the trainer alone
    merges = [tuple(merge) for merge in trained["merges"]]
    plain = Tokenizer(models.BPE(trained["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    for name, part in parts.items():
        setattr(plain, name, part)
    plain.add_special_tokens(SPECIAL)
    return plain


def byte_level(**how: Any) -> PreTrainedTokenizerFast:
    """GPT-2's, Llama-3's, Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL) + 256 + 80, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _wrap(tokenizer, **how)


def metaspace(scheme: str, split: bool = True, **how: Any) -> PreTrainedTokenizerFast:
    """SentencePiece's, where spaces become ▁; `scheme` says where one is put before a text."""
    tokenizer = _bpe(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    tokenizer.decoder = decoders.Sequence(STRIPPING) if scheme != "never" else decoders.Sequence(STRIPPING[:3])
    return _wrap(tokenizer, **how)


def legacy(**how: Any) -> PreTrainedTokenizerFast:
    """Llama-2's tokenizer.json: a normaliser writes ▁ before every stretch of text, also behind a special token."""
    tokenizer = _bpe(normalizer=LEGACY, pre_tokenizer=pre_tokenizers.Split("▁", "merged_with_next"))
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(STRIPPING)
    return _wrap(tokenizer, **how)


def llama(is_legacy: bool) -> Any:
    """transformers' own class, `legacy` both ways."""
    trained = json.loads(_bpe(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first")).to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    return LlamaTokenizer(vocab=trained["vocab"], merges=merges, legacy=is_legacy, chat_template=TEMPLATE)


def word_piece(**how: Any) -> PreTrainedTokenizerFast:
    """BERT's, which drops spaces."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False))
    return _wrap(tokenizer, **how)


def unigram(**how: Any) -> PreTrainedTokenizerFast:
    """SentencePiece's other model: the whole decides where each word is cut."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _wrap(tokenizer, **how)


KINDS: dict[str, Callable[[], Any]] = {
    "byte level": byte_level,
    "metaspace always": lambda: metaspace("always"),
    "metaspace first": lambda: metaspace("first"),
    "metaspace first, whole": lambda: metaspace("first", split=False),
    "metaspace never": lambda: metaspace("never"),
    "prepend normaliser": legacy,
    "llama legacy": lambda: llama(True),
    "llama": lambda: llama(False),
    "word piece": word_piece,
    "unigram": unigram,
}
ENDING: dict[str, Callable[[], Any]] = {
    "byte level": lambda: byte_level(eos=True),
    "metaspace": lambda: metaspace("first", eos=True),
    "prepend normaliser": lambda: legacy(eos=True),
    "word piece": lambda: word_piece(eos=True),
}
"""Tokenizers that put an end of sequence behind every text."""

"""Small tokenizers of every kind: byte-level, SentencePiece in its spellings, WordPiece, and words that end in a mark."""

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tiny import bpe_tokenizer

TEXT = "the cat sat on the mat, the café in 北京 and the 🙂."
SPECIAL = "<|end|>"
"""A special token of all of them; `<|user|>` is an added one that is not special."""

CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}</s>{% endfor %}"
_WORDS = ["the", "cat", "sat", "on", "mat", "and", "in"]
_LETTERS = list("abcdefghijklmnopqrstuvwxyz,.\né")


def _finish(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE)
    fast.add_tokens(
        [AddedToken(SPECIAL, special=True, normalized=False), AddedToken("<|user|>", special=False, normalized=False)]
    )
    return fast


def _pieces(bytes_too: bool) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary with ▁ for spaces, and the merges that its words need."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256) if bytes_too), "▁", *_LETTERS]
    merges = []
    for word in _WORDS:
        piece = "▁"
        for letter in word:
            merges.append((piece, letter))
            piece += letter
            tokens.append(piece)
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return vocab, list(dict.fromkeys(merges))


def _sentencepiece(decoder: Any, *, normalizer: Any = None, pre_tokenizer: Any = None) -> PreTrainedTokenizerFast:
    vocab, merges = _pieces(bytes_too=True)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    return _finish(tokenizer)


def _llama_decoder() -> Any:
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])


def llama_legacy() -> PreTrainedTokenizerFast:
    """Llama 2 as it was converted first: a `Prepend` normaliser, and a decoder that strips one space."""
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    return _sentencepiece(_llama_decoder(), normalizer=normalizers.Sequence(steps))


def llama() -> PreTrainedTokenizerFast:
    """Llama 2, Mistral and TinyLlama as they are converted now."""
    return _sentencepiece(_llama_decoder(), pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False))


def gemma() -> PreTrainedTokenizerFast:
    """Nothing is prepended, and nothing stripped."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return _sentencepiece(decoders.Sequence(steps), normalizer=normalizers.Replace(" ", "▁"))


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    """A `Metaspace` decoder behind byte fallback, with this `prepend_scheme`."""
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    return _sentencepiece(decoder, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False))


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's: `##` goes on with a word, and other tokens begin with a space."""
    tokens = ["<unk>", "<s>", "</s>", *_WORDS, *_LETTERS, *(f"##{letter}" for letter in _LETTERS)]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _finish(tokenizer)


def word_ends() -> PreTrainedTokenizerFast:
    """GPT-1's: `</w>` ends a word, and a space follows it unless the text ends."""
    tokens = ["<unk>", "<s>", "</s>", *_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder()
    return _finish(tokenizer)


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's, Llama 3's and Qwen's."""
    return _finish(bpe_tokenizer([TEXT] * 3).backend_tokenizer)


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_level": byte_level,
    "llama_legacy": llama_legacy,
    "llama": llama,
    "gemma": gemma,
    "metaspace_always": lambda: metaspace("always"),
    "metaspace_first": lambda: metaspace("first"),
    "metaspace_never": lambda: metaspace("never"),
    "wordpiece": wordpiece,
    "word_ends": word_ends,
}


def byte_tokens(tokenizer: PreTrainedTokenizerFast, raw: bytes) -> list[int]:
    """One token for each byte, in a vocabulary that has all of them."""
    names, letters = tokenizer.get_vocab(), bytes_to_unicode()
    return [names[f"<0x{byte:02X}>" if "<0x41>" in names else letters[byte]] for byte in raw]

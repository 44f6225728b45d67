"""How a tokenizer spells its tokens: their bytes where they have some of their own, else what they add to the text before.

A token of a byte-level vocabulary, and a byte that stands in for what a vocabulary lacks (`<0xE4>`), may be a part of a
character. Their bytes are taken as they are, and not from the tokenizer's decoder: that of byte fallback breaks a whole run of
bytes, though one alone is wrong. All other tokens are spelled by the decoder, after some of the tokens before them.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

__all__ = ["Spelling", "spelling_of"]

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class Spelling:
    """The texts of a vocabulary.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        kinds = set() if decoder is None else set(re.findall(r'"type":"(\w+)"', bytes(decoder.__getstate__()).decode()))
        self._byte_level = "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse", "Sequence"}
        self.opaque = not kinds or ("ByteLevel" in kinds and not self._byte_level)
        """Whether a token may be a part of a character though its bytes cannot be known."""
        self._added = frozenset(getattr(tokenizer, "added_tokens_decoder", ()))
        self._bytes: dict[int, bytes | None] = {}
        self._special: dict[int, bool] = {}

    def piece(self, token: int) -> str | None:
        """The token as the vocabulary has it; None if there is no such token."""
        piece: str | None = self._tokenizer.convert_ids_to_tokens(token)
        return piece

    def is_special(self, token: int) -> bool:
        """Whether the token is left out of texts."""
        if token not in self._special:
            twice = [token, token]  # the first of a text may lose a space that is all it is
            self._special[token] = self._decode(twice) == "" != self._decode(twice, special=True)
        return self._special[token]

    def bytes_of(self, token: int) -> bytes | None:
        """The token's bytes where they are its own; None where its text depends on what is before it."""
        if token not in self._bytes:
            self._bytes[token] = self._own_bytes(token)
        return self._bytes[token]

    def after(self, before: Sequence[int], tokens: Sequence[int], *, special: bool = False) -> str:
        """What tokens add to the text of those before them; with `special`, special tokens are written, too.

        Of `before`, the last with any text are enough: decoders treat a text's beginning apart, and look no further back.
        """
        start, known = len(before), ""
        while start and not known:
            start -= 1
            known = self._decode(before[start:])
        return self._decode([*before[start:], *tokens], special=special)[len(known) :]

    def written(self, before: Sequence[int], token: int) -> str:
        """What a token would add to the text if it were not left out."""
        text, piece = self.after(before, [token], special=True), self.piece(token)
        if piece is None or token not in self._added:
            return text
        return text[: len(text) - len(text.lstrip())] + piece  # a decoder may take it for bytes, or ▁ in it for a space

    def _own_bytes(self, token: int) -> bytes | None:
        piece = self.piece(token)
        if piece is None or self.opaque:
            return None
        if self._byte_level:
            plain = token in self._added or any(char not in _BYTE_OF for char in piece)
            return piece.encode() if plain else bytes(_BYTE_OF[char] for char in piece)
        byte = _BYTE.fullmatch(piece)
        return bytes.fromhex(byte[1]) if byte and self._decode([token]) != piece else None

    def _decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        settings = {"skip_special_tokens": not special, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(list(tokens), **settings))


spelling_of = functools.lru_cache(maxsize=8)(Spelling)
"""The spelling of a tokenizer, which all its texts share."""


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's alphabet for bytes: printable ones are themselves in Latin-1, and the rest are from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTE_OF = _bytes_of_characters()

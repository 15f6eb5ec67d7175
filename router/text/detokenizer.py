"""Turns a stream of token ids into text, and never splits a character.

Each step decodes only a window of the latest tokens. The new text is the window's text without the
part that was returned already. Replacement characters at the end are held back, because they may
become a character when the missing bytes arrive::

    window   t7 t8 t9 t10 t11      decode ->  " brown f\ufffd"
    returned   " brown"            new    ->         " f"     held -> "\ufffd"

All replacement characters at the end are held, not just one. If a run of byte tokens ends inside a
character, decoders with byte fallback (Llama 2, Gemma) write a replacement character for every byte
of the run, even for bytes whose characters were returned already.

A window that has become long is cut at the front, but only if the text of the shorter window has
the same end. A cut inside a character or inside a run of byte tokens may change the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"  # decoders write this for bytes that form no complete character
WINDOW_TOKENS = 24  # a longer window is cut
KEEP_TOKENS = 12  # the window's length after a cut
AGREE_CHARS = 4  # a cut is safe if this many characters before the held ones stay the same


class TokenDecoder(Protocol):
    """The part of ``tokenizers.Tokenizer`` that is needed here."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...


class IncrementalDetokenizer:
    """The text of one stream of tokens, without special tokens.

    The pieces that ``push`` and ``flush`` return add up to ``decode`` of all tokens.
    """

    def __init__(self, decoder: TokenDecoder) -> None:
        self._decoder = decoder
        self._window: list[int] = []
        self._returned_chars = 0  # how much of the window's text was returned
        self._window_limit = WINDOW_TOKENS

    def push(self, token_ids: Iterable[int]) -> str:
        """Add tokens and return the text that has become certain."""
        self._window.extend(token_ids)
        text = self._text(self._window)
        final_chars = len(text.rstrip(REPLACEMENT))
        new = text[self._returned_chars : final_chars]
        self._returned_chars = max(self._returned_chars, final_chars)
        if len(self._window) > self._window_limit:
            self._shorten(text)
        return new

    def flush(self) -> str:
        """Return the text that is held back. Call it after the last token."""
        rest = self._text(self._window)[self._returned_chars :]
        self._window.clear()
        self._returned_chars = 0
        return rest

    def _text(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(token_ids, skip_special_tokens=True)

    def _shorten(self, text: str) -> None:
        kept = self._window[-KEEP_TOKENS:]
        kept_text = self._text(kept)
        held_chars = len(text) - self._returned_chars
        equal_chars = AGREE_CHARS + held_chars
        # The kept text must be longer than the compared part, because the first kept character may
        # be incomplete or may lack the space before it.
        if len(kept_text) > equal_chars and kept_text[-equal_chars:] == text[-equal_chars:]:
            self._window = kept
            self._returned_chars = len(kept_text) - held_chars
            self._window_limit = WINDOW_TOKENS
        else:
            self._window_limit *= 2  # no safe cut yet; doubling keeps the cost of retries low

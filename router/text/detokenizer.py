"""Token ids to text, one token at a time, never splitting a character.

Only a window of the latest tokens is decoded at each step. Its text minus what was given
out already is new; replacement characters at the end are held back, for they may still turn
into a character when its other bytes arrive::

    window   t7 t8 t9 t10 t11      decode ->  " brown f\ufffd"
    given out  " brown"            new    ->         " f"     held -> "\ufffd"

The whole run of them is held, not one: decoders with byte fallback (Llama 2, Gemma) write
one for every byte of a run that is not complete, even for its characters given out before.

When the window gets long it is cut at the front, but only where the shorter window decodes
to the same end: a cut inside a character or inside a run of byte tokens would not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character (yet)
WINDOW_TOKENS = 24
KEEP_TOKENS = 12
AGREE_CHARS = 4  # characters that must be equal before the held ones for a cut to be safe


class TokenDecoder(Protocol):
    """The part of ``tokenizers.Tokenizer`` that is needed here."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...


class IncrementalDetokenizer:
    """Text of one stream of tokens; special tokens are skipped.

    The pieces returned, joined, equal ``decode`` of all tokens once ``flush`` was called.
    """

    def __init__(self, decoder: TokenDecoder) -> None:
        self._decoder = decoder
        self._window: list[int] = []
        self._given_chars = 0  # of the window's text
        self._window_limit = WINDOW_TOKENS

    def push(self, token_ids: Iterable[int]) -> str:
        """Add tokens; returns the text that is certain now."""
        self._window.extend(token_ids)
        text = self._text(self._window)
        final_chars = len(text.rstrip(REPLACEMENT))
        new = text[self._given_chars : final_chars]
        self._given_chars = max(self._given_chars, final_chars)
        if len(self._window) > self._window_limit:
            self._shorten(text)
        return new

    def flush(self) -> str:
        """The text held back; nothing more will come."""
        rest = self._text(self._window)[self._given_chars :]
        self._window.clear()
        self._given_chars = 0
        return rest

    def _text(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(token_ids, skip_special_tokens=True)

    def _shorten(self, text: str) -> None:
        kept = self._window[-KEEP_TOKENS:]
        kept_text = self._text(kept)
        held_chars = len(text) - self._given_chars
        equal_chars = AGREE_CHARS + held_chars
        # One more character than compared: the first may be half of one, or lack its space.
        if len(kept_text) > equal_chars and kept_text[-equal_chars:] == text[-equal_chars:]:
            self._window = kept
            self._given_chars = len(kept_text) - held_chars
            self._window_limit = WINDOW_TOKENS
        else:
            self._window_limit *= 2  # no safe cut here: look again later, at falling cost

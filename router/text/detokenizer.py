"""Turns a stream of token ids into text, and never splits a character.

Each step decodes only a window of the latest tokens. The new text is the window's text without the
part that was returned already. Replacement characters at the end are held back, because they may
become a character when the missing bytes arrive::

    window   t7 t8 t9 t10 t11      decode ->  " brown f\\ufffd"
    returned   " brown"            new    ->         " f"     held -> "\\ufffd"

All replacement characters at the end are held, not just one. If a run of byte tokens ends inside a
character, decoders with byte fallback (Llama 2, Gemma) write a replacement character for every byte
of the run, even for bytes whose characters were returned already.

A character has at most four bytes. So if four tokens in a row complete no character, the first of
them is part of none, and its replacement character is returned.

The window is cut at the front when it has become long, so each step costs the same. A cut must not
change the text: a cut inside a character does, and in a run of byte tokens it spoils the whole run.
Of four places in a row, at least one is between two characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"  # decoders write this for bytes that form no complete character
CHAR_TOKENS = 4  # most tokens of one character
WINDOW_TOKENS = 28  # a longer window is cut
KEEP_TOKENS = 20  # least length of the window after a cut: five characters of four bytes each
AGREE_CHARS = 4  # a cut is safe if this many characters at the end stay the same
MAX_WINDOW_TOKENS = 64  # a longer window is cut even if no cut is safe


class TokenDecoder(Protocol):
    """The part of ``tokenizers.Tokenizer`` that is needed here."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...


class IncrementalDetokenizer:
    """The text of one stream of tokens, without special tokens.

    If the tokens' bytes are valid UTF-8, the pieces that ``push`` and ``flush`` return add up to
    ``decode`` of all tokens.
    """

    def __init__(self, decoder: TokenDecoder) -> None:
        self._decoder = decoder
        self._window: list[int] = []
        self._text = ""  # of the window
        self._returned_chars = 0  # how much of the window's text was returned
        self._held_tokens = 0  # how many tokens at the end have completed no character

    def push(self, token_id: int) -> str:
        """Add a token and return the text that has become certain."""
        text = self._decode([*self._window, token_id])
        if text == self._text and self._is_special(token_id):
            return ""  # the window must not fill with special tokens
        self._window.append(token_id)
        self._text = text
        certain_chars = len(text.rstrip(REPLACEMENT))
        new = text[self._returned_chars : certain_chars]
        self._returned_chars = max(self._returned_chars, certain_chars)
        if certain_chars == len(text):
            self._held_tokens = 0
            if len(self._window) > WINDOW_TOKENS:
                self._shorten()
        else:
            self._held_tokens = 1 if new else self._held_tokens + 1
            if self._held_tokens >= CHAR_TOKENS:
                return self._return_invalid()
        return new

    def flush(self) -> str:
        """Return the text that is held back. Call it after the last token."""
        rest = self._text[self._returned_chars :]
        self._cut(len(self._window), returned_chars=0)
        return rest

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(token_ids, skip_special_tokens=True)

    def _is_special(self, token_id: int) -> bool:
        # A token that only stands for a space has no text by itself, special or not.
        shown = self._decoder.decode([token_id], skip_special_tokens=False)
        return bool(shown) and not self._decode([token_id])

    def _shorten(self) -> None:
        """Cut the window if that does not change the text. No text is held back."""
        for kept in range(KEEP_TOKENS, KEEP_TOKENS + CHAR_TOKENS):
            text = self._decode(self._window[-kept:])
            # The text must be longer than the compared part, because the first character may be
            # incomplete or may lack the space before it.
            if len(text) > AGREE_CHARS and text[-AGREE_CHARS:] == self._text[-AGREE_CHARS:]:
                self._cut(len(self._window) - kept, returned_chars=len(text))
                return
        if len(self._window) > MAX_WINDOW_TOKENS:
            self._cut(len(self._window) - KEEP_TOKENS, returned_chars=None)

    def _return_invalid(self) -> str:
        """Return held text that is part of no character, and cut the window after it."""
        for kept in range(CHAR_TOKENS, 0, -1):
            # After broken bytes, decoders with byte fallback do not see that a character is whole.
            character = self._decode(self._window[-kept:])
            if character and REPLACEMENT not in character:
                broken = self._decode(self._window[:-kept])[self._returned_chars :]
                self._cut(len(self._window) - kept, returned_chars=None)
                self._held_tokens = 0
                return broken + character
        # The last three tokens may be the beginning of a character, so a cut before them is best.
        for kept in range(CHAR_TOKENS - 1, 0, -1):
            before, after = self._window[:-kept], self._window[-kept:]
            text = self._decode(before)
            if text + self._decode(after) == self._text:
                break
        else:
            if len(self._window) <= MAX_WINDOW_TOKENS:
                return ""  # every cut would be inside an invalid sequence of bytes
        new = text[self._returned_chars :]
        self._cut(len(before), returned_chars=0)
        self._held_tokens = kept
        return new

    def _cut(self, tokens: int, *, returned_chars: int | None) -> None:
        """Remove tokens from the front of the window. ``None``: all of its text was returned."""
        self._window = self._window[tokens:]
        self._text = self._decode(self._window)
        self._returned_chars = len(self._text) if returned_chars is None else returned_chars

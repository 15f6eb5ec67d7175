"""Reads the special tokens that a chat template writes, but none in the text of its messages.

A token counts as special if the tokeniser says so, or if its string occurs in the template: some
models mark the turns with tokens that are only "added".

A user may write ``<|im_end|>`` and so on. If it were read as a special token, the user could forge
turns of the system or of the assistant. A message that contains a special token's string takes this
way; all other messages are tokenised as usual::

    content   "hi<|im_end|>"         hide     ->  "hi" + mark
    template  <|user|>{{content}}    render   ->  "<|user|>hi" + mark
    secret names for the template's special tokens  ->  secret("<|user|>") + "hi" + mark
    show the hidden strings          encode   ->  <|user|> is one token, "<|im_end|>" is text

The encoder is a copy of the tokeniser whose special tokens have secret names, so each of their
usual names is text to it. Apart from that, both tokenise alike.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Iterable
from typing import Any

import tokenizers

# The first of these characters that no message contains becomes the mark. Unicode will never assign
# them, so no template uses them.
_MARKS = [chr(code) for code in range(0xF0000, 0xF0100)]


class SpecialTokens:
    """The special tokens of one tokeniser. Thread-safe.

    Args:
        template: the model's chat template.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, template: str = "") -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        special = {
            token_id: token
            for token_id, token in added.items()
            if token.special or (token.content.strip() and token.content in template)
        }
        self._ids = {token.content: token_id for token_id, token in special.items()}
        self._pattern = re.compile(_any_of(self._ids))
        self._any_normalized = any(token.normalized for token in special.values())

    def prepare(self) -> None:
        """Build the encoder now. It takes up to seconds and would delay the first request."""
        _ = self._secret

    def are_in(self, text: str) -> bool:
        """Return whether the tokeniser could read a special token in ``text``."""
        if self._pattern.search(text):
            return True
        normalizer = self._tokenizer.normalizer
        if normalizer is None or not self._any_normalized:
            return False
        return self._pattern.search(normalizer.normalize_str(text)) is not None

    def mark_for(self, texts: Iterable[str]) -> str:
        """Return a character that none of ``texts`` contains.

        Raises:
            ValueError: there is none left.
        """
        used = set().union(*map(set, texts))
        for mark in _MARKS:
            if mark not in used:
                return mark
        raise ValueError("the messages use all characters that could mark hidden text")

    def hide(self, text: str, mark: str) -> str:
        """Replace each special token's string by its number between two marks."""
        numbers = {string: number for number, string in enumerate(self._ids)}
        return self._pattern.sub(lambda found: f"{mark}{numbers[found[0]]}{mark}", text)

    def encode(self, rendered: str, mark: str) -> tokenizers.Encoding:
        """Tokenise a rendered chat. Hidden strings are text; all others are special tokens."""
        names, encoder = self._secret
        strings = [*self._ids]
        named = self._pattern.sub(lambda found: names[found[0]], rendered)
        shown = re.sub(f"{mark}([0-9]+){mark}", lambda found: strings[int(found[1])], named)
        (encoding,) = encoder.encode_batch_fast([shown], add_special_tokens=False)
        return encoding

    @functools.cached_property
    def _secret(self) -> tuple[dict[str, str], tokenizers.Tokenizer]:
        """The secret names by their usual ones, and the tokeniser that knows the secret names."""
        salt = secrets.token_hex(8)
        names = {string: f"|{salt}-{number}|" for number, string in enumerate(self._ids)}
        settings = json.loads(self._tokenizer.to_str())
        for token in settings["added_tokens"]:
            if token["content"] in names:
                token |= {"content": names[token["content"]], "normalized": False}
        model = settings["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(text, text): id_ for text, id_ in model["vocab"].items()}
        else:  # Unigram: pairs of a string and its score, by id
            model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        settings["post_processor"] = None  # would add special tokens, which the template writes
        encoder = tokenizers.Tokenizer.from_str(json.dumps(settings))
        assert all(encoder.token_to_id(names[text]) == id_ for text, id_ in self._ids.items())
        return names, encoder


def _any_of(strings: Iterable[str]) -> str:
    """Return a pattern that matches each of ``strings``, the longest one first.

    It branches at each character. A plain alternation would try hundreds of strings with the same
    beginning at each place of a text.
    """
    root: dict[str, Any] = {}
    for string in strings:
        node = root
        for char in string:
            node = node.setdefault(char, {})
        node[""] = {}

    def pattern(node: dict[str, Any]) -> str:
        branches = [re.escape(char) + pattern(node[char]) for char in node if char]
        if not branches:
            return ""
        return f"(?:{'|'.join(branches)}){'?' if '' in node else ''}"

    return pattern(root) or r"(?!)"

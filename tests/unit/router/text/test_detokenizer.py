from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from router.text.detokenizer import (
    CHAR_TOKENS,
    REPLACEMENT,
    WINDOW_TOKENS,
    IncrementalDetokenizer,
)
from tests.support.router_harness import make_tokenizer

TOKENIZER = make_tokenizer()
any_token = st.integers(0, TOKENIZER.get_vocab_size() - 1)


def pieces_of(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


def fallback_tokenizer() -> Tokenizer:
    """Return a tokeniser like Llama 2's: words begin with a space, unknown characters are bytes."""
    vocab = {"<unk>": 0, "▁the": 1, "▁": 2, "a": 3, "▁b": 4}
    vocab |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


FALLBACK = fallback_tokenizer()
# How byte-level tokenisers write each byte: as itself if it is printable in Latin-1, else as one of
# the characters from U+0100 on (GPT-2's bytes_to_unicode).
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_LEVEL = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(0x100 + number) for number, byte in enumerate(_OTHERS)
}


@given(st.text(max_size=200))
@example("😀🎉" * 40)
@example("größer, schöner — 你好，世界 " * 10)
def test_text_comes_back_and_no_piece_has_half_a_character(text: str) -> None:
    pieces = pieces_of(TOKENIZER, TOKENIZER.encode(text, add_special_tokens=False).ids)
    assert "".join(pieces) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)


@given(st.lists(any_token, max_size=400))
def test_any_tokens_give_the_same_text_as_one_decode(token_ids: list[int]) -> None:
    assert "".join(pieces_of(TOKENIZER, token_ids)) == TOKENIZER.decode(token_ids)


@given(st.lists(st.sampled_from(["the", " a", " b", "😀", "é", "世界", " "]), max_size=80))
@example(["😀"] * 60)
def test_byte_fallback_runs(words: list[str]) -> None:
    token_ids: list[int] = []
    for word in words:
        known = {"the": [1], " a": [2, 3], " b": [4], " ": [2]}.get(word)
        token_ids += known or [5 + byte for byte in word.encode()]
    pieces = pieces_of(FALLBACK, token_ids)
    assert "".join(pieces) == FALLBACK.decode(token_ids)
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_special_tokens_have_no_text() -> None:
    the = TOKENIZER.encode("the").ids
    assert "".join(pieces_of(TOKENIZER, [0, *the, 1, *the, 0])) == "thethe"


def test_text_comes_as_soon_as_it_is_certain() -> None:
    euro = TOKENIZER.encode("€").ids
    assert len(euro) == 3, "the training text has no €, so € is three byte tokens"
    assert pieces_of(TOKENIZER, euro) == ["", "", "€", ""]


class Spy:
    """Records how many tokens are decoded at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.longest = self.total = 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self.longest = max(self.longest, len(ids))
        self.total += len(ids)
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))


@pytest.mark.parametrize("tokenizer", [TOKENIZER, FALLBACK], ids=["byte level", "byte fallback"])
@pytest.mark.parametrize("run", [b"\xff", b"\x80", b"\xe2", b"\xf0\x9f", b"\xf0\x9f\x98"])
def test_bytes_that_form_no_character_flow_and_cost_linear_time(
    tokenizer: Tokenizer, run: bytes
) -> None:
    """A broken model may write thousands of them."""
    token_ids = [byte_token(tokenizer, byte) for byte in run * 500]
    spy = Spy(tokenizer)
    detokenizer = IncrementalDetokenizer(spy)
    chars = 0
    for count, token_id in enumerate(token_ids, 1):
        chars += len(detokenizer.push(token_id))
        behind = len(tokenizer.decode(token_ids[:count])) - chars
        assert behind < CHAR_TOKENS
    assert detokenizer.flush() == REPLACEMENT * behind
    assert spy.total <= 10 * WINDOW_TOKENS * len(token_ids)


def byte_token(tokenizer: Tokenizer, byte: int) -> int:
    if tokenizer is FALLBACK:
        return 5 + byte
    (token_id,) = (
        token_id
        for token_id in range(tokenizer.get_vocab_size())
        if tokenizer.id_to_token(token_id) == BYTE_LEVEL[byte]
    )
    return token_id


@pytest.mark.parametrize("text", ["世界", "😀", "é世😀", "é"])
def test_long_runs_of_byte_tokens_cost_linear_time(text: str) -> None:
    """Llama 2's tokeniser writes most Chinese characters as bytes."""
    token_ids = [byte_token(FALLBACK, byte) for byte in (text * 500).encode()]
    spy = Spy(FALLBACK)
    detokenizer = IncrementalDetokenizer(spy)
    pieces = [detokenizer.push(token_id) for token_id in token_ids]
    assert "".join(pieces) == text * 500
    assert spy.longest <= WINDOW_TOKENS + CHAR_TOKENS
    assert spy.total <= 10 * WINDOW_TOKENS * len(token_ids)


def test_special_tokens_do_not_fill_the_window() -> None:
    spy = Spy(TOKENIZER)
    detokenizer = IncrementalDetokenizer(spy)
    euro = TOKENIZER.encode("€").ids
    for token_id in [*euro[:1], *[0] * 1000, *euro[1:], *[1] * 1000]:
        detokenizer.push(token_id)
    assert spy.longest <= 5


def test_text_after_broken_bytes_is_whole() -> None:
    broken = [byte_token(FALLBACK, 0xE2)] * 9
    euro = [byte_token(FALLBACK, byte) for byte in "€".encode()]
    text = "".join(pieces_of(FALLBACK, [*broken, *euro, 1]))
    assert text == REPLACEMENT * 9 + "€ the"


def test_the_window_stays_short_on_long_answers() -> None:
    spy = Spy(TOKENIZER)
    detokenizer = IncrementalDetokenizer(spy)
    text = "the quick brown 😀 fox — " * 100
    out = "".join(detokenizer.push(t) for t in TOKENIZER.encode(text).ids)
    assert out + detokenizer.flush() == text
    assert spy.longest <= 2 * WINDOW_TOKENS + 1

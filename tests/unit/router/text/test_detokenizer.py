from __future__ import annotations

from collections.abc import Sequence

from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from router.text.detokenizer import REPLACEMENT, WINDOW_TOKENS, IncrementalDetokenizer
from tests.support.router_harness import make_tokenizer

TOKENIZER = make_tokenizer()
any_token = st.integers(0, TOKENIZER.get_vocab_size() - 1)


def pieces_of(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    return [*(detokenizer.push((token_id,)) for token_id in token_ids), detokenizer.flush()]


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


def test_the_window_stays_short_on_long_answers() -> None:
    longest = 0

    class Spy:
        def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return str(TOKENIZER.decode(ids, skip_special_tokens=skip_special_tokens))

    detokenizer = IncrementalDetokenizer(Spy())
    text = "the quick brown 😀 fox — " * 100
    out = "".join(detokenizer.push((t,)) for t in TOKENIZER.encode(text).ids)
    assert out + detokenizer.flush() == text
    assert longest <= 2 * WINDOW_TOKENS + 1

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, cast

import pytest

from core.errors import ConfigError, InvalidArgumentError
from router.text.codec import LONG_CHARS, ChatTurn, ModelFacts, TextCodec, load_text_codec
from tests.support.router_harness import make_tokenizer, render_chat

CONFIG = {"model_type": "llama", "vocab_size": 320, "max_position_embeddings": 77}
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "<|user|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|end|>{% endif %}"
)


def write_model(folder: Path, **tokenizer_config: object) -> Path:
    make_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer_config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.asyncio
async def test_the_event_loop_runs_while_a_prompt_is_tokenised() -> None:
    text = "the lazy fox " * 40_000
    codec = TextCodec(ModelFacts("m", 10**6, 320), make_tokenizer(), render_chat)
    task = asyncio.create_task(codec.encode_prompt(text))
    turns = 0
    while not task.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 1000, "tokenising releases the GIL"
    assert list(await task) == make_tokenizer().encode(text).ids
    codec.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["prompt", "chat"])
async def test_a_very_long_prompt_delays_no_short_one(kind: str) -> None:
    short_are_done = threading.Event()

    class Slow:
        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> Any:
            if len(texts[0]) > LONG_CHARS:
                assert short_are_done.wait(timeout=10)
            return make_tokenizer().encode_batch(texts, add_special_tokens=add_special_tokens)

    codec = TextCodec(ModelFacts("m", 10**6, 320), cast(Any, Slow()), render_chat)

    def encode(text: str) -> Coroutine[Any, Any, tuple[int, ...]]:
        if kind == "prompt":
            return codec.encode_prompt(text)
        return codec.encode_chat([ChatTurn("user", text)])

    long = [asyncio.create_task(encode("x" * (LONG_CHARS + 1))) for _ in range(3)]
    for _ in range(3):
        assert await encode("the fox")
    assert not any(task.done() for task in long)
    short_are_done.set()
    for tokens in await asyncio.gather(*long):
        assert len(tokens) > LONG_CHARS
    codec.close()


@pytest.mark.asyncio
async def test_token_ids_that_do_not_fit_are_counted_but_never_read() -> None:
    class Encoding:
        ids = property()  # cannot be read

        def __len__(self) -> int:
            return 64

    class Tokenizer:
        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> Any:
            return [Encoding() for _ in texts]

    codec = TextCodec(ModelFacts("m", 64, 320), cast(Any, Tokenizer()), render_chat)
    for encoding in (codec.encode_prompt("x"), codec.encode_chat([ChatTurn("user", "x")])):
        with pytest.raises(InvalidArgumentError, match="has 64 tokens; at most 63 fit") as caught:
            await encoding
        assert caught.value.reason == "PROMPT_TOO_LONG"
    codec.close()


@pytest.mark.asyncio
async def test_a_models_folder_is_loaded_with_its_template(tmp_path: Path) -> None:
    path = write_model(tmp_path, chat_template=TEMPLATE)
    codec = load_text_codec(path, served_name="m", max_model_len=None)
    assert (codec.model.served_name, codec.model.max_model_len) == ("m", 77)
    assert codec.model.vocab_size == 320
    tokenizer = make_tokenizer()
    assert list(await codec.encode_prompt("the fox")) == tokenizer.encode("the fox").ids
    turns = [ChatTurn("user", "hi")]
    assert list(await codec.encode_chat(turns)) == tokenizer.encode("<|user|>hi<|end|>").ids
    with pytest.raises(InvalidArgumentError, match="no system turns"):
        await codec.encode_chat([ChatTurn("system", "x")])
    codec.close()


@pytest.mark.asyncio
async def test_a_model_without_a_template_takes_no_chat(tmp_path: Path) -> None:
    codec = load_text_codec(write_model(tmp_path), served_name="m", max_model_len=5)
    assert codec.model.max_model_len == 5
    with pytest.raises(InvalidArgumentError) as caught:
        await codec.encode_chat([ChatTurn("user", "hi")])
    assert caught.value.reason == "NO_CHAT_TEMPLATE"
    codec.close()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages[0].content + 1 }}", "str"),  # TypeError
        # ValueError: several named templates, and none is the default.
        ([{"name": name, "template": TEMPLATE} for name in ("rag", "tools")], "default"),
    ],
)
async def test_the_error_of_a_failing_template_is_in_the_message(
    tmp_path: Path, template: object, words: str
) -> None:
    path = write_model(tmp_path, chat_template=template)
    codec = load_text_codec(path, served_name="m", max_model_len=5)
    with pytest.raises(InvalidArgumentError, match=words) as caught:
        await codec.encode_chat([ChatTurn("user", "hi")])
    assert caught.value.reason == "INVALID_CHAT"
    codec.close()


def test_a_folder_without_a_tokeniser_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ConfigError, match=r"model\.path"):
        load_text_codec(tmp_path, served_name="m", max_model_len=None)

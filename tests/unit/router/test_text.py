from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from cluster.errors import ConfigError, InvalidArgumentError
from router.text import ChatTurn, ModelFacts, TextCodec, load_text_codec
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
async def test_the_event_loop_runs_on_while_a_prompt_is_tokenised() -> None:
    loop_ran_on = threading.Event()

    class Slow:
        def encode(self, text: str, add_special_tokens: bool) -> Any:
            assert loop_ran_on.wait(timeout=10), "the event loop was blocked"
            return make_tokenizer().encode(text, add_special_tokens=add_special_tokens)

    codec = TextCodec(ModelFacts("m", 64, 320), cast(Any, Slow()), render_chat)
    task = asyncio.create_task(codec.encode_prompt("the fox"))
    asyncio.get_running_loop().call_later(0, loop_ran_on.set)
    assert list(await task) == make_tokenizer().encode("the fox").ids
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
        # ValueError: several named templates, none of them the default.
        ([{"name": name, "template": TEMPLATE} for name in ("rag", "tools")], "default"),
    ],
)
async def test_a_template_that_fails_is_named_with_its_reason(
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

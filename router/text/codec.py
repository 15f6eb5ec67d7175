"""Renders chats and tokenises prompts, in threads beside the event loop.

Each request is tokenised once, in a thread and without the GIL, so a long prompt does not hold up
other requests' streams. Very long prompts have a thread of their own, so short ones never wait for
them. The configuration bounds the number of threads; the router's bound on requests in flight
bounds the number of prompts that wait.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import tokenizers

from core.errors import ConfigError, InvalidArgumentError
from router.text.detokenizer import TokenDecoder
from router.text.special import SpecialTokens

_GENERATION_FIELDS = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
)

# A prompt of this length takes about 50 ms. The largest message, 4 MB of text, takes 3 s.
LONG_CHARS = 65_536


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the router must know about the model that the workers serve."""

    served_name: str
    max_model_len: int  # prompt and output together, tokens
    vocab_size: int
    # The model's own values for fields of ``SamplingParams`` that a request leaves unset.
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)

    def check_fits(self, prompt_tokens: int) -> None:
        """Raises InvalidArgumentError if the prompt leaves no room for an output token."""
        if prompt_tokens >= self.max_model_len:
            raise InvalidArgumentError(
                f"the prompt has {prompt_tokens} tokens; at most {self.max_model_len - 1} fit into "
                f"the context of {self.max_model_len} with one token of output",
                reason="PROMPT_TOO_LONG",
            )


ChatRenderer = Callable[[Sequence["ChatTurn"]], str]


@dataclass(frozen=True, slots=True)
class ChatTurn:
    role: str
    content: str


class TextCodec:
    """Text to token ids, for one model. Owns its threads: call ``close``.

    Args:
        render_chat: renders a chat as the text of the prompt, including special tokens. Raises
            ``InvalidArgumentError`` if the model has no template or the template refuses the turns.
        template: the source of the chat template; empty if the model has none.
        threads: how many prompts are tokenised at a time. One more thread tokenises prompts of
            over ``LONG_CHARS`` characters.
    """

    def __init__(
        self,
        model: ModelFacts,
        tokenizer: tokenizers.Tokenizer,
        render_chat: ChatRenderer,
        *,
        template: str = "",
        threads: int = 1,
    ) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._render_chat = render_chat
        self._special = SpecialTokens(tokenizer, template)
        if template:
            self._special.prepare()
        self._short = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="tokenize-long")

    @property
    def decoder(self) -> TokenDecoder:
        """Decodes output tokens. A token takes microseconds, so the event loop may decode."""
        return self._tokenizer

    async def encode_prompt(self, prompt: str) -> tuple[int, ...]:
        """The token ids of ``prompt``, with a BOS token if the model's tokeniser adds one.

        Raises:
            InvalidArgumentError: the tokens do not fit into the model's context.
        """
        return await self._in_thread(
            len(prompt), lambda: self._encode(prompt, add_special_tokens=True)
        )

    async def encode_chat(
        self, turns: Sequence[ChatTurn], *, parse_special: bool = False
    ) -> tuple[int, ...]:
        """The token ids of the rendered chat. The last ones are the header of the assistant's turn.

        Args:
            parse_special: whether a special token's string in a content becomes the special token.
                If not, it is tokenised as text.

        Raises:
            InvalidArgumentError: the model has no template, the template refuses the turns, or the
                tokens do not fit into the model's context.
        """
        return await self._in_thread(
            sum(len(turn.content) for turn in turns),
            lambda: self._encode_chat(turns, parse_special=parse_special),
        )

    def close(self) -> None:
        """End the threads. Prompts that still wait are dropped."""
        for pool in (self._short, self._long):
            pool.shutdown(wait=False, cancel_futures=True)

    def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        # A batch of one, because ``encode`` keeps the GIL (tokenizers 0.23).
        (encoding,) = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        return self._ids_of(encoding)

    def _encode_chat(self, turns: Sequence[ChatTurn], *, parse_special: bool) -> tuple[int, ...]:
        # Special tokens are not added, because the template writes them.
        if parse_special or not any(self._special.are_in(turn.content) for turn in turns):
            return self._encode(self._render_chat(turns), add_special_tokens=False)
        mark = self._special.mark_for(turn.content for turn in turns)
        hidden = [replace(turn, content=self._special.hide(turn.content, mark)) for turn in turns]
        return self._ids_of(self._special.encode(self._render_chat(hidden), mark))

    def _ids_of(self, encoding: tokenizers.Encoding) -> tuple[int, ...]:
        # Check the length first: ``ids`` converts every id into a Python int and holds the GIL.
        self.model.check_fits(len(encoding))
        return tuple(encoding.ids)

    async def _in_thread(self, chars: int, work: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        pool = self._long if chars > LONG_CHARS else self._short
        return await asyncio.get_running_loop().run_in_executor(pool, work)


def keep_torch_out() -> None:
    """Let this process use transformers without torch, which it would import.

    Tokenisers and chat templates need no torch. Without it, a router takes 260 MiB less memory and
    starts 4 seconds sooner. Later imports of torch in this process fail.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
        sys.modules["torch"] = None  # type: ignore[assignment]


def load_text_codec(
    path: Path | str,
    *,
    served_name: str,
    max_model_len: int | None,
    trust_remote_code: bool = False,
    threads: int = 1,
) -> TextCodec:
    """Load a model's tokeniser and chat template. Takes seconds, so call it in a thread.

    Args:
        path: the model's folder or hub name.
        max_model_len: tokens; None takes the model's own context length.

    Raises:
        ConfigError: no fast tokeniser can be loaded, or the model's context length is unknown.
    """
    from transformers import AutoConfig, AutoTokenizer  # this import takes seconds

    name = str(path)
    # The tokeniser's own threads are of no use: they share the texts of a batch, and each batch has
    # one text.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as err:
        raise ConfigError(f"model.path: no tokeniser can be loaded from {name}: {err}") from err
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ConfigError(f"model.path: {name} has no fast tokeniser (tokenizer.json)")
    backend.no_truncation()  # tokenizer.json may switch on truncation and padding, for training
    backend.no_padding()
    text_config = config.get_text_config()
    context_tokens = max_model_len or getattr(text_config, "max_position_embeddings", None)
    if context_tokens is None:
        raise ConfigError(f"model.max_model_len: {name} does not state its context length; set it")
    facts = ModelFacts(
        served_name,
        int(context_tokens),
        int(text_config.vocab_size),
        _sampling_defaults(name),
    )
    template = getattr(tokenizer, "chat_template", None) or ""
    if isinstance(template, dict):  # named templates
        template = "\n".join(template.values())
    return TextCodec(facts, backend, _template_of(tokenizer), template=template, threads=threads)


def _sampling_defaults(name: str) -> dict[str, float]:
    """The sampling parameters in the model's generation_config.json, as vLLM reads them."""
    from transformers import GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(name).to_diff_dict()
    except OSError:  # most models have no such file
        return {}
    names = {field: field for field in _GENERATION_FIELDS} | {"max_new_tokens": "max_tokens"}
    found = {key: value for key, value in config.items() if key in names and value is not None}
    return {names[key]: value for key, value in found.items()}


def _template_of(tokenizer: object) -> ChatRenderer:
    """The chat template of a transformers tokeniser as a function."""
    from jinja2 import TemplateError

    apply_template = getattr(tokenizer, "apply_chat_template")  # noqa: B009 - untyped library
    has_template = getattr(tokenizer, "chat_template", None) is not None

    def render(turns: Sequence[ChatTurn]) -> str:
        if not has_template:
            raise InvalidArgumentError(
                "chat: this model has no chat template; send prompt or token_ids",
                reason="NO_CHAT_TEMPLATE",
            )
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return str(apply_template(messages, tokenize=False, add_generation_prompt=True))
        except (TemplateError, ValueError, TypeError) as err:
            # transformers raises ValueError if the model has named templates but no default one.
            raise InvalidArgumentError(
                f"chat: the model's template refuses these messages: {err}",
                reason="INVALID_CHAT",
            ) from err

    return render

"""Formats responses for a terminal, for a pipe and as JSON."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Final, TextIO

from baton.types import Completion, KvOutcome, KvReport, Phases, Response, Usage

_COLOURS: Final = ("36", "33", "35", "32")  # ANSI: cyan, yellow, magenta, green
_MIB: Final = 1024 * 1024
# These characters reorder the text around them. So they can make a line mislead its reader.
_BIDI_CONTROLS: Final = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_DEL_AND_C1: Final = re.compile(r"[\x7f-\x9f]")


def response_json(response: Response) -> str:
    """Return one response as one line of JSON, without the top-level keys that have no value.

    All control characters are escaped, so the line cannot control a terminal.
    """
    value: dict[str, object] = {
        "request_id": response.request_id,
        "sequence": response.sequence,
        "text": response.text,
        "token_ids": response.token_ids,
    }
    if response.logprobs:
        value["logprobs"] = [asdict(each) for each in response.logprobs]
    if response.finish_reason is not None:
        value["finish_reason"] = response.finish_reason
    if response.usage is not None:
        value["usage"] = asdict(response.usage)
    if response.phases is not None:
        value["phases"] = asdict(response.phases)
    line = json.dumps(value, ensure_ascii=False)
    return _DEL_AND_C1.sub(lambda found: f"\\u{ord(found[0]):04x}", line)


def phases_line(answer: Response | Completion) -> str:
    """Return one line that says where a finished request spent its time.

    Raises:
        ValueError: the request is not finished.
    """
    if answer.finish_reason is None or answer.usage is None or answer.phases is None:
        raise ValueError("only a finished request has phases")
    phases = answer.phases
    parts = [
        _tokens(answer.usage) + f" ({answer.finish_reason})",
        f"queue {_ms(phases.queue_ms)}",
        f"prefill {_ms(phases.prefill_ms)}",
        _kv(phases.kv),
    ]
    if answer.usage.completion_tokens > 1:  # the hand-off ends with the second token
        parts += [
            f"hand-off {_ms(phases.handoff_ms)}",
            f"{phases.tokens_per_s:.1f} tokens/s",
        ]
    parts.append(_workers(phases))
    if phases.attempts > 1:
        parts.append(f"{phases.attempts} attempts")
    return " | ".join(parts)


def _tokens(usage: Usage) -> str:
    cached = f" ({usage.cached_prompt_tokens} cached)" if usage.cached_prompt_tokens else ""
    return f"{usage.prompt_tokens} tokens in{cached}, {usage.completion_tokens} out"


def _kv(kv: KvReport | None) -> str:
    if kv is None:
        return "no KV report"
    if kv.outcome is KvOutcome.LOCAL:
        return "no KV sent (local prefill)"
    if kv.outcome is KvOutcome.RECOMPUTED:
        return "KV transfer failed, recomputed"
    hidden = f" ({kv.hidden_bytes / kv.bytes:.0%} hidden)" if kv.bytes else ""
    return f"KV {kv.bytes / _MIB:.2f} MiB{hidden} in {_ms(kv.transfer_ms)} over {kv.backend}"


def _workers(phases: Phases) -> str:
    if not phases.prefill_worker:
        return phases.decode_worker
    return f"{phases.prefill_worker} -> {phases.decode_worker}"


def _ms(value_ms: float) -> str:
    return f"{value_ms:.1f} ms" if value_ms < 10 else f"{value_ms:.0f} ms"


def printable(text: str) -> str:
    """Replace the characters that could control a terminal, because model output is not trusted.

    Keep the invisible characters that languages and emoji need: joiners, wide and non-breaking
    spaces.
    """
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if _controls_terminal(char) else char for char in text
    )


def _controls_terminal(char: str) -> bool:
    if char in "\n\t":
        return False
    return unicodedata.category(char) in ("Cc", "Cs") or char in _BIDI_CONTROLS


@dataclass(slots=True)
class _Stream:
    label: str
    pending: str = ""
    finished: bool = False


class StreamPrinter:
    """Prints concurrent streams, token by token; each line belongs to one stream.

    One stream at a time owns the current line, and its text is written as soon as it arrives.
    The text of the other streams is buffered until that line ends. Then the next stream with text
    gets the next line:

          1.2 s  paris | The capital of France is Paris.
          3.4 s  alice | Alice was very much surprised to see the Rabbit again, and

    Each line starts with the time at which it began, in seconds since the printer was created.
    When another stream has buffered a full line, the current line ends early, so a slow stream
    does not hold up a fast one.

    Args:
        clock: monotonic time in seconds.
        colour: mark the labels with ANSI colours; for terminals only.
        width_columns: width of the text; a line ends after the first word that reaches this width.
    """

    def __init__(
        self,
        out: TextIO,
        labels: Sequence[str],
        *,
        clock: Callable[[], float],
        colour: bool = False,
        width_columns: int = 76,
    ) -> None:
        self._out = out
        self._streams = {label: _Stream(label) for label in labels}
        self._clock = clock
        self._start_s = clock()
        self._colour = colour
        self._width = width_columns
        self._label_columns = max(map(len, labels))
        self._owner: _Stream | None = None
        self._last_owner = ""
        self._column = 0

    def write(self, label: str, text: str) -> None:
        """Add text to one stream, and print what can be printed now."""
        self._streams[label].pending += printable(text)
        self._print()

    def finish(self, label: str) -> None:
        """Mark a stream as complete, and end its line."""
        self._streams[label].finished = True
        self._print()

    def _print(self) -> None:
        while True:
            if self._owner is None:
                self._owner = self._next_owner()
                if self._owner is None:
                    break
                self._begin_line(self._owner)
            if not self._write_pending(self._owner) and not self._must_yield(self._owner):
                break
            self._end_line()
        self._out.flush()

    def _next_owner(self) -> _Stream | None:
        """Return the next stream, in round-robin order, that has more than whitespace to print."""
        labels = list(self._streams)
        turn = labels.index(self._last_owner) + 1 if self._last_owner else 0
        for label in labels[turn:] + labels[:turn]:
            stream = self._streams[label]
            stream.pending = stream.pending.lstrip()
            if stream.pending:
                return stream
        return None

    def _write_pending(self, stream: _Stream) -> bool:
        """Write pending text up to the end of the line. Return whether the line ended."""
        words = re.split(r"(\s+)", stream.pending)
        for index, word in enumerate(words):
            if word.isspace() and ("\n" in word or self._column >= self._width):
                stream.pending = "".join(words[index + 1 :])
                return True
            self._out.write(word)
            self._column += len(word)
        stream.pending = ""
        return False

    def _must_yield(self, owner: _Stream) -> bool:
        others = (each for each in self._streams.values() if each is not owner)
        return owner.finished or any(len(each.pending) >= self._width for each in others)

    def _begin_line(self, stream: _Stream) -> None:
        label = stream.label.rjust(self._label_columns)
        if self._colour:
            index = list(self._streams).index(stream.label)
            label = f"\x1b[{_COLOURS[index % len(_COLOURS)]}m{label}\x1b[0m"
        self._out.write(f"{self._clock() - self._start_s:6.1f} s  {label} | ")
        self._column = 0

    def _end_line(self) -> None:
        assert self._owner is not None
        self._out.write("\n")
        self._last_owner = self._owner.label
        self._owner = None

"""Finds stop strings in a stream of text, even if a stop string spans several pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Cuts a text before the winning stop string.

    The stop string that ends first wins. If several end at the same position, the longest wins. So
    the result depends only on the whole text, not on how the text was split into pieces. Text that
    may be the beginning of a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string is empty")
        self._stops = tuple(stops)
        self._first_chars = {stop[0] for stop in stops}
        self._max_held_chars = max((len(stop) for stop in stops), default=1) - 1
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """Add text and return the part that cannot belong to a stop string.

        Sets ``matched`` if a stop string is complete.
        """
        if self.matched:
            return ""
        text = self._held + text
        start = self._match(text)
        if start is not None:
            self.matched = True
            self._held = ""
            return text[:start]
        held_chars = self._held_chars(text)
        cut = len(text) - held_chars
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """Return the text that is held back. Call it after the last piece."""
        held, self._held = self._held, ""
        return held

    def _match(self, text: str) -> int | None:
        """The index at which the winning stop string begins; None if ``text`` contains none."""
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
        return None if best is None else best[1]

    def _held_chars(self, text: str) -> int:
        """The length of the longest suffix of ``text`` that is a prefix of a stop string."""
        for start in range(max(0, len(text) - self._max_held_chars), len(text)):
            if text[start] in self._first_chars:
                end = text[start:]
                if any(stop.startswith(end) for stop in self._stops):
                    return len(end)
        return 0

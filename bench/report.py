"""Prints the rows of a measurement as they come, and saves them as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def quantile(values: Sequence[float], q: float) -> float:
    """Return the ``q``-quantile of the values, without interpolation."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def summary(name: str, values_ms: Sequence[float]) -> dict[str, float]:
    """Return p50, p99 and the number of samples, under keys that begin with ``name``."""
    return {
        f"{name}_ms_p50": round(statistics.median(values_ms), 2),
        f"{name}_ms_p99": round(quantile(values_ms, 0.99), 2),
        f"{name}_samples": len(values_ms),
    }


def spread(name: str, values_ms: Sequence[float]) -> dict[str, float]:
    """Return p50 and the maximum, under keys that begin with ``name``. Meant for few samples."""
    return {
        f"{name}_ms_p50": round(statistics.median(values_ms), 1),
        f"{name}_ms_max": round(max(values_ms), 1),
    }


class Report:
    """Prints rows and collects them. ``save`` writes them to ``path``, unless it is None."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        self._rows.append(row)
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)

    def save(self) -> None:
        if self._path is not None:
            self._path.write_text(json.dumps(self._rows, indent=2) + "\n")

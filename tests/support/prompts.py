"""Prompts of random token ids."""

from __future__ import annotations

import random


def random_prompt(tokens: int, seed: int) -> list[int]:
    """Random token ids. The next token depends on every one of them, so a wrong block shows."""
    rng = random.Random(seed)
    return [rng.randrange(100, 40_000) for _ in range(tokens)]

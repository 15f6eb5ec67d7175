"""Prompts of random token ids."""

from __future__ import annotations

import random


def random_prompt(tokens: int, seed: int) -> list[int]:
    """Return random token ids. A wrong KV block then changes the model's next token."""
    rng = random.Random(seed)
    return [rng.randrange(100, 40_000) for _ in range(tokens)]

"""Prompts of random token ids."""

from __future__ import annotations

import random


def random_prompt(tokens: int, seed: int) -> list[int]:
    """Return random token ids. With such a prompt, a wrong KV block changes the next token."""
    rng = random.Random(seed)
    return [rng.randrange(100, 40_000) for _ in range(tokens)]

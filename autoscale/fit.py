"""Fits the numbers of both pools into the budget and the ratio. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from autoscale.policy import Ratio, low_and_high
from core.types import Pool

Priority = Literal["Prefill", "Decode", "Neither"]
_NO_BUDGET = float("inf")


@dataclass(frozen=True, slots=True)
class Claim:
    """What one pool asks for."""

    wanted: int
    least: int  # never fewer, unless the budget has no room
    most: int  # never more
    base: int  # the target so far
    gpus: float  # of one worker


@dataclass(frozen=True, slots=True)
class Fitted:
    """The numbers that fit, and the rule that changed the wanted ones ("": none)."""

    prefill: int
    decode: int
    rule: str
    text: str

    def of(self, pool: Pool) -> int:
        return self.prefill if pool is Pool.PREFILL else self.decode


def fit(
    claims: Mapping[Pool, Claim], budget: float | None, priority: Priority, ratio: Ratio | None
) -> Fitted:
    """Return the numbers of workers nearest to the wanted ones that obey both rules.

    A pool that wants workers gets at least one. If not all rules can hold, the first that is given
    up is that no pool takes from the other, then the ratio, then the minimums; never the budget.
    """
    gpus = _NO_BUDGET if budget is None else budget + 1e-9  # for errors of rounding
    claims = {pool: replace(c, least=max(c.least, min(c.wanted, 1))) for pool, c in claims.items()}
    relaxed = {pool: replace(c, least=min(c.wanted, 1)) for pool, c in claims.items()}
    kept = claims
    if priority == "Neither":
        kept = {
            pool: replace(c, least=max(c.least, min(c.base, c.wanted)))
            for pool, c in claims.items()
        }
    nothing = {pool: replace(c, least=0) for pool, c in claims.items()}
    attempts = ((kept, ratio), (claims, ratio), (kept, None), (claims, None), (relaxed, None))
    best = (0, 0)
    for tried, bounds in (*attempts, (nothing, None)):
        found = _best(tried, gpus, priority, bounds)
        if found is not None:
            best = found
            break
    return _explained(*best, claims, budget, priority, ratio)


def _best(
    claims: Mapping[Pool, Claim], gpus: float, priority: Priority, ratio: Ratio | None
) -> tuple[int, int] | None:
    prefill, decode = claims[Pool.PREFILL], claims[Pool.DECODE]
    best: tuple[tuple[float, ...], tuple[int, int]] | None = None
    for decodes in range(decode.least, decode.most + 1):
        room = gpus - decodes * decode.gpus
        if room < 0:
            break
        most = prefill.most
        if prefill.gpus and room < most * prefill.gpus:
            most = int(room / prefill.gpus)
        allowed = low_and_high(ratio, decodes, range(prefill.least, most + 1))
        if prefill.wanted == prefill.least == 0:  # the ratio is for pools that both have workers
            allowed = range(1)
        if not allowed:
            continue
        prefills = min(max(prefill.wanted, allowed.start), allowed.stop - 1)
        cost = _cost(prefills, decodes, prefill, decode, priority)
        if best is None or cost < best[0]:
            best = cost, (prefills, decodes)
    return None if best is None else best[1]


def _cost(
    prefills: int, decodes: int, prefill: Claim, decode: Claim, priority: Priority
) -> tuple[float, ...]:
    """Return how bad a choice is: first the workers that are short, then those beyond need."""
    short = {
        "Prefill": max(prefill.wanted - prefills, 0),
        "Decode": max(decode.wanted - decodes, 0),
    }
    extra = abs(prefills - prefill.wanted) + abs(decodes - decode.wanted)
    if priority == "Neither":
        worst = max(
            short["Prefill"] / max(prefill.wanted, 1), short["Decode"] / max(decode.wanted, 1)
        )
        return worst, short["Prefill"] + short["Decode"], extra
    other = "Decode" if priority == "Prefill" else "Prefill"
    return short[priority], short[other], extra


def _explained(
    prefill: int,
    decode: int,
    claims: Mapping[Pool, Claim],
    budget: float | None,
    priority: Priority,
    ratio: Ratio | None,
) -> Fitted:
    wanted = claims[Pool.PREFILL].wanted, claims[Pool.DECODE].wanted
    if (prefill, decode) == wanted:
        return Fitted(prefill, decode, "", "")
    gpus = sum(count * claims[pool].gpus for pool, count in zip(Pool, wanted, strict=True))
    asked = f"{wanted[0]} prefill and {wanted[1]} decode workers"
    if budget is not None and gpus > budget + 1e-9:
        return Fitted(
            prefill,
            decode,
            "budget",
            f"{asked} would hold {gpus:g} of {budget:g} GPUs; priority {priority}",
        )
    bounds = "" if ratio is None else f" {ratio.min:g} to {ratio.max:g}"
    text = f"{asked} are outside{bounds} prefill per decode worker"
    return Fitted(prefill, decode, "ratio", text)

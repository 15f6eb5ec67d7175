"""Policies of other systems, to compare with. They see the same snapshots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoscale.snapshot import Action, ActionKind, Phase, Snapshot, WorkerView
from core.types import Pool
from simulate.cluster import Scaler
from simulate.latency import LatencyModel
from simulate.laws import Forecast, Hpa, Law, RayServe, Seen

MOST = 64  # workers of a pool
# Windows before a scale-down: Kubernetes' default, and longer than the time between two bursts.
SHORT_S, LONG_S = 300.0, 1200.0


@dataclass(frozen=True, slots=True)
class BaselineDecision:
    """What a baseline wants; see ``cluster.Decided``."""

    actions: tuple[Action, ...]
    state: Mapping[Pool, Any]


@dataclass(frozen=True, slots=True)
class Baseline:
    """A policy of two laws.

    Args:
        itl_s: the ITL to keep, for the capacity of decode workers. Only forecasts use it.
    """

    laws: Mapping[Pool, Law]
    model: LatencyModel
    itl_s: float
    least: int = 1
    most: int = MOST

    def __call__(self, snapshot: Snapshot, state: Any, now_s: float) -> BaselineDecision:
        actions: list[Action] = []
        memories = {}
        for pool, law in self.laws.items():
            workers = [
                each
                for each in snapshot.workers
                if each.pool is pool and each.phase is not Phase.LEAVING
            ]
            memory = None if state is None else state[pool]
            wanted, memories[pool] = law.decide(self._seen(pool, snapshot, workers, now_s), memory)
            actions += _actions(pool, workers, wanted)
        return BaselineDecision(tuple(actions), memories)

    def _seen(
        self, pool: Pool, snapshot: Snapshot, workers: Sequence[WorkerView], now_s: float
    ) -> Seen:
        assert snapshot.demand is not None
        demand = snapshot.demand[pool]
        room = sum(each.kv_tokens_total for each in workers)
        requests = demand.running_requests + demand.waiting_requests
        tokens = demand.running_tokens + demand.waiting_tokens
        mean_tokens = max(1.0, tokens / requests) if requests else 1000.0
        if pool is Pool.PREFILL:
            rate = self.model.prefill_tokens_per_s(int(mean_tokens))
        else:
            rate = self.model.decode_tokens_per_s(mean_tokens, self.itl_s)
        return Seen(
            now_s,
            pool,
            current=len(workers),
            waiting=demand.waiting_requests,
            running=demand.running_requests,
            kv_used=sum(each.kv_tokens_used for each in workers) / room if room else 0.0,
            tokens_per_s=demand.arrival_tokens_per_s,
            worker_tokens_per_s=rate,
            least=self.least,
            most=self.most,
        )


def _actions(pool: Pool, workers: Sequence[WorkerView], wanted: int) -> list[Action]:
    """Bring a pool to a number. The workers with the fewest requests leave, starting ones first."""
    if wanted >= len(workers):
        return [Action(ActionKind.ADD, pool, None, "")] * (wanted - len(workers))
    leaving = sorted(workers, key=lambda each: (each.phase is Phase.READY, each.requests, each.id))
    return [
        Action(ActionKind.REMOVE, pool, each.id, "") for each in leaving[: len(workers) - wanted]
    ]


@dataclass(frozen=True, slots=True)
class Family:
    """One system with a small grid of its targets, so that its best setting is compared."""

    name: str
    variants: Mapping[str, Scaler]


def families(model: LatencyModel, itl_s: float) -> tuple[Family, ...]:
    """Return all baselines but the fixed pools, with their grids."""

    def family(name: str, grid: Mapping[str, tuple[Law, Law]]) -> Family:
        return Family(
            name,
            {
                label: Baseline({Pool.PREFILL: prefill, Pool.DECODE: decode}, model, itl_s)
                for label, (prefill, decode) in grid.items()
            },
        )

    start_s = model.cold_start_s
    return (
        family(
            "hpa-queue",
            {
                f"{n:g} waiting, window {window_s:g} s": _both(Hpa(n, down_window_s=window_s))
                for n in (0.5, 2.0, 8.0)
                for window_s in (SHORT_S, LONG_S)
            },
        ),
        family(
            "keda",
            {
                f"{p:g}/{d:g} requests, {kv:.0%} KV, window {window_s:g} s": (
                    Hpa(p, counts_running=True, down_window_s=window_s),
                    Hpa(d, counts_running=True, kv_used=kv, down_window_s=window_s),
                )
                for p in (0.5, 1.0, 2.0)
                for d, kv, window_s in ((32, 0.5, SHORT_S), (96, 0.7, SHORT_S), (96, 0.9, LONG_S))
            },
        ),
        family(
            "ray-serve",
            {
                f"{p:g}/{d:g} ongoing, delay {delay_s:g} s": (
                    RayServe(p, downscale_delay_s=delay_s),
                    RayServe(d, downscale_delay_s=delay_s),
                )
                for p in (0.3, 0.6, 1.2)
                for d, delay_s in ((32, 600.0), (96, 600.0), (96, LONG_S))
            },
        ),
        *(
            family(
                name,
                {
                    f"margin {margin:g}, window {window_s:g} s": _both(
                        Forecast(margin, lags, start_s, down_window_s=window_s)
                    )
                    for margin in (1.3, 1.7, 2.2)
                    for window_s in (SHORT_S, LONG_S)
                },
            )
            for name, lags in (("moving-average", 0), ("ar", 6))
        ),
    )


def _both(law: Law) -> tuple[Law, Law]:
    """Return the same law for both pools."""
    return law, law

"""What the autoscaler sees of the simulated cluster.

The router's part is the record that a live router publishes. What it holds is measured by the same
code (``router.signals``, the queues of ``router.admission``, the shares of ``router.placement``).
"""

from __future__ import annotations

from autoscale.demand import demand_of
from autoscale.snapshot import Phase, Snapshot, WorkerView
from core.types import Pool, RouterRecord, WorkerKey, WorkerShare
from router.signals import LATENCY_WINDOW_S
from simulate.fleet import Worker
from simulate.front import Front


class Observer:
    """Makes snapshots.

    Args:
        gpus: of one worker.
        start_s: the policy's time at the start of the simulation.
    """

    def __init__(self, front: Front, gpus: float, start_s: float) -> None:
        self._front = front
        self._gpus = gpus
        self._start_s = start_s

    def snapshot(self) -> Snapshot:
        """Return what the autoscaler sees now."""
        router = self.record()
        shares = {(each.worker_id, each.incarnation): each for each in router.shares}
        return Snapshot(
            workers=tuple(self._view(worker, shares) for worker in self._front.fleet),
            demand={pool: demand_of(pool, (router,), LATENCY_WINDOW_S) for pool in Pool},
            measured_s=self._start_s + self._front.now_s,
            gpus_per_worker=dict.fromkeys(Pool, self._gpus),
        )

    def record(self) -> RouterRecord:
        """Return what the router publishes."""
        front = self._front
        rates = front.signals.rates()
        ttft_s, itl_s = front.signals.latencies()
        return RouterRecord(
            id="router",
            address="",
            queues=(*front.turns.queue_loads(), *front.stranded_loads()),
            shares=front.ledger.shares(),
            window_s=rates.window_s,
            arrived_requests=rates.requests,
            arrived_prompt_tokens=rates.prompt_tokens,
            output_tokens=rates.output_tokens,
            ttft_s=ttft_s,
            itl_s=itl_s,
        )

    def _view(self, worker: Worker, shares: dict[WorkerKey, WorkerShare]) -> WorkerView:
        is_pending = worker.phase is Phase.PENDING
        since_s = self._start_s + worker.since_s
        if worker.record is None:
            return WorkerView(
                worker.id,
                worker.role,
                worker.phase,
                since_s,
                gpus=self._gpus,
                problem="no GPU is free" if is_pending else "",
            )
        share = shares.get(worker.record.key)
        load = worker.load()
        return WorkerView(
            worker.id,
            worker.role,
            worker.phase,
            since_s,
            gpus=self._gpus,
            requests=share.requests if share is not None else 0,
            kv_tokens_used=(load.kv_blocks_total - load.kv_blocks_free) * load.kv_block_tokens,
            kv_tokens_total=load.kv_blocks_total * load.kv_block_tokens,
            tokens_per_s=share.tokens_per_s if share is not None else 0.0,
            can_change_role=True,
        )

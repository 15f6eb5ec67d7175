"""Common parts of test_hazards_*. These tests try what broke in other projects' KV streams.

Each test is named after its hazard. References in the tests are to public issue trackers:
V vllm-project/vllm, S sgl-project/sglang, D ai-dynamo/dynamo, A vllm-project/aibrix, N NVIDIA/nccl.
Other tests cover the following hazards. The right column has each test's file
and a part of its name:

    prefix blocks in suffix slots (V#48633)    test_stream: exactly_the_lacking_blocks_arrive,
                                               a_message_that_was_not_reserved; test_shapes
    decode aborts, or its client is gone       test_stream: cancelled_by_d_before_during_and_after;
    (V#46283, V#50425, D#7489)                 blocks and threads after many of them: test_soak
    a decode rank never reserves (V#41269)     test_shapes: does_not_hold_prefill_for_ever
    abandoned prefills compute on (D#13691)    test_connector_scheduler: an_abort_after_a_step
    a kill fails other transfers (S#12779)     test_stream: death_of_prefill_fails_its_transfers
    no notice if a prefill fails before it     test_stream: a_reservation_for_an_aborted_prefill,
    begins (S#36033)                           preemption_fails_the_transfer
    a failed transfer is not recomputed        test_connector_scheduler: recomputed_from_the_start
    a drain ends before all KV has been        test_connector_scheduler: sent_blocks_stay_until_a_
    acknowledged (D#13559)                     rank_releases_them
    an engine without requests takes no step   the same test; test_hazards_peers has the case of
    that would free blocks (V#41180)           an abort
    a pickled frame (CVE-2025-47277)           test_stream: no_pickle_on_the_wire
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch

from kv_transfer.receive import receiver
from kv_transfer.receive.receiver import Receiver
from kv_transfer.receive.records import Peer
from tests.support.kv_faults import PATIENT_S
from tests.support.kv_stream import (
    BLOCK_TOKENS,
    Decode,
    Prefill,
    blocks_of,
    chunk_of,
    same_blocks,
    stream,
)
from tests.support.waiting import wait_until

LONG = 20 * BLOCK_TOKENS  # dozens of messages; only a few fit into the staging buffers
SOURCE, TARGET = list(range(20)), list(range(30, 50))
# Longer than every wait in these tests, so a timeout of this length never expires.
NEVER_S = 600.0
ends = partial(stream, pair_timeout_s=PATIENT_S)


def compute(prefill: Prefill, transfer_id: str, blocks: list[int], tokens: int) -> None:
    """Compute a prompt and sample its first token."""
    prefill.compute(transfer_id, blocks, tokens)
    prefill.server.request_finished(transfer_id, 42, computed=True)


def step(prefill: Prefill, transfer_id: str, start: int, end: int, tokens: int = LONG) -> None:
    """Compute one chunk of a prompt, in the blocks of ``SOURCE``."""
    blocks = tuple(SOURCE[: blocks_of(end)])
    prefill.server.begin_step([chunk_of(transfer_id, blocks, start, end, tokens)])
    prefill.server.end_step()


def delivers(prefill: Prefill, decode: Decode, transfer_id: str) -> bool:
    """Return whether a transfer delivers the right KV. Check that no engine call hangs."""
    decode.reserve(prefill, transfer_id, [60, 61], 0, 20)
    engine = threading.Thread(
        target=compute, args=(prefill, transfer_id, [62, 63], 20), daemon=True
    )
    engine.start()
    wait_until(lambda: not engine.is_alive(), what="the engine's calls have returned")
    return decode.result(transfer_id).complete and same_blocks(
        prefill.caches, [62, 63], decode.caches, [60, 61]
    )


def fill(caches: list[torch.Tensor], blocks: list[int], value: float) -> None:
    """Overwrite blocks, as an engine does when it gives them to another request."""
    for cache in caches:
        cache[blocks] = value


def filled(caches: list[torch.Tensor], blocks: list[int], value: float) -> bool:
    return all(bool((cache[blocks] == value).all()) for cache in caches)


def only_peer(decode: Decode) -> Peer:
    (peer,) = decode.client.transfers.peers.values()
    return peer


def close_only_pair(prefill: Prefill, *_: Any) -> None:
    """Close prefill's only pair, as if its peer had gone silent."""
    with prefill.server.transfers.lock:
        (peer,) = prefill.server.transfers.peers.values()
        prefill.server.transfers.close_peer(peer, "closed by the test")


def record_receivers(monkeypatch: pytest.MonkeyPatch) -> list[Receiver]:
    """Return a list to which each receiver made from now on is added."""
    made: list[Receiver] = []

    def record(*args: Any) -> Receiver:
        made.append(Receiver(*args))
        return made[-1]

    monkeypatch.setattr(receiver, "Receiver", record)
    return made

"""All KV that a decode rank needs reaches it exactly once, in messages of bounded size."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer import geometry
from kv_transfer.errors import IncompatibleError
from kv_transfer.geometry import (
    HeadRange,
    KvGeometry,
    LayerBlockRange,
    heads_of,
    plan_pair,
    sources,
    split_into_messages,
)

GEOMETRY = KvGeometry(
    model="tiny",
    dtype="bfloat16",
    num_layers=30,
    total_kv_heads=3,
    content=128,
    item_bytes=2,
    block_tokens=128,
    layout="LBHNC",
    positions_known=True,
    tp_size=1,
    tp_rank=0,
)


def test_block_bytes_of_smollm2() -> None:
    # 128 tokens x 3 heads x (64 K + 64 V) x 2 bytes
    assert GEOMETRY.block_bytes == 98_304
    assert replace(GEOMETRY, tp_size=3, tp_rank=2).block_bytes == 32_768
    assert replace(GEOMETRY, tp_size=6, tp_rank=5).block_bytes == 32_768, "a copy of a whole head"


@pytest.mark.parametrize(
    ("tp_size", "total", "ranks"),
    [
        (1, 6, [(0, 6)]),
        (3, 6, [(0, 2), (2, 4), (4, 6)]),
        (2, 2, [(0, 1), (1, 2)]),
        (6, 3, [(0, 1), (0, 1), (1, 2), (1, 2), (2, 3), (2, 3)]),
        (4, 1, [(0, 1)] * 4),
    ],
)
def test_heads_of_each_rank(tp_size: int, total: int, ranks: list[tuple[int, int]]) -> None:
    """If there are more ranks than heads, neighbouring ranks hold copies of a head, as in vLLM."""
    assert [heads_of(rank, tp_size, total) for rank in range(tp_size)] == [
        HeadRange(*heads) for heads in ranks
    ]


@pytest.mark.parametrize(("tp_size", "total"), [(2, 3), (4, 6), (3, 2), (8, 6)])
def test_heads_that_vllm_would_not_split_are_refused(tp_size: int, total: int) -> None:
    with pytest.raises(IncompatibleError, match=f"{total} KV heads cannot be .* {tp_size} ranks"):
        heads_of(0, tp_size, total)


@pytest.mark.parametrize(
    "change",
    [
        {"tp_rank": 1},
        {"tp_rank": -1},
        {"tp_size": 0},
        {"tp_size": 1025},
        {"num_layers": 0},
        {"total_kv_heads": 0},
        {"content": 0},
        {"item_bytes": 0},
        {"block_tokens": 0},
    ],
)
def test_a_cache_that_cannot_be_is_refused(change: dict[str, int]) -> None:
    """A peer sends its geometry in HELLO, and planning divides by the sizes in it."""
    with pytest.raises(ValueError, match="no such KV cache"):
        replace(GEOMETRY, **change)  # type: ignore[arg-type]


def tp_sizes(total: int) -> st.SearchStrategy[int]:
    return st.sampled_from([n for n in range(1, 13) if total % n == 0 or n % total == 0])


@settings(deadline=None)
@given(data=st.data(), total=st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
def test_every_head_comes_from_one_rank_and_every_rank_learns_of_each_transfer(
    data: st.DataObject, total: int
) -> None:
    prefill_tp, decode_tp = data.draw(tp_sizes(total)), data.draw(tp_sizes(total))
    readers: dict[int, list[int]] = {rank: [] for rank in range(prefill_tp)}
    with_heads = dict.fromkeys(range(prefill_tp), 0)
    for decode_rank in range(decode_tp):
        got: list[int] = []
        for rank, heads in sources(decode_rank, decode_tp, prefill_tp, total).items():
            readers[rank].append(decode_rank)
            with_heads[rank] += bool(heads)
            assert heads & heads_of(rank, prefill_tp, total) == heads or not heads
            got += range(heads.start, heads.end)
        lacking = heads_of(decode_rank, decode_tp, total)
        assert sorted(got) == list(range(lacking.start, lacking.end))
    assert all(readers.values()), "a prefill rank from which no decode rank reserves"
    copies = max(1, prefill_tp // total)
    for first in range(0, prefill_tp, copies):
        loads = [with_heads[rank] for rank in range(first, first + copies)]
        assert max(loads) - min(loads) <= 1, "copies serve decode ranks unevenly"

    for prefill_rank, served in readers.items():
        prefill = replace(GEOMETRY, total_kv_heads=total, tp_size=prefill_tp, tp_rank=prefill_rank)
        for decode_rank in range(decode_tp):
            decode = replace(GEOMETRY, total_kv_heads=total, tp_size=decode_tp, tp_rank=decode_rank)
            if decode_rank in served:
                plan = plan_pair(prefill, decode)
                assert plan.num_decode_ranks == len(served)
                assert (
                    plan.heads == sources(decode_rank, decode_tp, prefill_tp, total)[prefill_rank]
                )
            else:
                with pytest.raises(IncompatibleError, match="does not pair with"):
                    plan_pair(prefill, decode)


def test_planning_for_many_ranks_is_not_quadratic(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer may state a large TP size, and the engine waits for the lock that planning holds."""
    counted = 0

    def counting(rank: int, tp_size: int, total: int) -> HeadRange:
        nonlocal counted
        counted += 1
        return heads_of(rank, tp_size, total)

    monkeypatch.setattr(geometry, "heads_of", counting)
    plan_pair(replace(GEOMETRY, tp_size=3), replace(GEOMETRY, tp_size=96))
    assert counted <= 3 * 3 * 96, "more than 3 calls for each pair of ranks"


def test_equal_blocks_travel_whole_and_unlike_ones_in_common_units() -> None:
    plan = plan_pair(GEOMETRY, GEOMETRY)
    assert plan.whole_blocks
    assert plan.unit_tokens == 128
    assert plan.unit_bytes == GEOMETRY.block_bytes

    plan = plan_pair(replace(GEOMETRY, block_tokens=48), replace(GEOMETRY, block_tokens=32))
    assert not plan.whole_blocks
    assert plan.unit_tokens == 16
    assert plan.unit_bytes == 16 * 3 * 128 * 2
    assert [plan.units_of(tokens) for tokens in (1, 16, 17, 48)] == [1, 1, 2, 3]

    plan = plan_pair(GEOMETRY, replace(GEOMETRY, layout="LBNHC"))
    assert not plan.whole_blocks, "equal block sizes, but different layouts"


def test_the_size_bound_counts_units_and_one_always_fits() -> None:
    plan = plan_pair(GEOMETRY, GEOMETRY)
    units = [plan.max_units(n * plan.unit_bytes + extra) for n, extra in [(0, 1), (1, 0), (3, -1)]]
    assert units == [1, 1, 2]
    idle = plan_pair(
        replace(GEOMETRY, tp_size=6, tp_rank=1), replace(GEOMETRY, tp_size=3, tp_rank=1)
    )
    assert not idle.heads
    assert idle.unit_bytes == 0
    assert idle.max_units(100) >= 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": "other"}, "model is tiny in prefill and other in decode"),
        ({"dtype": "float16"}, "dtype is bfloat16 in prefill and float16 in decode"),
        ({"num_layers": 31}, "num_layers is 30 in prefill and 31 in decode"),
        ({"total_kv_heads": 1}, "total_kv_heads is 3 in prefill and 1 in decode"),
        ({"content": 64}, "content is 128 in prefill and 64 in decode"),
        ({"item_bytes": 1}, "item_bytes is 2 in prefill and 1 in decode"),
    ],
)
def test_facts_that_no_mapping_bridges_are_named(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(IncompatibleError) as caught:
        plan_pair(GEOMETRY, replace(GEOMETRY, **change))  # type: ignore[arg-type]
    assert str(caught.value) == f"KV caches cannot be mapped: {sentence}"


def test_all_differences_are_named_together() -> None:
    other = replace(GEOMETRY, model="other", content=64, block_tokens=16, positions_known=False)
    with pytest.raises(IncompatibleError) as caught:
        plan_pair(GEOMETRY, other)
    for fact in ("model is", "content is", "decode does not know where in a block a token lies"):
        assert fact in str(caught.value)


@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("change", [{"block_tokens": 64}, {"layout": "LBNHC"}])
def test_only_equal_blocks_travel_if_a_side_does_not_know_its_tokens(
    side: str, change: dict[str, object]
) -> None:
    both = {"prefill": GEOMETRY, "decode": replace(GEOMETRY, **change)}  # type: ignore[arg-type]
    both[side] = replace(both[side], positions_known=False)
    with pytest.raises(IncompatibleError, match=f"and {side} does not know where in a block"):
        plan_pair(**both)
    assert plan_pair(both[side], both[side]).whole_blocks


@given(
    layer_start=st.integers(0, 5),
    layers=st.integers(1, 40),
    unit_start=st.integers(0, 5),
    units=st.integers(1, 40),
    max_units=st.integers(1, 200),
)
def test_messages_cover_a_range_exactly_once(
    layer_start: int, layers: int, unit_start: int, units: int, max_units: int
) -> None:
    block_range = LayerBlockRange(layer_start, layer_start + layers, unit_start, unit_start + units)
    seen: dict[tuple[int, int], int] = {}
    last_layer_end = 0
    for message in split_into_messages(block_range, max_units):
        assert message.num_units <= max_units
        assert message.layer_end >= last_layer_end, "messages are not ordered by layer"
        last_layer_end = message.layer_end
        for layer in range(message.layer_start, message.layer_end):
            for unit in range(message.unit_start, message.unit_end):
                seen[layer, unit] = seen.get((layer, unit), 0) + 1
    assert seen == {
        (layer, unit): 1
        for layer in range(layer_start, layer_start + layers)
        for unit in range(unit_start, unit_start + units)
    }


@pytest.mark.parametrize("corners", [(0, 0, 0, 1), (1, 1, 0, 1), (0, 1, 2, 1), (-1, 1, 0, 1)])
def test_empty_and_negative_ranges_are_refused(corners: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="empty or negative range"):
        LayerBlockRange(*corners)

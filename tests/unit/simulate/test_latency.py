"""The latency model: formulas, file, and fit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from core.errors import ConfigError
from engine.fake import FakeLatency
from simulate.latency import (
    PRESETS,
    DecodeLatency,
    PrefillLatency,
    TransferLatency,
    fake_engine,
    fit_decode,
    fit_prefill,
)
from simulate.latency_file import latency_model, save_latency_model

LENGTHS = (16, 100, 500, 2000, 8000, 20_000)


def test_a_cached_prefix_saves_its_computation_but_not_the_attention_to_it() -> None:
    prefill = PrefillLatency(base_s=1.0, per_token_s=0.01, per_square_token_s=0.001)
    whole, first = prefill.seconds(100), prefill.seconds(40)
    assert prefill.seconds(100, cached_tokens=40) == pytest.approx(whole - first + 1.0)


@pytest.mark.parametrize(
    "prefill",
    [
        PrefillLatency(0.008, 45e-6, 6.6e-10),
        PrefillLatency(0.0, 2e-4),
        PrefillLatency(0.02, 1e-5),
    ],
)
def test_exact_prefill_times_give_the_factors_back(prefill: PrefillLatency) -> None:
    fitted, error = fit_prefill([(each, prefill.seconds(each)) for each in LENGTHS])
    assert error.rms < 1e-6
    for name in ("base_s", "per_token_s", "per_square_token_s"):
        assert getattr(fitted, name) == pytest.approx(getattr(prefill, name), rel=1e-3, abs=1e-12)


def test_exact_step_times_give_the_factors_back() -> None:
    decode = DecodeLatency(0.008, 5e-5, 5.6e-8)
    samples = [
        (streams, streams * kv, decode.seconds(streams, streams * kv))
        for streams in (1, 4, 16, 64)
        for kv in (100, 2000)
    ]
    fitted, error = fit_decode(samples)
    assert error.largest < 1e-6
    assert fitted.per_kv_token_s == pytest.approx(decode.per_kv_token_s, rel=1e-3)


def test_noise_is_reported_as_the_error() -> None:
    rng = random.Random(1)
    true = PrefillLatency(0.01, 1e-4)
    samples = [(n, true.seconds(n) * rng.uniform(0.9, 1.1)) for n in LENGTHS * 20]
    fitted, error = fit_prefill(samples)
    assert fitted.per_token_s == pytest.approx(true.per_token_s, rel=0.05)
    assert 0.04 < error.rms < 0.08
    assert error.largest < 0.15
    assert error.samples == len(samples)


@pytest.mark.parametrize("samples", [[], [(10, 1.0)], [(10, 1.0), (10, 1.1)], [(10, 1.0), (9, 0)]])
def test_too_few_or_impossible_samples(samples: list[tuple[int, float]]) -> None:
    with pytest.raises(ConfigError):
        fit_prefill(samples)


@pytest.mark.parametrize("name", PRESETS)
def test_a_model_survives_its_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    save_latency_model(PRESETS[name], path)
    assert latency_model(str(path)) == PRESETS[name]
    assert latency_model(name) == PRESETS[name]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("per_token_s", "per_tokn_s"), "unknown field prefill.per_tokn_s; did you mean per_token"),
        (("base_s: 0.008", "base_s: fast"), "prefill.base_s is 'fast'; write a number"),
        (("base_s: 0.008", "base_s: -1"), "prefill.base_s is -1"),
        (("cold_start_s: 60.0", "cold_start_s: [1]"), r"cold_start_s is \[1\]"),
        (("after prefill", "later"), "transfer.start is 'later'; write 'after prefill' or"),
        (("decode_tokens: 400000", "decode_tokens: 1.5"), "write a whole number"),
        (("decode_tokens: 400000", "decode_tokens: 0"), "must hold at least one block"),
        (("decode_tokens: 400000", ""), "kv.decode_tokens is missing"),
    ],
)
def test_a_wrong_file_names_the_field(
    change: tuple[str, str], complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.yaml"
    save_latency_model(PRESETS["8b-h100"], path)
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises(ConfigError, match=complaint):
        latency_model(str(path))


def test_an_unknown_model() -> None:
    with pytest.raises(ConfigError, match="write 8b-h100 or 8b-a10 or fake"):
        latency_model("h100")


def test_the_fake_engine_has_its_own_numbers() -> None:
    model = fake_engine(FakeLatency(prefill_ms_per_token=0.5, decode_step_ms=4, transfer_ms=7))
    assert model.prefill.seconds(100) == pytest.approx(0.05)
    assert model.decode.seconds(9, 5000) == pytest.approx(0.004)
    assert model.transfer.seconds(5000) == pytest.approx(0.007)


def test_the_rate_of_a_decode_worker_keeps_the_itl_and_the_room() -> None:
    model = PRESETS["8b-h100"]
    rate = model.decode_tokens_per_s(kv_tokens=100, itl_s=0.02)
    streams = rate * 0.02
    assert model.decode.seconds(int(streams), int(streams * 100)) == pytest.approx(0.02, rel=0.01)
    few = model.decode_tokens_per_s(kv_tokens=200_000, itl_s=10.0)
    assert few == pytest.approx(2 / model.decode.seconds(2, 400_000))
    assert TransferLatency(0.1).seconds(1000) == pytest.approx(0.1)

"""The scaling laws of other systems."""

from __future__ import annotations

import ast
import importlib.util
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from core.types import Pool
from simulate.laws import Forecast, Hpa, Law, RayServe, Seen

SEEN = Seen(
    now_s=0.0,
    pool=Pool.DECODE,
    current=4,
    waiting=0,
    running=0,
    kv_used=0.0,
    tokens_per_s=0.0,
    worker_tokens_per_s=100.0,
)


class Driver:
    """Calls a law once a second, and lets the pool follow it at once."""

    def __init__(self, law: Law, current: int = 4) -> None:
        self._law = law
        self._memory: Any = None
        self.now_s = 0.0
        self.current = current

    def run(self, seconds: int, **seen: Any) -> int:
        for _ in range(seconds):
            view = replace(SEEN, now_s=self.now_s, current=self.current, **seen)
            self.current, self._memory = self._law.decide(view, self._memory)
            self.now_s += 1
        return self.current


def test_hpa_wants_the_total_over_the_target() -> None:
    assert Driver(Hpa(2.0)).run(1, waiting=13) == 7


def test_hpa_stays_within_the_tolerance() -> None:
    assert Driver(Hpa(10.0)).run(1, waiting=43) == 4
    assert Driver(Hpa(10.0)).run(1, waiting=45) == 5


def test_hpa_doubles_at_most_per_period() -> None:
    driver = Driver(Hpa(1.0), current=8)
    assert driver.run(15, waiting=1000) == 16
    assert driver.run(15, waiting=1000) == 32


def test_hpa_goes_down_after_the_window_only() -> None:
    driver = Driver(Hpa(1.0))
    driver.run(1, waiting=6)
    assert driver.run(299, waiting=0) == 6
    assert driver.run(30, waiting=0) == 1


def test_the_largest_metric_wins() -> None:
    law = Hpa(10.0, counts_running=True, kv_used=0.5)
    assert Driver(law).run(1, running=20, kv_used=0.9) == 8
    assert Driver(law).run(1, running=90, kv_used=0.1) == 8


def test_ray_serve_waits_for_its_delays() -> None:
    driver = Driver(RayServe(2.0, look_back_s=1.0))
    assert driver.run(30, running=16) == 4
    assert driver.run(1, running=16) == 8
    assert driver.run(600, running=2) == 8
    assert driver.run(1, running=2) == 1


def installed_functions() -> dict[str, Any]:
    """Return functions of Ray Serve's policy, without the time to import Ray."""
    package = importlib.util.find_spec("ray")
    if package is None or package.origin is None:
        pytest.skip("Ray is not installed")
    source = Path(package.origin).parent / "serve" / "autoscaling_policy.py"
    names = ("_DELAY_ELAPSED_EPS_S", "_apply_scaling_factors", "_apply_delay_logic")
    wanted = [
        node
        for node in ast.parse(source.read_text()).body
        if getattr(node, "name", "") in names
        or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in names)
    ]
    assert len(wanted) == len(names)
    imports = ast.parse("from __future__ import annotations\nimport math, time").body
    found: dict[str, Any] = {
        "SERVE_AUTOSCALING_DECISION_COUNTERS_KEY": "counter",
        "SERVE_AUTOSCALING_DECISION_TIMESTAMP_KEY": "timestamp",
    }
    code = compile(ast.Module([*imports, *wanted], []), str(source), "exec")
    exec(code, found)  # noqa: S102
    return found


def test_ray_serves_formula_is_the_installed_one() -> None:
    serve = installed_functions()
    rng = random.Random(1)
    for _ in range(200):
        up, down = rng.choice((0.5, 1.0, 2.0)), rng.choice((0.3, 1.0))
        law = RayServe(
            1.0,
            upscale_delay_s=3,
            downscale_delay_s=7,
            upscaling_factor=up,
            downscaling_factor=down,
        )
        config = SimpleNamespace(
            get_upscaling_factor=lambda up=up: up,
            get_downscaling_factor=lambda down=down: down,
            upscale_delay_s=3,
            downscale_delay_s=7,
            downscale_to_zero_delay_s=None,
        )
        target, theirs = rng.randrange(1, 9), dict[str, Any]()
        ours, direction, since_s = target, 0, 0.0
        desired = 0.0
        for now_s in range(40):
            if now_s % 8 == 0 or rng.random() < 0.05:
                desired = rng.uniform(0, 12)
            number = serve["_apply_scaling_factors"](desired, target, config)
            assert law.scaled(desired, target) == number
            target, theirs = serve["_apply_delay_logic"](
                max(1, number), target, config, theirs, _now=float(now_s)
            )
            ours, direction, since_s = law.delayed(
                max(1, number), ours, direction, since_s, float(now_s)
            )
            assert ours == target


def test_a_forecast_provides_for_the_mean_with_its_margin() -> None:
    assert Driver(Forecast(1.5, lags=0, horizon_s=60)).run(120, tokens_per_s=400.0) == 6


def test_an_autoregressive_forecast_follows_a_trend() -> None:
    law = Forecast(1.0, lags=2, horizon_s=60)
    bins = tuple(100.0 + 10 * index for index in range(30))
    assert law.expected(bins) == pytest.approx(bins[-1] + 60, rel=0.02)
    assert replace(law, lags=0).expected(bins) < bins[-1]


def test_a_forecast_of_noise_stays_finite() -> None:
    rng = random.Random(1)
    bins = tuple(rng.uniform(0, 100) for _ in range(60))
    expected = Forecast(1.0, lags=6, horizon_s=120).expected(bins)
    assert 0 <= expected <= 2 * max(bins)
    assert not math.isnan(expected)

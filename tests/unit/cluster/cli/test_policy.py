"""``baton policy``: what it prints and refuses, without a cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from autoscale.snapshot import Phase, PoolDecision, Reason, WorkerView
from cluster.autoscale.view import AutoscaleView, Change, decode_view, encode_view
from cluster.cli.main import main
from cluster.cli.policy import as_json, as_text, check
from core.config.schema import load_config
from core.types import Pool

ROOT = Path(__file__).resolve().parents[4]
READY = sorted((ROOT / "deploy" / "policies").glob("*.yaml"))

VIEW = AutoscaleView(
    policy="chat",
    policy_digest="1",
    refused_digest="",
    refused_why="",
    advisory=False,
    demand_age_s=0.25,
    pools=(
        PoolDecision(
            Pool.PREFILL,
            current=1,
            target=2,
            reasons=(
                Reason("signals[1] QueueSeconds", 2, "1.6 s per worker"),
                Reason("signals[0] Utilization", 1, "0.4 of the time"),
            ),
        ),
        PoolDecision(Pool.DECODE, 1, 1, (Reason("hold", 1, "nothing new"),)),
    ),
    advice=(),
    workers=(
        WorkerView("baton-decode-0-aaaaaa", Pool.DECODE, Phase.READY, 0.0, requests=3),
        WorkerView("baton-prefill-1-bbbbbb", Pool.PREFILL, Phase.PENDING, 0.0, problem="no GPU"),
    ),
    changes=(Change(1, 1_700_000_000.0, Pool.PREFILL, "a worker starts: 1 to 2"),),
)


def test_the_ready_policies_are_correct(capsys: pytest.CaptureFixture[str]) -> None:
    assert READY
    assert main(["policy", "check", *map(str, READY)]) == 0
    assert capsys.readouterr().out.count(": correct") == len(READY)


def test_a_wrong_policy_is_refused_with_line_and_nearest_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(READY[0].read_text().replace("maxReplicas", "maxReplica", 1))
    assert main(["policy", "check", str(file)]) == 1
    line = next(
        number
        for number, text in enumerate(file.read_text().splitlines(), 1)
        if "maxReplica:" in text
    )
    error = capsys.readouterr().err
    assert f"{file}:{line}: " in error
    assert "the nearest name is maxReplicas" in error


def test_each_ready_policy_suits_the_default_configuration() -> None:
    config = load_config(None, {"cluster.role_change": True})
    for path in READY:
        check(path, config)


def test_all_wrong_policies_are_told_and_the_configuration_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "baton.yaml"
    config.write_text("decode: {max_replicas: 2}\n")
    files = []
    for name in ("a", "b"):
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text((ROOT / "deploy" / "policies" / "chat.yaml").read_text())
    assert main(["policy", "check", "--config", str(config), *map(str, files)]) == 1
    error = capsys.readouterr().err
    for file in files:
        assert f"{file}: spec.decode.maxReplicas: 8 is more than 2" in error


def test_a_missing_file_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "check", str(tmp_path / "none.yaml")]) == 1
    error = capsys.readouterr().err
    assert error == f"baton: {tmp_path / 'none.yaml'}: cannot be read: No such file or directory\n"


def test_explain_tells_the_decision_and_why() -> None:
    text = as_text(VIEW)
    for part in (
        "Policy chat; the newest numbers are 0.2 s old",
        "prefill: 1 worker, target 2\n  signals[1] QueueSeconds: 2 (1.6 s per worker)",
        "decode: 1 worker, target 1\n  hold: 1 (nothing new)",
        "baton-decode-0-aaaaaa: decode, ready, 3 requests",
        "baton-prefill-1-bbbbbb: prefill, pending, 0 requests; no GPU",
        "prefill: a worker starts: 1 to 2",
    ):
        assert part in text


def test_explain_says_what_is_missing() -> None:
    view = replace(VIEW, demand_age_s=None, refused_digest="2", refused_why="it is wrong")
    head = as_text(view).splitlines()[0]
    assert "no router has reported; the numbers of workers stay" in head
    assert "a newer policy was refused: it is wrong" in head


def test_explain_shows_advice_apart() -> None:
    text = as_text(replace(VIEW, advice=VIEW.pools))
    assert text.count("prefill: 1 worker, target 2") == 2
    assert "The policy is advisory. It would decide:" in text


def test_the_view_survives_the_store() -> None:
    assert decode_view(encode_view(VIEW)) == VIEW
    assert decode_view(as_json(VIEW).encode()) == VIEW
    assert decode_view(b"{}") is None
    assert decode_view(None) is None

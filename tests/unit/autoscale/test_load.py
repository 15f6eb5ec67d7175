"""A policy file that is wrong is refused with its line, its field and what to write instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autoscale.load import check_against, json_schema, load_policy, parse_policy
from core.errors import ConfigError
from core.types import Pool
from tests.support.autoscale_views import policy

POLICIES = Path(__file__).resolve().parents[3] / "deploy" / "policies"
READY = sorted(POLICIES.glob("*.yaml"))

TEXT = """\
apiVersion: baton/v1
kind: AutoscalingPolicy
metadata: {name: chat}
spec:
  mode: Active
  prefill:
    minReplicas: 1
    maxReplicas: 8
    signals:
      - {type: QueueSeconds, target: 1.0}
      - {type: TTFT, percentile: 95, targetMilliseconds: 500}
    behavior:
      scaleUp:
        stabilizationWindowSeconds: 0
        policies: [{type: Pods, value: 2, periodSeconds: 15}]
  decode:
    maxReplicas: 8
    signals:
      - {type: KVUtilization, target: 0.8}
  budget: {gpus: 8, priority: Decode}
  ratio: {min: 0.25, max: 4}
  roleChange: Never
  schedules:
    - name: office
      start: "0 8 * * 1-5"
      end: "0 18 * * 1-5"
      timeZone: Europe/Berlin
      prefill: {minReplicas: 4}
"""


def test_the_example_is_read() -> None:
    spec = parse_policy(TEXT, "chat.yaml").spec
    assert spec.pool(Pool.PREFILL).signals[0].type == "QueueSeconds"
    assert spec.decode.min_replicas == 1
    assert spec.decode.behavior.scale_down.stabilization_window_seconds == 300
    assert spec.schedules[0].bounds(Pool.PREFILL) is not None


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        (
            "target: 1.0",
            "targt: 1.0",
            "10: spec.prefill.signals[0].targt: unknown field; the nearest name is target",
        ),
        (
            "behavior:",
            "behaviour:",
            "12: spec.prefill.behaviour: unknown field; the nearest name is behavior",
        ),
        (
            "roleChange",
            "rolechange",
            "22: spec.rolechange: unknown field; the nearest name is roleChange",
        ),
        (
            "periodSeconds",
            "period",
            "15: spec.prefill.behavior.scaleUp.policies[0].period: unknown field",
        ),
        (
            "QueueSeconds",
            "QueueSecnds",
            "10: spec.prefill.signals[0].type: unknown type 'QueueSecnds'; the nearest name is Q",
        ),
        (
            "KVUtilization",
            "TTFT",
            "19: spec.decode.signals[0].type: TTFT is a signal of prefill; decode has",
        ),
        ("TTFT", "ITL", "11: spec.prefill.signals[1].type: ITL is a signal of decode; prefill has"),
        (
            "QueueSeconds",
            "KVUtilization",
            "10: spec.prefill.signals[0].type: KVUtilization is a signal of decode",
        ),
        (
            "KVUtilization",
            "QueueSeconds",
            "19: spec.decode.signals[0].type: QueueSeconds is a signal of prefill",
        ),
        ("type: QueueSeconds, ", "", "10: spec.prefill.signals[0].type: is missing"),
        (
            "percentile: 95",
            "percentile: 90",
            "11: spec.prefill.signals[1].percentile: must be 95 or 99, not 90",
        ),
        (
            "mode: Active",
            "mode: Advsory",
            "5: spec.mode: must be Active or Advisory, not 'Advsory'; the nearest is Ad",
        ),
        (
            "kind: AutoscalingPolicy",
            "kind: Policy",
            "2: kind: must be AutoscalingPolicy, not 'Policy'",
        ),
        ("apiVersion: baton/v1\n", "", "1: apiVersion: is missing"),
        ("maxReplicas: 8", 'maxReplicas: "8"', "8: spec.prefill.maxReplicas: "),
        ("maxReplicas: 8", "maxReplicas: yes", "8: spec.prefill.maxReplicas: "),
        ("target: 1.0", "target: 0", "10: spec.prefill.signals[0].target: "),
        ("target: 1.0", "target: .inf", "10: spec.prefill.signals[0].target: "),
        (
            "minReplicas: 1",
            "minReplicas: 9",
            "8: spec.prefill.maxReplicas: must be at least minReplicas (9), not 8",
        ),
        ("min: 0.25", "min: 5", "21: spec.ratio.max: must be at least ratio.min (5), not 4"),
        ("min: 0.25, max: 4", "min: 20, max: 30", "21: spec.ratio: no numbers of workers"),
        (
            "roleChange: Never",
            "roleChange: WhenBudgetIsSpent\n  budget: {gpus: 8}",
            "23: is not valid YAML: the key 'budget' appears twice",
        ),
        (
            "budget: {gpus: 8, priority: Decode}",
            "mode: Active",
            "20: is not valid YAML: the key 'mode' appears twice",
        ),
        ("0 8 *", "0 8 8 *", "25: spec.schedules[0].start: '0 8 8 * * 1-5' is no cron expression"),
        ("0 18 * * 1-5", "0 8 * * 1-5", "26: spec.schedules[0].end: must differ from start"),
        (
            "Europe/Berlin",
            "Europe/Berln",
            "27: spec.schedules[0].timeZone: unknown time zone 'Europe/Berln'; the nearest",
        ),
        (
            "minReplicas: 4",
            "minReplicas: 9",
            "28: spec.schedules[0].prefill.minReplicas: 9 (minReplicas) is more",
        ),
        (
            "minReplicas: 4",
            "maxReplicas: 9",
            "28: spec.schedules[0].prefill.maxReplicas: must be at most",
        ),
        ("spec:", "spec: [", "6: is not valid YAML"),
    ],
)
def test_a_mistake_is_named_with_its_line(old: str, new: str, error: str) -> None:
    assert old in TEXT
    with pytest.raises(ConfigError) as caught:
        parse_policy(TEXT.replace(old, new, 1), "chat.yaml")
    assert f"chat.yaml:{error}" in str(caught.value)


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_policy(TEXT.replace("target", "targt").replace("gpus: 8", "gpus: 0"), "chat.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) >= 4
    assert all(line.startswith("chat.yaml:") for line in lines)


def test_a_role_change_needs_a_budget() -> None:
    text = TEXT.replace("budget: {gpus: 8, priority: Decode}", "warmupSeconds: 30")
    with pytest.raises(ConfigError, match=r"roleChange: WhenBudgetIsSpent needs budget\.gpus"):
        parse_policy(text.replace("roleChange: Never", "roleChange: WhenBudgetIsSpent"), "x")


@pytest.mark.parametrize(
    "text", ["", "- a", "chat", "a: !!python/name:os.system x", "? {a: b}\n: c"]
)
def test_something_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        parse_policy(text, "x.yaml")


def nested_aliases(line: str) -> str:
    levels = [line.format(each=each, before=f"*a{each - 1}") for each in range(1, 40)]
    return "\n".join(["x0: &a0 {k: 1}", *levels])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("spec: \0", "not valid YAML"),
        ("[" * 50_000, "nested too deeply"),
        ("{a: " * 20_000, "nested too deeply"),
        (nested_aliases("x{each}: &a{each} [{before}, {before}]"), "more than 10000 values"),
        (nested_aliases("x{each}: &a{each} {{<<: [{before}, {before}]}}"), "more than 10000"),
        ("a: &a {b: *a}", "more than 10000 values"),
        ("a: 0x" + "f" * 5000, "1: .* more than 1000 characters"),
        ("a: !!bool x", "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: " + ",".join(["[1"] + ["1"] * 20_000) + "]", "more than 10000 values"),
    ],
    ids=[
        "nul",
        "lists",
        "sections",
        "aliases",
        "merges",
        "itself",
        "number",
        "bool",
        "date",
        "long",
    ],
)
def test_a_file_that_is_made_to_harm_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=rf"x\.yaml:.*{complaint}"):
        parse_policy(text, "x.yaml")


def test_an_anchor_and_a_merge_may_be_used() -> None:
    text = TEXT.replace("behavior:", "behavior: &slowly").replace(
        "decode:", "decode:\n    behavior: {<<: *slowly}"
    )
    spec = parse_policy(text, "chat.yaml").spec
    assert spec.decode.behavior == spec.prefill.behavior


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load_policy(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml"):
        load_policy(tmp_path / "binary.yaml")
    (tmp_path / "large.yaml").write_text("#" * 200_000)
    with pytest.raises(ConfigError, match="more than"):
        load_policy(tmp_path / "large.yaml")


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_each_ready_policy_is_valid(path: Path) -> None:
    loaded = load_policy(path)
    assert loaded.metadata.name == path.stem
    check_against(loaded, dict.fromkeys(Pool, 1.0), can_change_role=False)
    assert path.read_text().count("\n# ") >= 5, "it says when to use it and why its numbers"


def test_there_is_a_policy_for_each_kind_of_load() -> None:
    names = {path.stem for path in READY}
    assert names == {"batch", "bursty", "chat", "code-completion", "cost-saver", "rag", "voice"}


def test_the_committed_schema_is_that_of_the_code() -> None:
    """To write it: python -m autoscale.load > deploy/policies/schema.json"""
    assert json.loads((POLICIES / "schema.json").read_text()) == json_schema()


def test_each_field_has_a_description() -> None:
    schema = json_schema()
    for name, part in [("Policy", schema), *schema["$defs"].items()]:
        for field, value in part["properties"].items():
            assert field == "type" or value.keys() & {"description", "$ref"}, f"{name}.{field}"


def test_the_budget_must_hold_the_minimums() -> None:
    tight = policy({"minReplicas": 3}, budget={"gpus": 4})
    check_against(tight, dict.fromkeys(Pool, 1.0), can_change_role=False)
    with pytest.raises(ConfigError, match=r"4 is less than the 8 GPUs .* 3 prefill and 1 decode"):
        check_against(tight, dict.fromkeys(Pool, 2.0), can_change_role=False)


def test_the_budget_must_hold_the_minimums_of_schedules() -> None:
    office = {
        "name": "office",
        "start": "0 8 * * *",
        "end": "0 18 * * *",
        "prefill": {"minReplicas": 4},
    }
    tight = policy(budget={"gpus": 4}, schedules=[office])
    with pytest.raises(ConfigError, match="in schedule office"):
        check_against(tight, dict.fromkeys(Pool, 1.0), can_change_role=False)


def test_a_budget_of_a_cluster_without_gpus_is_refused() -> None:
    """It would silently bound nothing."""
    with pytest.raises(ConfigError, match="bounds nothing"):
        check_against(policy(budget={"gpus": 4}), dict.fromkeys(Pool, 0.0), can_change_role=False)


def test_roles_must_be_able_to_change() -> None:
    changing = policy(budget={"gpus": 4}, roleChange="WhenBudgetIsSpent")
    check_against(changing, dict.fromkeys(Pool, 1.0), can_change_role=True)
    with pytest.raises(ConfigError, match="cannot change their role"):
        check_against(changing, dict.fromkeys(Pool, 1.0), can_change_role=False)

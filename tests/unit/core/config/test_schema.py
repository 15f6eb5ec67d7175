"""A valid configuration loads, and the error for an invalid one names each mistake."""

from __future__ import annotations

import ast
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from core.config.engine import RESERVED_ENGINE_ARGS
from core.config.engine_args import ENGINE_ARGS
from core.config.errors import field_paths
from core.config.load import share_cores
from core.config.schema import MIB, Config, load_config
from core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[4]
DEPLOY = ROOT / "deploy"


def write(folder: Path, text: str) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return path


def test_the_laptop_file_equals_the_defaults() -> None:
    assert load_config(DEPLOY / "laptop.yaml") == load_config(None)


def test_the_one_node_file_uses_each_of_eight_gpus_once() -> None:
    config = load_config(DEPLOY / "one-gpu-node.yaml")
    gpus = [
        pool.replicas * (pool.num_gpus_per_replica or 0) for pool in (config.prefill, config.decode)
    ]
    assert gpus == [4, 4]
    assert config.prefill.tensor_parallel_size == config.decode.tensor_parallel_size == 4
    assert config.kv_transfer.message_bytes == 8 * MIB


def test_the_two_pools_file_quantizes_them_differently_on_one_node() -> None:
    config = load_config(DEPLOY / "two-unlike-pools.yaml")
    assert config.prefill.engine["quantization"] == "fp8"
    assert "quantization" not in config.decode.engine
    assert config.prefill.max_replicas + config.decode.max_replicas == 8
    # Both pools run on one node. Label selectors cannot separate pools on the same node.
    assert not config.prefill.label_selector
    assert config.cluster.host == "127.0.0.1"


def test_this_module_loads_every_example() -> None:
    assert {path.name for path in DEPLOY.glob("*.yaml")} == {
        "laptop.yaml",
        "one-gpu-node.yaml",
        "two-unlike-pools.yaml",
    }


def test_every_field_is_described() -> None:
    bare = [path for path, field in field_paths(Config).items() if not field.description]
    assert not bare


def test_everything_listens_on_loopback_by_default() -> None:
    config = load_config()
    assert config.cluster.host == config.router_host == "127.0.0.1"


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "prefill: {replicas: 3}\nmodel: {path: /models/a}\n")
    config = load_config(path, {"prefill.replicas": 2, "router.port": 0})
    assert (config.prefill.replicas, config.router.port) == (2, 0)
    assert config.model.path == "/models/a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("roter: {}", "roter: unknown field; the nearest known name is router"),
        ("prefill: {replica: 2}", "the nearest known name is prefill.replicas"),
        ("port: 50051", "port: unknown field; did you mean router.port?"),
        ("decode: {max_num_seqs: 8}", "as an engine argument, write decode.engine.max_num_seqs"),
        ("decode: {engine: {max_num_seq: 8}}", "nearest known name is max_num_seqs"),
        ("decode: {engine: {model: x}}", "model is not passed through: set model.path"),
        ("prefill: {replicas: 0}", "prefill.replicas: Input should be greater than or equal to 1"),
        ("prefill: {replicas: 9}", "prefill: replicas 9 exceed max_replicas 8"),
        ("prefill: 3", "prefill: Input should be"),
        ("prefill: {cpu_binding: [a]}", "prefill.cpu_binding: 'a' is not a list of CPU cores"),
        ("router: {max_message_bytes: 0}", "router.max_message_bytes: must be at least 1 byte"),
        ("router: {max_message_bytes: 2 GiB}", "router.max_message_bytes: Input should be less"),
        ("router: {max_message_bytes: yes}", "max_message_bytes: must be a number of bytes"),
        ("router: {port: yes}", "router.port: Input should be a valid integer, not True"),
        ("router: {port: {{ port }}}", "line 1, column 17: a key must be a plain value"),
        ("router: {1: 2}", "router.1: Keys should be strings"),
        ("redis: {lease_s: yes}", "redis.lease_s: Input should be a valid number, not True"),
        ("decode: {replicas: '2'}", "decode.replicas: Input should be a valid integer, not '2'"),
        ("decode: {num_gpus_per_replica: yes}", "decode.num_gpus_per_replica: Input should be"),
        (
            "router: {classes: {slow: {max_qeue: 3}}}",
            "router.classes.slow.max_qeue: unknown field; the nearest known name is "
            "router.classes.NAME.max_queue",
        ),
        ("router: {max_queue: 3}", "did you mean router.classes.NAME.max_queue?"),
        ("router: {classes: {}}", "router.classes: "),
        ("router: {classes: {a b: {}}}", "router.classes.a b"),
        ("router: {default_deadline_s: .nan}", "router.default_deadline_s: Input should be"),
        ("router: {port: 70000}", "router.port: Input should be less than or equal to 65535"),
        ("redis: {url: localhost}", "redis.url: String should match pattern"),
        ("redis: {renew_s: 2}", "redis: renew_s 2.0 must be at most half of lease_s 3.0"),
        ("router: {port: 1}\nrouter: {port: 2}", "line 2, column 1: the key 'router' appears"),
        ("prefill: &p {replicas: 2}\ndecode: {<<: *p, replicas: 1, replicas: 3}", "appears twice"),
        ("router: [", "is not valid YAML"),
        ("- router", "must consist of sections"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "router: {prot: 1}\ndecode: {replicas: no}\nmodell: {}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    lines = str(caught.value).splitlines()[1:]
    assert {line.partition(":")[0] for line in lines} == {
        "router.prot",
        "decode.replicas",
        "modell",
    }


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "overrides", [{"router.prot": 1}, {"router.port.x": 1}, {"x": 1}, {"prefill.replicas": None}]
)
def test_a_wrong_override_is_refused(overrides: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(overrides)).split(".")[0]):
        load_config(None, overrides)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        load_config().router.port = 1


def test_a_configuration_travels_to_other_processes() -> None:
    config = load_config(DEPLOY / "two-unlike-pools.yaml")
    assert pickle.loads(pickle.dumps(config)) == config
    assert Config.model_validate(config.model_dump()) == config


def test_the_repr_does_not_show_a_password() -> None:
    config = load_config(None, {"redis.url": "redis://:hush@10.0.0.1:6379"})
    assert "hush" not in repr(config)


@pytest.mark.parametrize(
    "text",
    [
        "redis: redis://user:hush@10.0.0.1",
        "redis: {url: redis//user:hush@10.0.0.1}",
        "redis: {lease_s: 'redis://:hu@sh:hush@10.0.0.1'}",
        "redis: {lease_s: 'redis://10.0.0.1?password=hush&db=1'}",
        "redis: {url: redis://:hush@10.0.0.1",
        "redis: {url: redis://:hush@10.0.0.1, x, url: 1}",
    ],
)
def test_no_error_shows_a_password(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert "hush" not in str(caught.value)


def test_a_section_can_merge_another(tmp_path: Path) -> None:
    text = """\
prefill: &common {replicas: 2, engine: {max_num_seqs: 8}}
decode: {<<: *common, replicas: 3}
"""
    config = load_config(write(tmp_path, text))
    assert (config.prefill.replicas, config.decode.replicas) == (2, 3)
    assert config.decode.engine == {"max_num_seqs": 8}


def test_pools_that_share_one_yaml_section_get_different_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1})
    path = write(tmp_path, "prefill: &pool {kv_cache_gib: 2}\ndecode: *pool\n")
    config = load_config(path)
    assert (config.prefill.cpu_binding, config.decode.cpu_binding) == (("0",), ("1",))


@pytest.mark.parametrize(
    ("cores", "ranks", "shares"),
    [
        ([0, 1], 2, ["0", "1"]),
        ([0], 2, ["0", "0"]),
        ([0, 1], 3, ["0", "1", "0"]),
        ([4, 5, 6, 7], 2, ["4", "5"]),
        (list(range(8)), 2, ["0,1,2", "3,4,5"]),
    ],
)
def test_cores_are_shared_evenly(cores: list[int], ranks: int, shares: list[str]) -> None:
    assert share_cores(cores, ranks) == shares


def test_each_rank_of_a_worker_gets_its_own_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(7)))
    ranks = {"prefill.tensor_parallel_size": 2, "decode.tensor_parallel_size": 2}
    config = load_config(None, ranks | {"decode.replicas": 2})
    assert config.prefill.cpu_binding == ("0|1",)
    assert config.decode.cpu_binding == ("2|3", "4|5")


@pytest.mark.parametrize(
    ("cores", "prefill", "decode"),
    [
        ({0, 1}, ["1"], ("0",)),
        ({0, 1}, ["0-1"], ("0",)),  # prefill names all cores, so decode shares core 0 with prefill
        ({0, 1, 2, 3, 4, 5}, ["0-1", "3"], ("2,4",)),  # core 5 is left to the router and Ray
        ({0, 1}, [], ("1",)),  # vLLM chooses prefill's cores; decode gets only its own share
    ],
)
def test_cores_that_one_pool_names_are_not_given_to_the_other(
    monkeypatch: pytest.MonkeyPatch, cores: set[int], prefill: list[str], decode: tuple[str, ...]
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: cores)
    config = load_config(None, {"prefill.cpu_binding": prefill})
    assert config.prefill.cpu_binding == tuple(prefill)
    assert config.decode.cpu_binding == decode


def test_an_explicit_binding_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path, 'prefill: {cpu_binding: []}\ndecode: {cpu_binding: ["7"]}\n')
    config = load_config(path)
    assert (config.prefill.cpu_binding, config.decode.cpu_binding) == ((), ("7",))


POOL = {
    "engine_kind": "fake",
    "tensor_parallel_size": 2,
    "engine": {"max_num_seqs": 8},
    "kv_cache_gib": 3,
    "num_gpus_per_replica": 1.0,
    "label_selector": {"zone": "a"},
}


@pytest.mark.parametrize("field", POOL)
def test_roles_change_only_between_equal_engines(field: str) -> None:
    pools = {"prefill": POOL, "decode": {key: POOL[key] for key in POOL if key != field}}
    assert not load_config(None, pools).cluster.role_change, "without it, pools may differ"
    with pytest.raises(ConfigError, match=rf"^cluster.role_change .*prefill\.{field} is .*decode"):
        load_config(None, {**pools, "cluster.role_change": True})
    equal = {"prefill": POOL, "decode": {**POOL, "max_concurrent": 9, "replicas": 2}}
    assert load_config(None, {**equal, "cluster.role_change": True}).cluster.role_change


def test_the_run_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert load_config().cluster.run_path == Path("/run/user/7/baton")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert load_config().cluster.run_path.name.startswith("baton-")


def test_reserved_engine_arguments_exist() -> None:
    assert RESERVED_ENGINE_ARGS.keys() <= ENGINE_ARGS


def strings_of(file: Path) -> Iterator[str]:
    """The string literals of a Python file, without its docstrings."""
    tree = ast.parse(file.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
        ):
            yield node.value


def test_messages_name_fields_that_exist() -> None:
    """Each name ``section.field`` in a string literal is a configuration field or a module."""
    paths = {*field_paths(Config), "model.safetensors"}  # model.safetensors is a file
    sections = "|".join(Config.model_fields)
    pattern = rf"(?<![\w.])(?:{sections})\.[a-z_]+(?:\.[a-z_]+)*(?![\w(])"
    wrong = []
    for folder in ("cluster", "core", "engine", "kv_transfer", "router", "worker"):
        for file in (ROOT / folder).rglob("*.py"):
            for text in strings_of(file):
                for name in re.findall(pattern, text):
                    module = ROOT.joinpath(*name.split("."))
                    is_module = module.with_suffix(".py").exists() or module.is_dir()
                    if name not in paths and not is_module:
                        wrong.append(f"{file.relative_to(ROOT)}: {name}")
    assert not wrong

"""Resolving a model: folders, hub names, and the embedded model, which is unpacked once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core.config.schema import ModelConfig
from core.errors import ConfigError
from core.model import resolve as model
from core.model.resolve import ResolvedModel, resolve_model, run_with_progress


def quiet(_line: str) -> None:
    """A progress callback that drops the line."""


class StopError(Exception):
    """Raised by a progress callback to end the step."""


class FakeConversion:
    """Fakes the process that unpacks a model. Writes empty files. Fails if ``error`` is given."""

    def __init__(
        self, *, files: Sequence[str] = model._REQUIRED_FILES, error: str | None = None
    ) -> None:
        self.files, self.error, self.runs = files, error, 0

    def __call__(self, command: Sequence[str], timeout_s: float, progress: model.Progress) -> None:
        self.runs += 1
        for name in self.files:
            (Path(command[-1]) / name).touch()
        if self.error:
            raise ConfigError(self.error)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    monkeypatch.setattr(model, "_find_gguf", lambda _embedded: (gguf, "1.0"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "baton"


def install(monkeypatch: pytest.MonkeyPatch, conversion: FakeConversion) -> FakeConversion:
    monkeypatch.setattr(model, "run_with_progress", conversion)
    return conversion


def test_a_folder_is_served_under_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").touch()
    assert resolve_model(ModelConfig(path=str(folder)), quiet) == ResolvedModel(
        str(folder), "llama"
    )
    named = resolve_model(ModelConfig(path=str(folder), served_name="mine"), quiet)
    assert named.served_name == "mine"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/model", "there is no folder /no/such/model"),
        ("./model", "there is no folder ./model"),
        ("a/b/c", "there is no folder a/b/c"),
        (
            "embedded:smolm2",
            "there is no embedded:smolm2; the nearest known name is embedded:smollm2",
        ),
    ],
)
def test_a_missing_model_is_named(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_model(ModelConfig(path=path), quiet)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"contains no config\.json"):
        resolve_model(ModelConfig(path=str(tmp_path)), quiet)


def test_a_hub_name_is_checked_by_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def download(repo: str, file: str) -> str:
        if repo != "owner/llama":
            raise FileNotFoundError(repo)
        asked.append((repo, file))
        return "/cache/config.json"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert resolve_model(ModelConfig(path="owner/llama"), quiet) == ResolvedModel(
        "owner/llama", "llama"
    )
    assert asked == [("owner/llama", "config.json")]
    with pytest.raises(ConfigError, match="owner/lama is not a local folder"):
        resolve_model(ModelConfig(path="owner/lama"), quiet)


def test_the_embedded_model_is_unpacked_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversion = install(monkeypatch, FakeConversion())
    first = resolve_model(ModelConfig(), quiet)
    assert first == resolve_model(ModelConfig(), quiet)
    assert first == ResolvedModel(
        str(cache / "smollm2-135m-instruct-1.0-r2"), "smollm2-135m-instruct"
    )
    assert conversion.runs == 1


def test_concurrent_calls_unpack_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversion = install(monkeypatch, FakeConversion())
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _n: resolve_model(ModelConfig(), quiet), range(4)))
    assert len(set(found)) == conversion.runs == 1


@pytest.mark.parametrize(
    "conversion",
    [
        FakeConversion(files=["config.json"], error="no space"),
        FakeConversion(files=["config.json"]),
    ],
    ids=["fails", "incomplete"],
)
def test_a_failed_unpacking_leaves_nothing_and_can_be_repeated(
    cache: Path, monkeypatch: pytest.MonkeyPatch, conversion: FakeConversion
) -> None:
    install(monkeypatch, conversion)
    with pytest.raises(ConfigError):
        resolve_model(ModelConfig(), quiet)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    install(monkeypatch, FakeConversion())
    assert Path(resolve_model(ModelConfig(), quiet).path).is_dir()


def test_the_rest_of_a_killed_unpacking_is_removed(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = cache / "smollm2-135m-instruct-1.0-r2.tmp-x"
    stale.mkdir(parents=True)
    install(monkeypatch, FakeConversion())
    resolve_model(ModelConfig(), quiet)
    assert not stale.exists()


def test_a_cache_that_cannot_be_written_is_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.touch()  # a file where the folder should be
    install(monkeypatch, FakeConversion())
    with pytest.raises(ConfigError, match="cannot be written"):
        resolve_model(ModelConfig(), quiet)


def test_waiting_for_another_process_is_bounded(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, FakeConversion())
    lock = cache / "smollm2-135m-instruct-1.0-r2.lock"
    cache.mkdir(parents=True)
    lines: list[str] = []
    with model._exclusive(lock, 1, quiet), pytest.raises(ConfigError, match="has held"):
        resolve_model(ModelConfig(prepare_timeout_s=0.01), lines.append)
    assert lines == ["another process is unpacking the embedded model; waiting for it"]


def test_progress_of_a_process_is_passed_on() -> None:
    lines: list[str] = []
    script = "print('noise'); print('progress: half done')"
    run_with_progress([sys.executable, "-c", script], 60, lines.append)
    assert lines == ["half done"]


def test_ctrl_c_in_a_terminal_does_not_reach_the_process() -> None:
    lines: list[str] = []
    script = "import os; print('progress:', os.getsid(0))"
    run_with_progress([sys.executable, "-c", script], 60, lines.append)
    assert int(lines[0]) != os.getsid(0)


def test_an_exception_from_progress_ends_the_process(tmp_path: Path) -> None:
    def stop(line: str) -> None:
        raise StopError(line)

    script = "import os; print('progress:', os.getpid(), flush=True); input()"
    with pytest.raises(StopError) as caught:
        run_with_progress([sys.executable, "-c", script], 60, stop)
    assert not Path(f"/proc/{caught.value}").exists()


def test_waiting_for_another_process_can_be_ended(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, FakeConversion())
    cache.mkdir(parents=True)
    lines: list[str] = []

    def stop_at_the_second_line(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            raise StopError

    lock = cache / "smollm2-135m-instruct-1.0-r2.lock"
    with model._exclusive(lock, 1, quiet), pytest.raises(StopError):
        resolve_model(ModelConfig(), stop_at_the_second_line)


def test_a_user_without_a_home_folder_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ConfigError, match="no home folder"):
        model.cache_dir()


def test_a_failing_process_says_why() -> None:
    with pytest.raises(ConfigError, match="unpacked:\nno space"):
        run_with_progress([sys.executable, "-c", "raise SystemExit('no space')"], 60, quiet)


def test_a_slow_process_is_ended() -> None:
    with pytest.raises(ConfigError, match="slower than 0 s"):
        run_with_progress([sys.executable, "-c", "input()"], 0.05, quiet)

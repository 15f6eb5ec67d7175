"""The run folder: locking a name, removing leftovers safely, and unreadable state files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cluster.local.run_dir import ClusterState, RunDir, is_held, read_state
from core.errors import ConfigError

STATE = ClusterState(
    name="c",
    cluster_id="0" * 32,
    pid=1,
    pid_started=0,
    phase="ready",
    address="127.0.0.1:1",
    model="m",
    store=None,
    start_timeout_s=1.0,
    stop_grace_s=1.0,
    max_replicas={"prefill": 1},
    folders=(),
)


def test_a_folder_that_is_not_a_clusters_is_never_removed(tmp_path: Path) -> None:
    letter = tmp_path / "documents" / "letter.txt"
    letter.parent.mkdir()
    (letter.parent / "tmp").mkdir()
    letter.write_text("dear")
    message = r"^cluster\.run_dir: .*documents exists and is not a cluster's"
    with pytest.raises(ConfigError, match=message):
        RunDir(tmp_path, "documents")
    assert letter.read_text() == "dear"
    assert not is_held(tmp_path, "documents")
    assert not (tmp_path / "documents.lock").exists()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_or_link_in_place_of_the_folder_is_never_removed(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    target.mkdir()
    thing = tmp_path / "c"
    if kind == "file":
        thing.touch()
    else:
        thing.symlink_to(target)
    with pytest.raises(ConfigError, match="is not a cluster's"):
        RunDir(tmp_path, "c")
    assert os.path.lexists(thing)
    assert target.exists()


def test_leftovers_of_a_cluster_without_a_state_are_removed(tmp_path: Path) -> None:
    base = tmp_path / "run"
    for name in ("ray", "tmp", "valkey"):
        (base / "c" / name).mkdir(parents=True)
    (base / "c" / "tmp" / "socket").touch()
    (base / "c" / "state.json.new").touch()
    run = RunDir(base, "c")
    assert not (run.path / "tmp" / "socket").exists()
    run.release()
    assert not base.exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "c"}', '{"folders": [], "new": 1}'])
def test_an_unreadable_state_is_named_in_the_error_and_may_be_deleted(
    tmp_path: Path, content: str
) -> None:
    base = tmp_path / "run"
    file = base / "c" / "state.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        RunDir(base, "c")
    assert str(caught.value).startswith(f"{file} is damaged or from another version")
    assert str(caught.value).endswith("delete it")
    file.unlink()
    run = RunDir(base, "c")
    run.write(STATE)
    assert read_state(base, "c") == STATE
    run.release()


def test_a_folder_that_a_reaper_removes_meanwhile_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "run"
    real_open = os.open
    removed: list[Path] = []

    def open_after_the_reaper(path: Any, *arguments: Any, **options: Any) -> int:
        if not removed:
            base.rmdir()
            removed.append(base)
        return real_open(path, *arguments, **options)

    monkeypatch.setattr("cluster.local.run_dir.os.open", open_after_the_reaper)
    run = RunDir(base, "c")
    assert removed
    assert is_held(base, "c")
    run.release()
    assert not any(folder.exists() for folder in run.folders)


def test_a_folder_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.local.run_dir.os.getuid", lambda: os.stat(tmp_path).st_uid + 1)
    with pytest.raises(ConfigError, match="belongs to another user"):
        RunDir(tmp_path, "c")
    assert not list(tmp_path.iterdir())

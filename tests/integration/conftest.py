"""One cluster with fake engines for all integration tests that use the fixture ``cluster``.

These tests run in any order, except that the one marked ``ends_cluster`` runs last. A test that
needs a certain number of workers uses ``one_of_each`` or ``two_of_each``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local import reaper
from tests.support.fake_engine_cluster import START_S, FakeEngineCluster, start
from tests.support.run_order import run_cluster_ends_last
from tests.support.word_model import write_word_model

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    run_cluster_ends_last(items, lambda item: HERE if _shares_cluster(item) else None)


def _shares_cluster(item: pytest.Item) -> bool:
    return item.path.is_relative_to(HERE) and "cluster" in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    write_word_model(folder)
    return folder


@pytest.fixture(scope="session")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeEngineCluster]:
    cluster = start(tmp_path_factory.mktemp("cluster"), model, "shared")
    try:
        cluster.wait(cluster.is_ready, START_S)
        cluster.pids = {cluster.launcher.pid} | reaper.find(cluster.state.cluster_id)
        yield cluster
    finally:
        cluster.kill()


@pytest.fixture
def one_of_each(cluster: FakeEngineCluster) -> None:
    """One idle worker in each pool."""
    cluster.resize(1)


@pytest.fixture
def two_of_each(cluster: FakeEngineCluster) -> None:
    """Two idle workers in each pool."""
    cluster.resize(2)

"""Runs the tests marked ``ends_cluster`` last in their module. Modules do not share a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.run_order import run_cluster_ends_last

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    run_cluster_ends_last(items, lambda item: item.path if item.path.is_relative_to(HERE) else None)

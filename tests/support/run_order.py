"""Sorts the tests that share one cluster."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable

import pytest


def run_cluster_ends_last(
    items: list[pytest.Item], cluster_of: Callable[[pytest.Item], Hashable | None]
) -> None:
    """Sort ``items`` in place, so that a test marked ``ends_cluster`` runs after all other tests
    that share its cluster.

    Args:
        cluster_of: returns the key of a test's shared cluster. None: the test shares no cluster.
    """
    places_by_cluster: dict[Hashable, list[int]] = defaultdict(list)
    for place, item in enumerate(items):
        if (cluster := cluster_of(item)) is not None:
            places_by_cluster[cluster].append(place)
    for places in places_by_cluster.values():
        members = sorted((items[place] for place in places), key=_ends_cluster)
        for place, item in zip(places, members, strict=True):
            items[place] = item


def _ends_cluster(item: pytest.Item) -> bool:
    return item.get_closest_marker("ends_cluster") is not None

from __future__ import annotations

import pytest

from cluster.errors import WorkerLostError
from engine.progress import ProgressWatch


class Setup:
    def __init__(self) -> None:
        self.now_s = 100.0
        self.watch = ProgressWatch(5, lambda: self.now_s)


def test_an_engine_without_requests_may_rest() -> None:
    setup = Setup()
    with setup.watch.request():
        pass
    setup.now_s += 50
    setup.watch.check()
    with setup.watch.request():
        setup.now_s += 5
        setup.watch.check()


def test_an_engine_with_requests_that_does_nothing_hangs() -> None:
    setup = Setup()
    with setup.watch.request():
        setup.now_s += 4
        setup.watch.step()
        setup.now_s += 4
        with setup.watch.request():  # a request that comes is no progress
            setup.watch.check()
            setup.now_s += 2
            with pytest.raises(WorkerLostError, match="2 requests and has done nothing for 6 s"):
                setup.watch.check()
    setup.watch.check()

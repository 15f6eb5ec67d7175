"""What stands in the store where an order is expected, and is none."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from core.state import orders
from core.state.orders import Orders, StartFailure
from core.types import Pool


class Holding:
    """A store that answers with these values, whatever it is asked."""

    def __init__(self, *values: bytes | None) -> None:
        self._values = values

    async def execute(self, *commands: Any) -> list[Any]:
        return list(self._values)


def orders_in(store: Holding, monkeypatch: pytest.MonkeyPatch) -> Orders:
    monkeypatch.setattr(orders, "RedisClient", lambda *_args, **_options: store)
    return Orders("redis://", cluster="c", socket_timeout_s=1)


async def test_a_scale_order_that_is_no_number_is_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    taker = orders_in(Holding(b"many", b"3"), monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert await taker.take_scale() == {Pool.DECODE: 3}
    assert "dropped an order to scale prefill to b'many'" in caplog.text


async def test_a_failure_that_cannot_be_read_is_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failure = b'{"part": "decode", "message": "no", "is_config": true}'
    taker = orders_in(Holding(b"{", failure, None), monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert await taker.take_failures() == (StartFailure("decode", "no", is_config=True),)
    assert "dropped a failure of prefill" in caplog.text

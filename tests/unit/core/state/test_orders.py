"""Malformed scale orders and start failures in the store are logged and dropped."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from core.state import orders
from core.state.orders import Orders, StartFailure
from core.types import Pool


class FixedStore:
    """A store that answers every call of ``execute`` with the given values."""

    def __init__(self, *values: bytes | None) -> None:
        self._values = values

    async def execute(self, *commands: Any) -> list[Any]:
        return list(self._values)


def orders_in(store: FixedStore, monkeypatch: pytest.MonkeyPatch) -> Orders:
    monkeypatch.setattr(orders, "RedisClient", lambda *_args, **_options: store)
    return Orders("redis://", cluster="c", socket_timeout_s=1)


async def test_a_scale_order_that_is_not_a_number_is_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = orders_in(FixedStore(b"many", b"3"), monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert await receiver.take_scale() == {Pool.DECODE: 3}
    assert "dropped an order to scale prefill to b'many'" in caplog.text


async def test_a_malformed_failure_report_is_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failure = b'{"part": "decode", "message": "no", "is_config": true}'
    receiver = orders_in(FixedStore(b"{", failure, None), monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert await receiver.take_failures() == (StartFailure("decode", "no", is_config=True),)
    assert "dropped a malformed failure report of prefill" in caplog.text

"""Test the registry, the scale orders, the start failures and the journal on real servers.

The servers are the embedded Valkey and the system's redis-server.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cluster.local.ports import free_port
from cluster.local.valkey import EmbeddedValkey
from core.config.schema import Config
from core.errors import ConfigError, UnavailableError
from core.state.autoscale import AutoscaleStore, Kept
from core.state.journal import (
    After,
    Change,
    JournalStore,
    RedisJournal,
    Written,
    memory_bytes,
)
from core.state.orders import ROUTER, Orders, StartFailure, report_failure
from core.state.redis import RedisClient
from core.state.registry import RedisRegistry
from core.state.store import Store
from core.types import Pool, RegistrySnapshot
from router.api.validate import MAX_REQUEST_ID_CHARS
from tests.support import journal_rules
from tests.support import registry_rules as rules
from tests.support.waiting import until_awaited

pytestmark = pytest.mark.integration

HOST = "127.0.0.1"
LEASE_S = 0.3
TIMEOUT_S = 1.0
JOURNAL_BYTES = 4 * 2**20


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    server = EmbeddedValkey(HOST, tmp_path_factory.mktemp("valkey"), journal_bytes=JOURNAL_BYTES)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the system's redis-server, as for a cluster that sets ``redis.url``."""
    binary = shutil.which("redis-server")
    if binary is None:
        if os.environ.get("CI") == "true":
            pytest.fail("redis-server is missing: apt-get install redis-server")
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    port = free_port(HOST)
    folder = tmp_path_factory.mktemp("redis")
    command = [binary, "--bind", HOST, "--port", str(port), "--save", "", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        yield f"redis://{HOST}:{port}/1"
        process.terminate()


@pytest.fixture(params=["embedded Valkey", "redis-server"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "redis-server":
        found: str = request.getfixturevalue("redis_url")
        return found
    server: EmbeddedValkey = request.getfixturevalue("valkey")
    return server.url


@pytest.fixture
def name() -> str:
    """A new cluster name for each test, because the tests share a server."""
    return f"test-{secrets.token_hex(4)}"


def connect(url: str, name: str, lease_s: float = 60) -> RedisRegistry:
    return RedisRegistry(url, cluster=name, lease_s=lease_s, socket_timeout_s=TIMEOUT_S)


@pytest.fixture
async def registry(url: str, name: str) -> AsyncIterator[RedisRegistry]:
    registry = connect(url, name)
    await until_awaited(lambda: answers(registry), what="the store answers")
    yield registry
    await registry.close()


async def answers(registry: RedisRegistry) -> bool:
    try:
        await registry.list()
    except UnavailableError:
        return False
    return True


async def test_put_list_remove(registry: RedisRegistry) -> None:
    await rules.check_put_list_remove(registry)


async def test_a_worker_is_asked_to_drain_once(registry: RedisRegistry) -> None:
    await rules.check_asked_to_drain_once(registry)


async def test_a_worker_is_asked_to_change_its_role_once(registry: RedisRegistry) -> None:
    await rules.check_asked_to_change_role_once(registry)


async def test_the_pool_of_a_record_may_change(registry: RedisRegistry) -> None:
    await rules.check_the_pool_of_a_record_may_change(registry)


async def test_an_order_to_join_an_unknown_pool_is_dropped(
    url: str, name: str, registry: RedisRegistry
) -> None:
    client = RedisClient(url, socket_timeout_s=TIMEOUT_S)
    await client.execute(("SET", f"baton:{name}:role:{rules.DECODE.id}", b"\xffcache"))
    assert await registry.put(rules.DECODE) is None
    await client.close()


async def test_a_renewal_replaces_the_record(registry: RedisRegistry) -> None:
    await rules.check_renewal_replaces(registry)


async def test_a_removed_worker_can_come_back(registry: RedisRegistry) -> None:
    await rules.check_a_removed_worker_can_come_back(registry)


async def test_routers(registry: RedisRegistry) -> None:
    await rules.check_routers(registry)


async def test_plans(registry: RedisRegistry) -> None:
    await rules.check_plans(registry)


async def test_an_unreadable_router_or_plan_does_not_hide_the_workers(
    url: str, name: str, registry: RedisRegistry
) -> None:
    client = RedisClient(url, socket_timeout_s=TIMEOUT_S)
    await registry.put(rules.DECODE)
    await registry.put_router(rules.ROUTER)
    await client.execute(
        ("SET", f"baton:{name}:router:{rules.ROUTER.id}", "?", "PX", 60_000),
        ("SET", f"baton:{name}:pools", "?", "PX", 60_000),
    )
    assert await registry.snapshot() == RegistrySnapshot((rules.DECODE,))
    with pytest.raises(UnavailableError, match="cannot be read"):
        await registry.list_routers()
    await client.close()


async def test_every_key_of_routers_and_plans_expires(
    url: str, name: str, registry: RedisRegistry
) -> None:
    client = RedisClient(url, socket_timeout_s=TIMEOUT_S)
    await registry.put_router(rules.ROUTER)
    await registry.put_plans(rules.PLANS)
    (keys,) = await client.execute(("KEYS", f"baton:{name}:*"))
    assert len(keys) == 3
    assert all(ttl > 0 for ttl in await client.execute(*(("PTTL", key) for key in keys)))
    await client.close()


async def test_clusters_do_not_see_each_other(url: str, registry: RedisRegistry) -> None:
    await registry.put(rules.DECODE)
    other = connect(url, "another")
    assert await other.list() == ()
    await other.close()


async def test_a_lease_ends_unless_renewed_and_leaves_nothing(url: str, name: str) -> None:
    registry = connect(url, name, LEASE_S)
    client = RedisClient(url, socket_timeout_s=TIMEOUT_S)
    await until_awaited(lambda: answers(registry), what="the store answers")
    started_s = time.monotonic()
    await registry.put(rules.DECODE)
    await registry.put(rules.PREFILL)
    await registry.put_router(rules.ROUTER)

    async def is_prefill_gone() -> bool:
        await registry.put(rules.DECODE)
        return await registry.list() == (rules.DECODE,) and await registry.list_routers() == ()

    await until_awaited(is_prefill_gone, what="the lease has run out")
    assert time.monotonic() - started_s > LEASE_S * 0.9
    index = f"baton:{name}:workers"
    assert (await client.execute(("SMEMBERS", index)))[0] == {b"decode-1"}
    (ttl_ms,) = await client.execute(("PTTL", index))
    assert ttl_ms > 0

    async def are_all_gone() -> bool:
        return await registry.list() == ()

    await until_awaited(are_all_gone, what="all leases have run out")
    assert (await client.execute(("KEYS", f"baton:{name}:*")))[0] == []
    await client.close()
    await registry.close()


async def test_orders_are_taken_once_and_expire(url: str, name: str) -> None:
    orders = Orders(url, cluster=name, socket_timeout_s=TIMEOUT_S)
    registry = connect(url, name)
    await until_awaited(lambda: answers(registry), what="the store answers")
    assert await orders.take_scale() == {}
    await orders.ask_scale(Pool.DECODE, 2)
    await orders.ask_scale(Pool.DECODE, 3)
    client = RedisClient(url, socket_timeout_s=TIMEOUT_S)
    (ttl_ms,) = await client.execute(("PTTL", f"baton:{name}:scale:decode"))
    assert 0 < ttl_ms <= 60_000
    assert await orders.take_scale() == {Pool.DECODE: 3}
    assert await orders.take_scale() == {}

    config = Config.model_validate({"cluster": {"name": name}})
    store = Store.of(config, url)
    await report_failure(store.orders(), ROUTER, ConfigError("router.port: taken"))
    await report_failure(store.orders(), Pool.PREFILL, RuntimeError("first line\nsecond line"))
    assert set(await orders.take_failures()) == {
        StartFailure("router", "router.port: taken", is_config=True),
        StartFailure("prefill", "RuntimeError: first line", is_config=False),
    }
    assert await orders.take_failures() == ()
    for connection in (orders, registry, client):
        await connection.close()


async def test_what_the_autoscaler_keeps(url: str, name: str) -> None:
    store = AutoscaleStore(url, cluster=name, view_s=LEASE_S, socket_timeout_s=TIMEOUT_S)

    async def policy() -> str | None:
        return (await store.read()).policy

    await until_awaited(lambda: answers_autoscale(store), what="the store answers")
    assert await store.read() == Kept(None, None)
    await store.apply_policy("wrong")
    await store.restore_policy("wrong", "good")
    assert await policy() == "good"
    await store.apply_policy("newer")
    await store.restore_policy("wrong", "good")
    assert await policy() == "newer", "it was applied after the wrong one was read"
    await store.remove_policy()
    assert await policy() == "", "removed, which is not the same as lost"
    await store.restore_policy(None, "good")
    assert await policy() == ""
    await store.write(b"state", b"view")
    assert await store.read() == Kept("", b"state")
    assert await store.read_view() == b"view"

    async def view_is_gone() -> bool:
        return await store.read_view() is None

    await until_awaited(view_is_gone, what="the view ends with its lease")
    await store.forget()
    assert await store.read() == Kept(None, None)
    await store.restore_policy(None, "good")
    assert await policy() == "good"
    await store.forget()
    await store.close()


async def answers_autoscale(store: AutoscaleStore) -> bool:
    try:
        await store.read()
    except UnavailableError:
        return False
    return True


async def test_a_server_that_goes_away_and_comes_back(tmp_path: Path, name: str) -> None:
    server = EmbeddedValkey(HOST, tmp_path, journal_bytes=JOURNAL_BYTES)
    server.start()
    registry = connect(server.url, name)
    await registry.put(rules.DECODE)
    server.stop()
    started_s = time.monotonic()
    with pytest.raises(UnavailableError, match="the registry does not answer"):
        await registry.list()
    assert time.monotonic() - started_s < 4 * TIMEOUT_S + 1
    server.start()  # on the same port, with the same password, and empty
    assert await registry.list() == ()
    await registry.put(rules.DECODE)
    assert await registry.list() == (rules.DECODE,)
    await registry.close()
    server.stop()


async def test_a_server_that_hangs_is_given_up(name: str) -> None:
    with socket.create_server((HOST, 0)) as hung:  # the kernel accepts, but no server answers
        url = f"redis://{HOST}:{hung.getsockname()[1]}"
        registry = RedisRegistry(url, cluster=name, lease_s=1, socket_timeout_s=0.1)
        async with asyncio.timeout(2):
            with pytest.raises(UnavailableError):
                await registry.list()
        await registry.close()


async def test_a_cancellation_is_never_lost(url: str) -> None:
    """The driver's own code loses a cancellation at some of these steps."""
    client = RedisClient(url, socket_timeout_s=TIMEOUT_S)

    async def call_until_cancelled() -> None:
        while True:
            await client.execute(("PING",), ("PING",))

    for steps in range(200):
        task = asyncio.create_task(call_until_cancelled())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=TIMEOUT_S)
        assert done, f"the task still runs after a cancellation at step {steps}"
        assert task.cancelled()
    await client.close()


async def test_the_embedded_server_requires_its_password(valkey: EmbeddedValkey, name: str) -> None:
    stranger = connect("redis://" + valkey.url.partition("@")[2], name)
    with pytest.raises(UnavailableError):
        await stranger.list()
    await stranger.close()


def test_the_embedded_server_comes_back_after_a_crash(tmp_path: Path) -> None:
    server = EmbeddedValkey(HOST, tmp_path, journal_bytes=JOURNAL_BYTES)
    server.start()
    url = server.url
    assert not server.ensure_running()
    assert server._process is not None
    server._process.kill()
    server._process.wait()
    assert server.ensure_running()
    assert server.url == url
    server.stop()


def test_other_users_cannot_read_the_embedded_servers_password(tmp_path: Path) -> None:
    server = EmbeddedValkey(HOST, tmp_path, journal_bytes=JOURNAL_BYTES)
    with closing(_Stopping(server)):
        server.start()
        assert (tmp_path / "valkey.conf").stat().st_mode & 0o077 == 0
        assert server._process is not None
        password = server.url.split("@")[0].rpartition(":")[2]
        assert password not in Path(f"/proc/{server._process.pid}/cmdline").read_text()


class _Stopping:
    def __init__(self, server: EmbeddedValkey) -> None:
        self.close = server.stop


def test_an_invalid_url_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"redis\.url"):
        RedisClient("redis://host:port-is-no-number", socket_timeout_s=1)


def open_journal(
    url: str,
    name: str,
    *,
    lease_s: float = 60,
    ttl_s: float = 60,
    budget_bytes: int = journal_rules.BUDGET_BYTES,
) -> RedisJournal:
    return RedisJournal(
        url,
        cluster=name,
        lease_s=lease_s,
        ttl_s=ttl_s,
        budget_bytes=budget_bytes,
        socket_timeout_s=TIMEOUT_S,
    )


@pytest.mark.parametrize("check", journal_rules.RULES)
async def test_journal(
    url: str, name: str, check: Callable[[JournalStore], Awaitable[None]]
) -> None:
    journal = open_journal(url, name)
    await check(journal)
    await journal.close()


async def test_a_dead_routers_request_can_be_taken_after_its_lease_and_then_expires(
    url: str, name: str
) -> None:
    journal = open_journal(url, name, lease_s=0.1, ttl_s=0.5)
    await journal.write([journal_rules.begin(journal_rules.A)])
    assert await journal.take("r", journal_rules.B, journal_rules.TOKEN) is Written.TAKEN

    async def is_taken_over() -> bool:
        return await journal.take("r", journal_rules.B, journal_rules.TOKEN) is not Written.TAKEN

    await until_awaited(is_taken_over, what="the lease has run out")

    client = RedisClient(url, socket_timeout_s=TIMEOUT_S)

    async def is_forgotten() -> bool:
        return not (await client.execute(("KEYS", f"baton:{name}:*")))[0]

    await until_awaited(is_forgotten, what="the entry has expired")
    await client.close()
    await journal.close()


async def test_expired_entries_make_room(url: str, name: str) -> None:
    content = bytes(journal_rules.ENTRY_BYTES)
    journal = open_journal(url, name, ttl_s=0.3)
    for number in range(journal_rules.ENTRIES):
        await journal.write([journal_rules.begin(journal_rules.A, content, f"r{number}")])
    assert await journal.write([journal_rules.begin(journal_rules.A)]) == [Written.FULL]

    async def has_room() -> bool:
        return await journal.write([journal_rules.begin(journal_rules.A)]) == [Written.DONE]

    await until_awaited(has_room, what="the entries have expired")
    await journal.close()


@pytest.mark.parametrize(
    ("content_bytes", "steps"), [(0, 20), (100, 20), (5000, 20), (100_000, 20), (41_000, 1)]
)
async def test_entries_take_no_more_memory_than_is_counted(
    url: str, name: str, content_bytes: int, steps: int
) -> None:
    """The ids have the maximum length. A server reserves most just after an entry has grown."""
    journal = open_journal(url, name, budget_bytes=2**30)
    client = RedisClient(url, socket_timeout_s=TIMEOUT_S)

    async def used_bytes() -> int:
        ((info),) = await client.execute(("INFO", "memory"))
        return int(info["used_memory"])

    ids = [f"{number:0{MAX_REQUEST_ID_CHARS}}" for number in range(200)]
    await journal.write([journal_rules.begin(journal_rules.A, b"", "warm-up")])
    before = await used_bytes()
    await journal.write([journal_rules.begin(journal_rules.A, b"", each) for each in ids])
    for step in range(steps):
        size = content_bytes // steps
        data = secrets.token_bytes(size)
        await journal.write(
            [Change(each, journal_rules.A, journal_rules.TOKEN, data, step * size) for each in ids]
        )
    complete = [
        Change(each, journal_rules.A, journal_rules.TOKEN, b"", content_bytes, after=After.COMPLETE)
        for each in ids
    ]
    assert await journal.write(complete) == [Written.DONE] * len(ids)
    grown = await used_bytes() - before
    assert grown <= len(ids) * memory_bytes(content_bytes)
    await client.execute(("DEL", *(f"baton:{name}:journal:{each}" for each in ids)))
    await client.close()
    await journal.close()

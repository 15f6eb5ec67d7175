"""Strangers and defective peers attack all ports of the KV stream.

A stranger is a client that is not part of the cluster. The ports are those of the control channel,
gloo and the rank reports. Whatever attackers send, the transfers of other peers arrive unchanged.
The log gets only a few lines, and no block, thread or file is kept for attackers.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import psutil
import pytest
import zmq

from kv_transfer import wire
from kv_transfer.curve import protect_client, protect_server
from kv_transfer.geometry import LayerBlockRange
from kv_transfer.rank_reports import RankReport, RankReports, send_report
from tests.support.hostile import OpenFiles, Strangers, another_protocol, dice, garbage
from tests.support.kv_faults import Stranger, kv_threads
from tests.support.kv_messages import TO_DECODE, TO_PREFILL
from tests.support.kv_stream import (
    BLOCK_TOKENS,
    BLOCKS,
    GEOMETRY,
    OPTIONS,
    Decode,
    Prefill,
    blocks_of,
    chunk_of,
    random_caches,
    same_blocks,
    stream,
)
from tests.support.waiting import wait_until

MIN_TRANSFERS = 10  # least number of correct transfers during a storm
FRAMES = 600
CONNECTIONS = 120
WRONG_MESSAGES = 40  # from a defective prefill worker
MAX_LOG_LINES = 30
HOST = "127.0.0.1"


class GoodPair:
    """A pair that runs correct transfers, one after another, each checked and released."""

    def __init__(self, prefill: Prefill, decode: Decode, rng: random.Random) -> None:
        self.prefill, self.decode = prefill, decode
        self._rng = rng
        self._transfer_ids = (
            f"{decode.client.options.incarnation}-{n}#1" for n in itertools.count()
        )
        self.transfer_id = ""  # id of the newest transfer

    def transfer(self) -> None:
        transfer_id = self.transfer_id = next(self._transfer_ids)
        tokens = self._rng.randrange(1, 12 * BLOCK_TOKENS)
        source, target = (self._rng.sample(range(BLOCKS), blocks_of(tokens)) for _ in "pd")
        self.decode.reserve(self.prefill, transfer_id, target, 0, tokens)
        self.prefill.compute(transfer_id, source, tokens)
        self.prefill.server.request_finished(transfer_id, 42, computed=True)
        assert self.decode.result(transfer_id).complete, transfer_id
        assert same_blocks(self.prefill.caches, source, self.decode.caches, target)
        self.prefill.wait_released(transfer_id)


@contextlib.contextmanager
def good_pair(
    rng: random.Random,
    caplog: pytest.LogCaptureFixture,
    *,
    max_lines: int = MAX_LOG_LINES,
    **options: Any,
) -> Iterator[GoodPair]:
    """Check at the exit that transfers still work and that strangers have left nothing behind."""
    with stream(**options) as (prefill, decode):
        pair = GoodPair(prefill, decode, rng)
        pair.transfer()
        threads, files = kv_threads(), OpenFiles()
        caplog.clear()
        yield pair
        pair.transfer()
        server = prefill.server
        wait_until(lambda: kv_threads() == threads, what="strangers' threads have ended")
        wait_until(lambda: not server.transfers.waiting, what="no stranger waits for a prefill")
        check_log(caplog, max_lines)
        files.wait_as_at_first()
        assert len(server.transfers.peers) == 1
        assert not server.transfers.by_id
        assert not decode.client.transfers.by_id
        assert len(server.transfers.ended_ids) <= OPTIONS.max_pending
    check_log(caplog, max_lines)


def check_log(caplog: pytest.LogCaptureFixture, max_lines: int = MAX_LOG_LINES) -> None:
    """Check and clear the log. A record keeps its exception, whose traceback keeps a pair open."""
    assert not [record.getMessage() for record in caplog.records if record.exc_info]
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(lines) <= max_lines, lines[:50]
    assert not [line for line in lines if len(line) > 500 or "\n" in line]
    caplog.clear()


def storm(attack: Callable[[], None], pair: GoodPair) -> None:
    """Run ``attack`` in a thread of its own while correct transfers run."""
    with ThreadPoolExecutor(1, "storm") as pool:
        storm = pool.submit(attack)
        count = 0
        while count < MIN_TRANSFERS or not storm.done():
            pair.transfer()
            count += 1
        storm.result()


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


# ---- bytes ---------------------------------------------------------------------------------

_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)


def _command(name: bytes, body: bytes) -> bytes:
    return bytes([4, 1 + len(name) + len(body), len(name)]) + name + body


_READY = _GREETING + _command(b"READY", b"\x0bSocket-Type\0\0\0\x06DEALER\x08Identity\0\0\0\0")


def truncated_greeting(rng: random.Random) -> bytes:
    return _GREETING[: rng.randrange(len(_GREETING))]


def wrong_handshake(rng: random.Random) -> bytes:
    body = b"\x0bSocket-Type" + rng.choice([b"\0\0\0\x04PULL", b"\xff\xff\xff\xff", b"\0"])
    return _GREETING + _command(rng.choice([b"READY", b"ERROR", b"HELLO", b""]), body)


def huge_frame(rng: random.Random) -> bytes:
    size = rng.choice([2**63, 2**64 - 1, 2**31, wire.MAX_FRAME_BYTES + 1])
    return _READY + b"\x02" + size.to_bytes(8) + rng.randbytes(99)


def frames_without_end(rng: random.Random) -> bytes:
    return _READY + b"\x01\x05hello" * rng.randrange(1, 2000)


def frames_of_noise(rng: random.Random) -> bytes:
    return _READY + b"".join(
        bytes([0, len(noise)]) + noise
        for noise in (rng.randbytes(rng.randrange(40)) for _ in range(50))
    )


CONTROL_BYTES = [
    garbage, another_protocol, truncated_greeting, wrong_handshake, huge_frame,
    frames_without_end, frames_of_noise,
]  # fmt: skip


def test_bytes_on_the_control_channel(caplog: pytest.LogCaptureFixture) -> None:
    rng = dice("control")
    with good_pair(rng, caplog) as pair:
        port = port_of(pair.prefill.server.address)
        strangers = Strangers(HOST, port, random.Random(rng.random()))
        storm(lambda: strangers.storm_here(CONTROL_BYTES, CONNECTIONS), pair)
        strangers.leave()


def test_bytes_on_gloo(caplog: pytest.LogCaptureFixture) -> None:
    """A new pair can be made while strangers are connected. Afterwards, no file is left open."""
    rng = dice("gloo")
    with stream() as (prefill, decode):
        # At its first use, torch opens some files and keeps them open.
        GoodPair(prefill, decode, rng).transfer()
    del prefill, decode
    files = OpenFiles()
    _attack_gloo(rng)
    check_log(caplog)
    files.wait_as_at_first()


def _attack_gloo(rng: random.Random) -> None:
    with stream() as (prefill, decode), running(Decode(random_caches(3), "d2")) as other:
        pair = GoodPair(prefill, decode, rng)
        pair.transfer()
        ports = sorted(_listening() - {port_of(prefill.server.address)})
        assert len(ports) >= 2, "gloo on both sides of the pair"
        crowds = {port: Strangers(HOST, port, random.Random(rng.random())) for port in ports}

        def attack() -> None:
            for port in ports:  # gloo keeps unknown connections until the pair is closed
                for _ in range(20):
                    crowds[port].come_and_stay(rng.choice([garbage, another_protocol])(rng))

        storm(attack, pair)
        GoodPair(prefill, other, rng).transfer()
        for strangers in crowds.values():
            strangers.leave()
        pair.transfer()


def _listening() -> set[int]:
    return {
        each.laddr.port
        for each in psutil.Process().net_connections("tcp")
        if each.status == psutil.CONN_LISTEN
    }


@contextlib.contextmanager
def running(decode: Decode) -> Iterator[Decode]:
    try:
        yield decode
    finally:
        decode.client.stop()


# ---- messages ------------------------------------------------------------------------------

MESSAGES: list[Any] = [*TO_PREFILL, *TO_DECODE]


def hostile_value(rng: random.Random, depth: int = 0) -> Any:
    values: list[Any] = [
        0, 1, -1, 2**31, 2**63 - 1, -(2**63), 2**64 - 1, 0.5, float("nan"), float("inf"), None,
        True, "", "x" * 5000, "\0\n\r", "\u202e😀", b"", rng.randbytes(20), OPTIONS.incarnation,
    ]  # fmt: skip
    if depth < 3:
        values += [[hostile_value(rng, depth + 1)] * 3, {"type": hostile_value(rng, depth + 1)}]
    return rng.choice(values)


def hostile_message(rng: random.Random, message: Any, known: dict[str, Any]) -> bytes:
    """Return a message of ours with some fields wrong or missing.

    Args:
        known: values that mean something to the receiver, by field name.
    """
    fields = msgspec.to_builtins(message)
    for name in list(fields):
        match rng.choice(["as it is", "as it is", "known", "hostile", "away"]):
            case "known" if name in known:
                fields[name] = known[name]
            case "hostile":
                fields[name] = hostile_value(rng)
            case "away" if rng.random() < 0.2:
                del fields[name]
    return msgspec.msgpack.encode(fields)


@contextlib.contextmanager
def dealer(address: str, secret: str = OPTIONS.secret) -> Iterator[zmq.Socket[bytes]]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    with socket:
        socket.setsockopt(zmq.LINGER, 0)
        protect_client(socket, secret)
        socket.connect(address)
        yield socket


def heard_all(socket: zmq.Socket[bytes]) -> None:
    """Send a PING and wait for an answer, so that the server has read the socket's messages.

    The answer is a REFUSE, because the connection has no pair.
    """
    while socket.poll(0):
        socket.recv_multipart()
    socket.send(wire.encode(wire.Ping()))
    assert socket.poll(10_000), "no answer"


def test_messages_without_a_hello(caplog: pytest.LogCaptureFixture) -> None:
    """Without HELLO a message has no effect, even if its fields are right.

    The exception is RELEASE, which this test does not send. The prefill worker's own front end
    sends it without HELLO.
    """
    rng = dice("strangers")
    messages = [each for each in MESSAGES if not isinstance(each, wire.Release)]
    with good_pair(rng, caplog) as pair:

        def frames() -> list[bytes]:
            match rng.choice(["noise", "msgpack", "message", "parts"]):
                case "noise":
                    return [rng.randbytes(rng.choice([0, 1, 50, wire.MAX_FRAME_BYTES]))]
                case "msgpack":
                    return [msgspec.msgpack.encode(hostile_value(rng))]
                case "parts":
                    return [rng.randbytes(9)] * rng.choice([2, 3, 100])
            known = {
                "transfer_id": pair.transfer_id,
                "expected_incarnation": "p0",  # with "p1", a HELLO would make a peer
                "incarnation": "d1",
            }
            return [hostile_message(rng, rng.choice(messages), known)]

        def attack() -> None:
            address = pair.prefill.server.address
            for _ in range(6):
                with dealer(address) as socket:
                    for _ in range(FRAMES // 6):
                        socket.send_multipart(frames())
                        while socket.poll(0):
                            socket.recv_multipart()
                    heard_all(socket)

        storm(attack, pair)
        assert len(pair.prefill.server.transfers.peers) == 1


def hello(**fields: Any) -> bytes:
    right = wire.Hello(
        version=wire.PROTOCOL_VERSION,
        expected_incarnation="p1",
        incarnation="stranger",
        geometry=GEOMETRY,
        backend="gloo",
        pair_id="pair",
    )
    return msgspec.msgpack.encode(msgspec.to_builtins(right) | fields)


def geometry(**fields: Any) -> dict[str, Any]:
    built: dict[str, Any] = msgspec.to_builtins(GEOMETRY) | fields
    return built


WRONG_HELLOS: dict[str, dict[str, Any]] = {
    "version": {"version": 2**63 - 1},
    "old incarnation": {"expected_incarnation": "p0"},
    "no incarnation": {"expected_incarnation": ""},
    "backend": {"backend": "nccl"},
    "unknown backend": {"backend": "\0"},
    "model": {"geometry": geometry(model="another")},
    "content": {"geometry": geometry(content=2**63 - 1)},
    "no heads": {"geometry": geometry(total_kv_heads=0)},
    "many ranks": {"geometry": geometry(tp_size=2**40)},
    "rank": {"geometry": geometry(tp_rank=1)},
    "odd ranks": {"geometry": geometry(tp_size=3, tp_rank=2)},
    "negative blocks": {"geometry": geometry(block_tokens=-16)},
    "unlike blocks": {"geometry": geometry(block_tokens=2**62, positions_known=False)},
    "id as a number": {"pair_id": 1},
}


def test_peers_with_a_wrong_hello(caplog: pytest.LogCaptureFixture) -> None:
    """A wrong HELLO is refused or ignored, and its sender does not become a peer."""
    rng = dice("hello")
    with good_pair(rng, caplog) as pair:

        def attack() -> None:
            for fields in WRONG_HELLOS.values():
                with dealer(pair.prefill.server.address) as socket:
                    socket.send(hello(**fields))
                    for _ in range(5):
                        socket.send(wire.encode(wire.Reserve(pair.transfer_id, 0, 9)))
                        socket.send(wire.encode(wire.Cancel(pair.transfer_id)))
                    heard_all(socket)

        storm(attack, pair)
        assert len(pair.prefill.server.transfers.peers) == 1


def test_a_peer_at_anothers_transfer(caplog: pytest.LogCaptureFixture) -> None:
    """No decode worker takes or ends a transfer of another decode worker."""
    rng = dice("peer")
    with good_pair(rng, caplog) as pair, Stranger(pair.prefill.server.address) as stranger:
        prefill, decode, tokens = pair.prefill, pair.decode, 5 * BLOCK_TOKENS
        stranger.hello()
        assert isinstance(stranger.receive(), wire.Welcome)

        def meddle() -> None:
            for number in range(200):
                start, end = (rng.choice([0, 16, tokens, -1, 2**63 - 1]) for _ in "ab")
                transfer_id = rng.choice(["mine#1", f"unknown{number % 20}", "", "x" * 300])
                stranger.send(wire.Reserve(transfer_id, start, end))
                stranger.send(wire.Cancel(rng.choice(["mine#1", "unknown", "x" * 300])))
            stranger.send(wire.Ping())
            wait_until(lambda: isinstance(stranger.receive(), wire.Pong), what="all was handled")

        source, target = list(range(5)), list(range(10, 15))
        decode.reserve(prefill, "mine#1", target, 0, tokens)
        wait_until(
            lambda: "mine#1" in prefill.server.transfers.waiting, what="the transfer is reserved"
        )
        meddle()
        prefill.server.begin_step([chunk_of("mine#1", tuple(source), 0, tokens, tokens)])
        meddle()
        stranger.send(wire.Bye())
        # A CANCEL may be on its way while the prefill worker answers BYE.
        stranger.send(wire.Cancel("mine#1"))
        stranger.hello()
        wait_until(lambda: isinstance(stranger.receive(), wire.Welcome), what="all was handled")
        prefill.server.end_step()
        prefill.server.request_finished("mine#1", 42, computed=True)
        assert decode.result("mine#1").complete
        assert same_blocks(prefill.caches, source, decode.caches, target)
        prefill.wait_released("mine#1")


def to_decode(rng: random.Random, transfer_id: str) -> wire.ToDecode:
    """Return a message of a defective prefill worker."""

    def number() -> int:
        return rng.choice([0, 1, -1, 64, 512, 2**31, 2**63 - 1, -(2**63)])

    block_range = LayerBlockRange(0, rng.choice([1, 4, 2**40]), 0, rng.choice([1, 5, 2**40]))
    messages: list[wire.ToDecode] = [
        wire.Welcome("pair", GEOMETRY),
        wire.Refuse(rng.choice(["pair", ""]), "because"),
        wire.Header(
            rng.choice([7, number()]), transfer_id, block_range, rng.choice([3, 2**62, number()])
        ),
        wire.End(
            transfer_id=transfer_id,
            token_start=number(),
            token_end=number(),
            messages=number(),
            num_bytes=number(),
            hidden_bytes=number(),
            first_token_id=number(),
            tail_ms=float("nan"),
        ),
        wire.Fail(rng.choice([transfer_id, "unknown"]), "x" * 100),
        wire.Pong(),
    ]
    return rng.choice(messages)


def test_a_prefill_worker_that_sends_wrong_messages(caplog: pytest.LogCaptureFixture) -> None:
    """Only this worker's transfers may fail. Only the blocks reserved for them may be written."""
    rng = dice("defective prefill")
    with good_pair(rng, caplog, max_lines=3 * WRONG_MESSAGES, peer_lease_s=1.5) as pair:
        _run_defective_prefill(pair, rng)
        wait_until(lambda: len(pair.decode.client.transfers.peers) == 1, what="its pair is closed")


def _run_defective_prefill(pair: GoodPair, rng: random.Random) -> None:
    decode, tokens = pair.decode, 3 * BLOCK_TOKENS
    defective = Prefill(random_caches(5), "p2", peer_lease_s=1.5)
    server = defective.server
    try:
        for number in range(WRONG_MESSAGES):
            transfer_id, target = f"wrong{number}#1", rng.sample(range(BLOCKS), 3)
            kept = [layer.clone() for layer in decode.caches]
            decode.reserve(defective, transfer_id, target, 0, tokens, incarnation="p2")
            wait_until(
                lambda: any(peer.up for peer in [*server.transfers.peers.values()]),
                what="the pair is open",
            )
            with server.transfers.lock:
                for peer in server.transfers.peers.values():
                    server.transfers.post(peer, to_decode(rng, transfer_id))
            defective.compute(transfer_id, [1, 2, 3], tokens)
            server.request_finished(transfer_id, 42, computed=True)
            if decode.result(transfer_id).complete:
                assert same_blocks(defective.caches, [1, 2, 3], decode.caches, target)
            others = sorted(set(range(BLOCKS)) - set(target))
            assert same_blocks(kept, others, decode.caches, others)
            pair.transfer()
    finally:
        server.stop()


def test_a_server_that_speaks_no_kv(caplog: pytest.LogCaptureFixture) -> None:
    """At a prefill worker's address, another server answers HELLO with noise."""
    rng = dice("no kv")
    router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    with good_pair(rng, caplog) as pair, router:
        router.setsockopt(zmq.LINGER, 0)
        protect_server(router, OPTIONS.secret)
        address = f"tcp://{HOST}:{router.bind_to_random_port(f'tcp://{HOST}')}"
        for number in range(20):
            transfer_id = f"noise{number}#1"
            pair.decode.reserve(address, transfer_id, [5], 0, 9)
            said: Any = None
            while not isinstance(said, wire.Hello):  # the BYE of the previous pair may come first
                assert router.poll(10_000), "no HELLO"
                routing_id, frame = router.recv_multipart()
                said = wire.decode_to_prefill(frame)
            hostile = hostile_message(rng, rng.choice(MESSAGES), {"type": "welcome"})
            noise = rng.choice([rng.randbytes(30), hostile])
            router.send_multipart([routing_id, noise])
            assert not pair.decode.result(transfer_id).complete
        pair.transfer()


def test_reports_of_strangers(caplog: pytest.LogCaptureFixture) -> None:
    """A reported fault replaces the whole worker, so reports of strangers must be dropped."""
    rng = dice("reports")
    reports = RankReports(HOST, OPTIONS.secret)
    strangers = Strangers(HOST, port_of(reports.endpoint), rng)
    strangers.storm_here(CONTROL_BYTES, CONNECTIONS)
    send_report(reports.endpoint, "guess", RankReport(0, fault="replace it"))
    send_report(reports.endpoint, "guess", RankReport(0, address="tcp://elsewhere"))
    send_report(reports.endpoint, OPTIONS.secret, RankReport(7, address="tcp://no-such-rank"))
    push: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
    with push:
        push.setsockopt(zmq.LINGER, 1000)
        protect_client(push, OPTIONS.secret)
        push.connect(reports.endpoint)
        for _ in range(100):
            push.send_multipart([rng.randbytes(20)] * rng.choice([1, 1, 3]))
            push.send(msgspec.msgpack.encode(hostile_value(rng)))
    send_report(reports.endpoint, OPTIONS.secret, RankReport(0, address="tcp://here"))
    try:
        assert reports.addresses(1, 10) == ("tcp://here",)
        assert reports.fault() is None
        send_report(reports.endpoint, OPTIONS.secret, RankReport(0, fault="it hangs"))
        wait_until(lambda: reports.fault() == "it hangs", what="our own report has arrived")
    finally:
        reports.close()
        strangers.leave()
    check_log(caplog)

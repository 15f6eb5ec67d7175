"""If this machine cannot use a host, the error names the host's configuration field."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cluster.local.ports import check_port_is_free, free_port, with_router_port
from core.config.schema import load_config
from core.errors import ConfigError

ELSEWHERE = "192.0.2.1"  # RFC 5737 reserves this address for documentation: no machine has it


@pytest.mark.parametrize("port", [0, 50051])
@pytest.mark.parametrize("name", ["router.host", "cluster.host"])
def test_a_host_of_another_machine_is_named_by_its_field(name: str, port: int) -> None:
    config = load_config(None, {name: ELSEWHERE, "router.port": port})
    with pytest.raises(ConfigError, match=f"^{name}: {ELSEWHERE} is not an address of this mach"):
        with_router_port(config)


def test_a_host_without_an_address_is_named_by_its_field() -> None:
    with pytest.raises(ConfigError, match=r"^router.host: 'no.invalid' cannot be resolved"):
        check_port_is_free("no.invalid", free_port("127.0.0.1"), "router.host")


def test_the_system_gives_a_free_port_to_no_other_program() -> None:
    """Otherwise, a process of Ray may get the router's port before the router starts."""
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    if high - low > 50_000:
        pytest.skip("this machine gives away nearly all ports")
    ports = {free_port("127.0.0.1") for _ in range(50)}
    assert len(ports) > 1
    assert not any(low <= port <= high for port in ports)


def test_a_port_that_is_in_use_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        monkeypatch.setattr("cluster.local.ports._PORTS", [taken] * 100)
        assert free_port("127.0.0.1") != taken

"""Addresses as "host:port" text; an IPv6 host stands in brackets."""

from __future__ import annotations

import ipaddress


def bracketed(host: str) -> str:
    """``host`` as it stands before a colon: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def host_port(host: str, port: int | str) -> str:
    """The address of ``port`` on ``host``."""
    return f"{bracketed(host)}:{port}"


def split_host_port(address: str) -> tuple[str, int]:
    """The host, without brackets, and the port of an address that ``host_port`` made."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""Options of Baton's gRPC servers and channels. Both ends of a connection send keepalive pings."""

from __future__ import annotations

Options = tuple[tuple[str, int], ...]


def channel_options(max_message_bytes: int, silence_s: float) -> Options:
    """Return the options of a channel.

    Args:
        max_message_bytes: largest message that is sent or accepted.
        silence_s: seconds without any data from the peer after which the connection counts as
            broken. Only this bound detects a failed host or network, because neither end
            then closes the connection.
    """
    ping_ms = max(1, round(silence_s * 1000 / 2))
    return (
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", ping_ms),  # from the last byte received to the ping
        ("grpc.keepalive_timeout_ms", ping_ms),  # from the ping to its answer
        # 0: no limit, so that pings continue while a stream waits for its first token.
        ("grpc.http2.max_pings_without_data", 0),
    )


def server_options(max_message_bytes: int, silence_s: float) -> Options:
    """Return the options of a server. The arguments are those of ``channel_options``."""
    return (
        *channel_options(max_message_bytes, silence_s),
        ("grpc.so_reuseport", 0),  # a second server on the same port must fail, not share it
        ("grpc.http2.max_ping_strikes", 0),  # 0: never close a connection for frequent pings
    )

"""Options of our gRPC servers and channels. Both ends of a connection ask for signs of life."""

from __future__ import annotations

Options = tuple[tuple[str, int], ...]


def channel_options(max_message_bytes: int, silence_s: float) -> Options:
    """Of a channel.

    Args:
        silence_s: without a sign of life until the connection counts as broken. Nothing else tells
            of a peer whose host, or the way to it, is gone; nobody closed the connection.
    """
    ping_ms = max(1, round(silence_s * 1000 / 2))
    return (
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", ping_ms),  # from the last byte to the question
        ("grpc.keepalive_timeout_ms", ping_ms),  # and on to the answer
        ("grpc.http2.max_pings_without_data", 0),  # while a stream waits for its first token, too
    )


def server_options(max_message_bytes: int, silence_s: float) -> Options:
    """Of a server; likewise."""
    return (
        *channel_options(max_message_bytes, silence_s),
        ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
        ("grpc.http2.max_ping_strikes", 0),  # clients may ask as often as we do
    )

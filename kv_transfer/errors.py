"""Errors of the KV stream.

Applications never see them: if a transfer fails, the decode worker recomputes the prompt.
"""


class KvTransferError(Exception):
    """Base of all errors of the KV stream."""


class ProtocolError(KvTransferError):
    """The peer, or a caller in this process, broke the protocol."""


class IncompatibleError(KvTransferError):
    """Two ranks cannot pair, or a rank's cache cannot be streamed. The message says why."""


class PairError(KvTransferError):
    """A pair could not be made, or it broke."""


class PairClosedError(PairError):
    """The peer announced that it closed the pair. The pair may be made again."""

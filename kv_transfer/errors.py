"""Errors of the KV stream. Applications never see them: a failed transfer is recomputed."""


class KvTransferError(Exception):
    """Base of all errors of the KV stream."""


class ProtocolError(KvTransferError):
    """The peer, or a caller in this process, broke the protocol."""


class IncompatibleError(KvTransferError):
    """The two caches cannot be mapped onto each other; the message names what differs."""


class PairError(KvTransferError):
    """The process group of a pair could not be made, or it broke."""


class PairClosedError(PairError):
    """The peer closed the pair on purpose; the pair may be made again."""

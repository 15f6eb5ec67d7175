"""Errors of the KV stream. None of them reaches an application: a failed transfer is recomputed."""


class KvTransferError(Exception):
    """Base of all errors of the KV stream."""


class ProtocolError(KvTransferError):
    """The peer, or a caller here, did what the protocol does not allow."""


class IncompatibleError(KvTransferError):
    """The two caches cannot be mapped onto each other; says which fact differs."""


class PairError(KvTransferError):
    """The process group of a pair could not be made, or broke."""


class PairClosedError(PairError):
    """The peer closed the pair in good order; it may be made again."""

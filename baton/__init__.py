"""Client for Baton, an LLM serving cluster that splits prefill and decode.

    with baton.Client("127.0.0.1:50051") as client:
        for response in client.generate("Once upon a time", max_tokens=32):
            print(response.text, end="", flush=True)

``Client`` blocks; ``AsyncClient`` is for asyncio. A call that fails raises a ``BatonError``.
"""

from baton.aio import AsyncClient, AsyncResponseStream
from baton.client import Client, ResponseStream
from baton.errors import (
    AlreadyExistsError,
    BatonError,
    CancelledError,
    CapacityError,
    DeadlineError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from baton.types import (
    ChatMessage,
    Completion,
    FinishReason,
    KvOutcome,
    KvReport,
    Phases,
    RequestFields,
    Response,
    SamplingFields,
    SamplingParams,
    TokenLogprobs,
    TopLogprob,
    Usage,
)

__all__ = [
    "AlreadyExistsError",
    "AsyncClient",
    "AsyncResponseStream",
    "BatonError",
    "CancelledError",
    "CapacityError",
    "ChatMessage",
    "Client",
    "Completion",
    "DeadlineError",
    "FinishReason",
    "InternalError",
    "InvalidArgumentError",
    "KvOutcome",
    "KvReport",
    "NotFoundError",
    "Phases",
    "RequestFields",
    "Response",
    "ResponseStream",
    "SamplingFields",
    "SamplingParams",
    "TokenLogprobs",
    "TopLogprob",
    "UnavailableError",
    "Usage",
]

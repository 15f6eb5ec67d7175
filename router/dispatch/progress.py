"""The state of one request over all its attempts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from baton.v1 import inference_pb2
from router.dispatch.attempt import Attempt
from router.phases import PhaseClock
from router.request import TokenRequest


@dataclass(slots=True)
class Progress:
    """The state of one request over all its attempts."""

    request: TokenRequest
    worker_request_id: str  # used once, unlike a client's request id
    deadline_s: float
    phases: PhaseClock
    service_class: str = ""
    token_ids: list[int] = field(default_factory=list)
    attempts: int = 0
    lost_attempts: int = 0  # also those at other routers, before a resume
    on_lost_attempt: Callable[[int], None] = lambda _count: None  # gets lost_attempts
    prefill_id: str = ""
    decode_id: str = ""
    attempt: Attempt | None = None  # the latest

    @property
    def remaining_tokens(self) -> int:
        return self.request.sampling.max_tokens - len(self.token_ids)

    def sampling(self) -> inference_pb2.SamplingParams:
        """The sampling parameters of the next attempt, for the tokens that are still to come."""
        sampling = inference_pb2.SamplingParams()
        sampling.CopyFrom(self.request.sampling)
        sampling.max_tokens = self.remaining_tokens
        sampling.min_tokens = max(0, sampling.min_tokens - len(self.token_ids))
        return sampling

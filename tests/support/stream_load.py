"""Client threads that send requests, and checks of each request's outcome."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import baton
from tests.support.waiting import wait_until

# If a request is refused for one of these reasons before its first response, the client sends it
# again.
REFUSALS = {
    "NO_PREFILL_WORKER",
    "NO_DECODE_WORKER",
    "QUEUE_FULL",
    "QUEUE_TIMEOUT",
    "OVERLOADED",
}
# Reasons that a client gets if the router dies or shuts down.
ROUTER_GONE = {"CONNECTION_FAILED", "ROUTER_DRAINING"}
_RETRY_AFTER_S = 0.2
_JOIN_S = 200.0


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One greedy request that a client sends."""

    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(slots=True)
class Outcome:
    """What a client has received for one request so far. One thread writes it."""

    request: PlannedRequest
    refusals: list[str] = field(default_factory=list)  # reasons, one for each refusal
    responses: list[baton.Response] = field(default_factory=list)
    errors: list[baton.BatonError] = field(default_factory=list)
    ends: int = 0  # how many times the stream ended, with or without an error
    given_up: bool = False  # refused, and not sent again because the load was ending

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for response in self.responses for token in response.token_ids)

    @property
    def attempts(self) -> int:
        """How many times the router dispatched the request. The request must have ended well."""
        phases = self.responses[-1].phases
        assert phases is not None
        return phases.attempts


class Load:
    """Sends requests. Each plan has its own client thread.

    The end of the ``with`` block waits until all requests have ended. If an error ends the block,
    clients send no further requests.

    Args:
        plans: for each client, the requests that it sends one after the other.
        refusals: reasons of refusals after which a client sends the request again.
    """

    def __init__(
        self,
        address: str,
        plans: Sequence[Iterable[PlannedRequest]],
        refusals: Set[str] = REFUSALS,
    ) -> None:
        self._address = address
        self._refusals = refusals
        self._finished = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(plan,), daemon=True) for plan in plans
        ]
        self.outcomes: list[Outcome] = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._finished.set()
        for thread in self._threads:
            thread.join(_JOIN_S)
        if error is None:
            assert not any(thread.is_alive() for thread in self._threads), "a client thread hangs"

    def wait_for_streams(self, count: int, within_s: float = 60) -> None:
        """Wait until ``count`` requests have received some of their responses, but not all."""

        def are_running() -> bool:
            return sum(bool(each.responses) and not each.ends for each in self.outcomes) >= count

        wait_until(are_running, what=f"{count} streams run", within_s=within_s)

    def finish(self) -> None:
        """Send no further requests."""
        self._finished.set()

    def wait_for_tokens(self, count: int, within_s: float = 60) -> None:
        """Wait until the number of requests with at least ``count`` tokens reaches the number of
        clients. If a client sends several requests, each of them counts."""

        def have_come() -> bool:
            tokens = [len(outcome.token_ids) for outcome in self.outcomes]
            return len([each for each in tokens if each >= count]) >= len(self._threads)

        wait_until(have_come, what=f"enough requests have {count} tokens", within_s=within_s)

    def wait_for_requests(self, count: int, within_s: float = 60) -> None:
        """Wait until the clients have sent ``count`` requests in total."""
        wait_until(
            lambda: len(self.outcomes) >= count,
            what=f"{count} requests were sent",
            within_s=within_s,
        )

    def _run(self, plan: Iterable[PlannedRequest]) -> None:
        with baton.Client(self._address, timeout_s=_JOIN_S) as client:
            for request in plan:
                if self._finished.is_set():
                    return
                outcome = Outcome(request)
                self.outcomes.append(outcome)
                while _is_refused(outcome, client, self._refusals):
                    if self._finished.wait(_RETRY_AFTER_S):
                        outcome.given_up = True
                        return


def _is_refused(outcome: Outcome, client: baton.Client, refusals: Set[str]) -> bool:
    """Send the request once. Return True if the client may send it again."""
    try:
        stream = client.generate(
            token_ids=outcome.request.prompt,
            max_tokens=outcome.request.max_tokens,
            temperature=0.0,
            ignore_eos=True,
        )
        for response in stream:
            outcome.responses.append(response)
    except baton.BatonError as error:
        if error.reason in refusals and not outcome.responses:
            outcome.refusals.append(error.reason)
            return True
        outcome.errors.append(error)
    outcome.ends += 1
    return False


def check_ended_well(outcome: Outcome) -> None:
    """Check that the request ended exactly once, at ``max_tokens`` and without an error. A request
    that was given up must have no response."""
    if outcome.given_up:
        assert not outcome.responses
        return
    assert not outcome.errors, f"after {len(outcome.token_ids)} tokens: {outcome.errors}"
    assert outcome.ends == 1
    finishes = [each.finish_reason for each in outcome.responses if each.finish_reason]
    assert finishes == [baton.FinishReason.LENGTH]
    assert outcome.responses[-1].finish_reason


def check_sequence(outcome: Outcome) -> None:
    """Check that no response is missing, repeated or out of order."""
    numbers = [each.sequence for each in outcome.responses]
    assert numbers == list(range(len(numbers)))


def check_tokens(outcome: Outcome, expected: Sequence[int]) -> None:
    """Check that the tokens so far are those of an undisturbed run, ``expected``. If the stream
    ended without an error, no token may be missing."""
    tokens = outcome.token_ids
    assert tokens == tuple(expected)[: len(tokens)]
    if outcome.ends and not outcome.errors:
        assert len(tokens) == len(expected)

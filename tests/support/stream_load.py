"""Client threads with streams, and what must hold of each stream."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import baton
from tests.support.waiting import wait_until

# Refused before anything was done for the request: the client may come again, and does.
REFUSALS = {
    "NO_PREFILL_WORKER",
    "NO_DECODE_WORKER",
    "QUEUE_FULL",
    "QUEUE_TIMEOUT",
    "OVERLOADED",
}
# The router died, or left, before it had said anything of the request.
ROUTER_GONE = {"CONNECTION_FAILED", "ROUTER_DRAINING"}
_COME_AGAIN_S = 0.2
_JOIN_S = 200.0


@dataclass(frozen=True, slots=True)
class Ask:
    """One greedy request."""

    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(slots=True)
class Outcome:
    """What came of one request, as far as it came. Written by one thread."""

    ask: Ask
    refusals: list[str] = field(default_factory=list)  # reasons
    responses: list[baton.Response] = field(default_factory=list)
    errors: list[baton.BatonError] = field(default_factory=list)
    ends: int = 0  # of the stream, with or without an error
    given_up: bool = False  # it was refused, and the load was over

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for response in self.responses for token in response.token_ids)

    @property
    def attempts(self) -> int:
        """Dispatches, of a request that has ended well."""
        phases = self.responses[-1].phases
        assert phases is not None
        return phases.attempts


class Load:
    """Runs requests, one client thread for each of ``plans``, which asks one after the other.

    Leaving the block waits for the requests that run; those not begun are left out if an error
    ends the block.

    Args:
        refusals: reasons to come again with a request.
    """

    def __init__(
        self,
        address: str,
        plans: Sequence[Iterable[Ask]],
        refusals: Set[str] = REFUSALS,
    ) -> None:
        self._address = address
        self._refusals = refusals
        self._over = threading.Event()
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
            self._over.set()
        for thread in self._threads:
            thread.join(_JOIN_S)
        if error is None:
            assert not any(thread.is_alive() for thread in self._threads), "a client hangs"

    def wait_for_streams(self, count: int, within_s: float = 60) -> None:
        """Until so many requests have some of their responses, and not all."""

        def there() -> bool:
            return sum(bool(each.responses) and not each.ends for each in self.outcomes) >= count

        wait_until(there, what=f"{count} streams run", within_s=within_s)

    def finish(self) -> None:
        """Begin no more requests."""
        self._over.set()

    def wait_for_tokens(self, count: int, within_s: float = 60) -> None:
        """Until each client has a request with so many tokens."""

        def there() -> bool:
            tokens = [len(outcome.token_ids) for outcome in self.outcomes]
            return len([each for each in tokens if each >= count]) >= len(self._threads)

        wait_until(there, what=f"each client has {count} tokens", within_s=within_s)

    def wait_for_requests(self, count: int, within_s: float = 60) -> None:
        """Until so many requests have begun."""
        wait_until(lambda: len(self.outcomes) >= count, what=f"{count} requests", within_s=within_s)

    def _run(self, plan: Iterable[Ask]) -> None:
        with baton.Client(self._address, timeout_s=_JOIN_S) as client:
            for ask in plan:
                if self._over.is_set():
                    return
                outcome = Outcome(ask)
                self.outcomes.append(outcome)
                while _is_refused(outcome, client, self._refusals):
                    if self._over.wait(_COME_AGAIN_S):
                        outcome.given_up = True
                        return


def _is_refused(outcome: Outcome, client: baton.Client, refusals: Set[str]) -> bool:
    """Send the request once; True if it may come again."""
    try:
        stream = client.generate(
            token_ids=outcome.ask.prompt,
            max_tokens=outcome.ask.max_tokens,
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
    """Exactly once, without an error."""
    if outcome.given_up:
        assert not outcome.responses
        return
    assert not outcome.errors, f"after {len(outcome.token_ids)} tokens: {outcome.errors}"
    assert outcome.ends == 1
    finishes = [each.finish_reason for each in outcome.responses if each.finish_reason]
    assert finishes == [baton.FinishReason.LENGTH]
    assert outcome.responses[-1].finish_reason


def check_sequence(outcome: Outcome) -> None:
    """No response is missing, repeated or out of order."""
    numbers = [each.sequence for each in outcome.responses]
    assert numbers == list(range(len(numbers)))


def check_tokens(outcome: Outcome, expected: Sequence[int]) -> None:
    """Those of a run that nothing disturbed, as far as they came."""
    tokens = outcome.token_ids
    assert tokens == tuple(expected)[: len(tokens)]
    if outcome.ends and not outcome.errors:
        assert len(tokens) == len(expected)

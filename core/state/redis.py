"""The only module of ``core.state`` that talks to Redis or Valkey.

The other modules pass commands as plain tuples, so that only this file imports the driver.
"""

from __future__ import annotations

import asyncio
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from core.errors import ConfigError, UnavailableError

Command = tuple[str | bytes | int, ...]

# Enough for one process. If all connections are in use, a call fails at once. Without this limit,
# calls would pile up unnoticed on a server that hangs.
_MAX_CONNECTIONS = 4


class RedisClient:
    """A client of one server. Belongs to the event loop that first uses it.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``. It may contain a password.
        socket_timeout_s: bound on connecting and on each answer. The driver tries twice, so a call
            to a server that hangs usually takes twice this bound.

    Raises:
        ConfigError: ``url`` is malformed.
    """

    def __init__(self, url: str, *, socket_timeout_s: float) -> None:
        try:
            self._redis: Redis = Redis.from_url(
                url,
                socket_timeout=socket_timeout_s,
                socket_connect_timeout=socket_timeout_s,
                retry=Retry(NoBackoff(), retries=1),
                retry_on_error=[RedisConnectionError, RedisTimeoutError],
                max_connections=_MAX_CONNECTIONS,
                protocol=2,  # supported by every server since Redis 2
            )
        except ValueError:  # not chained: the driver's text may quote a part of the password
            raise ConfigError(
                "redis.url: not a valid address; write special characters in a user name or "
                "password as %XX"
            ) from None

    async def execute(self, *commands: Command) -> list[Any]:
        """Run the commands as one transaction. Return their answers, with strings as bytes.

        Commands must be safe to repeat, because a transaction runs twice if its answer is lost.

        Raises:
            UnavailableError: the server does not answer, or refuses a command.
        """
        task = asyncio.current_task()
        assert task is not None
        cancellations = task.cancelling()
        try:
            async with self._redis.pipeline(transaction=len(commands) > 1) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                answers: list[Any] = await pipeline.execute()
        except (RedisError, OSError) as error:
            raise UnavailableError(
                f"the registry does not answer: {error}",
                reason="REGISTRY_UNAVAILABLE",
                retry_after_s=1.0,
            ) from error
        finally:
            # The driver loses a cancellation that comes while it writes: it uses asyncio.wait_for,
            # which in Python 3.11 returns its result instead.
            if task.cancelling() > cancellations:
                raise asyncio.CancelledError
        return answers

    async def close(self) -> None:
        """Disconnect. Idempotent."""
        await self._redis.aclose()

"""``make demo``: starts a cluster on this machine, sends two requests to it, and stops it.

At the end, the demo checks that no process, port or folder of the cluster is left.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

from baton import AsyncClient, ChatMessage, Completion, RequestFields
from cluster.cli.demo_text import LONG_PROMPT
from cluster.cli.progress import Progress
from cluster.cli.render import StreamPrinter, phases_line
from cluster.local.launch import Cluster
from cluster.local.ports import check_port_is_free
from cluster.local.reaper import find
from cluster.local.run_dir import ClusterState, read_state
from core.config.schema import Config, load_config
from core.errors import BatonError, ConfigError, InternalError
from core.net import split_host_port

QUESTION: Final = "What is the capital of France?"
ANSWER: Final = "Paris"
# With this example, each token of the answer is at least e times as probable as any other one, so
# the last bits of the arithmetic, which differ between processors, change none.
CHAT: Final = (
    ChatMessage("user", "What is the capital of Japan?"),
    ChatMessage("assistant", "The capital of Japan is Tokyo."),
    ChatMessage("user", QUESTION),
)
# The demo has its own cluster name and a free port, so it does not clash with a running cluster.
OVERRIDES: Final = {"cluster.name": "demo", "router.port": 0}
ANSWER_TIMEOUT_S: Final = 120.0  # both answers take about 5 s on two cores


@dataclass(frozen=True, slots=True)
class DemoRequest:
    """One request of the demo. If ``prompt`` is None, ``fields`` contains a chat."""

    description: str  # shown to the user
    prompt: str | None
    fields: RequestFields


REQUESTS: Final[Mapping[str, DemoRequest]] = {
    "paris": DemoRequest(
        description=f"{QUESTION} (a chat's second question)",
        prompt=None,
        fields={
            "messages": list(CHAT),
            "temperature": 0.0,
            "max_tokens": 32,
        },
    ),
    "alice": DemoRequest(
        description=f"go on after {len(LONG_PROMPT.split()):,} words of Alice in Wonderland",
        prompt=LONG_PROMPT,
        fields={"temperature": 0.0, "max_tokens": 64},
    ),
}


class Conversation:
    """Sends all requests at the same time and prints the answers as they arrive.

    Args:
        requests: the requests by label.
        progress: shows which requests still wait for their first token.
    """

    def __init__(
        self,
        client: AsyncClient,
        requests: Mapping[str, DemoRequest],
        out: TextIO,
        progress: Progress,
    ) -> None:
        self._client = client
        self._requests = requests
        self._progress = progress
        self._printer = StreamPrinter(
            out, list(requests), clock=time.monotonic, colour=out.isatty()
        )
        self._waiting = set(requests)  # labels of the requests that have no text yet
        self._streaming: set[str] = set()  # labels of unfinished requests that have text

    async def run(self) -> dict[str, Completion]:
        """Return the finished answers by label.

        Raises:
            BatonError: a request failed, and the other requests were cancelled.
        """
        self._show_waiting()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {label: group.create_task(self._answer(label)) for label in self._requests}
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        return {label: task.result() for label, task in tasks.items()}

    async def _answer(self, label: str) -> Completion:
        request = self._requests[label]
        responses = []
        async with self._client.generate(request.prompt, **request.fields) as stream:
            async for response in stream:
                responses.append(response)
                if response.text:
                    self._progress.done()
                    self._waiting.discard(label)
                    self._streaming.add(label)
                    self._printer.write(label, response.text)
        self._waiting.discard(label)
        self._streaming.discard(label)
        self._printer.finish(label)
        self._show_waiting()
        return Completion.join(responses)

    def _show_waiting(self) -> None:
        if self._waiting and not self._streaming:
            labels = [label for label in self._requests if label in self._waiting]
            self._progress.step(f"waiting for the first token of {' and '.join(labels)}")


def demo(config: Config, out: TextIO) -> None:
    """Run the whole demo and print it to ``out``. Raises ConfigError or BatonError on failure."""
    print("Baton: a router, a prefill worker and a decode worker on this machine", file=out)
    with Progress(out) as progress:
        with Cluster(config, progress.step) as cluster:
            progress.done()
            state = read_state(config.cluster.run_path, config.cluster.name)
            assert state is not None, "a cluster that runs has a state"
            print_answers(asyncio.run(_converse(cluster.address, out, progress)), out)
        progress.done()
    check_all_gone(state)
    print("Everything is down: no process, port or folder is left.", file=out)


async def _converse(address: str, out: TextIO, progress: Progress) -> dict[str, Completion]:
    print(f"\nTwo requests at the same time, over gRPC to {address}:", file=out)
    for label, request in REQUESTS.items():
        print(f"  {label}: {request.description}", file=out)
    print(file=out)
    async with AsyncClient(address, timeout_s=ANSWER_TIMEOUT_S) as client:
        return await Conversation(client, REQUESTS, out, progress).run()


def check_all_gone(state: ClusterState) -> None:
    """Check that a cluster left nothing behind.

    Raises:
        InternalError: a process or a folder of the cluster still exists, or its port is in use.
    """
    if pids := find(state.cluster_id):
        raise InternalError(f"processes are left: {', '.join(map(str, sorted(pids)))}")
    if folders := [folder for folder in state.folders if Path(folder).exists()]:
        raise InternalError(f"folders are left: {', '.join(folders)}")
    try:
        check_port_is_free(*split_host_port(state.address))
    except ConfigError as error:
        raise InternalError(f"the port is still in use: {error}") from error


def print_answers(answers: Mapping[str, Completion], out: TextIO) -> None:
    """Print one line of phases per answer.

    Raises:
        InternalError: the answer to QUESTION is wrong.
    """
    print(file=out)
    width = max(map(len, answers))
    for label, answer in answers.items():
        print(f"{label:>{width}}: {phases_line(answer)}", file=out)
    print(file=out)
    if ANSWER not in (text := answers["paris"].text):
        raise InternalError(f"the answer to {QUESTION!r} does not name {ANSWER}: {text!r}")


def main() -> int:
    """Run the demo. Return the exit status: 0 success, 1 failure, 130 interrupted."""
    try:
        demo(load_config(None, OVERRIDES), sys.stdout)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ConfigError, BatonError) as error:
        print(f"The demo failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

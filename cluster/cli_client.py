"""``baton generate`` and ``baton chat``: the client package on a terminal."""

from __future__ import annotations

import argparse
import sys

from baton import ChatMessage, Client, Completion, RequestFields, Response
from cluster.render import phases_line, response_json


def generate(options: argparse.Namespace, address: str) -> int:
    """Send one prompt and print the answer as it comes; the phases go to stderr."""
    prompt: str = sys.stdin.read() if options.prompt == "-" else options.prompt
    fields = _fields(options)
    if options.chat:
        fields["messages"] = [ChatMessage("user", prompt)]
    with (
        Client(address, timeout_s=options.timeout) as client,
        client.generate(None if options.chat else prompt, **fields) as stream,
    ):
        last: Response | None = None
        for last in stream:
            if options.json:
                print(response_json(last), flush=True)
            else:
                print(last.text, end="", flush=True)
    if last is not None and not options.json:
        print(flush=True)
        print(phases_line(last), file=sys.stderr)
    return 0


def chat(options: argparse.Namespace, address: str) -> int:
    """Read messages and print answers until the input ends. Ctrl-C ends an answer only."""
    messages = [ChatMessage("system", options.system)] if options.system else []
    fields = _fields(options)
    with Client(address, timeout_s=options.timeout) as client:
        while True:
            try:
                text = input("> ")
            except EOFError:
                print()
                return 0
            if not text.strip():
                continue
            messages.append(ChatMessage("user", text))
            answer = _answer(client, messages, fields)
            messages.append(ChatMessage("assistant", answer))


def _answer(client: Client, messages: list[ChatMessage], fields: RequestFields) -> str:
    """Print one answer and return it, as far as it came."""
    responses: list[Response] = []
    try:
        with client.generate(**(fields | {"messages": list(messages)})) as stream:
            for response in stream:
                responses.append(response)
                print(response.text, end="", flush=True)
    except KeyboardInterrupt:
        print(" (interrupted)")
        return "".join(response.text for response in responses)
    print()
    print(phases_line(Completion.join(responses)), file=sys.stderr)
    return "".join(response.text for response in responses)


def _fields(options: argparse.Namespace) -> RequestFields:
    given = {
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "seed": options.seed,
        "stop": options.stop,
    }
    fields: RequestFields = {}
    fields.update({name: value for name, value in given.items() if value is not None})  # type: ignore[typeddict-item]
    return fields

"""``baton generate`` and ``baton chat``: send requests and print the answers as they stream."""

from __future__ import annotations

import argparse
import sys

from baton import (
    BatonError,
    ChatMessage,
    Client,
    Completion,
    InvalidArgumentError,
    RequestFields,
    Response,
)
from cluster.cli.render import phases_line, printable, response_json

_NOT_TEXT = "standard input holds bytes that are not UTF-8 text"


def generate(options: argparse.Namespace, address: str) -> int:
    """Send one prompt and print the answer as it arrives.

    Without ``--json``, a last line on stderr tells how long each phase took. Returns the exit
    status. Raises BatonError if the request fails.
    """
    prompt = _prompt(options)
    fields = _fields(options)
    if options.chat:
        fields["messages"] = [ChatMessage("user", prompt)]
    with (
        _client(options, address) as client,
        client.generate(None if options.chat else prompt, **fields) as stream,
    ):
        last: Response | None = None
        for last in stream:
            if options.json:
                print(response_json(last), flush=True)
            else:
                _show(last.text)
    if last is not None and not options.json:
        print(flush=True)
        print(phases_line(last), file=sys.stderr)
    return 0


def chat(options: argparse.Namespace, address: str) -> int:
    """Read messages and print answers until the input ends. Returns the exit status.

    Ctrl-C or an error during an answer ends that answer only, and the conversation continues.

    Raises:
        BatonError: the router cannot be reached.
    """
    messages = [ChatMessage("system", options.system)] if options.system else []
    fields = _fields(options)
    with _client(options, address) as client:
        while True:
            try:
                text = input("> ")
            except EOFError:
                print()
                return 0
            except UnicodeDecodeError:
                print(f"baton: {_NOT_TEXT}", file=sys.stderr)
                continue
            if not text.strip():
                continue
            messages.append(ChatMessage("user", text))
            answer = _answer(client, messages, fields)
            if answer is None:
                messages.pop()  # if it caused the error, the next request would fail, too
            else:
                messages.append(ChatMessage("assistant", answer))


def _client(options: argparse.Namespace, address: str) -> Client:
    def on_interruption(error: BatonError, seconds: float) -> None:
        wait = f"waiting up to {seconds:.0f} s for a router that continues the answer"
        print(f"\nbaton: {error}; {wait}", file=sys.stderr)

    return Client(address, timeout_s=options.timeout, on_interruption=on_interruption)


def _answer(client: Client, messages: list[ChatMessage], fields: RequestFields) -> str | None:
    """Print one answer and return its text, which may be partial.

    Return None if an error or Ctrl-C came before any text.
    """
    responses: list[Response] = []
    try:
        with client.generate(**(fields | {"messages": list(messages)})) as stream:
            for response in stream:
                responses.append(response)
                _show(response.text)
    except KeyboardInterrupt:
        print(" (interrupted)")
        return "".join(response.text for response in responses) or None
    except BatonError as error:
        if error.reason == "CONNECTION_FAILED":
            raise
        if responses:
            print()
        print(f"baton: {error}", file=sys.stderr)
        return "".join(response.text for response in responses) or None
    print()
    print(phases_line(Completion.join(responses)), file=sys.stderr)
    return "".join(response.text for response in responses)


def _show(text: str) -> None:
    """Print text unchanged to a file or pipe; on a terminal, replace control characters."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def _prompt(options: argparse.Namespace) -> str:
    prompt: str = options.prompt
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise InvalidArgumentError(_NOT_TEXT) from None


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

"""The command ``baton``: parses the command line and runs one command.

Each command imports its modules only when it runs. Commands that talk to a running cluster never
import Ray, vLLM or PyTorch, so they start in well under a second.

Exit status:

    0    success; also ``up`` when it is interrupted, after it has stopped the cluster
    1    failure: one sentence on stderr, or none if the pipe of stdout is closed
    2    wrong usage
    130  interrupted
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.types import Pool

if TYPE_CHECKING:
    from cluster.local.run_dir import ClusterState
    from core.config.schema import Config
    from core.errors import ConfigError

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = _parser().parse_args(arguments)
    run: Command = options.run
    from core.errors import BatonError, ConfigError

    try:
        return run(options)
    except (ConfigError, BatonError) as error:
        print(f"baton: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader closed the pipe; discard what is still buffered
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _up(options: argparse.Namespace) -> int:
    from cluster.cli.progress import Progress
    from cluster.local.launch import Cluster, StartInterruptedError
    from cluster.local.signals import Signals

    config = _load(options)
    with Signals() as signals, Progress(sys.stdout) as progress:
        cluster = Cluster(config, progress.step, signals)
        try:
            cluster.start()
            progress.done()
            _say(f"ready: gRPC at {cluster.address}; Ctrl-C stops it")
            cluster.watch(_say)
        except StartInterruptedError:
            pass
        finally:
            cluster.stop()
            progress.done()
    _say("stopped")
    if signals.hurry:  # a thread may still be inside a Ray call and would delay a normal exit
        os._exit(0)
    return 0


def _down(options: argparse.Namespace) -> int:
    from cluster.cli.down import take_down

    config = _load(options)
    take_down(config.cluster.run_path, config.cluster.name, _say)
    return 0


def _status(options: argparse.Namespace) -> int:
    from cluster.cli.status import as_json, as_table, read_view, read_workers

    state = _running(_load(options))
    has_store = state.store is not None
    workers = read_workers(state) if has_store else ()
    view = read_view(state) if has_store else None
    print((as_json if options.json else as_table)(state, workers, view))
    return 0


def _scale(options: argparse.Namespace) -> int:
    from cluster.cli.progress import Progress
    from cluster.cli.scale import scale

    with Progress(sys.stdout) as progress:
        scale(_running(_load(options)), dict(options.targets), progress.step)
    return 0


def _drain(options: argparse.Namespace) -> int:
    from cluster.cli.drain import drain
    from cluster.cli.progress import Progress

    with Progress(sys.stdout) as progress:
        drain(_running(_load(options)), options.worker, progress.step)
    _say(f"{options.worker} has left; another worker starts in its place")
    return 0


def _policy_apply(options: argparse.Namespace) -> int:
    from cluster.cli.policy import apply, check

    text = check(options.policy, None)
    view = apply(_running(_load(options)), text)
    _say(f"policy {view.policy} applies" + (", as advice only" if view.advisory else ""))
    return 0


def _policy_check(options: argparse.Namespace) -> int:
    from cluster.cli.policy import check
    from core.config.schema import load_config
    from core.errors import ConfigError

    config = None if options.config is None else load_config(options.config)
    wrong = []
    for path in options.policies:
        try:
            check(path, config)
        except ConfigError as error:
            wrong.append(str(error))
        else:
            _say(f"{path}: correct")
    if wrong:
        raise ConfigError("\n".join(wrong))
    return 0


def _policy_show(options: argparse.Namespace) -> int:
    from cluster.cli.policy import show

    _say(show(_running(_load(options))).rstrip())
    return 0


def _policy_remove(options: argparse.Namespace) -> int:
    from cluster.cli.policy import remove

    remove(_running(_load(options)))
    _say("no policy any more; each pool keeps its number of workers")
    return 0


def _policy_explain(options: argparse.Namespace) -> int:
    from cluster.cli.policy import as_json, as_text, explained

    _say((as_json if options.json else as_text)(explained(_running(_load(options)))))
    return 0


def _policy_simulate(options: argparse.Namespace) -> int:
    from simulate.run import SimulateOptions, simulate_command
    from simulate.trace import TraceOptions

    replay = {
        "duration_s": options.duration,
        "copies": options.copies,
        "speed": options.speed,
        "service_class": options.service_class,
    }
    simulate_command(
        options.policies,
        SimulateOptions(
            trace=options.trace,
            model=options.model,
            replay=TraceOptions(**{key: each for key, each in replay.items() if each is not None}),
            cold_start_s=options.cold_start,
            ttft_ms=options.ttft_ms,
            itl_ms=options.itl_ms,
            max_tokens=options.max_tokens,
            json_path=options.json,
            html_path=options.html,
        ),
        _say,
    )
    return 0


def _policy_calibrate(options: argparse.Namespace) -> int:
    from cluster.cli.calibrate import calibrate

    state = _running(_load(options))
    calibrate(state, options.output, _say)
    return 0


def _generate(options: argparse.Namespace) -> int:
    from cluster.cli.generate import generate

    return generate(options, _address(options))


def _chat(options: argparse.Namespace) -> int:
    from cluster.cli.generate import chat

    return chat(options, _address(options))


def _say(line: str) -> None:
    print(line, flush=True)


def _load(options: argparse.Namespace) -> Config:
    from core.config.schema import load_config

    given = {
        "cluster.name": options.name,
        "prefill.replicas": getattr(options, "prefill", None),
        "decode.replicas": getattr(options, "decode", None),
        "model.path": getattr(options, "model", None),
        "router.port": getattr(options, "port", None),
    }
    overrides: dict[str, Any] = {path: value for path, value in given.items() if value is not None}
    return load_config(options.config, overrides)


def _running(config: Config) -> ClusterState:
    """Return the state of the cluster. Raises ConfigError if no cluster of this name runs."""
    from cluster.local.run_dir import is_held, read_state

    base, name = config.cluster.run_path, config.cluster.name
    state = read_state(base, name)
    if state is None or not is_held(base, name):
        raise _not_running(config)
    return state


def _not_running(config: Config) -> ConfigError:
    from core.errors import ConfigError

    return ConfigError(
        f"no cluster named {config.cluster.name!r} is running; start one with: baton up"
    )


def _address(options: argparse.Namespace) -> str:
    from cluster.local.run_dir import read_state
    from core.errors import ConfigError

    if options.address is not None:
        address: str = options.address
        return address
    config = _load(options)
    try:
        state = read_state(config.cluster.run_path, config.cluster.name)
    except ConfigError:  # use the configured address; it may be on another machine
        state = None
    if state is not None:
        return state.address
    if config.router.port == 0:
        raise _not_running(config)
    return config.router_address


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="baton", description="An LLM serving cluster that splits prefill and decode."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    up = _command(commands, "up", _up, "start a cluster and stay in the foreground")
    up.add_argument("--prefill", type=int, metavar="N", help="prefill workers")
    up.add_argument("--decode", type=int, metavar="N", help="decode workers")
    up.add_argument("--model", metavar="NAME_OR_PATH", help="model to serve")
    up.add_argument("--port", type=int, help="gRPC port of the router; 0 takes a free one")

    _command(commands, "down", _down, "stop a cluster")

    status = _command(commands, "status", _status, "show a cluster's workers")
    status.add_argument("--json", action="store_true", help="print one JSON object")

    scale = _command(commands, "scale", _scale, "change the number of workers")
    scale.add_argument(
        "targets", nargs="+", type=_target, metavar="POOL=N", help="such as prefill=2"
    )

    drain = _command(commands, "drain", _drain, "drain one worker; another takes its place")
    drain.add_argument(
        "worker", metavar="WORKER", help="id of the worker, as baton status shows it"
    )

    _policy_commands(commands)

    generate = _command(commands, "generate", _generate, "send one prompt, stream the answer")
    generate.add_argument("prompt", help="the text; - reads it from standard input")
    generate.add_argument("--chat", action="store_true", help="send the prompt as a chat message")
    generate.add_argument("--json", action="store_true", help="print one JSON object per response")
    _sampling(generate)

    chat = _command(commands, "chat", _chat, "chat with the model; Ctrl-D ends the chat")
    chat.add_argument("--system", metavar="TEXT", help="system message")
    _sampling(chat)
    return parser


def _policy_commands(commands: Any) -> None:
    about = "apply, check, explain and simulate an autoscaling policy"
    policy = commands.add_parser("policy", help=about, description=about)
    verbs = policy.add_subparsers(title="commands", required=True, metavar="COMMAND")

    apply = _command(verbs, "apply", _policy_apply, "apply a policy; no worker restarts")
    apply.add_argument("policy", type=Path, metavar="FILE", help="policy file")

    about = "check policy files, without a cluster"
    check = verbs.add_parser("check", help=about, description=about)
    check.set_defaults(run=_policy_check)
    check.add_argument("policies", type=Path, nargs="+", metavar="FILE", help="policy file")
    about = "a cluster's configuration, which must allow the policies"
    check.add_argument("--config", type=Path, metavar="FILE", help=about)

    _command(verbs, "show", _policy_show, "print the policy that applies")
    _command(verbs, "remove", _policy_remove, "go on without a policy")

    _simulate_command(verbs)

    about = "measure the latency model of a running, idle cluster, for simulate"
    calibrate = _command(verbs, "calibrate", _policy_calibrate, about)
    calibrate.add_argument("output", type=Path, metavar="FILE", help="file to write, as YAML")

    explain = _command(verbs, "explain", _policy_explain, "show the decision now, and why")
    explain.add_argument("--json", action="store_true", help="print one JSON object")


def _simulate_command(verbs: Any) -> None:
    about = "replay a trace under policies in virtual time, and compare them; needs no cluster"
    simulate = verbs.add_parser("simulate", help=about, description=about)
    simulate.set_defaults(run=_policy_simulate)
    simulate.add_argument("policies", type=Path, nargs="+", metavar="POLICY", help="policy file")
    simulate.add_argument(
        "--trace",
        required=True,
        help="a file of Azure's LLM traces (CSV) or of Mooncake (JSON lines), or: synthetic",
    )
    simulate.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    simulate.add_argument("--html", type=Path, metavar="FILE", help="write a report with plots")
    simulate.add_argument(
        "--model",
        default="8b-h100",
        metavar="NAME_OR_FILE",
        help="latency model: 8b-h100 (default), fake, or a file of baton policy calibrate",
    )
    about = "time until a new worker is ready"
    simulate.add_argument("--cold-start", type=float, metavar="SECONDS", help=about)
    simulate.add_argument("--ttft-ms", type=float, metavar="MS", help="objective, for all policies")
    simulate.add_argument("--itl-ms", type=float, metavar="MS", help="objective, for all policies")
    about = "replay only the first SECONDS of the trace"
    simulate.add_argument("--duration", type=float, metavar="SECONDS", help=about)
    simulate.add_argument("--speed", type=float, metavar="N", help="replay N times as fast")
    simulate.add_argument("--copies", type=int, metavar="N", help="replay each request N times")
    simulate.add_argument("--service-class", metavar="NAME", help="class of all requests")
    about = "max_tokens of each request (default: the length of its answer)"
    simulate.add_argument("--max-tokens", type=int, metavar="N", help=about)


def _command(commands: Any, name: str, run: Command, about: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML configuration")
    parser.add_argument("--name", help="cluster's name (default: the configured one)")
    parser.set_defaults(run=run)
    return parser


def _sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="default: the running cluster's address, otherwise the configured address",
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most tokens in the answer")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="may be repeated")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="deadline of a request")


def _target(text: str) -> tuple[Pool, int]:
    pool, _, count = text.partition("=")
    try:
        return Pool(pool), int(count)
    except ValueError:
        known = " or ".join(f"{pool}=N" for pool in Pool)
        raise argparse.ArgumentTypeError(f"{text!r} is not {known}") from None


if __name__ == "__main__":
    sys.exit(main())

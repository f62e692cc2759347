"""The `shoal` command."""

import argparse
import atexit
import gc
import os
import sys
from collections.abc import Callable, Sequence

from services import (
    bench_command,
    commands,
    data_command,
    experts_command,
    export_command,
    plan_command,
    train_command,
)
from services.closed_pipe import while_it_is_read
from services.commands import CommandError
from services.parser import Parser
from services.values import count, number, seconds, utf8

DESCRIPTION = "Serve DeepSeek-V2-family models with their experts in separate Ray actors."
EPILOG = """\
examples:
  shoal serve models/bundled                      serve on http://127.0.0.1:8000 until Ctrl-C
  shoal serve DIR --expert-hosts 4 --detach       the same in the background
  shoal chat                                      talk to it
  shoal status --json                             hosts, workers and epoch, for scripts
  shoal experts scale 4 --wait                    go on with 4 expert hosts; no request notices
  shoal experts drain host-1 --wait               empty a host and end it
  shoal experts drain --to 2 --wait               before nodes go: with two hosts
  shoal experts replicas 2 --extra 4              two holders of each expert, more of the busiest
  shoal experts events --follow                   faults and changes as they happen
  shoal train examples/sft.yaml lr=1e-5           fine-tune, with the experts in actors
  shoal serve DIR --adapter runs/lora/adapter     serve it with what was trained
  shoal export DIR --adapter A --out NEW          the two in one checkpoint
  shoal data check FILE --model DIR               what is wrong with training data, and what is learned of it
  shoal plan DIR --expert-hosts 4                 memory and traffic of each actor, from config.json
  shoal stop                                      end it, and everything it started
  shoal doctor DIR                                what is missing or misconfigured
  shoal bench --quick                             measure it beside transformers
"""

REMOTE = (
    commands.chat,
    commands.status,
    experts_command.status,
    experts_command.scale,
    experts_command.rebalance,
    experts_command.drain,
    experts_command.replicas,
    experts_command.events,
)  # what can be asked of a service on another machine


def parser() -> argparse.ArgumentParser:
    """The command line; every subcommand explains itself with --help."""
    root: argparse.ArgumentParser = Parser(
        "shoal", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands_ = root.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands_)

    chat = _add(commands_, "chat", commands.chat, "Talk to a running service, or ask one question.")
    chat.add_argument("message", nargs="?", type=utf8, help="ask this, print the answer and leave")
    chat.add_argument("--system", type=utf8, help="text that comes before the conversation")
    chat.add_argument("--max-tokens", type=count, metavar="N", help="of an answer (default: what the context leaves)")
    chat.add_argument("--temperature", type=number, metavar="T", help="0: always the likeliest token")
    chat.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same answer")
    _add_key(chat)

    status = _add(commands_, "status", commands.status, "Show the hosts, workers and epoch of a running service.")
    status.add_argument("--json", action="store_true", help="for scripts")

    _add_experts(commands_)
    train_command.add_parser(commands_)
    export_command.add_parser(commands_)
    data_command.add_parser(commands_)
    plan_command.add_parser(commands_)

    stop = _add(commands_, "stop", commands.stop, "End a running service and everything that it started.")
    stop.add_argument("--timeout", type=seconds, default=60.0, metavar="S", help="seconds to wait (default 60)")

    doctor = _add(commands_, "doctor", commands.doctor, "Check this machine, and a checkpoint if one is given.")
    doctor.add_argument("model", nargs="?", metavar="MODEL", help="directory of a checkpoint")
    doctor.add_argument("--json", action="store_true", help="for scripts")

    commands_.add_parser(bench_command.NAME, help=bench_command.HELP, add_help=False)  # `main` hands it over
    return root


def _add(
    commands_: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], int],
    help_text: str,
) -> argparse.ArgumentParser:
    command = commands_.add_parser(name, help=help_text, description=help_text)
    if run in REMOTE:
        key = "API key" if run is commands.chat else "$SHOAL_ADMIN_TOKEN"
        where = command.add_mutually_exclusive_group()
        where.add_argument("--port", type=int, metavar="P", help="which service of this machine (8000)")
        where.add_argument(
            "--address",
            metavar="URL",
            help=f"a service elsewhere, with its {key} ($SHOAL_URL, unless --port is given)",
        )
    else:
        command.add_argument("--port", type=int, default=8000, metavar="P", help="which service (8000)")
    command.set_defaults(run=run)
    return command


def _add_key(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--api-key", default=os.environ.get("SHOAL_API_KEY"), metavar="KEY", help="default: $SHOAL_API_KEY"
    )


def _add_serve(commands_: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "Start Ray, the expert hosts, the attention workers and the HTTP endpoint; end them on Ctrl-C."
    serve = _add(commands_, "serve", commands.serve, text)
    serve.add_argument("model", metavar="MODEL", help="directory of a checkpoint in Hugging Face's layout")
    serve.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="DIR",
        help="LoRA adapter or delta to apply; may be given more than once",
    )
    serve.add_argument("--expert-hosts", type=int, default=2, metavar="N", help="actors that share the experts (2)")
    serve.add_argument("--expert-replicas", type=int, default=1, metavar="R", help="hosts that hold each expert (1)")
    serve.add_argument("--attention-replicas", type=int, default=1, metavar="M", help="attention workers (1)")
    serve.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on; others need a key")
    serve.add_argument("--served-name", metavar="NAME", help="model id for clients (default: the directory's name)")
    serve.add_argument("--max-length", type=int, metavar="T", help="tokens of prompt and answer (4096)")
    serve.add_argument("--cache-tokens", type=int, default=32768, metavar="T", help="of each worker's cache (32768)")
    serve.add_argument(
        "--threads", type=int, metavar="N", help="of each actor (default: the cores, shared by the hosts)"
    )
    serve.add_argument(
        "--transport",
        choices=("auto", "shared", "nixl", "grpc"),
        default="auto",
        help="of rows to the hosts (auto: shared memory on a machine, nixl between machines if installed)",
    )
    serve.add_argument(
        "--auto-rebalance", action="store_true", help="move experts between hosts when the load is uneven"
    )
    serve.add_argument(
        "--gpus",
        type=number,
        default=0.0,
        metavar="G",
        help="of each host and worker; a part, such as 0.3, lets several share one (default 0: CPUs compute)",
    )
    serve.add_argument("--detach", action="store_true", help="return when it is ready; `shoal stop` ends it")
    _add_key(serve)


def _add_experts(commands_: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "See and change the expert hosts of a running service; requests go on meanwhile."
    actions = commands_.add_parser("experts", help=text, description=text).add_subparsers(
        required=True, metavar="ACTION"
    )

    status = _add(actions, "status", experts_command.status, "Show the hosts, their load, and the last changes.")
    status.add_argument("--json", action="store_true", help="for scripts")

    scale = _add(actions, "scale", experts_command.scale, "Go on with another number of hosts.")
    scale.add_argument("hosts", type=int, metavar="N", help="how many hosts there shall be")
    scale.add_argument(
        "--leaving", nargs="+", type=utf8, default=[], metavar="HOST", help="who leaves first (the youngest)"
    )

    rebalance = _add(actions, "rebalance", experts_command.rebalance, "Spread the experts by the load that was seen.")

    drain = _add(actions, "drain", experts_command.drain, "Empty hosts and end them.")
    which = drain.add_mutually_exclusive_group(required=True)
    which.add_argument("hosts", nargs="*", type=utf8, default=[], metavar="HOST", help="id of a host, such as host-1")
    which.add_argument("--to", type=count, metavar="N", help="those beyond N, before their nodes go")
    which.add_argument("--node", type=utf8, metavar="NODE", help="those on this Ray node, by its id, address or name")
    drain.add_argument("--if-running", action="store_true", help="do nothing, and succeed, where no service answers")

    replicas = _add(actions, "replicas", experts_command.replicas, "Change how many hosts hold each expert.")
    replicas.add_argument("replicas", type=int, metavar="R", help="hosts that hold each expert")
    replicas.add_argument("--extra", type=int, metavar="E", help="further copies a layer, of its busiest experts")

    for change in (scale, rebalance, drain, replicas):
        change.add_argument(
            "--wait",
            action="store_true",
            help="until it is done; waits for a service that starts, or whose controller restarts; 1 when it is not",
        )
        change.add_argument(
            "--timeout",
            type=seconds,
            default=900.0,
            metavar="S",
            help="seconds that --wait takes at most, for the service to be ready and the change done (900)",
        )
        change.add_argument("--json", action="store_true", help="the change as a document, for scripts")

    events = _add(actions, "events", experts_command.events, "Show what happened to the hosts, and why.")
    events.add_argument("--follow", action="store_true", help="and what happens from now on, until Ctrl-C")
    events.add_argument("--json", action="store_true", help="one object a line, for scripts")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit status is 0, 1 for what went wrong, 2 for a wrong command line, 130 after Ctrl-C.

    Raises SystemExit with 1 when nobody reads the output any more, and with 2.
    A training run that a signal ended has 128 and its number: see `services.train_command.STATUSES`.
    """
    atexit.register(gc.freeze)  # else an interpreter that ends looks at all of torch and Ray once more, for a second
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == [bench_command.NAME]:
        bench_command.run_bench(given[1:])
    with while_it_is_read():
        options = parser().parse_args(given)
        try:
            return int(options.run(options))
        except CommandError as error:
            print(f"shoal: {error}", file=sys.stderr)
            return error.status
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main())

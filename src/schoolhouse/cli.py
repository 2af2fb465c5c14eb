"""The command line: parse, validate, and only then load what is heavy."""

from __future__ import annotations

import argparse
import io
import logging
import os
import select
import sys
from collections.abc import Sequence
from pathlib import Path

from schoolhouse import __version__, inert
from schoolhouse.errors import PeerError, SchoolhouseError, Stopped
from schoolhouse.parallel import launch

ENVIRONMENT = {
    # progress bars and advice of libraries do not belong in our output
    "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
"""Read by libraries when they are imported; the user's own environment stands before it."""
QUIET = ("torchao", "torch.utils._pytree")
"""Loggers that warn, at every start, of what concerns their own authors: kernels for other machines, a deprecation."""
SPINS = {"GOMP_SPINCOUNT": "4000"}
"""Threads that wait for one another spin for about 0.1 ms and then sleep, unless the environment says how they wait.

Sleeping at once doubles a small model's step; spinning for long lets one other busy process stretch it tenfold.
"""
SWITCH = 1e-4
"""Seconds after which a thread that decodes images or writes a checkpoint lets Python go to the one that trains, which
may wait after each of its thousand operations; Python's own are 50 times as many."""
CACHES = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
"""Products that oneDNN remembers, each with its working memory: those of a micro-batch. Lengths are others in each, and
1,024 of them, as it would have it, took a gibibyte and more of a small bfloat16 model's run."""
OVERRIDES = "settings put over the recipe's, e.g. optim.learning_rate=1e-4"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot write a character is shown its number
            stream.reconfigure(errors="backslashreplace")
    options = parse(arguments)
    spins = {} if "OMP_WAIT_POLICY" in os.environ else SPINS
    os.environ.update({**ENVIRONMENT, **CACHES, **spins, **os.environ})
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    sys.setswitchinterval(SWITCH)
    inert.allow(options.trust_remote_code)
    from schoolhouse import commands

    _look_here_last()
    try:
        commands.COMMANDS[options.command](options)
        print(end="", flush=True)
    except SchoolhouseError as error:
        launch.finish_the_word()
        launch.report(error, error.exit_code)
        if options.debug:
            raise
        if not launch.is_worker(os.environ):
            print(f"error: {error}", file=sys.stderr)
        if isinstance(error, PeerError):
            launch.end_as_consequence(error.exit_code)
        sys.exit(error.exit_code)
    except Stopped as stopped:
        if not launch.is_worker(os.environ) or os.environ["RANK"] == "0":
            print(stopped, file=sys.stderr)
        if launch.lost_peers() and not launch.stop_asked():
            launch.end_as_consequence(PeerError.exit_code)  # the agent's signal, not a stop that was asked for
        sys.exit(launch.note_stopped())
    except KeyboardInterrupt:
        print("stopped; nothing was lost", file=sys.stderr)
        sys.exit(Stopped.exit_code)
    except BrokenPipeError:
        if options.command == "run" or launch.is_worker(os.environ) or not _unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _look_here_last() -> None:
    """A user's own `module:function` is looked for in the working directory; nothing there takes a library's place,
    not even with `python -m`, which looks there first."""
    here = str(Path.cwd())
    if sys.path[:1] in ([""], [here]):
        del sys.path[0]
    if here not in sys.path:
        sys.path.append(here)


def _unread() -> bool:
    """Whether standard output is a pipe that nobody reads any more, as where `| head` has seen enough."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    return bool(watch.poll(0))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line; settings may stand before and after the options."""
    grammar = parser()
    options, rest = grammar.parse_known_args(arguments)
    unknown = [word for word in rest if "overrides" not in options or word.startswith("-") or "=" not in word]
    if unknown:
        grammar.error(f"unknown argument: {unknown[0]}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    options.words = list(sys.argv[1:] if arguments is None else arguments)
    return options


def parser() -> argparse.ArgumentParser:
    """The grammar of the command line."""
    top = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="schoolhouse", description="Supervised fine-tuning that can be proved: from a raw row to an exam result."
    )
    top.add_argument("--version", action="version", version=__version__)
    top.set_defaults(debug=False, trust_remote_code=False)
    _everywhere(top)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = _with_recipe(commands, "run", "train; continues by itself where the directory holds an unfinished run")
    run.add_argument("--rehearse", action="store_true", help="the whole way in miniature, on a CPU, without a network")
    _nproc(run)
    run.add_argument("--allow-change", action="append", default=[], metavar="KEY",
                     help="continue although this setting differs from the one the run began with")
    run.add_argument("--strict-resume", action="store_true",
                     help="a damaged checkpoint is an error (6), not a reason to use an earlier one")
    check = _with_recipe(commands, "check", "everything that can be known before training: settings, rows, lengths")
    check.add_argument("--json", action="store_true", help="print JSON")
    _show(_with_recipe(commands, "show", "the tokens as they are trained, coloured"))
    selfcheck = _with_recipe(commands, "selfcheck", "your own first rows and model against plain transformers")
    _nproc(selfcheck)
    selfcheck.add_argument("--rows", type=_count, default=8, metavar="N", help="how many rows (default 8)")
    evaluate = _command(commands, "eval", "generate and score on the recipe's exam")
    _target(evaluate, "run directory or model")
    _recipe(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print every answer as a line of JSON")
    chat = _command(commands, "chat", "talk to a run or a model")
    _target(chat, "run directory or model")
    chat.add_argument("--json", action="store_true",
                      help='for programs: a line {"messages": [...]} in, a line {"answer": ...} or {"error": ...} out')
    compare = _command(commands, "compare", "before and after: two runs or models on the same questions")
    compare.add_argument("first", help="run directory or model")
    compare.add_argument("second", help="run directory or model")
    _recipe(compare)
    export = _command(commands, "export", "write a Hugging Face directory and prove it equal")
    _target(export, "run directory")
    export.add_argument("--out", help="where; unset: RUN/export, or RUN/merged")
    export.add_argument("--merge", action="store_true", help="merge the adapters; unset: the adapters alone")
    export.add_argument("--step", type=int, help="the checkpoint; unset: the best, else the newest")
    verify = _command(commands, "verify", "compare every byte of a checkpoint with its manifest")
    _target(verify, "checkpoint, or a run directory for all of its checkpoints")
    _target(_command(commands, "replay", "compute the step of bad_step.json again, and say which pack it was"),
            "run directory")
    _target(_command(commands, "report", "write the run's report.html"), "run directory")
    track = _command(commands, "track", "pass a run's records on to a tracker, until the run ends")
    _target(track, "run directory")
    track.add_argument("--to", required=True, choices=("tensorboard", "wandb", "trackio"), help="whose")
    track.add_argument("--project", default="schoolhouse", help="the project's name there (default schoolhouse)")
    serve = _command(commands, "serve", "the page, in this machine's browser: choose, start, watch, stop, chat")
    serve.add_argument("directory", nargs="?", default=".", help="where recipes and runs/ are (unset: here)")
    serve.add_argument("--port", type=int, default=8765, metavar="N", help="of 127.0.0.1 (default 8765; 0: any)")
    _job(_with_recipe(commands, "job", "print a job file for many machines; nothing is submitted"))
    _command(commands, "ls", "list the recipes")
    new = _command(commands, "new", "copy a recipe")
    new.add_argument("name", help="a recipe of `schoolhouse ls`")
    new.add_argument("file", help="the new file")
    _schema(_command(commands, "schema", "print the JSON Schema of recipes, for editors"))
    _command(commands, "env", "print versions and devices")
    return top


def _command(commands: argparse._SubParsersAction, name: str, does: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, allow_abbrev=False, help=does, description=does[0].upper() + does[1:] + ".")
    _everywhere(command)
    return command


def _everywhere(command: argparse.ArgumentParser) -> None:
    """What may stand before a command and after it."""
    command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS,
                         help="show the traceback of an error")
    command.add_argument(inert.OPTION, action="store_true", default=argparse.SUPPRESS,
                         help="run the Python code that the model brings, as you, with all you may do: read it first")


def _with_recipe(commands: argparse._SubParsersAction, name: str, does: str) -> argparse.ArgumentParser:
    command = _command(commands, name, does)
    _recipe(command)
    return command


def _recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    command.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)


def _nproc(command: argparse.ArgumentParser) -> None:
    command.add_argument("--nproc", type=int, default=1, metavar="N", help="processes on this machine (default 1)")


def _target(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("target", metavar="TARGET", help=what)


def _show(command: argparse.ArgumentParser) -> None:
    command.add_argument("--rows", default="0:3", metavar="A:B", help="which rows, counted from 0 (default 0:3)")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one line of JSON an example")
    form.add_argument("--html", metavar="FILE", help="a self-contained page")


def _job(command: argparse.ArgumentParser) -> None:
    command.add_argument("--to", required=True, choices=("slurm", "skypilot", "kubernetes"), help="whose job file")
    command.add_argument("--nodes", type=_count, metavar="N", help="machines (unset: as the layout needs)")
    command.add_argument("--gpus", type=_count, metavar="N", help="accelerators of each machine (unset: up to 8)")


def _schema(command: argparse.ArgumentParser) -> None:
    command.add_argument("--markdown", action="store_true", help="all settings as a page to read")


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


if __name__ == "__main__":
    main()

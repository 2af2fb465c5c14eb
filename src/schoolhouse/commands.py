"""What each command does. Heavy imports stand inside, so that help and mistakes in a recipe answer at once."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schoolhouse import inert
from schoolhouse import recipe as recipes
from schoolhouse.config import Recipe, Track
from schoolhouse.errors import ConfigError, SchoolhouseError, Stopped
from schoolhouse.parallel import launch, place
from schoolhouse.stopping import StopRequest

if TYPE_CHECKING:
    from schoolhouse.data.served import Serving
    from schoolhouse.parallel.mesh import Mesh

EXAMPLES = Path("examples/sft")


def run(options: Namespace) -> None:
    """Train, and write the report at the end, whichever end it is."""
    if options.rehearse:
        return _rehearse(options)
    stop = StopRequest()
    recipe = recipes.read(options.recipe, options.overrides)
    try:
        with _joined(options, recipe, stop) as mesh:
            _train(recipe, options, stop, mesh)
    finally:
        stop.heard = True
        if not launch.is_worker(os.environ):  # of several, one that ends is not to die of a late word
            stop.over()


@contextlib.contextmanager
def _joined(options: Namespace, recipe: Recipe, stop: StopRequest | None = None) -> Iterator[Mesh]:
    """This process among those of the recipe's layout; where --nproc asks for several, it starts them and ends."""
    here = place.place(os.environ)
    if options.nproc != 1 or (place.machines(os.environ) > 1 and here.world == 1):
        sys.exit(_launch(options, recipe, here))
    place.degrees(recipe.parallel, here.world)
    launch.attend()
    from schoolhouse import places
    from schoolhouse.model import load, products
    from schoolhouse.parallel import mesh as meshes
    from schoolhouse.parallel import watch

    if here.world > 1:  # once joined, only rank 0 of all could save a starter student
        places.directory_of(recipe.model)
    device = load.device(recipe.device, here.local)
    with contextlib.nullcontext() if stop is None else watch.stops(stop, here.world):
        mesh = meshes.connect(recipe.parallel, device)
        with watch.losses(mesh), products.fastest(device, recipe.model.precision):
            yield mesh
    launch.depart()
    meshes.leave(mesh)


def _rehearse(options: Namespace) -> None:
    """Every stage of a recipe in miniature: check, show, train, stop, resume, exam, export."""
    from schoolhouse import rehearsal, trained

    recipe = recipes.read(options.recipe, options.overrides)
    planned = rehearsal.prepare(recipe, Path(options.recipe), options.nproc)
    page = str(planned.page)
    print("rehearsal:", *planned.changes, sep="\n  ")
    said = {"recipe": page, "overrides": [], "rehearse": False, "words": ["run", page, *inert.words()]}
    again = Namespace(**{**vars(options), **said, "json": False, "html": None, "rows": "0:1"})
    check(again)
    show(again)
    _run_to_its_end(again)
    rehearsal.forget_the_last_half(planned.directory)
    _run_to_its_end(again)
    rehearsal.compare_halves(planned.directory)
    for merge in (False, True) if recipe.lora else (False,):
        out, proof = trained.export_run(planned.directory, None, None, merge)
        print(f"exported and verified: {out} ({proof})")
    print(f"rehearsed: check, show, {rehearsal.STEPS} steps, resumed bit by bit, export; see {planned.directory}")


def _run_to_its_end(options: Namespace) -> None:
    """`run`, also where it starts processes of its own and would end this one with theirs."""
    try:
        run(options)
    except SystemExit as ended:
        if ended.code:
            raise


def _train(recipe: Recipe, options: Namespace, stop: StopRequest, mesh: Mesh) -> None:
    from schoolhouse import run as runs
    from schoolhouse import track as tracks
    from schoolhouse.report import page
    from schoolhouse.screen import Screen
    from schoolhouse.train import train

    screen = Screen.of(mesh.is_first)
    back = runs.Return(options.allow_change, options.strict_resume)
    tracks.require(recipe.track)
    running = runs.begin(recipe, Path(options.recipe), screen, mesh, back)
    tracker = tracks.Follower(recipe.track if mesh.is_first else None, running.record.directory)
    status = "failed"
    try:
        screen.note(tracker.begin())
        train(running, stop)
        status = "done"
    except Stopped:
        status = "stopped"
        raise
    finally:
        stop.heard = True  # a second request does not cut the end short
        if mesh.is_first and running.record.directory.is_dir():  # gone: the error on its way says so
            with contextlib.suppress(*([] if status == "done" else [OSError, SchoolhouseError])):
                running.finish(status)
                page.write(running.record.directory)
        screen.note(tracker.end())
    screen.say(f"done: {running.done} steps; report: {running.record.directory / 'report.html'}")


def _launch(options: Namespace, recipe: Recipe, here: place.Place) -> int:
    """Start the processes of this machine, each with the same command; their exit code."""
    if options.nproc < 1 or here.world > 1:
        raise ConfigError(
            f"--nproc {options.nproc} where the environment names {here.world} process(es)",
            required="at least 1, and only where no other launcher has started the processes", where="command line",
            remedy="leave --nproc out under torchrun and srun",
        )
    place.degrees(recipe.parallel, options.nproc * place.machines(os.environ))
    return launch.launch(options.nproc, recipe.parallel.max_restarts, [*options.words, "--nproc", "1"])


def check(options: Namespace) -> None:
    """Prepare the rows and print what they are."""
    recipe = recipes.read(options.recipe, options.overrides)
    from schoolhouse import overview
    from schoolhouse.screen import Screen

    screen = Screen()
    found = overview.overview(recipe, _serving(recipe), screen)
    if options.json:
        print(json.dumps(found, ensure_ascii=False, indent=1))
    else:
        overview.print_overview(found)


def show(options: Namespace) -> None:
    """Encode a few rows and show their tokens."""
    recipe = recipes.read(options.recipe, options.overrides)
    from rich.console import Console

    from schoolhouse import overview
    from schoolhouse.data import served
    from schoolhouse.data import show as shown

    first, end = _row_range(options.rows)
    model = served.load(_serving(recipe))
    examples = list(overview.shown_rows(recipe, model, served.rules(recipe), first, end))
    if not examples and first != end:
        raise ConfigError(
            f"no row is taught in --rows {options.rows}", required="a range that holds one, counted from 0",
            where="command line", remedy="choose an earlier one; `schoolhouse check` counts the rows",
        )
    if options.json:
        for example in examples:
            print(json.dumps(example, ensure_ascii=False))
    elif options.html:
        _write(Path(options.html), shown.page(shown.html(examples), options.recipe))
        print(options.html)
    else:
        Console().print(shown.terminal(examples))


def selfcheck(options: Namespace) -> None:
    """Compare loss and gradients of the first rows with plain transformers; an error where they differ."""
    recipe = recipes.read(options.recipe, options.overrides)
    with _joined(options, recipe) as mesh:
        from schoolhouse import selfcheck as checking

        lines = checking.selfcheck(recipe, options.rows, mesh)
        if mesh.is_first:
            checking.print_lines(lines)
        checking.refuse(lines, options.recipe)


def evaluate(options: Namespace) -> None:
    """Generate answers to the recipe's exam and grade them."""
    recipe = recipes.read(options.recipe, options.overrides)
    _refuse_another_student(options, options.target)
    score, samples = _examine(options.target, recipe)
    if options.json:
        for sample in samples:
            print(json.dumps(sample, ensure_ascii=False))
    print(f"{score['correct']} of {score['count']} ({score['score']:.1%}) in {score['seconds']:.1f} s", file=sys.stderr)


def compare(options: Namespace) -> None:
    """The same questions to two students, side by side."""
    recipe = recipes.read(options.recipe, options.overrides)
    _refuse_another_student(options, options.first, options.second)
    from schoolhouse import talk

    first, second = (_examine(target, recipe) for target in (options.first, options.second))
    talk.print_comparison((options.first, *first), (options.second, *second))


def chat(options: Namespace) -> None:
    """Talk until the end of input."""
    from schoolhouse import talk, trained

    with trained.opened(options.target) as (student, model):
        if options.json:
            talk.answer_lines(student, model)
        else:
            talk.chat(student, model)


def export(options: Namespace) -> None:
    """Write a Hugging Face directory of a run's checkpoint, proved equal."""
    from schoolhouse import trained

    out, proof = trained.export_run(Path(options.target), options.out, options.step, options.merge)
    print(f"exported and verified: {out} ({proof})")


def verify(options: Namespace) -> None:
    """Verify one checkpoint, or all of a run."""
    from schoolhouse import checkpoint

    target = Path(options.target)
    paths = [target] if (target / "manifest.json").exists() else checkpoint.steps_in(target / "checkpoints")
    if not paths:
        raise ConfigError(
            f"{target} holds no checkpoint", required="a checkpoint or a run directory", where=str(target),
            remedy="name RUN or RUN/checkpoints/step-…",
        )
    faults = []
    for path in paths:
        try:
            checkpoint.verify(path)
            print(f"{path}: every byte verified")
        except SchoolhouseError as fault:
            print(f"{path}: {fault.found}")
            faults.append(fault)
    if faults:
        raise faults[0]


def replay(options: Namespace) -> None:
    """Compute the step of bad_step.json again; an error where it comes out differently."""
    from schoolhouse import replay as again

    for line in again.replay(Path(options.target)):
        print(line)


def report(options: Namespace) -> None:
    """Write report.html from the run's records."""
    from schoolhouse.report import page

    print(page.write(Path(options.target)))


def job(options: Namespace) -> None:
    """Print a job file for many machines; never submit it."""
    recipe = recipes.read(options.recipe, options.overrides)
    from schoolhouse import jobs

    words = [*inert.words(), *options.overrides]
    wanted = jobs.job(options.recipe, words, recipe.parallel, options.nodes, options.gpus)
    print(jobs.text(wanted, options.to), end="")


def ls(options: Namespace) -> None:
    """List the recipes below `examples/sft`, with who is taught what, the way, and the memory that it needs."""
    found = sorted(EXAMPLES.glob("*/*.yaml"))
    if not found:
        print(f"no recipes below {EXAMPLES}: call this in the project's directory", file=sys.stderr)
    for path in found:
        one = recipes.read(path)
        lessons = ", ".join(source.path for source in one.data.train)
        print(f"{path!s:48} {one.model.path:36} {recipes.way(one):16} {lessons}")
        if needed := _memory(path.read_text(encoding="utf-8")):
            print(f"    {needed}")


def _memory(page: str) -> str:
    """The first sentence about memory in the comment above a recipe; empty where nothing is said."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), page.splitlines())
    text = " ".join(line.lstrip("# ") for line in comment)
    found = re.search(r"Memory\b.*?\.(?= |$)", text)
    return found.group().removesuffix(".") if found else ""


def new(options: Namespace) -> None:
    """Copy a recipe; an existing file is never overwritten."""
    named = [path for path in EXAMPLES.glob("*/*.yaml") if options.name in (str(path), path.stem)]
    source = named[0] if named else Path(options.name)
    recipes.read(source)
    target = Path(options.file)
    if target.exists():
        raise ConfigError(f"{target} exists", required="a new file", where=str(target), remedy="choose another name")
    _write(target, source.read_text(encoding="utf-8"))
    print(target)


def track(options: Namespace) -> None:
    """Pass a run's records on to a tracker, until it ends."""
    from schoolhouse import track as tracks

    sent = tracks.track(Path(options.target), Track(to=options.to, project=options.project))
    print(f"{sent:,} records passed on to {options.to}")


def serve(options: Namespace) -> None:
    """The page of a workspace, until ctrl-C."""
    from schoolhouse.serve import app

    app.serve(Path(options.directory), options.port)


def schema(options: Namespace) -> None:
    """The JSON Schema of a recipe, or its settings as a page."""
    from schoolhouse import reference

    said = reference.markdown() if options.markdown else json.dumps(Recipe.model_json_schema(), indent=1) + "\n"
    print(said, end="")


def env(options: Namespace) -> None:
    """Versions and devices, to paste into a bug report."""
    import torch
    import transformers

    from schoolhouse import __version__

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    print(f"schoolhouse {__version__} · python {platform.python_version()} · torch {torch.__version__} · "
          f"transformers {transformers.__version__}")
    print(f"{platform.platform()} · {torch.get_num_threads()} threads · accelerator: {accelerator or 'none'}")


COMMANDS: Mapping[str, Callable[[Namespace], None]] = {
    "run": run, "check": check, "show": show, "selfcheck": selfcheck, "eval": evaluate, "chat": chat,
    "compare": compare, "export": export, "verify": verify, "replay": replay, "report": report,
    "track": track, "serve": serve, "job": job, "ls": ls, "new": new, "schema": schema, "env": env,
}


def _serving(recipe: Recipe) -> Serving:
    from schoolhouse import places
    from schoolhouse.data import served

    return served.serving(recipe.model, places.directory_of(recipe.model))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}", required="a path in a directory that is there and writable",
            where=str(path), remedy="choose another path",
        ) from None


def _row_range(text: str) -> tuple[int, int | None]:
    first, _, end = text.partition(":")
    try:
        start = int(first or 0)
        stop = (int(end) if end else None) if ":" in text else start + 1
        if start < 0 or (stop is not None and stop < 0):
            raise ValueError(text)
        return start, stop
    except ValueError:
        raise ConfigError(
            f"--rows {text} is no range", required="A:B, counted from 0", where="command line", remedy="e.g. --rows 0:5"
        ) from None


def _refuse_another_student(options: Namespace, *targets: str) -> None:
    """A run brings its own student: words about one would be passed over."""
    from schoolhouse import trained

    about = [one for one in options.overrides if one.partition("=")[0].split(".")[0] in ("model", "lora")]
    if about and all(trained.is_run(Path(target)) for target in targets):
        raise ConfigError(
            f"{about[0]}, and a run answers as it was trained", required="settings of the exam, the device or the seed",
            where="command line", remedy="leave it out, or name a model's directory (`schoolhouse export`)",
        )


def _examine(target: str, recipe: Recipe) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from schoolhouse import evaluate as evaluation
    from schoolhouse import graders, trained

    if recipe.exam.data is None:
        raise ConfigError(
            "the recipe has no exam", required="exam.data", where="exam.data", remedy="add exam.data=SOURCE"
        )
    with trained.opened(target, recipe) as (student, model):
        asked = evaluation.questions(recipe, model)
        return evaluation.exam(student, model, asked, graders.grader(recipe.exam.grader), recipe.exam, recipe.seed)

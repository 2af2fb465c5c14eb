"""The command line: every order of arguments, every mistake in a few lines with its exit code, never a traceback."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_recipe import SCHEMA, schema_faults
from test_run import LESSON, command, here, program, write_recipe

from schoolhouse import cli, commands, peers
from schoolhouse import recipe as recipes

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "run", "check", "show", "eval", "chat", "compare", "export", "verify", "report", "ls", "new", "schema", "env",
}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


# What is understood.


def test_every_command_of_the_contract_is_there() -> None:
    assert commands.COMMANDS.keys() >= COMMANDS
    for name in commands.COMMANDS:
        with pytest.raises(SystemExit) as leaving:
            cli.parser().parse_args([name, "--help"])
        assert leaving.value.code == 0


@pytest.mark.parametrize("arguments", [
    "run R --nproc 2 a=1 b=2", "run R a=1 b=2 --nproc 2", "run --nproc 2 R a=1 b=2", "run R a=1 --nproc 2 b=2",
    "--debug run R --nproc=2 a=1 b=2",
])
def test_settings_and_options_in_any_order(arguments: str) -> None:
    """The remote controls write options before settings; people write them as they come to mind."""
    options = cli.parse(arguments.split())
    assert (options.recipe, options.nproc, options.overrides) == ("R", 2, ["a=1", "b=2"])


@pytest.mark.parametrize("arguments", [
    [], ["rnu", "x"], ["run"], ["run", "R", "--nproc", "x"], ["eval", "R"], ["compare", "a", "R"],
    ["show", "R", "--jsno"], ["export", "R", "--step", "best"], ["run", "R", "--np", "2"], ["ls", "extra"],
    ["show", "R", "--json", "--html", "x"], ["run", "R", "a=1", "--nproc", "2", "b"], ["verify", "R", "a=1"],
])
def test_what_is_not_understood(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2 with a line of usage; no abbreviation is guessed."""
    with pytest.raises(SystemExit) as leaving:
        cli.main(arguments)
    assert leaving.value.code == 2 and "usage:" in capsys.readouterr().err


def test_values_of_settings_may_hold_anything(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equals signs, blanks, braces and dashes belong to the value."""
    one = recipes.read(page, ["exam.grader=a:b", "data.columns={question: a=b}", "directory=-x y"])
    assert (one.exam.grader, one.data.columns, one.directory) == ("a:b", {"question": "a=b"}, "-x y")


# What goes wrong.


WITHOUT_EXAM = "model: starter/qwen3\ndata: starter/arithmetic\n"
MISTAKES = {
    "there is no recipe": ("check {tmp}/none.yaml", 2), "unknown key": ("check {page} optim.learning_rat=1", 2),
    "is no setting": ("check {page} learning_rate", 2), "laid out": ("run {page} --nproc 2 parallel.ulysses=3", 2),
    "--nproc 0": ("run {page} --nproc 0 directory={tmp}/run", 2), "there is no starter student": (
        "check {page} model=starter/qwne3", 2),
    "holds no model": ("check {page} model={tmp}", 2), "there is no starter lesson": (
        "check {page} data.train=starter/algebra", 3),
    "there is no such file": ("check {page} data.train={tmp}/rows.jsonl", 3), "--rows x": ("show {page} --rows x", 2),
    "--rows -1:3": ("show {page} --rows=-1:3", 2), "--rows 0:-3": ("show {page} --rows=0:-3", 2),
    "no exam": ("eval starter/qwen3 {bare}", 2),
    "there is no grader": ("eval starter/qwen3 {page} exam.grader=gsm9k", 2),
    "cannot be imported": ("eval starter/qwen3 {page} exam.grader=no_such_module:f", 2),
    "is no run directory": ("export {tmp}", 6), "holds no checkpoint": ("verify {tmp}", 2),
    "is not a run directory": ("report {tmp}", 2), "was not found": ("eval nobody/nothing {page}", 2),
    "{tmp}/page.html": ("new {page} {tmp}/page.html", 2), "missing/new.yaml": ("new {page} {tmp}/missing/new.yaml", 2),
    "missing/page.html": ("show {page} --html {tmp}/missing/page.html", 2),
    "there is no recipe starterr": ("new starterr {tmp}/new.yaml", 2), "has no token": (
        "check {page} model.stop_tokens=[<|nowhere|>]", 2),
    "no module": ("check {page} data.function=no_such_module:f", 2), "module": ("check {page} data.function=a.b:f", 2),
    "there is no chat template": ("check {page} model.chat_template={tmp}/none.jinja", 2),
    "device": ("run {page} directory={tmp}/run device=warp", 2),
    "cuda:77": ("run {page} directory={tmp}/run device=cuda:77", 2),
    "empty.jsonl": ("check {page} data.train={empty}", 3), "there is no directory": ("check {page} model=./nope", 2),
    "has no value": ("check {page} optim.clip=", 2), "--rows 900000:900001": (
        "show {page} --rows 900000:900001", 2),
}
"""What is said, by what was typed and the exit code of the contract."""


@pytest.mark.parametrize("said", MISTAKES)
def test_a_mistake_is_said_in_a_few_lines(
    said: str, page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found, where, required, to do, each on its line; the exit code of the contract; no Python in sight."""
    bare = write_recipe(tmp_path / "bare", WITHOUT_EXAM)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "page.html").write_text("mine")
    words = {"tmp": tmp_path, "page": page, "bare": bare, "empty": tmp_path / "empty.jsonl"}
    line, code = MISTAKES[said]
    here(*(word.format(**words) for word in line.split()), code=code)
    told = capsys.readouterr().err.splitlines()
    start = next(number for number, text in enumerate(told) if text.startswith("error: "))
    assert [text.split(":")[0].strip() for text in told[start + 1 : start + 4]] == ["where", "required", "to do"]
    assert len(told) - start <= 6 and said.format(**words) in "\n".join(told[start:])
    assert (tmp_path / "page.html").read_text() == "mine", "an existing file is never overwritten"


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(recipes.ConfigError):
        cli.main(["--debug", "check", str(tmp_path / "none.yaml")])


def test_an_error_goes_to_standard_error_alone(tmp_path: Path) -> None:
    """Standard output holds only what was asked for, so that it can be read by another program."""
    done = program("check", tmp_path / "none.yaml", "--json", code=2)
    assert done.stdout == "" and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["at the end", "at once"])
@pytest.mark.parametrize("name", ["ls", "env"])
def test_a_reader_that_has_seen_enough(name: str, unbuffered: str) -> None:
    """`schoolhouse ls | head -1`: no traceback, whenever it is written."""
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command(name), stdout=writing, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT, env=environment
    )
    os.close(writing)
    assert done.returncode == 1 and done.stderr == ""


def test_another_pipe_that_breaks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise BrokenPipeError("a worker's")

    monkeypatch.setitem(commands.COMMANDS, "env", broken)
    with Path(os.devnull).open("w") as out, pytest.raises(BrokenPipeError, match="a worker's"):
        monkeypatch.setattr(sys, "stdout", out)
        cli.main(["env"])


def test_no_standard_output_at_all() -> None:
    shell = f"exec {shlex.join(command('ls'))} >&-"
    done = subprocess.run(["sh", "-c", shell], stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["-m", "schoolhouse"])
def test_nothing_beside_the_recipe_takes_a_librarys_place(tmp_path: Path, name: str) -> None:
    """A downloaded directory, or one's own script of that name: only what a recipe names is looked for there."""
    for library in ("filelock", "numpy", "datasets"):
        (tmp_path / f"{library}.py").write_text("raise SystemExit('run')\n")
    (tmp_path / "mine.py").write_text("def same(answer, reference):\n    return True\n")
    (tmp_path / "recipe.yaml").write_text(
        "model: starter/qwen3\ndata: {train: [{path: starter/arithmetic, limit: 20}]}\n"
        "exam: {data: {path: 'starter/arithmetic:exam', limit: 1}, max_new_tokens: 1, grader: 'mine:same'}\n"
    )
    words = [sys.executable, "-m", "schoolhouse"] if name == "-m" else [str(Path(sys.executable).with_name(name))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([*words, "eval", "starter/qwen3", "recipe.yaml"], env=environment, capture_output=True,
                          text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0 and "1 of 1" in done.stderr, done.stderr


# In which process.

PROBE = """
import os, sys, types
begun = dict(os.environ)
told = lambda: print(os.getpid(), sys.argv[1:], [each.get("GLIBC_TUNABLES") for each in (begun, os.environ)])
sys.modules["schoolhouse.cli"] = types.SimpleNamespace(main=told)
"""
FEW, MANY = "glibc.malloc.tcache_count=0", f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={1 << 40}"
TOLD = f"{FEW}:{MANY}"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize(("own", "found"), [
    (None, TOLD), ("", TOLD), ("glibc.cpu.x=1", f"glibc.cpu.x=1:{TOLD}"), (TOLD, TOLD),
    ("glibc.malloc.tcache_count=3", f"glibc.malloc.tcache_count=3:{MANY}"),
], ids=["none", "empty", "other", "all", "one"])
@pytest.mark.parametrize("way", [["-m", "schoolhouse"], ["-u", "-m", "schoolhouse"], ["{bin}/schoolhouse"]],
                         ids=["module", "option", "script"])
def test_the_allocator_is_told_before_it_begins(
    tmp_path: Path, own: str | None, found: str, way: list[str]
) -> None:
    """Such settings are read once, when a process begins. It stays the same process, with the same words; what it
    starts itself, as processes that decode images, is told what the user says alone."""
    said, process = begun(tmp_path, way, own)
    assert said == f"{process.pid} ['run', 'a b', '-m', 'c=1'] {[found, own or None]}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_the_allocators_former_names_are_the_users_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "65536")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert begun(tmp_path, ["-m", "schoolhouse"], None)[0].endswith(f" {[FEW, None]}\n")


@pytest.mark.parametrize("way", [
    ["-c", "from schoolhouse.__main__ import main; main()"], ["{bin}/profiler", "-m", "schoolhouse"],
    ["-X", "schoolhouse=3", "-m", "schoolhouse"],
], ids=["another program", "a profiler", "begun once more"])
def test_no_other_program_is_begun_once_more(tmp_path: Path, way: list[str]) -> None:
    """Nor one that lost the variable on the way."""
    assert begun(tmp_path, way, None)[0].endswith(" [None, None]\n")


def test_what_cannot_begin_once_more_goes_on(tmp_path: Path) -> None:
    said, process = begun(tmp_path, ["-m", "schoolhouse"], None, probe=PROBE + "sys.executable = ''\n")
    assert said.startswith(f"{process.pid} ['run', ")


def begun(
    place: Path, way: list[str], own: str | None, probe: str = PROBE
) -> tuple[str, subprocess.Popen[str]]:
    """What a command line says of itself that starts Python in this way."""
    (place / "sitecustomize.py").write_text(probe)
    (place / "schoolhouse").write_text("from schoolhouse.__main__ import main\nmain()\n")
    (place / "profiler").write_text(
        "import runpy, sys\ndel sys.argv[:2]\nrunpy.run_module('schoolhouse', run_name='__main__', alter_sys=True)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    environment |= {} if own is None else {"GLIBC_TUNABLES": own}
    environment["PYTHONPATH"] = os.pathsep.join([str(place), str(ROOT / "src")])
    words = [sys.executable, *(word.format(bin=place) for word in way), "run", "a b", "-m", "c=1"]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return said, process


# What only looks.


def test_ls_lists_the_recipes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each with who is taught what."""
    monkeypatch.chdir(ROOT)
    here("ls")
    said = capsys.readouterr().out
    for path in sorted(ROOT.glob("examples/sft/*/*.yaml")):
        assert f"{path.relative_to(ROOT)} " in said and recipes.read(path).model.path in said


@pytest.mark.parametrize(("page", "way", "memory"), [
    ("", "full", ""),
    ("lora: {rank: 4}\n", "LoRA r4", "Memory: 0.5 G x 2 bytes, one device of 8 GiB"),
    ("parallel: {ulysses: 2}\n", "full SP2", "Memory of each device: 9 GiB"),
    ("model: {path: starter/qwen3-vl, freeze: [vision]}\n", "all but vision", ""),
])
def test_ls_says_the_way_and_the_memory(
    page: str, way: str, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The way is read from the settings; memory is the first sentence about it in the comment above, on one line."""
    monkeypatch.chdir(tmp_path)
    words = f"{memory}. More." if memory else "No word of it."
    above = "".join(f"# {word}\n" for word in words.split())
    model = "" if "model:" in page else "model: starter/qwen3\n"
    place = tmp_path / "examples" / "sft" / "some" / "one.yaml"
    place.parent.mkdir(parents=True)
    place.write_text(above + model + page + "data: starter/arithmetic\n# Memory: no.\n")
    here("ls")
    first, *rest = capsys.readouterr().out.splitlines()
    assert f" {way} " in first and "starter/arithmetic" in first
    assert [line.strip() for line in rest] == ([memory] if memory else [])


def test_ls_says_where_there_is_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Elsewhere than in the project: a word, and not silence."""
    monkeypatch.chdir(tmp_path)
    here("ls")
    said = capsys.readouterr()
    assert (said.out + said.err).strip()


def test_new_copies_a_recipe_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its short name, or as a path; comments and all."""
    monkeypatch.chdir(ROOT)
    shipped = sorted(Path("examples/sft").glob("*/*.yaml"))[0]
    for number, name in enumerate([shipped.stem, str(shipped), str(ROOT / shipped)]):
        here("new", name, tmp_path / f"{number}.yaml")
        assert (tmp_path / f"{number}.yaml").read_bytes() == shipped.read_bytes()


def test_the_page_of_settings_is_the_schemas(capsys: pytest.CaptureFixture[str]) -> None:
    """`schoolhouse schema --markdown > docs/settings.md`: every setting, and every name that others know."""
    here("schema", "--markdown")
    said = capsys.readouterr().out
    assert said == (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    lines = [line for line in said.splitlines() if line.startswith("| `")]
    told = {line.split("`")[1] for line in lines}
    assert all(key in told or f"data.{key.split('.')[-1]}" in told for key in recipes._all_keys() if "." in key)
    known = {word for word, ours in peers.NAMES.items() if not ours.startswith("--")}
    assert known <= {word for line in lines for word in line.split("`")}


def test_schema_is_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    here("schema")
    printed = json.loads(capsys.readouterr().out)
    assert printed == SCHEMA
    assert schema_faults({"model": "m", "data": "d", "optim": {"learning_rat": 1}}, printed, printed)


def test_env_names_versions_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    here("env")
    said = capsys.readouterr().out
    assert all(word in said for word in ("schoolhouse", "python", "torch", "transformers", "accelerator"))


def test_show_as_a_page_and_on_the_screen(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here("show", page, "--rows", "0:2", "--html", tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert html.startswith("<!doctype html>") and "&lt;|im_end|&gt;" in html and " src=" not in html
    here("show", page, "--rows", "0:1")
    assert "<|im_end|>" in capsys.readouterr().out


def test_check_prints_tables_for_people(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here("check", page)
    said = capsys.readouterr().out
    assert all(word in said for word in ("rows read", "200", "kept: one", "supervised tokens", "8 steps"))


@pytest.mark.parametrize("words", [
    ["lora.rank=4", "lora.targets=[nope]"], ["lora.rank=4", "lora.modules_to_save=[heads]"],
    ["lora.rank=4", "lora.experts=true"], ["lora.rank=4", "model.new_tokens=[<x>]"], ["optim.rates={vision: 0.1}"],
    ["train.balance=0.1"], ["model.freeze=[vision]"],
], ids=lambda words: words[-1])
def test_check_tries_what_names_parts_of_the_model(
    words: list[str], page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without weights, and before rows are prepared, which may take long."""
    here("check", page, f"data.cache={tmp_path / 'cache'}", *words, code=2)
    said = capsys.readouterr().err
    assert words[-1].split("=")[0] in said and "Traceback" not in said
    assert not (tmp_path / "cache" / "stores").exists()


def test_check_says_what_is_trained(page: Path) -> None:
    done = program("check", page, "--json", "lora.rank=4", "lora.targets=[q_proj]")
    told = {row["what"]: row["value"] for row in json.loads(done.stdout)["in_force"]}
    assert "(q_proj 4 of 4)" in told["way"] and f"; {4 * 4 * (128 + 128):,} of " in told["way"]


def test_check_prints_only_json_for_programs(page: Path) -> None:
    """Also while rows are prepared for the first time, with progress to tell of."""
    done = program("check", page, "--json", "data.supervise=last")
    assert json.loads(done.stdout)["train"]["rows"] == 200


@pytest.mark.parametrize("script", sorted(ROOT.glob("examples/sft/*/run_*.sh")), ids=lambda path: path.name)
def test_remote_controls_press_the_right_button(script: Path, tmp_path: Path) -> None:
    """`run_x.sh <nproc> <run directory> [key=value …]`, from any directory, quoting kept; without words, the usage."""
    bench = tmp_path / "bin"
    bench.mkdir()
    (bench / "schoolhouse").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (bench / "schoolhouse").chmod(0o755)
    path = f"{bench}:/usr/bin:/bin"
    pressed = ["bash", str(script), "2", "my run", "a=1", "b={c: d}"]
    done = subprocess.run(pressed, capture_output=True, text=True, cwd=tmp_path, env={"PATH": path}, check=True)
    verb, page, *words = done.stdout.splitlines()
    assert verb == "run" and Path(page).is_file()
    options = cli.parse([verb, page, *words])
    assert (options.nproc, options.overrides) == (2, ["directory=my run", "a=1", "b={c: d}"])
    recipes.read(page)
    bare = subprocess.run(["bash", str(script)], capture_output=True, text=True, env={"PATH": path}, check=False)
    assert bare.returncode != 0 and "usage:" in bare.stderr


def test_it_runs_where_paths_are_odd(tmp_path: Path) -> None:
    """Blanks and letters beyond ASCII in every path, in a directory that is a link."""
    real = tmp_path / "real"
    place = write_recipe(real / "héllo wörld", LESSON.replace("steps: 8", "steps: 1").replace("every: 4", "every: 0"))
    (tmp_path / "link").symlink_to(real)
    page = tmp_path / "link" / "héllo wörld" / place.name
    program("run", page.name, "directory=my rün", cwd=page.parent, env=plain_environment(tmp_path))
    assert (real / "héllo wörld" / "my rün" / "report.html").is_file()


def plain_environment(tmp_path: Path) -> dict[str, str]:
    """Little more than a path: no home of the user's, and a locale without a single letter beyond ASCII."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS") if name in os.environ}
    cache = os.environ["XDG_CACHE_HOME"]
    return {**kept, "XDG_CACHE_HOME": cache, "HOME": str(tmp_path), "LC_ALL": "C", "HF_HUB_OFFLINE": "1"}


def test_the_program_is_installed() -> None:
    """The command of the README, not only `python -m`."""
    assert shutil.which("schoolhouse"), "pip install must have made the command"

"""The shape of the code is held by tests: who imports whom, sizes, and what is never written.

Every rule is a function over syntax trees, so that a rule can be tried on a bad line of text as well as on the code.
"""

from __future__ import annotations

import ast
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from schoolhouse import recipe

SOURCE = Path(__file__).resolve().parents[1] / "src" / "schoolhouse"
FILES = sorted(SOURCE.rglob("*.py"))
HEAVY = ("torch", "transformers")

LAYERS = (
    ("errors", "types", "config", "recipe", "inert", "places", "enlarge", "orphans", "peers", "shares",
     "crossing", "stopping", "starter", "reference"),
    ("data", "parallel"),
    ("loss", "model", "optim", "graders", "memory"),
    ("checkpoint", "saving", "evaluate", "record", "room", "estimate", "screen", "overview", "export", "card", "proof",
     "report"),
    ("run", "fitting", "trained", "rehearsal", "talk", "outcome", "train", "replay", "jobs", "selfcheck",
     "serve", "track"),
    ("commands", "cli", "__main__"),
)
"""A part imports from its own layer and those before it."""

MAKES_TENSORS = ("data/loader.py", "data/ahead.py")
LOADS_TOKENIZERS = ("data/tokens.py", "data/served.py", "data/vision.py", "data/eyes.py")

FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "hasattr", "__import__"}
FORBIDDEN_METHODS = {("torch", "load"), ("os", "system"), ("os", "popen"), ("yaml", "unsafe_load")}
SAFE_LOADERS = ("_Loader", "SafeLoader", "yaml.SafeLoader")

MOST_LINES_OF_A_FUNCTION = 60
MOST_LINES_OF_A_FILE = 450


def name_of(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def part_of(module: str) -> str:
    """`schoolhouse.data.plan` belongs to `data`; the package itself belongs to none."""
    return [*module.split("."), ""][1]


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Every module a file imports, with `from schoolhouse import x` read as the module `schoolhouse.x`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide the direction"
            if node.module == "schoolhouse":
                yield from ((f"schoolhouse.{alias.name}", node) for alias in node.names)
            else:
                yield node.module or "", node


def typing_only(tree: ast.Module) -> set[ast.AST]:
    """Everything below `if TYPE_CHECKING:`, which is never executed."""
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    return {inner for guard in guards for inner in ast.walk(guard)}


def executed(tree: ast.Module) -> list[tuple[str, ast.stmt]]:
    hidden = typing_only(tree)
    return [(module, node) for module, node in imports(tree) if node not in hidden]


def wrong_directions(tree: ast.Module, part: str) -> list[str]:
    """Imports of `part` from a higher layer."""
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    inner = [module for module, _ in imports(tree) if module.startswith("schoolhouse.")]
    return [module for module in inner if part_of(module) != "__version__" and layer[part_of(module)] > layer[part]]


def misdeeds(tree: ast.Module) -> list[str]:
    """Lines that are never written here, whatever for."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            found.append(f"{node.lineno}: global")
        elif isinstance(node, ast.ExceptHandler) and _broad(node):
            found.append(f"{node.lineno}: broad except")
        elif isinstance(node, ast.Call):
            found += [f"{node.lineno}: {fault}" for fault in _bad_call(node)]
    bad = [(module, node.lineno) for module, node in imports(tree) if module.split(".")[0] in FORBIDDEN_MODULES]
    return found + [f"{line}: import {module}" for module, line in bad]


def _broad(handler: ast.ExceptHandler) -> bool:
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(one is None or ast.unparse(one) in ("Exception", "BaseException") for one in caught)


def _bad_call(call: ast.Call) -> Iterator[str]:
    called, arguments = ast.unparse(call.func), {word.arg: word.value for word in call.keywords}
    if called in FORBIDDEN_CALLS or tuple(called.rsplit(".", 1)) in FORBIDDEN_METHODS:
        yield called
    if called == "getattr" and isinstance(call.args[1], ast.Constant):
        yield "getattr of a literal name"
    loads = called.startswith(("Auto", "sight.loader")) and called.endswith(("_pretrained", "_config"))
    if loads and "trust_remote_code" not in arguments:
        yield f"{called} without trust_remote_code"
    for word, also in (("shell", ""), ("trust_remote_code", "inert.allowed()"), ("allow_pickle", "")):
        if word in arguments and ast.unparse(arguments[word]) not in ("False", also):
            yield f"{word}={ast.unparse(arguments[word])}"
    if called == "yaml.load" and ast.unparse(arguments.get("Loader", ast.Constant(None))) not in SAFE_LOADERS:
        yield "yaml.load without a safe loader"


def undocumented(tree: ast.Module) -> list[str]:
    """The module and its public classes, functions and methods without a docstring."""
    found = [] if ast.get_docstring(tree) else ["the module"]
    for owner in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
        for node in owner.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            inside = isinstance(owner, ast.Module) or not owner.name.startswith("_")
            if public and inside and not ast.get_docstring(node):
                found.append(f"{node.lineno}: {node.name}")
    return found


def long_functions(tree: ast.Module) -> list[str]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [one.name for one in functions if one.end_lineno - one.lineno + 1 > MOST_LINES_OF_A_FUNCTION]


def each_file(rule) -> dict[str, list[str]]:
    """What a rule finds, by file."""
    return {name_of(path): found for path in FILES if (found := rule(tree_of(path)))}


def test_imports_point_one_way() -> None:
    found = {}
    for path in FILES:
        part = name_of(path).split("/")[0].removesuffix(".py")
        if part != "__init__":
            found[name_of(path)] = wrong_directions(tree_of(path), part)
    assert {name: bad for name, bad in found.items() if bad} == {}


def test_every_part_has_a_layer() -> None:
    """A new file must say where it belongs."""
    parts = {name_of(path).split("/")[0].removesuffix(".py") for path in FILES} - {"__init__"}
    assert parts <= {name for names in LAYERS for name in names}


def test_the_package_itself_imports_nothing() -> None:
    assert [name_of(path) for path in SOURCE.rglob("__init__.py") if list(imports(tree_of(path)))] == []


def test_data_is_free_of_torch_and_models() -> None:
    """Only the loader makes tensors; transformers is met inside two functions, so that a worker starts fast."""
    for path in sorted((SOURCE / "data").rglob("*.py")):
        tree, name = tree_of(path), name_of(path)
        top = {id(node) for node in tree.body}
        for module, node in executed(tree):
            assert not module.startswith(("torch.distributed", "schoolhouse.model", "schoolhouse.parallel")), name
            if module.split(".")[0] == "torch":
                assert name in MAKES_TENSORS
            if module.split(".")[0] == "transformers":
                assert name in LOADS_TOKENIZERS and id(node) not in top, name


def test_reports_only_read() -> None:
    """What looks at a run works where torch is not installed."""
    for path in sorted((SOURCE / "report").rglob("*.py")):
        foreign = {module.split(".")[0] for module, _ in imports(tree_of(path))}
        assert not foreign & {"torch", "transformers", "numpy"}, name_of(path)


def test_the_loss_knows_no_mesh() -> None:
    text = (SOURCE / "loss.py").read_text(encoding="utf-8")
    inner = {module for module, _ in imports(ast.parse(text)) if module.startswith(("schoolhouse", "torch."))}
    assert inner <= {"schoolhouse.types", "schoolhouse.model"}
    assert "distributed" not in text and "mesh" not in text


def test_nothing_is_written_that_is_never_written() -> None:
    assert each_file(misdeeds) == {}


def test_only_the_command_line_allows_code_of_models() -> None:
    """And the workers that it starts, which are told."""
    calls = [name_of(path) for path in FILES for node in ast.walk(tree_of(path))
             if isinstance(node, ast.Call) and ast.unparse(node.func) == "inert.allow"]
    assert sorted(calls) == ["cli.py", "data/prepare.py"]


def test_every_public_name_is_documented() -> None:
    assert each_file(undocumented) == {}


def test_functions_and_files_stay_small() -> None:
    assert each_file(long_functions) == {}
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: number for name, number in lines.items() if number > MOST_LINES_OF_A_FILE} == {}


@pytest.mark.parametrize(("line", "rule"), [
    ("global x", misdeeds), ("try: pass\nexcept: pass", misdeeds), ("try: pass\nexcept Exception: pass", misdeeds),
    ("try: pass\nexcept (ValueError, Exception): pass", misdeeds), ("import pickle", misdeeds), ("eval('1')", misdeeds),
    ("def f():\n import pickle.x", misdeeds), ("torch.load(p)", misdeeds), ("getattr(a, 'b', None)", misdeeds),
    ("run(x, shell=True)", misdeeds), ("load(trust_remote_code=flag)", misdeeds), ("hasattr(a, 'b')", misdeeds),
    ("yaml.load(text)", misdeeds), ("yaml.load(text, Loader=yaml.Loader)", misdeeds), ("def f(): pass", undocumented),
    ("def f():\n" + " x = 1\n" * 60, long_functions),
    ("from schoolhouse import run", lambda tree: wrong_directions(tree, "optim")),
    ("def f():\n from schoolhouse.model.load import x", lambda tree: wrong_directions(tree, "data")),
])
def test_each_rule_sees_what_it_forbids(line: str, rule) -> None:
    assert rule(ast.parse(line))


def test_the_yaml_loader_is_safe() -> None:
    assert issubclass(recipe._Loader, yaml.SafeLoader)
    with pytest.raises(yaml.constructor.ConstructorError):
        yaml.load("!!python/object/apply:os.getcwd []", Loader=recipe._Loader)


# What starting the program loads, in processes of their own.


def loaded(code: str) -> set[str]:
    """The top modules of a fresh process that ran `code`."""
    report = "; import sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_is_light() -> None:
    assert not loaded("import schoolhouse") & {*HEAVY, "numpy", "pydantic", "datasets"}


def test_importing_the_commands_is_light() -> None:
    assert not loaded("import schoolhouse.commands") & {*HEAVY, "datasets"}


def test_reading_runs_is_light() -> None:
    assert not loaded("import schoolhouse.report.page, schoolhouse.record") & {*HEAVY, "numpy", "datasets"}


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"], ["schema"], ["ls"]])
def test_help_answers_at_once(arguments: list[str]) -> None:
    """Less than a second of processor time, whatever else the machine does, and torch is not needed for it."""
    seconds, done = timed(arguments)
    assert done.returncode == 0, done.stderr
    assert seconds < 1.0


def test_f23_a_typo_answers_at_once(tmp_path: Path) -> None:
    """Exit 2 with place and nearest key, in less than a second of processor time, and torch is never imported."""
    path = tmp_path / "typo.yaml"
    path.write_text("model: starter/qwen3\ndata: starter/arithmetic\noptim:\n  learning_rat: 1e-4\n")
    seconds, done = timed(["run", str(path)])
    assert done.returncode == 2
    assert f"{path}:4" in done.stderr and "optim.learning_rate?" in done.stderr and "Traceback" not in done.stderr
    assert seconds < 1.0


def timed(arguments: list[str]) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Run the program where torch and transformers cannot be imported; its seconds of processor time."""
    guard = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
    code = guard + f"from schoolhouse import cli; cli.main({arguments!r})"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done

"""F22, F24: what is offline opens no connection, and a model that brings code or a pickle leaves no trace."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_run import here, program, write_recipe

from schoolhouse import inert, places
from schoolhouse.config import Model
from schoolhouse.data import bounds, prepare, served
from schoolhouse.errors import SafetyError
from schoolhouse.types import Conversation, Message, Origin, Part

WATCHED = """
import os, sys
def watch(event, arguments):
    if event == "socket.connect" or event == "socket.getaddrinfo":
        print("NETWORK", event, arguments[-1:], file=sys.stderr)
        os._exit(99)
sys.addaudithook(watch)
from schoolhouse import cli
cli.main(sys.argv[1:])
"""


def test_f24_a_run_opens_no_connection(tmp_path: Path) -> None:
    """The interpreter's own audit ends the process at the first address that is looked up or met."""
    words = ["run", str(write_recipe(tmp_path)), f"directory={tmp_path / 'run'}", "train.steps=2"]
    done = subprocess.run([sys.executable, "-c", WATCHED, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "NETWORK" not in done.stderr, done.stderr[-2000:]
    probe = WATCHED.replace("from schoolhouse import cli\ncli.main(sys.argv[1:])",
                            "import socket; socket.create_connection(('127.0.0.1', 9))")
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode == 99


def test_f22_code_and_pickles_of_a_model_leave_no_trace(tmp_path: Path, capsys) -> None:
    """A configuration that names code of its own, beside weights as a pickle: an error, and the code never ran."""
    model, trace = tmp_path / "model", tmp_path / "trace"
    shutil.copytree(places.model_directory("starter/qwen3"), model)
    code = f"from pathlib import Path\nPath({str(trace)!r}).touch()\nclass Own: pass\n"
    (model / "own.py").write_text(code)
    settings = json.loads((model / "config.json").read_text())
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (model / "config.json").write_text(json.dumps({**settings, "model_type": "own", "auto_map": own}))
    for weights in model.glob("*.safetensors*"):
        weights.unlink()
    (model / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch " + str(trace).encode() + b"'\ntR.")
    page = write_recipe(tmp_path)
    here("run", page, f"directory={tmp_path / 'run'}", f"model={model}", code=8)
    assert "a pickle" in capsys.readouterr().err and not trace.exists()
    shutil.copy(places.model_directory("starter/qwen3") / "model.safetensors", model)
    here("run", page, f"directory={tmp_path / 'run'}", f"model={model}", code=8)
    said = capsys.readouterr().err
    assert "code of its own" in said and not trace.exists() and "Traceback" not in said


OWN = """\
import os
from pathlib import Path

from transformers import Qwen3Config, Qwen3ForCausalLM

Path({trace!r}).open("a").write(f"{{os.getpid()}}\\n")


class OwnConfig(Qwen3Config):
    model_type = "own"


class OwnModel(Qwen3ForCausalLM):
    config_class = OwnConfig
"""
ALLOWED = "--trust-remote-code"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A model whose configuration and architecture are its author's code, which leaves a trace where it runs."""
    model = tmp_path / "own-model"
    shutil.copytree(places.model_directory("starter/qwen3"), model)
    (model / "own.py").write_text(OWN.format(trace=str(tmp_path / "trace")))
    settings = json.loads((model / "config.json").read_text())
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    settings |= {"model_type": "own", "auto_map": code, "architectures": ["OwnModel"]}
    (model / "config.json").write_text(json.dumps(settings))
    return model


def test_f22_only_the_command_line_runs_code_of_a_model(own: Path, tmp_path: Path) -> None:
    """Refused without the option, whatever the environment says; with it, said with the file and its SHA-256 before it
    runs, kept in the run, and enough for training on two processes, going on, exam, and a proved export. Code that
    changed, or is not allowed any more, is another run.
    """
    page, run, trace = write_recipe(tmp_path), tmp_path / "run", tmp_path / "trace"
    words = [str(page), f"directory={run}", f"model={own}", "train.steps=2", "exam.every=0"]
    environment = os.environ | {"TRUST_REMOTE_CODE": "1", "HF_HUB_TRUST_REMOTE_CODE": "1",
                                "HF_MODULES_CACHE": str(tmp_path / "modules")}
    refused = program("run", *words, code=8, env=environment)
    assert ALLOWED in refused.stderr and not trace.exists() and len(refused.stderr.splitlines()) <= 6
    program("run", *words, "--nproc", "2", code=8, env=environment)
    assert not trace.exists()
    digest = hashlib.sha256((own / "own.py").read_bytes()).hexdigest()
    done = program("run", *words, ALLOWED, "--nproc", "2", env=environment)
    assert trace.exists() and done.stderr.count(f"may run {own / 'own.py'} (sha256 {digest})") == 1
    assert json.loads((run / "run.json").read_text())["code"] == {"own.py": digest}
    longer = [*words, "train.steps=4", "--allow-change", "train.steps"]
    assert ALLOWED in program("run", *longer, code=2, env=environment).stderr
    program("run", *longer, ALLOWED, env=environment)
    out = program(ALLOWED, "export", run, env=environment).stdout
    assert "identical logits" in out and (run / "export" / "own.py").read_bytes() == (own / "own.py").read_bytes()
    (own / "own.py").write_text((own / "own.py").read_text() + "# another line\n")
    for command in (("run", *longer), ("export", run), ("eval", run, page)):
        changed = program(*command, ALLOWED, code=2, env=environment)
        assert "code is not that with which the run began: own.py" in changed.stderr


@pytest.fixture
def trusting() -> Iterator[None]:
    """As if the option stood on the command line."""
    inert.allow(True)
    yield
    inert.allow(False)


@pytest.mark.parametrize("place", [
    "somebody/else--own.OwnConfig", "sub/own.OwnConfig", "/elsewhere/own.OwnConfig", "..own.OwnConfig",
    ["own.OwnConfig", "somebody/else--own.OwnConfig"],
])
def test_f22_code_from_elsewhere_is_never_run(own: Path, trusting: None, place: object) -> None:
    """Only files of the model's own directory, whose names and hashes are shown, can be meant."""
    settings = json.loads((own / "config.json").read_text())
    settings["auto_map"]["AutoConfig"] = place
    (own / "config.json").write_text(json.dumps(settings))
    with pytest.raises(SafetyError, match="auto_map"):
        inert.checked(own)


def test_f22_another_configuration_or_way_of_writing_is_refused(own: Path, tmp_path: Path) -> None:
    """`configuration_files` hides keys from the look at config.json; `custom_generate` needs no auto_map to run."""
    inert.checked(own)
    (own / "custom_generate").mkdir()
    inert.checked(own)
    inert.allow(True)
    try:
        with pytest.raises(SafetyError, match="own way of writing"):
            inert.checked(own)
    finally:
        inert.allow(False)
    settings = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**settings, "configuration_files": ["config.4.0.0.json"]}))
    with pytest.raises(SafetyError, match="configuration_files"):
        inert.checked(own)


def test_f22_all_code_beside_a_model_is_shown_copied_and_part_of_what_is_prepared(own: Path, tmp_path: Path) -> None:
    """Also in directories, which code may import; rows that other code tokenized are other rows."""
    (own / "sub").mkdir()
    (own / "sub" / "words.py").write_text("WORDS = 1\n")
    (own / "no.py").mkdir()
    serving = served.serving(Model(path=str(own)), own)
    without = prepare.serving_fingerprint(serving)
    assert inert.code(own) == {}
    inert.allow(True)
    try:
        assert sorted(inert.code(own)) == ["own.py", "sub/words.py"]
        inert.copy_code(own, tmp_path / "copy")
        first = prepare.serving_fingerprint(serving)
        (own / "sub" / "words.py").write_text("WORDS = 2\n")
        assert len({without, first, prepare.serving_fingerprint(serving)}) == 3
    finally:
        inert.allow(False)
    assert (tmp_path / "copy" / "sub" / "words.py").read_text() == "WORDS = 1\n"


def test_f22_a_rehearsal_and_a_job_keep_to_the_command_line(own: Path, tmp_path: Path) -> None:
    """The tokenizer's own code is refused in a rehearsal, too, whatever is answered on the terminal; a job that is
    written says what this command line said.
    """
    settings = json.loads((own / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnModel", None]}}
    (own / "tokenizer_config.json").write_text(json.dumps(settings))
    (own / "config.json").write_text(json.dumps({**json.loads((own / "config.json").read_text()), "auto_map": {},
                                                 "model_type": "llama"}))
    page = write_recipe(tmp_path)
    words = [page, f"directory={tmp_path / 'run'}", f"model={own}"]
    said = program("run", *words, "--rehearse", code=8, input="y\n")
    assert "code of its own" in said.stderr and not (tmp_path / "trace").exists()
    assert ALLOWED in program("job", *words, "--to", "slurm", ALLOWED).stdout
    assert ALLOWED not in program("job", *words, "--to", "slurm").stdout


@pytest.mark.parametrize("bad", [
    {"model_type": "qwen3\nimport os"}, {"_attn_implementation_internal": "someone/kernel"},
    {"text_config": {"trust_remote_code": True}},
])
def test_f22_a_configuration_with_more_than_a_description(tmp_path: Path, capsys, bad: dict) -> None:
    model = tmp_path / "model"
    shutil.copytree(places.model_directory("starter/qwen3"), model)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, **bad}))
    here("run", write_recipe(tmp_path), f"directory={tmp_path / 'run'}", f"model={model}", code=8)
    said = capsys.readouterr().err
    assert "configuration has" in said and str(model / "config.json") in said and len(said.splitlines()) <= 6


@pytest.mark.parametrize(("template", "words"), [
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}", "not finished"),
    ("{{ 'x' * 10 ** 11 }}", "repeats a text"),
    ("{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "wrote 99,980,001 characters"),
    ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "forbids"),
    ("{{ cycler.__init__.__globals__.os.popen('touch trace').read() }}", "forbids"),
])
def test_f22_a_template_that_does_what_none_needs(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, template: str, words: str
) -> None:
    """Exit 8 in four parts within seconds, though bad rows may be set aside; nothing is prepared, nothing ran."""
    monkeypatch.chdir(tmp_path)
    Path("own.jinja").write_text(template)
    page = write_recipe(tmp_path)
    began = time.process_time()
    here("check", page, "model.chat_template=own.jinja", "data.on_error=skip:99%", "data.workers=1", code=8)
    said = capsys.readouterr().err
    assert words in said and "model.chat_template" in said and len(said.splitlines()) <= 6
    assert not Path("trace").exists() and time.process_time() - began < 30


def test_f22_yaml_makes_no_objects(tmp_path: Path, capsys) -> None:
    page = write_recipe(tmp_path, "model: !!python/object/apply:os.system ['touch trace']\ndata: starter/arithmetic\n")
    here("check", page, code=8)
    said = capsys.readouterr().err
    assert "objects of Python" in said and f"{page}:1:8" in said and not (tmp_path / "trace").exists()


def test_f22_a_long_conversation_is_no_endless_loop(tmp_path: Path) -> None:
    """A template that Qwen3's makers wrote renders 4,000 turns of text far below the limit: the fastest of three times,
    for another program, or Python's own collection of garbage, may be in the way of one."""
    made = served.load(served.serving(Model(path="starter/qwen3"), places.model_directory("starter/qwen3")))
    turns = [Message(role, (Part("text", "word " * 50),)) for _ in range(2000) for role in ("user", "assistant")]
    took = []
    for _ in range(3):
        began = time.process_time()
        made.template.script(Conversation(tuple(turns), Origin("rows", 1))).full(len(turns))
        took.append(time.process_time() - began)
    assert min(took) < bounds.SECONDS / 4, took

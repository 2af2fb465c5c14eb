"""The page, visited: what its buttons do, who may press them, and what its end means for training (F25)."""

from __future__ import annotations

import contextlib
import html
import http.client
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlencode

import pytest
from test_run import PATIENCE, last_step, program
from visitor import RECIPE, Visitor, hears, page, records, where

from schoolhouse import places, record

ODD = "a; $(touch marker) `touch marker` <img src=x onerror=alert(1)> ü"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A workspace with one recipe, beside something that is nobody's business; no run is left under way."""
    places.model_directory("starter/qwen3")
    outside = tmp_path_factory.mktemp("outside")
    (outside / "run.json").write_text('{"status": "a secret"}')
    (outside / "secret.yaml").write_text(RECIPE)
    root = tmp_path_factory.mktemp("workspace")
    (root / "lesson.yaml").write_text(RECIPE)
    (root / "runs").symlink_to(tmp_path_factory.mktemp("disk"))  # a larger one
    (root / "runs" / "link").symlink_to(outside)
    (root / "link.yaml").symlink_to(outside / "secret.yaml")
    yield root
    for number in filter(None, map(record.holder, root.glob("runs/*"))):
        os.kill(number, signal.SIGKILL)


@pytest.fixture(scope="module")
def visitor(root: Path) -> Iterator[Visitor]:
    with page(root) as found:
        yield found


@pytest.fixture(scope="module")
def done(visitor: Visitor) -> str:
    """A run that was started from the page, under a name that a shell or a browser would run; it has ended."""
    visitor.start(ODD)
    visitor.wait(ODD, "✓ done")
    return ODD


def test_f25_nobody_enters_without_the_token(visitor: Visitor) -> None:
    """Whatever is asked for; and a token in the address is never kept there."""
    stranger = Visitor(visitor.port, visitor.token, visitor.process)
    for method, path in (("GET", "/"), ("GET", "/style.css"), ("GET", "/runs/x"), ("POST", "/start")):
        assert stranger.ask(method, path).status == 401
    assert stranger.ask("GET", "/?token=wrong").status == 401
    assert stranger.ask("GET", "/", cookie=visitor.cookie.partition("=")[0] + "=wrong").status == 401
    assert stranger.ask("GET", "/", authorization=f"Bearer {visitor.token}").status == 200
    assert stranger.ask("GET", "/", authorization=f"Bearer {visitor.token}x").status == 401


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "", "localhost.evil.example"])
def test_f25_it_answers_to_no_other_name(host: str, visitor: Visitor) -> None:
    """A name that was pointed at this machine (DNS rebinding) gets nothing, with the cookie or the token."""
    assert visitor.ask("GET", "/", host=host).status == 403
    assert visitor.ask("GET", f"/?token={visitor.token}", host=host).status == 403
    assert visitor.ask("GET", "/", host=f"localhost:{visitor.port}").status == 200


@pytest.mark.parametrize("headers", [{"origin": "http://evil.example"}, {"origin": "null"}, {}, {
    "origin": "http://127.0.0.1:1"}], ids=str)  # fmt: skip
def test_f25_buttons_of_other_pages_do_nothing(headers: dict[str, str], visitor: Visitor, root: Path) -> None:
    sent = "recipe=lesson.yaml&name=forged&processes=1&settings="
    assert visitor.ask("POST", "/start", sent, **headers).status == 403
    assert not (root / "runs" / "forged").exists()


def test_f25_nothing_outside_is_read(visitor: Visitor) -> None:
    """Neither by dots, encoded or not, nor through links."""
    for path in ("/runs/../../etc/passwd", "/runs/..%2f..%2fetc%2fpasswd", "/runs/..", "/runs/%2e%2e/x", "/runs/link",
                 "/compare?first=..&second=link", "/etc/passwd", "/page.py"):  # fmt: skip
        assert visitor.ask("GET", path).status == 404, path
    assert "secret" not in visitor.get("/") and ">link" not in visitor.get("/")
    for recipe in ("link.yaml", "../outside/secret.yaml", "/etc/passwd", "--help"):
        assert "there is no recipe" in visitor.press("/start", 400, recipe=recipe, name="x", processes=1).text


def test_f25_every_page_loads_and_runs_only_its_own(visitor: Visitor, done: str) -> None:
    for path in ("/", where(done), "/style.css", "/page.js", "/runs/none"):
        headers = visitor.ask("GET", path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"] and headers["x-content-type-options"] == "nosniff"
    text = visitor.get(where(done))
    assert " style=" not in text and " onclick" not in text and re.findall("<script[^>]*>", text) == [
        '<script src="/page.js" defer="">']  # fmt: skip


def test_f25_a_name_is_only_a_name(visitor: Visitor, done: str, root: Path) -> None:
    """No shell reads it, and a browser is shown it as text; the run is what the command line makes of the recipe."""
    assert (root / "runs" / ODD / "report.html").is_file() and not (root / "marker").exists()
    for path in ("/", where(done), where(done, "chat")):
        assert html.escape(ODD) in visitor.get(path) and "<img" not in visitor.get(path)
    program("run", "lesson.yaml", "directory=plain", cwd=root)
    losses = [[one["loss"] for one in records(run) if one["kind"] == "step"]
              for run in (root / "runs" / ODD, root / "plain")]  # fmt: skip
    assert losses[0] == losses[1] and len(losses[0]) == 12


def test_the_page_of_a_run_is_its_report(visitor: Visitor, done: str) -> None:
    text = visitor.get(where(done))
    assert all(word in text for word in ("exam after", "<figcaption><span>Loss", "adds up", "0.98"))
    assert "step 12/12" in text, "what it has printed"
    assert ">Stop<" not in text and ">Resume<" not in text and "✓ done" in visitor.get("/")


def test_the_best_checkpoint_answers(visitor: Visitor, done: str) -> None:
    """A conversation that goes on; a message is kept as it was written."""
    for asked in ("Mia has 3 plums and buys 4. How many?", "And <b>then</b>?"):
        visitor.press(where(done, "chat"), text=asked)
    text = visitor.get(where(done, "chat"))
    assert text.count('class="said user"') == text.count('class="said assistant"') == 2, text
    assert "And &lt;b&gt;then&lt;/b&gt;?" in text
    visitor.press(where(done, "forget"))
    assert 'class="said' not in visitor.get(where(done, "chat"))


def test_programs_talk_in_lines(done: str, root: Path) -> None:
    """A line is answered by a line, also where it is none that can be answered; images lie below the directory."""
    asked = [{"messages": [{"role": "user", "content": "Mia has 3 plums."}]}, [1], {"messages": []}, {}]
    lines = [*map(json.dumps, asked), "no JSON"]
    said = program("chat", root / "runs" / done, "--json", input="\n".join(lines), cwd=root).stdout
    found = [json.loads(line) for line in said.splitlines()]
    assert [list(one) for one in found] == [["answer"], *([["error"]] * 4)]
    assert "standard input:2 is no object" in found[1]["error"] and "standard input:3" in found[2]["error"]


def test_stopped_resumed_and_compared(visitor: Visitor, done: str, root: Path) -> None:
    """With two processes; the buttons are the signals and commands of the command line."""
    visitor.start("second", "train.steps=400", "exam.every=0", processes=2)
    visitor.wait("second", "… running")
    wait_for_step(root / "runs" / "second", 2)
    with visitor.listening("second") as listener:
        visitor.press(where("second", "stop"))
        assert visitor.told("second") in ("‖ stopping after this step", "‖ stopped")
        while visitor.told("second") != "‖ stopped":
            hears(listener)  # of every change, the last one too
    refused = visitor.press(where("second", "stop"), 400).text
    assert "no process trains" in refused and f'data-page="{where("second")}"' in refused, "and is renewed as before"
    reached = last_step(root / "runs" / "second")
    visitor.press(where("second", "resume"), processes=2)
    visitor.wait("second", "… running")
    assert "cannot be resumed" in visitor.press(where("second", "resume"), 400, processes=2).text
    wait_for_step(root / "runs" / "second", reached + 1)
    assert f"resumed from step {reached} (verified)" in visitor.get(where("second"))
    visitor.press(where("second", "stop"))
    visitor.wait("second", "‖ stopped")
    text = visitor.get(f"/compare?first=second&second={where(done).removeprefix('/runs/')}")
    assert text.count("curve second") == 3 and "only second is right" in text


def wait_for_step(run: Path, step: int) -> None:
    limit = time.monotonic() + PATIENCE
    while last_step(run) < step:
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_one_of_many_presses_starts_it(visitor: Visitor, root: Path) -> None:
    sent = urlencode({"recipe": "lesson.yaml", "name": "once", "settings": "train.steps=1\nexam.every=0"})
    with ThreadPoolExecutor(8) as several:
        pressed = [several.submit(visitor.ask, "POST", "/start", sent, origin=visitor.origin) for _ in range(8)]
        assert sorted(one.result().status for one in pressed) == [303, *([400] * 7)]
    visitor.wait("once", "✓ done")
    assert "the run is active" not in visitor.get(where("once"))


@pytest.fixture
def odd(root: Path, done: str) -> Iterator[Path]:
    """A run as it may come from a stranger."""
    place = root / "runs" / "odd"
    shutil.copytree(root / "runs" / done, place, ignore=shutil.ignore_patterns("checkpoints", ".active", ".lock"))
    yield place
    shutil.rmtree(place) if not place.is_symlink() else place.unlink()


@pytest.mark.parametrize(("name", "content"), [
    ("run.json", b"["), ("run.json", b"[" * 200_000), ("run.json", b"\xff\xfe"), ("run.json", b'{"recipe": [1]}'),
    ("metrics.jsonl", b"[" * 200_000), ("metrics.jsonl", b'{"kind": "step", "step": 1' + b"0" * 400 + b"}"),
    ("metrics.jsonl", b'{"kind": "step", "step": -5, "loss": Infinity}\n{"kind": "step", "step": 3, "loss": NaN}'),
    ("metrics.jsonl", b'{"kind": "step", "step": 2, "loss": 1' + b"0" * 400 + b"}"),
    ("examples.jsonl", b'{"source": 1, "row": 2, "verdict": 3, "turns": [], "ids": [], "weights": [], '
                       b'"pieces": ["x"]}'),
    (".active", b"\xff\xff"), (".active", b"pid " + b"9" * 5000 + b" on x"), ("console.txt", b"\x1b[31m\xff" * 50_000),
], ids=lambda value: repr(value)[:40])
def test_f25_files_of_strangers_cost_no_page(name: str, content: bytes, odd: Path, visitor: Visitor) -> None:
    (odd / name).write_bytes(content)
    assert visitor.ask("GET", "/").status == 200 and visitor.ask("GET", where("odd")).status == 200


def test_f25_odd_entries_are_nobodys_runs(odd: Path, visitor: Visitor, root: Path) -> None:
    """Links, pipes, circles, and names that are no text: not shown, not written to, and nobody waits for them."""
    secret = root / "secret"
    secret.write_text("a secret")
    runs = odd.parent
    for number, name in enumerate(("console.txt", "run.json", ".lock", "chat.txt", ".active", "metrics.jsonl")):
        shutil.copytree(odd, runs / f"odd-{number}")
        (runs / f"odd-{number}" / name).unlink(missing_ok=True)
        (runs / f"odd-{number}" / name).symlink_to(secret)
    os.mkfifo(odd / ".active")
    (runs / "circle").symlink_to(runs / "ring")
    (runs / "ring").symlink_to(runs / "circle")
    no_text = Path(os.fsdecode(os.fsencode(runs) + b"/\xff\xfe"))
    no_text.mkdir()
    (no_text / "run.json").write_text("{}")
    front = visitor.get("/")
    for name in ("odd", *(f"odd-{number}" for number in range(6)), "circle", "ring"):
        assert f">{name}<" not in front and visitor.ask("GET", where(name)).status == 404, name
        visitor.press("/start", 400, recipe="lesson.yaml", name=name, processes=1, settings="")
    assert secret.read_text() == "a secret"


@pytest.mark.parametrize("leave", ["forget", "ctrl-C"])
def test_nobody_waits_for_a_student_that_hangs(leave: str, done: str, root: Path) -> None:
    """Whoever asked is answered, and no process is left."""
    with page(root) as visitor, ThreadPoolExecutor(1) as asking:
        asked = asking.submit(visitor.ask, "POST", where(done, "chat"), "text=Hello", origin=visitor.origin)
        limit = time.monotonic() + PATIENCE
        while not (students := children(visitor.process.pid)):
            assert time.monotonic() < limit
            time.sleep(0.05)
        os.kill(students[0], signal.SIGSTOP)
        if leave == "forget":
            visitor.press(where(done, "forget"))
            assert asked.result(20).status == 303
        else:
            visitor.process.send_signal(signal.SIGINT)
            assert visitor.process.wait(20) == 0
            with contextlib.suppress(OSError, http.client.HTTPException):
                asked.result(20)
        assert not Path(f"/proc/{students[0]}").exists() or children(visitor.process.pid) == []


def children(number: int) -> list[int]:
    """The processes that a process has started and that have not ended."""
    found = Path(f"/proc/{number}/task").glob("*/children")
    return [int(one) for path in found for one in path.read_text().split()]


def test_f25_training_outlives_the_page(root: Path) -> None:
    """Its server is killed, and another one shows the same run, whole, and can stop it."""
    with page(root) as first:
        first.start("outlives", "train.steps=2000", "exam.every=0")
        first.wait("outlives", "… running")
        os.kill(first.process.pid, signal.SIGKILL)
        first.process.wait()
    before = last_step(root / "runs" / "outlives")
    with page(root) as second:
        assert second.token != first.token and second.ask("GET", "/", cookie=first.cookie).status == 401
        limit = time.monotonic() + PATIENCE
        while last_step(root / "runs" / "outlives") <= before:
            assert time.monotonic() < limit
            time.sleep(0.1)
        assert second.told("outlives") == "… running"
        second.press(where("outlives", "stop"))
        second.wait("outlives", "‖ stopped")
        steps = [one["step"] for one in records(root / "runs" / "outlives") if one["kind"] == "step"]
        assert steps == list(range(1, len(steps) + 1)) and f"step {steps[-1]:,}" in second.get(where("outlives"))


def test_f25_a_hundred_listeners(visitor: Visitor, done: str, root: Path) -> None:
    """Each hears of a change, and the page answers as if they were not there."""
    with contextlib.ExitStack() as all_of_them:
        listeners = [all_of_them.enter_context(visitor.listening(done)) for _ in range(100)]
        began = time.monotonic()
        visitor.get("/style.css")
        assert time.monotonic() - began < 5
        os.utime(root / "runs" / done / "events.jsonl")
        assert len({hears(listener) for listener in listeners}) == 1


@pytest.mark.parametrize(("changed", "said"), [
    ({"name": ""}, "is no name of a run"), ({"name": "a/b"}, "is no name of a run"),
    ({"name": "../x"}, "is no name of a run"), ({"name": "-x"}, "is no name of a run"),
    ({"name": "x" * 101}, "is no name of a run"), ({"name": "a\x00b"}, "is no name of a run"),
    ({"settings": "--trust-remote-code"}, "is no setting"), ({"settings": "directory=/tmp/x"}, "is runs/ and its name"),
    ({"settings": " directory = /tmp/x"}, "is runs/ and its name"),
    ({"settings": "train.steps=3\x00"}, "is no setting"), ({"settings": "a=" + "x" * 200_000}, "is no setting"),
    ({"settings": "train.steps"}, "is no setting"),
    ({"processes": "0"}, "0 processes"), ({"processes": "1e9"}, "0 processes"), ({"processes": "65"}, "65 processes"),
], ids=str)
def test_what_cannot_be_started(changed: dict[str, str], said: str, visitor: Visitor, root: Path) -> None:
    """Is said on the page, beside what was typed; code of models can be allowed on a command line alone."""
    before = sorted(root.glob("runs/*"))
    answer = visitor.press("/start", 400, **{"recipe": "lesson.yaml", "name": "mistaken", "processes": "1", **changed})
    assert said in html.unescape(answer.text) and "Traceback" not in answer.text
    assert sorted(root.glob("runs/*")) == before


def test_a_name_is_given_once(visitor: Visitor, done: str) -> None:
    assert "there is a run" in visitor.press("/start", 400, recipe="lesson.yaml", name=done, processes=1).text


def test_a_mistake_in_a_recipe_is_shown_as_it_was_printed(visitor: Visitor) -> None:
    visitor.start("typo", "train.stepz=3")
    limit = time.monotonic() + PATIENCE
    while "did not start" not in (text := visitor.get(where("typo"))):
        assert time.monotonic() < limit
        time.sleep(0.2)
    assert "did you mean train.steps?" in text
    visitor.start("typo", "train.steps=1", "exam.every=0", "exam.data=null")
    visitor.wait("typo", "✓ done")


def test_too_much_is_refused(visitor: Visitor) -> None:
    sent = "text=" + "x" * 2_000_000
    assert visitor.ask("POST", "/start", sent, origin=visitor.origin).status == 413


def test_a_port_that_is_taken(visitor: Visitor, root: Path) -> None:
    said = program("serve", root, "--port", visitor.port, code=2).stderr
    assert "cannot have port" in said and "--port" in said
    assert "there is no directory" in program("serve", root / "none", code=2).stderr


def test_ctrl_c_closes_it(root: Path) -> None:
    """At once, though somebody listens; what was being trained is not its own to end."""
    with page(root) as visitor:
        visitor.start("goes on", "train.steps=2000", "exam.every=0")
        visitor.wait("goes on", "… running")
        with visitor.listening("goes on"):
            visitor.process.send_signal(signal.SIGINT)
            assert visitor.process.wait(20) == 0
    with page(root) as again:
        assert again.told("goes on") == "… running"
        again.press(where("goes on", "stop"))
        again.wait("goes on", "‖ stopped")

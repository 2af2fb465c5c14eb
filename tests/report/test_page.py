"""The report: what it says equals the records, it loads nothing, and no text in a run can harm who opens it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fake_run
import pytest

from schoolhouse.data import show
from schoolhouse.errors import ConfigError
from schoolhouse.report import given, page, plots, words
from schoolhouse.report.read import Run, read

HOSTILE = "</title></script><script>alert(1)</script><img src=x onerror=alert(1)>\x00\x1b[31m\u202e\ud800\"'&"
VOID = {"meta", "link", "br"}


class Reader(HTMLParser):
    """Every element with its attributes, the ids, and the text; elements must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.text += data

    def attributes(self, *names: str) -> list[str]:
        return [given[name] or "" for _, given in self.elements for name in names if name in given]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return read(fake_run.write(tmp_path_factory.mktemp("runs") / "starter"))


@pytest.fixture(scope="module")
def text(run: Run) -> str:
    return page.to_html(run)


def rows(text: str, section: str) -> dict[str, str]:
    """The two-column table rows of a section; the first of a name."""
    [body] = re.findall(rf'<section id="{section}".*?</section>', text, re.DOTALL)
    found = re.findall(r"<tr[^>]*><th[^>]*>(.*?)</th><td[^>]*>(.*?)</td></tr>", body)
    return {html.unescape(name): html.unescape(value) for name, value in reversed(found)}


def cards(text: str) -> dict[str, tuple[str, str]]:
    """The key figures: large and small print, by name."""
    found = re.findall(r"<dt>(.*?)</dt><dd>(.*?)<small>(.*?)</small></dd>", text)
    return {name: (large, small) for name, large, small in found}


# ---- what it says


def test_the_verdict_and_the_exam_are_the_records(run: Run, text: str) -> None:
    assert "The exam rose from 1.5 % to 94.0 % (188 of 200 questions) in 2 min 23 s." in text
    assert "3 of 200<br>0.5 % to 4.3 %" in text and "188 of 200<br>89.8 % to 96.5 %" in text
    assert "They do not overlap." in text and "✓ done" in text and "gsm8k / starter" in text


def test_the_figures_are_sums_over_the_records(run: Run, text: str) -> None:
    tokens, taught = sum(step.tokens for step in run.steps), sum(step.supervised_tokens for step in run.steps)
    took = sum(step.seconds for step in run.steps)
    assert cards(text) == {
        "Steps": ("600", "of 600, 3 epochs"),
        "Trainable": ("3.41M", "of 3.41M parameters"),
        "Training loss": (words.figure(run.steps[-1].loss), f"from {words.figure(run.steps[0].loss)}"),
        "Validation loss": (words.figure(run.validations[-1].loss), f"from {words.figure(run.validations[0].loss)}"),
        "Tokens": (plots.compact(tokens), f"{plots.compact(taught)} supervised"),
        "Tokens a second": (plots.compact(tokens / took), f"{plots.compact(taught / took)} supervised"),
        "Peak memory": ("1.37 GiB", "of this process"),
        "Time": ("2 min 23 s", f"{words.duration(took)} in steps"),
    }


def test_pointing_at_a_curve_reads_the_record(run: Run, text: str) -> None:
    losses = {step.step: step.loss for step in run.steps}
    readings = re.findall(r"<title>step (\d+)\nsmoothed [^\n<]+\neach step ([^\n<]+)", text)
    assert len(readings) > 4 * 50
    loss_readings = readings[: text[: text.index("Token accuracy")].count("each step ")]
    assert all(value == plots.compact(losses[int(step)]) for step, value in loss_readings)
    validations = dict(re.findall(r"<title>step (\d+)\n[^<]*?validation ([\d.]+)</title>", text))
    assert validations == {str(one.step): plots.compact(one.loss) for one in run.validations}


def test_every_curve_is_there_with_a_label(text: str) -> None:
    captions = re.findall(r"<figcaption><span>(.*?)</span>", text)
    assert captions == ["Loss", "Exam", "Token accuracy", "Learning rate", "Gradient norm", "Tokens a second"]
    labels = re.findall(r'role="img" aria-label="([^"]+)"', text)
    assert len(labels) == text.count("<svg") == 9 and "Exam: 1.5 % at step 0, 94.0 % at step 600" in labels


def test_the_ledger_adds_up_and_says_so(text: str) -> None:
    assert "7,473 read = 7,432 kept + 41 dropped <b>✓ adds up</b>" in text
    found = rows(text, "data")
    assert (found["rows read"], found["dropped: longer than data.max_tokens"]) == ("7,473", "41")
    assert (found["verdict one"], found["verdict split"]) == ("7,284", "148")
    assert found["stop token is a target"] == "100.0 %"


def test_a_ledger_that_does_not_add_up_is_called_out(tmp_path: Path) -> None:
    directory = fake_run.write(tmp_path)
    data = json.loads((directory / "data.json").read_text())
    data["train"]["rows"] += 1
    (directory / "data.json").write_text(json.dumps(data))
    assert "✗ does not add up" in page.to_html(read(directory))


def test_answers_that_changed_come_first(run: Run, text: str) -> None:
    kinds = re.findall(r'<summary>(\w[\w ]+)<span class="quiet">([^<]+)</span>', text)
    before, after = ({one.index: one.correct for one in run.answers if one.step == step} for step in (0, 600))
    learnt = sum(after[index] and not before[index] for index in before)
    assert kinds[0] == ("Learnt", f"8 of {learnt} shown") and kinds[1] == ("Forgotten", "1")
    assert [kind for kind, _ in kinds] == ["Learnt", "Forgotten", "Still wrong", "Right both times"]
    pairs = re.findall(r'<div class="answer (right|wrong)">', text)
    assert pairs[:16] == ["wrong", "right"] * 8 and pairs[16:18] == ["right", "wrong"]


def test_the_same_question_stands_on_both_sides(run: Run, text: str) -> None:
    first = min(one.index for one in run.answers if one.step == 600 and one.correct)
    pair = [html.escape(one.text) for one in run.answers if one.index == first]
    article = text[text.index('<article class="question">') :].split("</article>")[0]
    assert all(answer in article for answer in pair)


def test_a_played_conversation_stands_under_its_own_answer(tmp_path: Path) -> None:
    """Each exam has its own history: only the last question is common, and no answer stands under another's history."""
    directory = fake_run.write(tmp_path / "run")
    shown = [{"role": "user", "content": "Mia has plums."}, {"role": "assistant", "content": "?"},
             {"role": "user", "content": "And what has Mia?"}]
    samples = [
        {"step": step, "index": 0, "question": [shown[0], {"role": "assistant", "content": said}, shown[2]],
         "reference": "plums", "answer": answer, "extracted": answer, "correct": correct}
        for step, said, answer, correct in ((0, "untaught words", "none", False), (600, "taught words", "plums", True))
    ]
    (directory / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
    question = page.to_html(read(directory)).split('<article class="question">')[1].split("</article>")[0]
    top, before, after = question.split('<div class="answer ')
    assert top.count("And what has Mia?") == 1 and "plums" not in top
    assert "untaught words" in before and "none" in before and "And what has Mia?" not in before
    assert "taught words" in after and "untaught" not in after and before.count("The conversation before") == 1


def test_examples_are_coloured_by_show(run: Run, text: str) -> None:
    assert show.html(run.examples) in text


def test_settings_that_differ_are_listed_with_their_default(run: Run, text: str) -> None:
    assert {key: (value, default) for key, value, default, _ in given.changed(run.recipe)} == {
        "model.path": ("starter/qwen3", None),
        "data.train": (run.recipe["data"]["train"], None),
        "data.validation": (run.recipe["data"]["validation"], None),
        "optim.learning_rate": (1e-3, 1e-5),
        "train.epochs": (3, 1),
        "validation.every": (100, 0),
        "exam.data": (run.recipe["exam"]["data"], None),
        "exam.every": (200, 0),
    }
    assert "<code>optim.learning_rate</code></td><td><code>0.001</code></td><td>1e-05</td>" in text
    assert "weight_decay: 0.01" in text, "the whole recipe, defaults too"


def test_what_was_in_force_and_where_it_ran_are_told(text: str) -> None:
    assert "schoolhouse (packed, isolated; SDPA for each example)" in text
    assert rows(text, "in-force")["warmup steps"] == "30"
    assert rows(text, "environment")["torch"] == "2.13.0+cpu" and rows(text, "environment")["cores"] == "2"


def test_a_resume_is_marked(text: str) -> None:
    assert "Dotted lines: resumed from step 350." in text and text.count('class="mark"') == 6


# ---- runs that did not come to their end


@pytest.mark.parametrize(
    ("steps", "status", "exams", "said"),
    [
        (0, "running", False, "Nothing has been trained yet. The last record is step 0 of 600"),
        (120, "running", False, "The last record is step 120 of 600: the run is under way, or was killed."),
        (120, "stopped", True, "It was stopped after step 120 of 600 and can be resumed."),
        (120, "done", True, "It ended early, after step 120 of 600: nothing had become better for a while."),
        (300, "failed", True, "It failed after step 300 of 600; the events below say why."),
    ],
)
def test_an_unfinished_run_says_how_far_it_came(
    tmp_path: Path, steps: int, status: str, exams: bool, said: str
) -> None:
    text = page.to_html(read(fake_run.write(tmp_path, steps, status, exams=exams)))
    assert said in text and ('id="exam"' in text) == exams
    Reader(text)


def test_a_report_is_made_of_run_json_alone_even_if_empty(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    reader = Reader(page.write(tmp_path).read_text())
    assert "Nothing has been trained yet." in reader.text


def test_what_was_torn_is_told(tmp_path: Path) -> None:
    directory = fake_run.write(tmp_path)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "ste')
    assert "1 record could not be read" in page.to_html(read(directory))


def test_a_report_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    directory = fake_run.write(tmp_path)
    before = {path.name for path in directory.iterdir()}
    first = page.write(directory).read_bytes()
    assert page.write(directory).read_bytes() == first
    assert {path.name for path in directory.iterdir()} == before | {"report.html"}


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        page.write(tmp_path)


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    directory = fake_run.write(tmp_path, steps=0)
    records = (fake_run.step_record(step, fake_run.random.Random(step)) for step in range(1, 30_001))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = page.to_html(read(directory))
    lines = re.findall(r'<polyline points="([^"]+)"', text)
    assert lines and max(line.count(" ") + 1 for line in lines) <= plots.MOST_POINTS
    assert len(text) < 400_000


# ---- safe to open and to share


def test_the_page_loads_nothing(text: str) -> None:
    reader = Reader(text)
    links = reader.attributes("src", "href", "srcset", "action", "data", "poster", "xlink:href")
    assert links and all(link.startswith("#") or link == "data:," for link in links)
    styles = "".join(re.findall("<style>(.*?)</style>", text, re.DOTALL))
    assert not re.search(r"https?:|//|url\(|@import|@font-face", re.sub(r"/\*.*?\*/", "", styles))
    assert not re.search("fetch|XMLHttpRequest|WebSocket|import\\(|sendBeacon|innerHTML|eval", page._beside("page.js"))


def test_the_policy_admits_the_style_and_the_script_by_hash_only(text: str) -> None:
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]+)"', text)
    assert "unsafe" not in policy and policy.startswith("default-src 'none'; ")
    for kind in ("style", "script"):
        [content] = re.findall(f"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        assert f"{kind}-src {show._hash(content)};" in policy
    reader = Reader(text)
    assert not [key for _, given in reader.elements for key in given if key.startswith("on") or key == "style"]


def test_ids_are_unique_and_every_link_has_its_place(text: str) -> None:
    reader = Reader(text)
    ids = reader.attributes("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in reader.attributes("href") if link.startswith("#")} <= set(ids)
    assert set(reader.attributes("aria-labelledby")) <= set(ids)


def poisoned(value: Any, spare: frozenset[str] = frozenset({"kind", "name", "status"})) -> Any:
    """Every text in a value with hostile text before it, keys of free mappings too."""
    if isinstance(value, str):
        return HOSTILE + value
    if isinstance(value, dict):
        free = value.keys() & {"one", "starter/arithmetic", "torch", "cores", "steps_total"}
        return {
            HOSTILE + key if key in free else key: inner if key in spare else poisoned(inner)
            for key, inner in value.items()
        }
    return [poisoned(inner) for inner in value] if isinstance(value, list) else value


def test_text_in_a_run_cannot_become_markup(tmp_path: Path) -> None:
    directory = fake_run.write(tmp_path)
    for path in directory.iterdir():
        records = [poisoned(json.loads(line)) for line in path.read_text().splitlines()]
        path.write_text("\n".join(map(json.dumps, records)))
    text = page.write(directory).read_text(encoding="utf-8")
    reader = Reader(text)
    names = [name for name, _ in reader.elements]
    assert names.count("script") == 1 and "img" not in names and text.count("<script") == 1
    assert not show.UNSAFE.search(text)
    assert reader.text.count("<script>alert(1)</script>") > 100, "hostile text is shown, as text"
    assert not [key for _, given in reader.elements for key in given if key.startswith("on")]


def test_reports_need_neither_torch_nor_transformers_nor_numpy() -> None:
    code = "import sys, schoolhouse.report.page; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: the page is not opened in a real browser")
def test_a_real_browser_runs_the_page(tmp_path: Path) -> None:
    path = page.write(fake_run.write(tmp_path / "run"))
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
    found = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", *quiet,
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert 'class="read" data-x=' in found.stdout, "the curves are there"
    assert "\neach step " not in found.stdout, "the script ran: the hints it replaces are gone"
    assert "Content Security Policy" not in found.stderr

"""Rows that cannot be taught (F15-F18 of the fault list): exit code, what is said, and what is left on the disk."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_run import here

from schoolhouse import places

GOOD = [{"question": f"What is {number} + 1?", "answer": f"#### {number + 1}"} for number in range(8)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a cache of its own, so that everything on the disk is seen."""
    places.model_directory("starter/qwen3")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(
    capsys: pytest.CaptureFixture[str], content: bytes | str, *overrides: str, code: int, name: str = "rows.jsonl"
) -> str:
    """What `check` says on standard error about a file with this content."""
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    Path("page.yaml").write_text(f"model: starter/qwen3\ndata: {{train: {name}, cache: cache}}\n")
    capsys.readouterr()
    here("check", "page.yaml", *overrides, code=code)
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said.err if code else said.out


def lines(*rows: object) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def stores() -> list[Path]:
    """The prepared data on the disk."""
    return [path for path in Path("cache/stores").iterdir() if path.is_dir()] if Path("cache").is_dir() else []


def kept_lines(name: str) -> list[dict[str, Any]]:
    [store] = stores()
    return [json.loads(line) for line in (store / name).read_text(encoding="utf-8").splitlines()]


# F15: lines that are broken.


@pytest.mark.parametrize(("line", "where", "words"), [
    ('{"question": "q", "answer" "a"}', ":9:28", "broken JSON"),
    ('{"question": "q', ":9:14", "broken JSON"), ("[1, 2]", ":9:1", "the line is no object"),
    ('{"question": "q", "answer": 5}', ":9 answer", "5 is no text"), ('{"question": "q"}', ":9", "answer"),
    ('{"question": "a\0b", "answer": "c"}', ":9:16", "a NUL byte"), ("\0\0\0", ":9:1", "a NUL byte"),
    ('{"question": null, "answer": "a"}', ":9 question", "None is no text"),
])
def test_f15_a_broken_line_is_named_by_line_and_column(place: Path, capsys, line: str, where: str, words: str) -> None:
    said = check(capsys, lines(*GOOD, line), code=3)
    assert f"rows.jsonl{where}" in said and words in said and len(said.splitlines()) <= 6
    assert stores() == [] and not Path("runs").exists()


def test_f15_bytes_that_are_no_text(place: Path, capsys) -> None:
    said = check(capsys, lines(*GOOD).encode() + b'{"question": "\xff", "answer": "a"}\n', code=3)
    assert "rows.jsonl:9:15" in said and "0xff is not UTF-8" in said and stores() == []


def test_f15_a_line_that_is_too_long_is_never_held(place: Path, capsys) -> None:
    """70 MB in one line: the line is named, the rows around it are read."""
    long = '{"question": "q", "answer": "' + "x" * 70_000_000 + '"}'
    said = check(capsys, lines(GOOD[0], long, GOOD[1]), code=3)
    assert "rows.jsonl:2" in said and "at most 64 MiB in a line" in said and len(said) < 2000
    check(capsys, lines(GOOD[0], long, GOOD[1]), "data.on_error=skip:50%", code=0)
    assert [line["row"] for line in kept_lines("bad.jsonl")] == [2]


def test_f15_byte_order_marks_and_windows_line_ends_are_no_fault(place: Path, capsys) -> None:
    content = b"\xef\xbb\xbf" + lines(*GOOD).replace("\n", "\r\n").encode() + b"\r\n\r\n"
    assert "rows read" in check(capsys, content, code=0)
    [store] = stores()
    plain = (store / "input_ids.bin").read_bytes()
    shutil.rmtree("cache")
    check(capsys, lines(*GOOD), code=0)
    assert (stores()[0] / "input_ids.bin").read_bytes() == plain, "the same tokens as without"


def test_f15_the_first_five_of_many_offenders(place: Path, capsys) -> None:
    said = check(capsys, lines(*(row for good in GOOD for row in (good, "broken"))), code=3)
    assert "(8 of 16 rows are bad)" in said
    assert [f"rows.jsonl:{line}:1" in said for line in range(2, 17, 2)] == [True] * 5 + [False] * 3
    assert stores() == []


def test_f15_bad_rows_are_set_aside_where_that_is_allowed(place: Path, capsys) -> None:
    """The good rows are taught, the bad ones stand in a file with their place, and both are counted."""
    said = check(capsys, lines(GOOD[0], "broken", *GOOD[1:], {"question": "q"}), "data.on_error=skip:20%", code=0)
    assert "bad: unreadable" in said and "bad.jsonl" in said
    broken, without = kept_lines("bad.jsonl")
    assert (broken["where"], broken["row"], broken["content"]) == ("rows.jsonl:2:1", 2, None)
    assert without["content"] == {"question": "q"} and without["row"] == 10 and "of no known form" in without["found"]
    assert [(line["row"], line["reason"]) for line in kept_lines("dropped.jsonl")] == [
        (2, "bad: unreadable"), (10, "bad: unreadable"),
    ]


def test_f15_more_bad_rows_than_allowed(place: Path, capsys) -> None:
    said = check(capsys, lines(GOOD[0], "broken", *GOOD[1:], "broken"), "data.on_error=skip:19.9%", code=3)
    assert "(2 of 10 rows are bad, 20.00%, more than data.on_error=skip:19.9% allows)" in said
    assert "rows.jsonl:2:1" in said and "rows.jsonl:10:1" in said and stores() == []


# F16: nothing to learn, or too much.


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_f16_an_empty_file(place: Path, capsys, name: str) -> None:
    said = check(capsys, "[]" if name.endswith("json") else "", code=3, name=name)
    assert "no rows" in said and name in said and stores() == []


def test_f16_no_row_is_left(place: Path, capsys) -> None:
    """Nothing has a weight: the ledger says why each row went."""
    unmarked = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    said = check(capsys, lines(unmarked, unmarked), "data.supervise=marked", code=3)
    assert "of 2 rows none is left to learn (nothing to learn: every answer has weight 0: 2)" in said and stores() == []


def test_f16_rows_that_are_too_long_come_with_a_histogram(place: Path, capsys) -> None:
    long = {"question": "q", "answer": "five " * 300}
    said = check(capsys, lines(*GOOD, long, long), "data.max_tokens=128", code=3)
    assert "more than 128" in said and "(2 of 10 rows are bad)" in said and "data.too_long" in said
    assert re.search(r"rows by tokens: 8 below \d+, 2 below [\d,]+$", said, re.MULTILINE) and stores() == []


@pytest.mark.parametrize("too_long", ["drop", "turns"])
def test_f16_too_long_rows_are_dropped_and_counted(place: Path, capsys, too_long: str) -> None:
    """Also one whose prompt alone is too long: it has no target, so it never enters a batch."""
    rows = [*GOOD, {"question": "q", "answer": "five " * 300}, {"question": "five " * 300, "answer": "a"}]
    said = check(capsys, lines(*rows), "data.max_tokens=128", f"data.too_long={too_long}", "--json", code=0)
    ledger = json.loads(said)["train"]
    assert ledger["dropped"] == {"longer than data.max_tokens": 2} and ledger["kept"] == 8 == ledger["examples"]
    assert [line["row"] for line in kept_lines("dropped.jsonl")] == [9, 10]


def test_f16_every_row_is_too_long(place: Path, capsys) -> None:
    said = check(capsys, lines(*GOOD), "data.max_tokens=2", "data.too_long=drop", code=3)
    assert "none is left to learn (longer than data.max_tokens: 8)" in said and "rows by tokens: 8 below" in said


# F17: what the template does with the rows.


@pytest.mark.parametrize(("template", "row", "words", "setting"), [
    ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}", {}, "no stop token", "model.chat_template"),
    ("{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
     "{% if add_generation_prompt %}[assistant]{% endif %}", {"reasoning_content": "Hm."}, "drops the reasoning",
     "model.chat_template"),
    ("{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
     "{% if add_generation_prompt %}[model]{% endif %}", {}, "differently from how it asks", "model.chat_template"),
    ("{{ raise_exception('No assistants') }}", {}, "No assistants", "model.chat_template"),
])
def test_f17_a_template_that_does_not_serve_the_rows(place: Path, capsys, template, row, words, setting) -> None:
    """The rows, both texts where there are two, and the setting that resolves it; nothing is trained on."""
    Path("mine.jinja").write_text(template)
    answer = {"role": "assistant", "content": "a", **row}
    rows = [{"messages": [{"role": "user", "content": "q"}, answer]}] * 3
    said = check(capsys, lines(*rows), "model.chat_template=mine.jinja", code=3)
    assert words in said and setting in said and "(3 of 3 rows are bad)" in said
    assert "rows.jsonl:1" in said and "rows.jsonl:2" in said and "rows.jsonl:3" in said and stores() == []
    assert "No assistants" in words or ("asked:" in said and "taught:" in said)


def test_f17_refused_rows_can_be_set_aside(place: Path, capsys) -> None:
    cut = {"question": "q", "answer": "before<|im_end|>after"}
    check(capsys, lines(*GOOD, cut), "data.on_error=skip:20%", code=0)
    [bad] = kept_lines("bad.jsonl")
    assert bad["content"] == cut and "stands before the end" in bad["found"]
    assert kept_lines("dropped.jsonl")[0]["reason"] == "bad: refused"


def test_f17_a_template_without_generation_marks_is_no_fault(place: Path, capsys) -> None:
    Path("mine.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
                                  "{% if add_generation_prompt %}[assistant]{% endif %}")
    said = check(capsys, lines(*GOOD), "model.chat_template=mine.jinja", "--json", code=0)
    assert json.loads(said)["train"]["verdicts"] == {"one": 8}


# F18: a tokenizer that is not the model's.


@pytest.fixture
def student(place: Path) -> Path:
    """A model directory to damage."""
    return Path(shutil.copytree(places.model_directory("starter/qwen3"), place / "student"))


def changed(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def test_f18_tokens_without_an_embedding(student: Path, capsys) -> None:
    """Found in the rows, before the weights are read: they are not even there."""
    changed(student / "config.json", vocab_size=100)
    for weights in student.glob("*.safetensors"):
        weights.unlink()
    said = check(capsys, lines(*GOOD), f"model.path={student}", code=3)
    assert "has no embedding" in said and "tokens below 100" in said and "rows.jsonl:1" in said and stores() == []


def test_f18_an_end_token_that_the_tokenizer_does_not_have(student: Path, capsys) -> None:
    changed(student / "generation_config.json", eos_token_id=[99_999])
    said = check(capsys, lines(*GOOD), f"model.path={student}", code=3)
    assert "the tokenizer has no token 99999" in said and "generation_config.json" in said
    assert "model.stop_tokens" in said


def test_f18_padding_with_the_end_token_is_no_fault(student: Path, capsys) -> None:
    """The stop token is a target all the same: nothing here reads the pad token."""
    plain = json.loads(check(capsys, lines(*GOOD), f"model.path={student}", "--json", code=0))["train"]
    config = json.loads((student / "tokenizer_config.json").read_text(encoding="utf-8"))
    changed(student / "tokenizer_config.json", pad_token=config["eos_token"])
    same = json.loads(check(capsys, lines(*GOOD), f"model.path={student}", "--json", code=0))["train"]
    assert same["stopped_turns"] == same["turns"] == 8
    assert same["supervised_tokens"] == plain["supervised_tokens"] and same["fingerprint"] != plain["fingerprint"]

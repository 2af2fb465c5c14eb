"""Runs of a model that sees, from the command line: rows of every kind of file, exam, eval, chat and export.

What is exported is opened by plain transformers alone, with its own image processor and template.
"""

from __future__ import annotations

import io
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import datasets
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from schoolhouse import cli, export, places
from schoolhouse.config import Model
from schoolhouse.data import prepare, served
from schoolhouse.starter import lessons

QUESTIONS, STEPS = 5, 16
RECIPE: dict[str, Any] = {
    "model": "starter/qwen3-vl", "train": {"steps": STEPS}, "batch": {"examples": 8, "tokens": 400},
    "optim": {"name": "muon", "learning_rate": 5e-3},
}
EXAM = {"data": {"path": "starter/sights:exam", "limit": QUESTIONS}, "max_new_tokens": 8, "grader": "exact"}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Two dozen questions about drawings, every third one without its picture."""
    drawn = itertools.islice(lessons.rows("sights", "train"), 24)
    return [{**row, "image": None if number % 3 == 1 else row["image"]} for number, row in enumerate(drawn)]


def as_lines(rows: list[dict[str, Any]], place: Path) -> Path:
    """JSON lines beside the pictures' files."""
    lines = []
    for number, row in enumerate(rows):
        if row["image"] is not None:
            (place / f"{number}.png").write_bytes(row["image"]["bytes"])
        lines.append(json.dumps({**row, "image": row["image"] and f"{number}.png"}) + "\n")
    (place / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    return place / "rows.jsonl"


def as_parquet(rows: list[dict[str, Any]], place: Path) -> Path:
    parquet.write_table(pa.Table.from_pylist(rows), place / "rows.parquet", row_group_size=5)
    return place / "rows.parquet"


def as_arrow(rows: list[dict[str, Any]], place: Path) -> Path:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(place / "rows.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=7)
    return place / "rows.arrow"


def opened(rows: list[dict[str, Any]]) -> datasets.Dataset:
    """As PIL images, which the datasets library encodes for itself."""
    seen = [row["image"] and Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows]
    columns = {name: [row[name] for row in rows] for name in ("question", "answer")}
    kinds = {"question": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
    return datasets.Dataset.from_dict({**columns, "image": seen}, features=datasets.Features(kinds))


def as_saved(rows: list[dict[str, Any]], place: Path) -> Path:
    opened(rows).save_to_disk(place / "saved")
    return place / "saved"


def as_dataset_parquet(rows: list[dict[str, Any]], place: Path) -> Path:
    opened(rows).to_parquet(place / "seen.parquet")
    return place / "seen.parquet"


def trained(place: Path, data: Path, rules: Mapping[str, Any] = MappingProxyType({}), **more: Any) -> Path:
    """The directory of a finished run; `rules` are those for its rows."""
    path = place / "recipe.yaml"
    path.write_text(json.dumps({**RECIPE, "data": {"train": str(data), **rules}, **more}), encoding="utf-8")
    cli.main(["run", str(path), f"directory={place / 'run'}"])
    return place / "run"


def records(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def run(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over JSON lines, with an exam."""
    place = tmp_path_factory.mktemp("seeing")
    return trained(place, as_lines(rows, place), exam=EXAM)


@pytest.mark.parametrize("form", [as_parquet, as_arrow, as_saved, as_dataset_parquet])
def test_every_kind_of_file_trains_the_same(
    form: Callable[[list[dict[str, Any]], Path], Path], rows: list[dict[str, Any]], run: Path, tmp_path: Path
) -> None:
    """Losses are those of the JSON lines to the bit: the same pixels, the same tokens, in the same packs."""
    other = trained(tmp_path, form(rows, tmp_path))
    ours, wanted = ([one["loss"] for one in records(place, "metrics.jsonl") if one["kind"] == "step"]
                    for place in (other, run))
    assert ours == wanted and len(ours) == STEPS
    ledger = json.loads((other / "data.json").read_text(encoding="utf-8"))["train"]
    assert ledger["rows"] == ledger["kept"] == len(rows)


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "lora"])
def test_what_sees_is_not_trained_where_nothing_is_shown(
    lora: dict[str, Any] | None, rows: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weight decay alone would change it: refused by check and by run, until it is frozen."""
    path, (row, *_) = tmp_path / "recipe.yaml", (row for row in rows if row["image"] is None)
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps({**row, 'image': None})}\n" * 8, encoding="utf-8")
    changes = {"data": {"train": str(tmp_path / "rows.jsonl")}, "train": {"steps": 1}, "lora": lora, "optim": {}}
    path.write_text(json.dumps({**RECIPE, **changes}), encoding="utf-8")
    for command in ("check", "run"):
        with pytest.raises(SystemExit) as ended:
            cli.main([command, str(path), f"directory={tmp_path / 'run'}"])
        assert ended.value.code == 2 and "no training row has an image" in capsys.readouterr().err
    cli.main(["run", str(path), f"directory={tmp_path / 'other'}", "model.freeze=[vision,projector]"])


def test_a_student_with_states_learns_to_see(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """Qwen3.5: its layers with a state are told, its run ends with an exam, and its export is verified."""
    done = trained(tmp_path, as_lines(rows, tmp_path), model="starter/qwen3.5", train={"steps": 2}, exam=EXAM)
    info = json.loads((done / "run.json").read_text(encoding="utf-8"))
    told = {one["what"]: one["value"] for one in info["in_force"]}
    assert "2 of its layers carry a state along the sequence" in told["attention"]
    assert told["tokenizer"] == "Qwen3_5Tokenizer, as tokenizer.json"
    cli.main(["export", str(done)])


def test_encoded_images_are_not_written_into_the_ledger(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """A bad row is named with its content, and its image by its size."""
    broken = [dict(row) for row in rows]
    broken[3]["image"] = {"bytes": rows[3]["image"]["bytes"][:-20], "path": None}
    place = trained(tmp_path, as_parquet(broken, tmp_path), {"on_error": "skip:5%"}, train={"steps": 1})
    (bad,) = records(place, "bad.jsonl")
    assert bad["row"] == 4 and bad["content"]["question"] == rows[3]["question"]
    assert bad["content"]["image"] == {"bytes": f"<{len(broken[3]['image']['bytes'])} bytes>", "path": None}


def test_eval_repeats_the_exam(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = [one for one in records(run, "samples.jsonl") if one["step"] == STEPS]
    assert len(recorded) == QUESTIONS and len({one["answer"] for one in recorded}) > 1, "answers that would not differ"
    cli.main(["eval", str(run), str(run.parent / "recipe.yaml"), "--json"])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [{"step": STEPS, **one} for one in answers] == recorded


def asked(number: int) -> tuple[str, Image.Image]:
    """Question `number` of the exam and its picture."""
    row = next(itertools.islice(lessons.rows("sights", "exam"), number, None))
    return row["question"], Image.open(io.BytesIO(row["image"]["bytes"]))


def test_the_export_sees_in_plain_transformers(run: Path, tmp_path: Path) -> None:
    """transformers' tokenizer, template, Pillow processor and model write the exam's answers, letter by letter."""
    out = tmp_path / "export"
    cli.main(["export", str(run), "--out", str(out)])
    tokenizer = AutoTokenizer.from_pretrained(out)
    processor = AutoImageProcessor.from_pretrained(out, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    wanted = [one["answer"] for one in records(run, "samples.jsonl") if one["step"] == STEPS]
    placeholder = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    for number in range(QUESTIONS):
        question, picture = asked(number)
        seen = processor(images=[picture], return_tensors="pt")
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True, tokenize=False,
        )
        assert text.count(placeholder) == 1
        visual = int(seen["image_grid_thw"].prod()) // processor.merge_size**2
        ids = tokenizer(text.replace(placeholder, placeholder * visual), add_special_tokens=False,
                        return_tensors="pt")["input_ids"]
        written = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **seen,
            mm_token_type_ids=(ids == model.config.image_token_id).int(), max_new_tokens=8, do_sample=False,
        )
        assert tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True) == wanted[number]


def test_chat_shows_an_image(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`/image PATH question` is answered; one that is not there is said, and the conversation goes on."""
    question, picture = asked(0)
    picture.save(tmp_path / "a b.png")
    monkeypatch.setattr(sys, "stdin", io.StringIO(
        f"/image {tmp_path / 'none.png'} {question}\n/image \"{tmp_path / 'a b.png'}\" {question}\n\n"
    ))
    cli.main(["chat", str(run)])
    said = capsys.readouterr().out
    assert "none.png" in said
    wanted = next(one["answer"] for one in records(run, "samples.jsonl") if one["step"] == STEPS)
    assert wanted and wanted in said.replace("\n", "")


def test_a_processor_kept_as_transformers_5_keeps_it(tmp_path: Path) -> None:
    """Inside `processor_config.json`, which is read before `preprocessor_config.json`: an edit of it makes other rows,
    and what is exported has the recipe's own limit of tokens there, too."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(places.model_directory("starter/qwen3-vl"), base)
    own = json.loads((base / "preprocessor_config.json").read_text())
    (base / "preprocessor_config.json").unlink()
    serving = served.serving(Model(path=str(base), image_tokens=4), base)
    found = [prepare.serving_fingerprint(serving)]
    for size in (own["size"], {**own["size"], "longest_edge": own["size"]["longest_edge"] // 2}):
        told = {"image_processor": {**own, "size": size}, "processor_class": "Qwen3VLProcessor"}
        (base / "processor_config.json").write_text(json.dumps(told))
        found.append(prepare.serving_fingerprint(serving))
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    assert len({*found, prepare.serving_fingerprint(serving)}) == 4
    shutil.rmtree(base / "additional_chat_templates")
    model = served.load(serving)
    out.mkdir()
    export._write_beside(base, model, out)
    for place, limited in ((base, False), (out, True)):
        read = AutoImageProcessor.from_pretrained(place, backend="pil")
        assert (dict(read.size) == dict(model.sight.processor.size)) == limited

"""A directory is its training rows, whatever its layout; nothing of another split is taught without being asked for."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schoolhouse import places
from schoolhouse.config import Recipe, Source
from schoolhouse.data import choose, prepare, served, sources
from schoolhouse.errors import DataError


def laid_out(place, *names):
    """Files of one row each, which tells the file's name."""
    for name in names:
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist([{"file": name}]), path)
        else:
            path.write_text(json.dumps({"file": name}) + "\n")
    return place


def read(path):
    return [row["file"] for _, row in sources.read(Source(path=str(path)))]


def fault(path):
    with pytest.raises(DataError) as caught:
        read(path)
    error = caught.value
    assert error.found and error.required and error.remedy and error.where == str(path)
    return error


@pytest.mark.parametrize(
    ("names", "trained", "tested"),
    [
        (["chat.jsonl", "test.jsonl"], ["chat.jsonl"], ["test.jsonl"]),
        (["a.jsonl", "b.jsonl", "test-1.jsonl", "eval.jsonl"], ["a.jsonl", "b.jsonl"], ["test-1.jsonl"]),
        (["train.jsonl", "test.jsonl", "dev.jsonl"], ["train.jsonl"], ["test.jsonl"]),
        (["sgd_train.messages.jsonl", "sgd_test.messages.jsonl"],
         ["sgd_train.messages.jsonl"], ["sgd_test.messages.jsonl"]),
        (["v1.2-train-00000-of-00002.parquet", "v1.2-train-00001-of-00002.parquet", "v1.2-test-0.parquet"],
         ["v1.2-train-00000-of-00002.parquet", "v1.2-train-00001-of-00002.parquet"], ["v1.2-test-0.parquet"]),
        (["unit_test_generation.jsonl", "latest.jsonl", "contest.jsonl", "test.jsonl"],
         ["contest.jsonl", "latest.jsonl", "unit_test_generation.jsonl"], ["test.jsonl"]),
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "README.md", "dataset_infos.json"],
         ["data/train-00000-of-00001.parquet"], ["data/test-00000-of-00001.parquet"]),
        (["train/b.jsonl", "train/a.jsonl", "test/a.jsonl", "scripts/a.jsonl"],
         ["train/a.jsonl", "train/b.jsonl"], ["test/a.jsonl"]),
        (["data/train/a.parquet", "data/test/a.parquet"], ["data/train/a.parquet"], ["data/test/a.parquet"]),
        (["train.jsonl", "test.jsonl", "data/train.jsonl", "train/a.jsonl"], ["train.jsonl"], ["test.jsonl"]),
    ],
)
def test_a_directory_means_its_training_rows(tmp_path, names, trained, tested):
    laid_out(tmp_path, *names)
    assert read(tmp_path) == trained
    assert read(f"{tmp_path}:test") == tested
    source = Source(path=str(tmp_path))
    assert sources.names(source) == [f"{tmp_path}/{name}" for name in trained]
    assert [str(origin) for origin, _ in sources.read(source)] == [f"{tmp_path}/{name}:1" for name in trained]
    assert sources.count(source) == len(trained)


@pytest.mark.parametrize("name", ["test", "validation", "valid", "val", "dev", "eval", "testing", "evaluation"])
def test_what_is_named_for_another_split_is_never_trained(tmp_path, name):
    laid_out(tmp_path, f"{name}.jsonl")
    error = fault(tmp_path)
    assert "no split 'train'" in error.found and error.remedy == f"write {tmp_path}:{name}"
    assert read(f"{tmp_path}:{name}") == [f"{name}.jsonl"]
    laid_out(tmp_path, f"chat_{name}.jsonl", "chat.jsonl")
    assert read(tmp_path) == ["chat.jsonl"]


def test_files_of_no_split_beside_training_files_are_refused_by_name(tmp_path):
    laid_out(tmp_path, "train-1.jsonl", "test.jsonl", "extra.jsonl", "more.jsonl")
    error = fault(tmp_path)
    assert "extra.jsonl, more.jsonl" in error.found and "test.jsonl" not in error.found
    assert f"{tmp_path}:train" in error.remedy and f"{tmp_path}/extra.jsonl" in error.remedy
    assert read(f"{tmp_path}:train") == ["train-1.jsonl"] and read(tmp_path / "extra.jsonl") == ["extra.jsonl"]


def test_directories_without_rows(tmp_path):
    laid_out(tmp_path, "README.md", "dataset_infos.json", "scripts/a.jsonl")
    (tmp_path / "data").mkdir()
    assert "without data files" in fault(tmp_path).found
    laid_out(tmp_path, "data/a.jsonl", "data/b.csv")
    assert "kinds .csv, .jsonl" in fault(tmp_path).found


def test_a_saved_data_set_of_another_split_alone_is_not_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    for split, path in (("test", tmp_path / "one"), ("sft", tmp_path / "two")):
        datasets.DatasetDict({split: datasets.Dataset.from_list([{"file": split}])}).save_to_disk(path)
    assert fault(tmp_path / "one").remedy == f"write {tmp_path}/one:test"
    assert read(f"{tmp_path}/one:test") == ["test"] and read(tmp_path / "two") == ["sft"]


def test_a_fingerprint_knows_the_files_of_a_directory_and_not_the_name_of_a_single_one(tmp_path):
    one, two = laid_out(tmp_path / "one", "a.jsonl"), tmp_path / "two"
    before = sources.fingerprint(Source(path=str(one)))
    two.mkdir()
    (two / "a.jsonl").write_bytes((one / "a.jsonl").read_bytes())
    assert sources.fingerprint(Source(path=str(two))) == before
    alone = sources.fingerprint(Source(path=str(one / "a.jsonl")))
    (one / "a.jsonl").rename(one / "b.jsonl")
    assert sources.fingerprint(Source(path=str(one))) != before
    assert sources.fingerprint(Source(path=str(one / "b.jsonl"))) == alone
    (one / "b.jsonl").write_bytes(b'{"question": "q", "answer": "a"}\n')
    assert sources.fingerprint(Source(path=str(one / "b.jsonl"))) == (
        "a4bedecb8c71d6a491aba88da5c5b436b3ef8ef6b13b076215a71c9c09b70955")


# Through the whole preparation.


@pytest.fixture
def recipe(cache: Path, tmp_path: Path):
    """A directory of two files of five rows, beside a file; row 5 of the second part is broken."""
    place = tmp_path / "dirbad"
    place.mkdir()
    for part in (0, 1):
        lines = [json.dumps({"question": f"{part}{row}?", "answer": "yes"}) for row in range(5)]
        lines[4] = lines[4] if part == 0 else '{"question": '
        (place / f"part-{part}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "alone.jsonl").write_text('{"question": "alone?", "answer": "yes"}\n')

    def made(**data):
        train = [str(place), str(tmp_path / "alone.jsonl")]
        return Recipe.model_validate({"model": "starter/qwen3", "seed": 3, "data": {
            "train": train, "workers": 1, "cache": str(tmp_path / "cache"), **data}})

    return made


def stored(recipe):
    serving = served.serving(recipe.model, places.model_directory("starter/qwen3"))
    return {side: prepare.prepare(recipe.data, choice, serving, served.rules(recipe))
            for side, choice in choose.choices(recipe).items()}


def test_each_row_of_a_directory_is_known_by_its_own_file_and_line(recipe, tmp_path):
    place = tmp_path / "dirbad"
    with pytest.raises(DataError) as caught:
        stored(recipe())
    assert caught.value.where == f"{place}/part-1.jsonl:5:14"
    store = stored(recipe(on_error="skip:10%"))["train"]
    expected = [f"{place}/part-0.jsonl:{row}" for row in (1, 2, 3, 4, 5)]
    expected += [f"{place}/part-1.jsonl:{row}" for row in (1, 2, 3, 4)] + [f"{tmp_path}/alone.jsonl:1"]
    assert [str(store.origin(index)) for index in range(len(store))] == expected
    (bad,) = [json.loads(line) for line in (store.directory / "bad.jsonl").read_text().splitlines()]
    (dropped,) = [json.loads(line) for line in (store.directory / "dropped.jsonl").read_text().splitlines()]
    for line in (bad, dropped):
        assert (line["source"], line["row"]) == (f"{place}/part-1.jsonl", 5)
    assert store.ledger.by_source == {str(place): 10, f"{tmp_path}/alone.jsonl": 1}  # as the user wrote them


def test_rows_of_a_directory_are_drawn_and_held_out_as_those_of_one_file(recipe, tmp_path):
    place = tmp_path / "dirbad"
    lines = [line for part in (0, 1) for line in (place / f"part-{part}.jsonl").read_text().splitlines()][:9]
    (place / "part-1.jsonl").write_text("\n".join(lines[5:]) + "\n")
    whole = tmp_path / "whole.jsonl"
    whole.write_text("\n".join(lines) + "\n")

    def numbers(store, source):
        assert store.ledger.by_source.keys() == {source}
        first = {f"{place}/part-0.jsonl": 0, f"{place}/part-1.jsonl": 5, str(whole): 0}
        origins = [store.origin(index) for index in range(len(store))]
        return [first[origin.source] + origin.row for origin in origins], store.ledger.not_drawn.get(source)

    for choice in ({"limit": 4}, {"validation": 0.4}):
        many, one = (stored(recipe(train=[str(path)], **choice)) for path in (place, whole))
        assert many.keys() == one.keys()
        assert [numbers(many[side], str(place)) for side in many] == [numbers(one[side], str(whole)) for side in one]

"""Rows from every kind of source arrive whole and in order; a bad line is named by its place, and no other row."""

import codecs
import csv
import gzip
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schoolhouse.config import Rows, Source
from schoolhouse.data import files, sources
from schoolhouse.data.formats import to_conversation
from schoolhouse.errors import DataError

SHARED = Path(__file__).parents[2].parent / "shared"
ROWS = [{"question": f"q{i}", "answer": f"a\n{i} é"} for i in range(7)]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"city": "x", "when": None}}}
texts = st.text(st.characters(exclude_categories=["Cs"]))


def read(path, **settings):
    return list(sources.read(Source(path=str(path), **settings)))


def rows(path, **settings):
    found = [row for _, row in read(path, **settings)]
    assert not [row for row in found if isinstance(row, DataError)]
    return found


def fault(path, **settings):
    with pytest.raises(DataError) as caught:
        read(path, **settings)
    assert caught.value.found and caught.value.required and caught.value.where and caught.value.remedy
    return caught.value


def jsonl(path, values=ROWS):
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), "utf-8")
    return path


def write(directory, suffix):
    """ROWS in a file of each kind."""
    path = directory / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif suffix == ".arrow":
        table = pa.Table.from_pylist(ROWS)
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    elif suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0], delimiter="," if suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    elif suffix == ".json":
        path.write_text(json.dumps({"version": "1", "data": ROWS}, indent=1))
    elif suffix.endswith(".gz"):
        path.write_bytes(gzip.compress(jsonl(directory / "plain.jsonl").read_bytes()))
    else:
        jsonl(path)
    return path


# Files.


@pytest.mark.parametrize("suffix", list(files.READERS))
def test_every_kind_of_file(tmp_path, suffix):
    path = write(tmp_path, suffix)
    found = read(path)
    assert [row for _, row in found] == ROWS
    assert [(origin.source, origin.row) for origin, _ in found] == [(str(path), i + 1) for i in range(7)]
    assert rows(path, limit=3) == ROWS[:3]
    assert [row for _, row in sources.read(Source(path=str(path), limit=5), start=2)] == ROWS[2:5]
    assert list(sources.read(Source(path=str(path)), start=7)) == []


@pytest.mark.parametrize("suffix", list(files.READERS))
def test_the_number_of_rows_is_told_before_they_are_read(tmp_path, suffix):
    """Where lines or tables have it; elsewhere the limit, if there is one. A broken file is for its reader to tell."""
    path = write(tmp_path, suffix)
    known = suffix in (".jsonl", ".ndjson", ".parquet", ".arrow")
    assert sources.count(Source(path=str(path))) == (7 if known else None)
    assert sources.count(Source(path=str(path), limit=5)) == 5
    assert sources.count(Source(path=str(path), limit=9)) == (7 if known else 9)
    path.write_bytes(b"\0broken")
    assert sources.count(Source(path=str(path))) == (0 if suffix in (".jsonl", ".ndjson") else None)


def test_json_may_be_a_bare_list(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS), "utf-8-sig")
    assert rows(tmp_path / "a.json") == ROWS


@settings(deadline=None)
@given(st.lists(st.dictionaries(texts, st.none() | st.booleans() | st.integers() | st.lists(texts)), min_size=1))
def test_any_object_survives_jsonl_as_it_is(tmp_path_factory, values):
    path = jsonl(tmp_path_factory.getbasetemp() / "any.jsonl", values)
    assert [json.dumps(row) for row in rows(path)] == [json.dumps(value) for value in values]


@given(st.lists(st.tuples(texts, texts), min_size=1))
def test_any_text_survives_csv_as_it_is(tmp_path_factory, pairs):
    pairs = [("0" + one.replace("\0", ""), two.replace("\0", "")) for one, two in pairs]
    path = tmp_path_factory.getbasetemp() / "any.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("q", "a"), *pairs])
    assert rows(path) == [{"q": one, "a": two} for one, two in pairs]


def test_byte_order_mark_crlf_and_blank_lines_are_accepted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": "\xe2\x80\xa8"}\r\n{"a": 3}')
    assert [(origin.row, row) for origin, row in read(path)] == [(1, {"a": 1}), (4, {"a": "\u2028"}), (5, {"a": 3})]
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfa,b\r\n1,"x\r\ny"\r\n\r\n2,\r\n')
    assert rows(path) == [{"a": "1", "b": "x\r\ny"}, {"a": "2", "b": ""}]
    assert [origin.row for origin, _ in read(path)] == [1, 2]


@pytest.mark.parametrize(
    ("line", "column", "found"),
    [
        (b'{"a": 1,}', 9, "broken JSON"),
        (b'{"a": "\xc3\xa9\xc3\xa9" "b"}', 12, "broken JSON"),
        (b'{"a": 1', 8, "too early"),
        (b'{"a": 1  ', 10, "too early"),
        (b'{"a": "x', 7, "broken JSON"),
        (b'{"a": "\xc3\xa9\xff"}', 9, "0xff is not UTF-8"),
        (b'{"a": "x\x00"}', 9, "NUL"),
        (b'\x00{"a": 1}', 1, "NUL"),
        (b'{"a": 1} {"a": 2}', 10, "broken JSON"),
        (b"[1, 2]", 1, "no object"),
        (b'"text"', 1, "no object"),
        (b"null", 1, "no object"),
        (b'{"a": ' + b"9" * 5000 + b"}", 1, "cannot be read"),
        (b"[" * 200_000, 1, "cannot be read"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path, line, column, found):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\r\n{"a": 3}\n')
    (_, first), (origin, bad), (_, last) = read(path)
    assert (first, last) == ({"a": 1}, {"a": 3})
    assert bad.where == f"{path}:2:{column}" and origin.row == 2
    assert found in bad.found and bad.required and bad.remedy


@given(st.data())
def test_the_column_is_where_python_sees_the_fault(tmp_path_factory, data):
    text = json.dumps(data.draw(st.dictionaries(texts, texts, min_size=1)), ensure_ascii=False)
    cut = data.draw(st.integers(1, len(text) - 1))
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.write_bytes(text[:cut].encode() + b"\n{}\n")
    try:
        json.loads(text[:cut])
        raise AssertionError(text)
    except json.JSONDecodeError as error:
        assert read(path)[0][1].where == f"{path}:1:{error.pos + 1}"


def test_a_line_without_end_is_a_bad_row_and_never_held(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_LINE", 2**16)
    path = tmp_path / "a.jsonl.gz"
    whole = b'{"a": "' + b"x" * (2**16 - 9) + b'"}'
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(whole + b"\n" + b'{"a": "' + b"x" * (2**24) + b'"}\n' + b'{"a": 3}\n' + whole[:-2] + b'x"}')
    tracemalloc.start()
    found = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [type(row) for _, row in found] == [dict, DataError, dict, DataError]
    assert "too long" in found[1][1].found and found[1][1].where == f"{path}:2"
    assert peak < 2**22  # a quarter of the line


def big_file(directory, suffix, count):
    """`count` rows of about 250 bytes; the parquet file is one row group."""
    path = directory / f"{count}{suffix}"
    if suffix == ".parquet":
        column = pa.array([f"{'x' * 100}{i}" for i in range(count)])
        pq.write_table(pa.table({"q": column, "a": column}), path)
        return path
    line = '{{"q": "{0}{1}", "a": "{0}{1}"}}\n' if suffix == ".jsonl" else "{0}{1},{0}{1}\n"
    with path.open("w") as file:
        file.writelines(["q,a\n"] if suffix == ".csv" else [])
        file.writelines(line.format("x" * 100, i) for i in range(count))
    return path


@pytest.mark.parametrize(("suffix", "least"), [(".jsonl", 4_000), (".csv", 4_000), (".parquet", 20_000)])
def test_memory_is_flat(tmp_path, suffix, least):
    """Five times the rows (at least 5 MB) need no more memory, but for 1 MiB of buffers. A parquet page has 1 MiB."""
    peaks = []
    for count in (least, 5 * least):
        path = big_file(tmp_path, suffix, count)
        tracemalloc.start()
        before, arrow, number = pa.total_allocated_bytes(), 0, 0
        for number, _ in enumerate(sources.read(Source(path=str(path))), 1):
            arrow = max(arrow, pa.total_allocated_bytes() - before) if number % 500 == 0 else arrow
        peaks.append(tracemalloc.get_traced_memory()[1] + arrow)
        tracemalloc.stop()
        assert number == count
    assert peaks[1] < peaks[0] + 2**20


@pytest.mark.parametrize(
    ("name", "content", "place", "found"),
    [
        ("a.json", b'[{"a": 1},\n {"a": }]', ":2:8", "broken JSON"),
        ("a.json", b'{"a": 1}\n{"a": 2}\n', ":2:1", "Extra data"),
        ("a.json", b'{"a": [1], "b": [2]}', "", "2 lists"),
        ("a.json", b'{"a": 1}', "", "0 lists"),
        ("a.json", b"7", "", "0 lists"),
        ("a.json", b"[" * 200_000, "", "cannot be read"),
        ("a.json", b'["\xff"]', "", "cannot be read"),
        ("a.csv", b"a,a\n1,2\n", ":1", "twice"),
        ("a.csv", b"a,b\n1,\xff\n", "", "cannot be read"),
        ("a.csv", b"question;answer\nhi, you;yes\n", ":1", "has ';' between its cells"),
        ("a.csv", b"question\tanswer\nhi, you\tyes\n", ":1", "has '\\t' between its cells"),
        ("a.tsv", b"question,answer\nhi,yes\n", ":1", "has ',' between its cells"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "", "UTF-16"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16-le"), "", "UTF-16"),
        ("a.jsonl.gz", gzip.compress('{"a": 1}\n'.encode("utf-16"), mtime=0), "", "UTF-16"),
        ("a.json", '[{"a": 1}]'.encode("utf-16-be"), "", "UTF-16"),
        ("a.csv", codecs.BOM_UTF16_BE + "a,b\n1,2\n".encode("utf-16-be"), "", "UTF-16"),
        ("a.parquet", b"PAR1 this is none", "", "cannot be read"),
        ("a.arrow", b"ARROW1 this is none", "", "cannot be read"),
        ("a.arrow", b"this is none", "", "cannot be read"),
        ("a.arrow", b"", "", "cannot be read"),
        ("a.jsonl.gz", b"no gzip", "", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-9], "", "cannot be read"),
    ],
)
def test_a_fault_of_the_whole_file_is_raised(tmp_path, name, content, place, found):
    path = tmp_path / name
    path.write_bytes(content)
    error = fault(path)
    assert error.where == f"{path}{place}" and found in error.found


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".arrow", ".jsonl.gz"]), st.binary(), st.integers(0, 500)
)
def test_any_damage_is_a_data_error(tmp_path_factory, suffix, garbage, place):
    path = write(tmp_path_factory.getbasetemp(), suffix)
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + garbage + whole[place + 20 :])
    try:
        assert all(isinstance(row, dict | DataError) for _, row in read(path))
    except DataError as error:
        assert error.where.startswith(str(path))


def test_bad_rows_of_json_and_csv_are_named(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1}, 7, {"a": 3}]')
    assert [type(row) for _, row in read(tmp_path / "a.json")] == [dict, DataError, dict]
    (tmp_path / "a.csv").write_bytes(b'a,b\n1,"x\ny"\n1\n1,2,3\n1,"x"y\n1,\0\n1,2\n')
    found = read(tmp_path / "a.csv")
    assert [type(row) for _, row in found] == [dict, DataError, DataError, DataError, DataError, dict]
    assert [row.where for _, row in found[1:5]] == [f"{tmp_path}/a.csv:{line}" for line in (4, 5, 6, 7)]
    assert [origin.row for origin, _ in found] == [1, 2, 3, 4, 5, 6]


def test_the_remedies_for_other_separators_and_encodings_work(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question;answer\nhi, you;yes\n")
    assert "pandas.read_csv('a.csv', sep=';').to_csv('new.csv', index=False)" in fault(path).remedy
    path.write_text("question\tanswer\nhi, you\tyes\n")
    assert "name the file .tsv" in fault(path).remedy
    assert rows(path.rename(tmp_path / "a.tsv")) == [{"question": "hi, you", "answer": "yes"}]
    (tmp_path / "bad.tsv").write_text('a\tb\n1\n1,2\t"3\t4"\n')
    (_, bad), (_, good) = read(tmp_path / "bad.tsv")
    assert bad.found == "1 cells" and "tabs" in bad.remedy and good == {"a": "1,2", "b": "3\t4"}
    (tmp_path / "b.jsonl").write_bytes('{"a": "é"}\n'.encode("utf-16"))
    command = fault(tmp_path / "b.jsonl").remedy.removeprefix("convert it: ")
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    assert rows(tmp_path / "new-b.jsonl") == [{"a": "é"}]
    (tmp_path / "c.jsonl").write_bytes(b'\0{"a": 1}\n{"a": 2}\n')  # a damaged line, and no other encoding
    assert [type(row) for _, row in read(tmp_path / "c.jsonl")] == [DataError, dict]


def test_a_long_cell_is_read(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n" + "x" * 500_000 + ",y\n")
    assert len(rows(tmp_path / "a.csv")[0]["a"]) == 500_000


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_an_empty_source_is_an_error(tmp_path, name):
    (tmp_path / name).write_bytes({"a.jsonl": b"\n \n", "a.csv": b"a,b\n", "a.json": b"[]"}[name])
    assert "no rows" in fault(tmp_path / name).found


# Paths.


def test_a_path_that_does_not_exist_names_the_nearest(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    path = jsonl(tmp_path / "data" / "train.jsonl")
    for wrong in ("data/trian.jsonl", "data/train.json", "dta/train.jsonl", "data/train.jsnl:train"):
        assert f"did you mean {path}?" in fault(tmp_path / wrong).remedy
    monkeypatch.chdir(tmp_path)
    assert "did you mean data/train.jsonl?" in fault("dat/train.jsonl").remedy
    for missing in ("nowhere/a.jsonl", "rows.csv", "./none", "/none", "a/b/c", "https://host/a", "a b", "x\0y"):
        assert fault(missing).where == missing


def test_files_that_nothing_reads(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert ".jsonl" in fault(tmp_path / "a.txt").required
    path = jsonl(tmp_path / "a.jsonl")
    assert fault(f"{path}:train").remedy == f"write {path}"


def test_a_directory_of_files(tmp_path):
    for number in (2, 1):
        jsonl(tmp_path / f"part{number}.jsonl", [{"n": number}, {"n": number}])
    (tmp_path / "README.md").write_text("x")
    (tmp_path / ".hidden.jsonl").write_text("x")
    found = read(tmp_path)
    assert [row["n"] for _, row in found] == [1, 1, 2, 2]
    assert [str(origin) for origin, _ in found] == [f"{tmp_path}/part{n}.jsonl:{row}" for n in (1, 2) for row in (1, 2)]
    assert sources.names(Source(path=str(tmp_path))) == [f"{tmp_path}/part{number}.jsonl" for number in (1, 2)]
    (tmp_path / "part2.jsonl").write_text("{\n")
    assert read(tmp_path)[2][1].where == f"{tmp_path}/part2.jsonl:1:2"
    (tmp_path / "a.csv").write_text("a\n1\n")
    assert "kinds .csv, .jsonl" in fault(tmp_path).found
    (tmp_path / "none").mkdir()
    assert "without data files" in fault(tmp_path / "none").found


def test_the_splits_of_a_directory_are_never_mixed(tmp_path):
    for split in ("train", "test"):
        jsonl(tmp_path / f"{split}-00000.jsonl", [{"split": split}])
    assert rows(tmp_path) == rows(f"{tmp_path}:train") == [{"split": "train"}]
    assert rows(f"{tmp_path}:test") == [{"split": "test"}]
    error = fault(f"{tmp_path}:tset")
    assert "test, train" in error.required and error.remedy == f"write {tmp_path}:test"


# Arrow.


def tool(name, **properties):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def test_arrow_does_not_leak_foreign_parameters(tmp_path):
    """Each row's schemas and arguments come back without the other rows' fields; nulls in lists and JSON stay."""
    values = [
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "gpt", "content": None, "tool_calls": [{"function": {"name": name, "arguments": arguments}}]},
                {"role": "tool", "content": "1", "tool_call_id": "7"},
            ],
            "tools": [tool(name, **properties)],
            "schemas": json.dumps({"default": None}),
            "meta": {"a": None, "b": name},
        }
        for name, properties, arguments in (
            ("f", {"city": {"type": "string", "enum": ["a", None]}}, {"city": "x"}),
            ("g", {"when": {"type": "string", "description": "d"}}, {"when": "y"}),
        )
    ]
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "a.parquet")
    found = rows(tmp_path / "a.parquet")
    for row, value in zip(found, values, strict=True):
        assert row["tools"] == value["tools"]
        assert json.dumps(row["tools"]).count("null") == json.dumps(value["tools"]).count("null")
        assert row["messages"] == value["messages"]
        assert (row["schemas"], row["meta"]) == (value["schemas"], value["meta"])


names = st.sampled_from("abcdef")
schemas = st.recursive(
    st.fixed_dictionaries({"type": st.just("string")}, optional={"description": texts, "minimum": st.integers(0, 9)}),
    lambda inner: st.fixed_dictionaries({"properties": st.dictionaries(names, inner, min_size=1)}),
    max_leaves=5,
)


@settings(deadline=None)
@given(st.lists(st.dictionaries(names, schemas, min_size=1), min_size=1, max_size=4))
def test_tools_without_nulls_survive_arrow(tmp_path_factory, many):
    values = [{"tools": [tool("f", **properties)]} for properties in many]
    path = tmp_path_factory.getbasetemp() / "tools.parquet"
    pq.write_table(pa.Table.from_pylist(values), path)
    assert rows(path) == values


def test_nested_messages_and_maps_become_plain_values(tmp_path):
    kind = pa.struct({"talk": pa.list_(pa.struct({"from": pa.string(), "value": pa.string(), "weight": pa.float64()})),
                      "counts": pa.map_(pa.string(), pa.int64()), "note": pa.string()})
    value = {"talk": [{"from": "human", "value": None, "weight": None}, {"from": "gpt", "value": "b", "weight": 0.5}],
             "counts": [("a", 1)], "note": None}
    pq.write_table(pa.table({"extra": pa.array([value, None], kind)}), tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet") == [
        {"extra": {"talk": [{"from": "human", "value": None}, value["talk"][1]], "counts": {"a": 1}, "note": None}},
        {"extra": None},
    ]


# Saved data sets, the hub, the starter.


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    return datasets, tmp_path / "saved"


def test_a_saved_data_set(saved):
    datasets, path = saved
    datasets.Dataset.from_list(ROWS).save_to_disk(path)
    found = read(path)
    assert [row for _, row in found] == ROWS
    assert [(origin.source, origin.row) for origin, _ in found][:2] == [(str(path), 1), (str(path), 2)]
    one = sources.fingerprint(Source(path=str(path)))
    (file,) = path.glob("*.arrow")
    file.write_bytes(file.read_bytes().replace(b"q3", b"Q3"))
    assert sources.fingerprint(Source(path=str(path))) != one
    file.write_bytes(b"")
    assert "cannot be read" in fault(path).found
    file.unlink()
    assert fault(path).where == str(path)
    with pytest.raises(DataError):
        sources.fingerprint(Source(path=str(path)))
    (path / "state.json").write_text("{")
    assert "cannot be read" in fault(path).found


def test_the_splits_of_a_saved_data_set(saved):
    datasets, path = saved
    parts = {"train": datasets.Dataset.from_list(ROWS[:4]), "test": datasets.Dataset.from_list(ROWS[4:])}
    datasets.DatasetDict(parts).save_to_disk(path)
    assert rows(path) == rows(f"{path}:train") == ROWS[:4]
    assert rows(f"{path}:test") == ROWS[4:]
    assert "train, test" in fault(f"{path}:exam").required
    assert sources.fingerprint(Source(path=f"{path}:test")) != sources.fingerprint(Source(path=str(path)))


def test_real_nulls_survive_the_json_type(saved):
    datasets, path = saved
    if "Json" not in vars(datasets):
        pytest.skip("this release of datasets has no JSON type")
    tools = [{"name": "f", "default": None}]
    values = [{"tools": tools, "messages": [{"role": "gpt", "content": "b", "tool_calls": [call]}]}
              for call in (CALL, {**CALL, "index": 0})]
    features = datasets.Features({"tools": datasets.Json(), "messages": datasets.List(
        {"role": datasets.Value("string"), "content": datasets.Value("string"), "tool_calls": datasets.Json()})})
    datasets.Dataset.from_list(values, features=features).save_to_disk(path)
    assert json.dumps(rows(path)) == json.dumps(values)
    assert to_conversation(rows(path)[0], Rows(), read(path)[0][0]).messages[0].tool_calls == (CALL,)


HUB = """
import json, os, sys
cache = sys.argv[1]
os.environ |= {"HF_HOME": cache, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": cache}
import datasets
from schoolhouse.config import Source
from schoolhouse.data import sources
from schoolhouse.errors import DataError

for revision in ("1" * 40, "2" * 40):
    place = f"{cache}/school___toy/main/0.0.0/{revision}"
    os.makedirs(place)
    data = datasets.Dataset.from_list([{"question": revision[0], "answer": "a"}])
    with datasets.arrow_writer.ArrowWriter(path=f"{place}/toy-train.arrow", features=data.features) as writer:
        writer.write({"question": revision[0], "answer": "a"})
        writer.finalize()
    split = {"name": "train", "num_examples": 1, "dataset_name": "toy"}
    datasets.DatasetInfo(
        features=data.features, builder_name="parquet", dataset_name="toy", config_name="main", version="0.0.0",
        splits={"train": split},
    ).write_to_directory(place)
    os.utime(place, (int(revision[0]), int(revision[0])))
    source = Source(path="school/toy:main:train")
    print(json.dumps([[[str(origin), row] for origin, row in sources.read(source)], sources.fingerprint(source)]))
for path in ("school/absent", "school/toy:main:none", "school/toy:other"):
    try:
        list(sources.read(Source(path=path)))
    except DataError as error:
        print(json.dumps([error.where, error.found, error.remedy]))
"""


def test_the_hub_from_the_local_cache_and_without_a_network(tmp_path):
    done = subprocess.run([sys.executable, "-c", HUB, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (one, first), (two, second), *faults = [json.loads(line) for line in done.stdout.splitlines()]
    assert one == [["school/toy:main:train:1", {"question": "1", "answer": "a"}]]
    assert two == [["school/toy:main:train:1", {"question": "2", "answer": "a"}]]
    assert first != second  # another revision is another source
    assert [where for where, _, _ in faults] == ["school/absent", "school/toy:main:none", "school/toy:other"]
    assert all("network" in remedy for _, _, remedy in faults)


def test_a_starter_lesson():
    found = read("starter/arithmetic", limit=3)
    assert [str(origin) for origin, _ in found] == [f"starter/arithmetic:{i}" for i in (1, 2, 3)]
    assert set(found[0][1]) == {"question", "answer"}
    assert rows("starter/arithmetic:exam", limit=3) != rows("starter/arithmetic", limit=3)
    assert fault("starter/arithmetik").remedy
    fingerprints = {sources.fingerprint(Source(path=f"starter/arithmetic{split}")) for split in ("", ":train", ":exam")}
    assert len(fingerprints) == 2


def test_reading_lines_needs_neither_torch_nor_datasets_nor_arrow(tmp_path):
    code = (
        "import sys; from schoolhouse.config import Rows, Source; from schoolhouse.data import formats, sources\n"
        "source = Source(path=sys.argv[1]); sources.fingerprint(source)\n"
        "assert all(formats.to_conversation(row, Rows(), origin) for origin, row in sources.read(source))\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'pandas', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(write(tmp_path, ".jsonl"))], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# Fingerprints.


def test_a_fingerprint_is_of_the_content_the_kind_and_the_limit(tmp_path):
    path = jsonl(tmp_path / "a.jsonl")
    one = sources.fingerprint(Source(path=str(path)))
    same = jsonl(tmp_path / "b.jsonl")
    assert len(one) == 64 and one == sources.fingerprint(Source(path=str(same), format="messages"))
    others = {sources.fingerprint(Source(path=str(path), limit=3)), sources.fingerprint(Source(path=str(tmp_path)))}
    jsonl(path, ROWS[:-1])
    others.add(sources.fingerprint(Source(path=str(path))))
    assert len(others | {one}) == 4


@pytest.mark.skipif(not SHARED.joinpath("gsm8k").exists(), reason="the shared rows are not on this machine")
def test_a_directory_with_the_real_splits():
    path = SHARED / "gsm8k"
    assert len(read(path)) == 7473 and len(read(f"{path}:test")) == 1319

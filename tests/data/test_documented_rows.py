"""What docs/data.md says of rows is so: its rows are read as the form they stand beside, its function runs."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from schoolhouse.config import Recipe, Rows
from schoolhouse.data import files, messages
from schoolhouse.data.formats import _FORMS, to_conversation
from schoolhouse.errors import DataError
from schoolhouse.types import Origin

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
SECTION = TEXT.partition("## Rows that are understood")[2].partition("## Which rows are taught")[0]
EXAMPLES = re.findall(r"^\| `(\w+)` \| (.+?) \| `(\{.+?\})` \|", SECTION, re.MULTILINE)
BLOCKS = re.findall(r"```(\w+)\n(.+?)```", SECTION, re.DOTALL)


def said(row, **rows):
    found = to_conversation(row, Rows(**rows), Origin("rows", 1))
    return None if found is None else [(message.role, message.text) for message in found.messages]


def test_every_form_is_listed():
    assert {name for name, _, _ in EXAMPLES} == {form.name for form in _FORMS}
    listed = {name: set(re.findall(r"`(\w+)`", columns)) for name, columns, _ in EXAMPLES}
    for form in _FORMS:
        assert listed[form.name].issuperset(form.required)
        for field in form.fields:
            assert f"`{field}`" in SECTION
    for name in (*messages._ROLE_OF, *messages._WEIGHTS, *messages._REASONING, *messages._FINER, *messages._PARTS):
        assert f"`{name}`" in SECTION
    for suffix in {suffix.removesuffix(".gz") for suffix in files.READERS}:
        assert f"`{suffix}`" in SECTION


@pytest.mark.parametrize(("form", "row"), [(name, row) for name, _, row in EXAMPLES])
def test_every_row_is_read_as_its_form(form, row):
    found = said(json.loads(row))
    assert found == said(json.loads(row), format=form)
    assert found[-1] == ("assistant", "4") and found[-2] == ("user", "Add.\n2 2" if form == "alpaca" else "2+2?")
    assert (("user", "Hi") in found) == ("history" in row)


def test_every_setting_is_one(tmp_path, monkeypatch):
    given = [yaml.safe_load(block)["data"] for language, block in BLOCKS if language == "yaml"]
    columns, template, texts, function = (Recipe.model_validate({"model": "x", "data": one}).data for one in given)
    row = {"extra_info": {"question": "2+2?"}, "solution": "4"}
    assert said(row, columns=columns.columns) == [("user", "2+2?"), ("assistant", "4")]
    row = {"context": "Sums.", "question": "2+2?", "answer": "4", "id": 7}
    assert said(row, messages=template.messages) == [("user", "Sums.\n\n2+2?"), ("assistant", "4")]
    assert said({"text": "Once."}, messages=texts.messages) == [("assistant", "Once.")]
    with pytest.raises(DataError, match="a text as it is"):
        said({"text": "Once."})
    (code,) = [block for language, block in BLOCKS if language == "python"]
    (tmp_path / "my_rows.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        rated = {"prompt": "2+2?", "completion": "4", "label": True, "stars": 0.5}
        assert said(rated, function=function.function) == [("user", "2+2?"), ("assistant", "4")]
        answer = to_conversation(rated, Rows(function=function.function), Origin("rows", 1)).messages[1]
        assert answer.weight == 0.5
        assert said({**rated, "label": False}, function=function.function) is None
    finally:
        sys.modules.pop("my_rows", None)

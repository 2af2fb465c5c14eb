"""Reading a recipe: every mistake at once and in its place, and whatever is valid reads back as it was."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from schoolhouse import peers
from schoolhouse import recipe as recipes
from schoolhouse.config import Lora, Recipe
from schoolhouse.errors import ConfigError

SHORT = "model: starter/qwen3\ndata: starter/arithmetic\n"
QUICK = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
"""The file of a recipe is written anew for every example, so one directory serves them all."""


def write(directory: Path, text: str) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def read(directory: Path, text: str, *overrides: str) -> Recipe:
    return recipes.read(write(directory, text), overrides)


def mistake(directory: Path, text: str, *overrides: str) -> str:
    """The error's text, with the file's path shortened to `F`."""
    path = write(directory, text)
    with pytest.raises(ConfigError) as caught:
        recipes.read(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(str(path), "F")


# What can be written.


def test_short_forms(tmp_path: Path) -> None:
    """A model and data in one word each; a source is a path, a mapping, or a list of both."""
    one = read(tmp_path, SHORT)
    assert (one.model.path, [source.path for source in one.data.train]) == ("starter/qwen3", ["starter/arithmetic"])
    long = "model: {path: starter/qwen3}\ndata: {train: [{path: starter/arithmetic}]}\n"
    assert read(tmp_path, long) == one
    mixed = read(tmp_path, "model: m\ndata: {train: [a, {path: b, limit: 3}], validation: c}\nexam: {data: d}")
    assert [(source.path, source.limit) for source in mixed.data.train] == [("a", None), ("b", 3)]
    assert (mixed.data.validation[0].path, mixed.exam.data.path) == ("c", "d")


@pytest.mark.parametrize(("text", "value"), [
    ("1e-5", 1e-5), ("1E-5", 1e-5), ("1.5e-5", 1.5e-5), (".5e-3", 5e-4), ("1.e-5", 1e-5), ("2e5", 2e5), ("+1e-5", 1e-5),
])
def test_numbers_with_an_exponent(tmp_path: Path, text: str, value: float) -> None:
    assert read(tmp_path, SHORT + f"optim: {{learning_rate: {text}}}").optim.learning_rate == value
    assert read(tmp_path, SHORT, f"optim.learning_rate={text}").optim.learning_rate == value


def test_overrides_stand_over_the_file(tmp_path: Path) -> None:
    text = SHORT + "optim: {learning_rate: 1, warmup: 0.5}\n"
    one = read(tmp_path, text, "optim.learning_rate=2", "optim.learning_rate=3", "batch.tokens=77", "directory=a=b")
    assert (one.optim.learning_rate, one.optim.warmup, one.batch.tokens, one.directory) == (3, 0.5, 77, "a=b")


def test_another_student_keeps_what_is_said_of_the_model(tmp_path: Path) -> None:
    """`model=PATH` chooses who is trained; precision and the rest are not lost by it."""
    text = SHORT.replace("starter/qwen3", "{path: starter/qwen3, precision: bfloat16, chat_template: chatml}")
    one = read(tmp_path, text, "model=starter/gemma3").model
    assert (one.path, one.precision, one.chat_template) == ("starter/gemma3", "bfloat16", "chatml")
    assert read(tmp_path, text, 'model={"path": "m"}').model.precision == "float32", "a whole section takes its place"


@pytest.mark.parametrize(("best", "needed"), [("exam", "exam.data"), ("validation", "data.validation")])
def test_what_chooses_has_to_be_there(tmp_path: Path, best: str, needed: str) -> None:
    assert f"checkpoint.best={best} needs {needed}" in mistake(tmp_path, SHORT, f"checkpoint.best={best}")


def test_whole_epochs_may_be_written_as_fractions(tmp_path: Path) -> None:
    assert read(tmp_path, SHORT, "train.epochs=3.0").train.epochs == 3
    assert "train.epochs is 0.5" in mistake(tmp_path, SHORT, "train.epochs=0.5")


def test_warm_up_is_a_share_and_no_number_of_steps(tmp_path: Path) -> None:
    assert "Share of the steps" in mistake(tmp_path, SHORT, "optim.warmup=1")


def test_what_another_trainer_calls_it_is_explained(tmp_path: Path) -> None:
    """Names are others', and so may units be."""
    said = mistake(tmp_path, SHORT, "train.warmup_steps=10")
    assert "did you mean optim.warmup? (Share of the steps in which the learning rate rises" in said
    for key, near in (("n_gpus", "--nproc"), ("trian", "train")):  # of which the schema says nothing
        assert mistake(tmp_path, SHORT, f"{key}=8").endswith(f"did you mean {near}?")


def test_overrides_open_short_forms(tmp_path: Path) -> None:
    """A setting below a one-word model, data or source keeps the word."""
    one = read(tmp_path, SHORT, "model.precision=bfloat16", "data.supervise=last")
    assert (one.model.path, one.model.precision) == ("starter/qwen3", "bfloat16")
    assert (one.data.train[0].path, one.data.supervise) == ("starter/arithmetic", "last")


@pytest.mark.parametrize("override", ["exam.data.limit=4", "data.validation.limit=4", "data.train.limit=4"])
def test_overrides_open_short_sources(tmp_path: Path, override: str) -> None:
    text = "model: m\ndata: {train: a, validation: b}\nexam: {data: c}\n"
    one = read(tmp_path, text, override)
    found = [(source.path, source.limit) for source in (one.data.train[0], one.data.validation[0], one.exam.data)]
    touched = override.split(".limit")[0]
    assert found == [
        (path, 4 if touched == name else None) for path, name in zip("abc", SOURCES, strict=True)
    ]


SOURCES = ("data.train", "data.validation", "exam.data")


def test_overrides_reach_into_lists(tmp_path: Path) -> None:
    one = read(tmp_path, "model: m\ndata: {train: [{path: a, limit: 9}, b]}\n", "data.train.0.limit=4")
    assert [(source.path, source.limit) for source in one.data.train] == [("a", 4), ("b", None)]


@pytest.mark.parametrize("override", ["learning_rate", "=3", ".=3", "optim.=3", "optim..beta1=3"])
def test_what_is_no_override(tmp_path: Path, override: str) -> None:
    assert "command line" in mistake(tmp_path, SHORT, override)


def test_an_override_without_a_value_switches_nothing_off(tmp_path: Path) -> None:
    """`optim.clip=$CLIP` with the variable not set; `null` has to be written."""
    assert "optim.clip=null" in mistake(tmp_path, SHORT, "optim.clip=")
    assert read(tmp_path, SHORT, "optim.clip=null").optim.clip is None


def test_a_single_source_is_the_first(tmp_path: Path) -> None:
    for text in ("model: m\ndata: {train: a}\n", "model: m\ndata: {train: {path: a, limit: 9}}\n"):
        one = read(tmp_path, text, "data.train.0.limit=4")
        assert [(source.path, source.limit) for source in one.data.train] == [("a", 4)]


def test_a_section_of_the_command_line_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    assert "command line: trainer.total_epochs" in mistake(tmp_path, SHORT, "trainer.total_epochs=3")


def test_every_name_of_others_is_one_of_ours() -> None:
    """And none of them hides a setting's own name."""
    ours = set(recipes._all_keys())
    assert set(peers.WORDS) - {"--nproc"} <= ours
    assert not {name.rsplit(".", 1)[-1] for name in ours} & set(peers.NAMES)
    assert len(peers.NAMES) == sum(len(words.split()) for words in peers.WORDS.values()), "each means one thing"


# What is wrong, where, and what was meant.


def test_f23_every_mistake_at_once(tmp_path: Path) -> None:
    """Unknown key, wrong type, out of range, wrong choice, missing: each with its line, in one error."""
    text = (
        "model: {path: m, precisoin: float32}\nbatch:\n  examples: many\n  tokens: 0\noptim:\n  learning_rate: -1\n"
        "  schedule: cosin\n  warmup: 1.5\ntrian:\n  epochs: 2\nvalidation: {every: 1.5}\n"
    )
    found = mistake(tmp_path, text, "checkpoint.keep=0", "optim.clipp=3")
    assert found.startswith("11 mistakes")
    for line in (
        "F:1 model.precisoin: unknown key; did you mean model.precision?", "F:3 batch.examples is 'many'",
        "F:4 batch.tokens is 0", "F:6 optim.learning_rate is -1", "F:7 optim.schedule is 'cosin'",
        "F:8 optim.warmup is 1.5", "F:9 trian: unknown key; did you mean train?", "F:11 validation.every is 1.5",
        "command line: checkpoint.keep=0 checkpoint.keep is 0", "did you mean optim.clip?", "data is missing",
    ):
        assert line in found, line


@pytest.mark.parametrize(("wrong", "meant"), [
    ("optim: {learning_rat: 1}", "optim.learning_rate"), ("optim: {lr_rate: 1, warm_up: 0}", "optim.warmup"),
    ("learning_rate: 1", "optim.learning_rate"), ("exam: {grade: x}", "exam.grader"),
    ("data: {train: [{path: a, limits: 3}]}", "data.train.0.limit"), ("optim: {epochs: 3}", "train.epochs"),
    ("max_new_token: 3", "exam.max_new_tokens"), ("chekpoint: {}", "checkpoint"),
    ("save_steps: 50", "checkpoint.every"), ("eval_steps: 10", "validation.every"),
    ("optim: {lr: 1}", "optim.learning_rate"),
    ("lora: {r: 8}", "lora.rank"), ("output_dir: x", "directory"), ("num-train-epochs: 3", "train.epochs"),
])
def test_f23_the_nearest_key(tmp_path: Path, wrong: str, meant: str) -> None:
    text = SHORT.split("data:")[0] if wrong.startswith("data") else SHORT
    assert f"did you mean {meant}?" in mistake(tmp_path, text + wrong)


def test_one_mistake_has_four_parts(tmp_path: Path) -> None:
    found = mistake(tmp_path, SHORT + "\n\noptim:\n  # a comment\n  beta1: 2\n").splitlines()
    assert len(found) == 4 and found[0].startswith("optim.beta1 is 2:")
    assert [line.split(":")[0].strip() for line in found[1:]] == ["where", "required", "to do"]
    assert "F:7" in found[1] and "mean of gradients" in found[2]


@pytest.mark.parametrize(("text", "places"), [
    ("model: a\nmodel: b\ndata: c", "F:1 and F:2"),
    (SHORT + "optim:\n  warmup: 0\n  beta1: 0\n  warmup: 1", "F:4 and F:6"),
])
def test_a_key_that_stands_twice(tmp_path: Path, text: str, places: str) -> None:
    found = mistake(tmp_path, text)
    assert "stands twice" in found and places in found


def test_a_section_that_nothing_stands_in(tmp_path: Path) -> None:
    """As where all of it was commented out: one that always is there says nothing, one that may be there is asked for.
    """
    plain = read(tmp_path, SHORT)
    assert plain == read(tmp_path, f"{SHORT}exam:\n  # data: some\noptim:\n") == read(tmp_path, SHORT, "exam=null")
    assert "nothing stands in lora" in (found := mistake(tmp_path, f"{SHORT}lora:\n  # rank: 8\n")) and "F:3" in found
    assert plain == read(tmp_path, f"{SHORT}lora: null") == read(tmp_path, f"{SHORT}lora:", "lora=null")
    assert read(tmp_path, f"{SHORT}lora: {{}}").lora == Lora() == read(tmp_path, f"{SHORT}lora:", "lora.rank=16").lora
    assert "data is missing" in mistake(tmp_path, "model: a\ndata:\n")
    assert plain == read(tmp_path, f"{SHORT}optim:\n  rates:\n    # vision: 0.1\n")
    deeper = mistake(tmp_path, f"{SHORT}exam:\n  data:\n    # path: a\n  grader: exact\n")
    assert "nothing stands in exam.data" in deeper and "F:4" in deeper and "{}" not in deeper
    assert "data.validation" in mistake(tmp_path, "model: a\ndata:\n  train: b\n  validation:\n    # - path: c\n")


@pytest.mark.parametrize("text", [
    "", "- a\n- b", "model: [", "just words", "model: a: b", "\tmodel: a", "model: !python/name:os.system", "a\0b",
    "a: &a [*a]\n" + SHORT,
])
def test_what_is_no_recipe(tmp_path: Path, text: str) -> None:
    assert "F" in mistake(tmp_path, text)


@pytest.mark.parametrize("setting", [
    "batch.examples=true", "batch.tokens='7'", "train.epochs=yes", "model.activation_checkpointing=1",
    "model.activation_checkpointing='no'", "optim.learning_rate='1'", "data.workers=null", "batch=3", "batch=[1]",
    "optim.warmup=.nan", "optim.learning_rate=.inf", "model=3", "data=[]", "model.stop_tokens=3",
])
def test_f23_wrong_types_are_not_bent(tmp_path: Path, setting: str) -> None:
    """`yes` is not 1 and `'7'` is not 7: a value of another type is a slip, not a wish."""
    assert setting.split("=")[0] in mistake(tmp_path, SHORT, setting)


@pytest.mark.parametrize("setting", [
    "seed=18446744073709551616", "seed=-1", "optim.beta1=1", "optim.beta2=1.0", "optim.epsilon=0", "optim.clip=0",
    "exam.top_p=0", "data.max_tokens=9000", "validation.every=1", "exam.every=1", "data.on_error=skip:101%",
    "data.on_error=skip", "data.on_error=skip:1", "data.validation=0", "data.validation=1.0", "data.validation=true",
    "data.limit=0", "data.train={path: a, proportion: 0}", "data.train=[{path: a, proportion: 1}, b]",
    "data.validation=[{path: a, proportion: 1}, b]", "exam.data={path: a, proportion: 1}",
])
def test_f23_out_of_range_is_said_before_training(tmp_path: Path, setting: str) -> None:
    """Values that AdamW or a random generator would refuse later, with a traceback."""
    assert mistake(tmp_path, SHORT, setting)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no recipe"):
        recipes.read(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("model: ü".encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot be read"):
        recipes.read(tmp_path / "latin.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        recipes.read(tmp_path)


YAML_WORDS = st.sampled_from([
    "model", "data", "optim", "train", "path", ": ", "\n", "  ", "- ", "[", "]", "{", "}", "&a ", "*a", "!!int ", "|\n",
    "2024-13-45", "1e5", "0x", "12:61", "~", "yes", "? ", "<<: ", "#", "'", '"', "%", "@", "starter/qwen3", "1_0", "=",
    "!!float ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!x ", "0b2", "\ufeff", "\u2028", "é", ",",
])


@settings(QUICK, max_examples=300)
@given(st.lists(YAML_WORDS, max_size=14).map("".join), st.lists(YAML_WORDS, max_size=5).map("".join))
def test_any_text_is_a_recipe_or_a_mistake(tmp_path: Path, text: str, override: str) -> None:
    """No text ends in a traceback: not a broken tag, not a date that does not exist, not a list that holds itself."""
    tried = [(text, []), (SHORT + text, []), (SHORT, [f"optim.{override}"]), (SHORT, [f"seed={override}"])]
    for whole, overrides in tried:
        try:
            assert isinstance(read(tmp_path, whole, *overrides), Recipe)
        except ConfigError as error:
            assert error.found and error.where and error.required and error.remedy


# What is valid reads back as it was.


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn"]), min_size=1, max_size=12)
TRICKY = st.sampled_from(["1e5", "yes", "null", "~", "2024-01-01", "0x1f", "1:30", "- a", "#x", " a ", "\u2028", "1_0"])
NAMES = WORDS | TRICKY
RATES = st.floats(min_value=0, max_value=1, exclude_max=True)
POSITIVE = st.floats(min_value=1e-300, max_value=1e300)
COUNT = st.integers(1, 10**9)
SOURCE = st.fixed_dictionaries({"path": NAMES}, optional={
    "limit": COUNT, "format": st.sampled_from(["messages", "alpaca"]), "function": NAMES,
    "columns": st.dictionaries(NAMES, NAMES, max_size=2),
    "messages": st.lists(st.dictionaries(NAMES, NAMES, max_size=2), max_size=2),
})
SETTINGS: dict[str, st.SearchStrategy] = {
    "model.path": NAMES, "model.revision": NAMES, "model.precision": st.sampled_from(["float32", "bfloat16"]),
    "model.template_arguments": st.dictionaries(NAMES, st.booleans() | st.integers() | RATES | NAMES, max_size=3),
    "model.stop_tokens": st.lists(NAMES, max_size=3),
    "model.activation_checkpointing": st.booleans() | st.just("selective"),
    "data.train": st.lists(SOURCE, min_size=1, max_size=3), "data.validation": st.lists(SOURCE, min_size=1, max_size=2),
    "data.supervise": st.sampled_from(["every", "last", "marked"]), "data.limit": COUNT,
    "data.on_error": st.sampled_from(["stop", "skip:0.1%", "skip:100%"]), "data.workers": st.integers(0, 99),
    "data.cache": NAMES, "directory": NAMES, "seed": st.integers(0, 2**62), "device": NAMES, "batch.examples": COUNT,
    "train.epochs": COUNT, "train.steps": COUNT, "optim.learning_rate": POSITIVE, "optim.weight_decay": POSITIVE,
    "optim.schedule": st.sampled_from(["cosine", "linear", "constant"]), "optim.warmup": RATES, "optim.minimum": RATES,
    "optim.beta1": RATES, "optim.beta2": RATES, "optim.epsilon": POSITIVE, "optim.clip": st.none() | POSITIVE,
    "exam.data": SOURCE, "exam.grader": NAMES, "exam.max_new_tokens": COUNT, "exam.temperature": POSITIVE,
    "exam.examples": COUNT, "checkpoint.every": COUNT, "checkpoint.keep": COUNT,
}
OVERRIDES = st.sets(st.sampled_from(sorted(SETTINGS)), max_size=4).flatmap(
    lambda names: st.fixed_dictionaries({name: SETTINGS[name] for name in sorted(names)})
)


@QUICK
@given(OVERRIDES)
def test_a_resolved_recipe_reads_back_equal(tmp_path: Path, overrides: dict[str, Any]) -> None:
    """`resolved.yaml` is the recipe: nothing rounded, no word turned into a number, no default lost."""
    one = read(tmp_path, SHORT, *(setting(name, value) for name, value in overrides.items()))
    for name, value in overrides.items():
        assert flat(one)[name] == jsonable(value), name
    assert read(tmp_path, recipes.dump(one)) == one


def setting(name: str, value: Any) -> str:
    """An override whose value is JSON, and so YAML."""
    return f"{name}={json.dumps(value, ensure_ascii=False)}"


def jsonable(value: Any) -> Any:
    """Sources hold every setting once they are read: compare only the path of each."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [one["path"] for one in value]
    return value["path"] if isinstance(value, dict) and "path" in value else value


def flat(one: Recipe) -> dict[str, Any]:
    values = {}
    for name in SETTINGS:
        value: Any = one.model_dump(mode="json")
        for part in name.split("."):
            value = value[part]
        values[name] = jsonable(value)
    return values


def test_flat_names_every_setting_once(tmp_path: Path) -> None:
    """What the refusal of a changed recipe compares: a change anywhere is a change in the flat form."""
    one = read(tmp_path, SHORT, "optim.learning_rate=0.25").model_dump(mode="json")
    named = recipes.flat(one)
    assert named["optim.learning_rate"] == 0.25 and named["model.path"] == "starter/qwen3"
    other = recipes.flat(read(tmp_path, SHORT).model_dump(mode="json"))
    assert {name for name in named if named[name] != other[name]} == {"optim.learning_rate"}


# The schema that editors use says the same as the program.


def schema_faults(value: Any, schema: dict[str, Any], whole: dict[str, Any], path: str = "") -> list[str]:
    """Where a value breaks a JSON Schema: the keywords that our schema uses, written from the specification."""
    if "$ref" in schema:
        return schema_faults(value, whole["$defs"][schema["$ref"].rsplit("/", 1)[1]], whole, path)
    if "anyOf" in schema:
        tried = [schema_faults(value, one, whole, path) for one in schema["anyOf"]]
        return [] if [] in tried else [f"{path}: none of {len(tried)} forms"]
    if "oneOf" in schema:
        tried = [schema_faults(value, one, whole, path) for one in schema["oneOf"]]
        return [] if tried.count([]) == 1 else [f"{path}: {tried.count([])} of {len(tried)} forms"]
    assert schema.keys() <= KEYWORDS, schema.keys() - KEYWORDS
    if not TYPES[schema.get("type")](value):
        return [f"{path}: not {schema['type']}"]
    broken = [word for word, holds in LIMITS.items() if word in schema and not holds(value, schema[word])]
    found = [f"{path}: not {word}" for word in broken]
    for number, one in enumerate(value) if isinstance(value, list) else ():
        found += schema_faults(one, schema.get("items", {}), whole, f"{path}.{number}")
    for name, one in value.items() if isinstance(value, dict) else ():
        inner = schema.get("properties", {}).get(name, schema.get("additionalProperties", {}))
        found += [f"{path}.{name}: unknown"] if inner is False else schema_faults(one, inner, whole, f"{path}.{name}")
    return found


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


TYPES = {
    "object": lambda v: isinstance(v, dict), "array": lambda v: isinstance(v, list), "null": lambda v: v is None,
    "string": lambda v: isinstance(v, str), "boolean": lambda v: isinstance(v, bool), "number": number,
    "integer": lambda v: number(v) and float(v).is_integer(), None: lambda v: True,
}
LIMITS = {
    "minimum": lambda v, limit: v >= limit, "exclusiveMinimum": lambda v, limit: v > limit,
    "maximum": lambda v, limit: v <= limit, "exclusiveMaximum": lambda v, limit: v < limit,
    "minItems": lambda v, limit: len(v) >= limit,
    "minLength": lambda v, limit: not isinstance(v, str) or len(v) >= limit,
    "pattern": lambda v, pattern: not isinstance(v, str) or re.search(pattern, v) is not None,
    "enum": lambda v, allowed: v in allowed,
    "const": lambda v, only: v == only, "required": lambda v, names: set(names) <= set(v),
}
KEYWORDS = {*LIMITS, "type", "items", "properties", "additionalProperties", "title", "description", "default", "$defs"}
SCHEMA = Recipe.model_json_schema()


@QUICK
@given(OVERRIDES)
def test_the_schema_accepts_what_the_program_accepts(tmp_path: Path, overrides: dict[str, Any]) -> None:
    path = write(tmp_path, SHORT)
    one = recipes.read(path, [setting(name, value) for name, value in overrides.items()])
    assert schema_faults(one.model_dump(mode="json"), SCHEMA, SCHEMA) == []


@pytest.mark.parametrize("text", [
    SHORT, "model: m\ndata: {train: a}", "model: m\ndata: {train: [a, {path: b}], validation: c}\nexam: {data: d}",
    "model: m\ndata: {train: {path: a}}",
])
def test_the_schema_accepts_short_forms(tmp_path: Path, text: str) -> None:
    read(tmp_path, text)
    assert schema_faults(yaml.safe_load(text), SCHEMA, SCHEMA) == []


@pytest.mark.parametrize("text", [
    "model: m", SHORT + "optim: {learning_rat: 1}", SHORT + "optim: {learning_rate: 0}", SHORT + "batch: {tokens: x}",
    SHORT + "trian: {}", SHORT + "optim: {beta1: 1.5}", "model: m\ndata: {train: [{limit: 3}]}",
    "model: m\ndata: {train: []}", SHORT + "batch: {tokens: true}",
])
def test_the_schema_refuses_what_the_program_refuses(tmp_path: Path, text: str) -> None:
    mistake(tmp_path, text)
    assert schema_faults(yaml.safe_load(text), SCHEMA, SCHEMA)


def test_every_setting_says_what_it_is() -> None:
    """Defaults and units live in one place, and few of them: less than eighty."""
    leaves = list(settings_of(Recipe))
    assert [name for name, field in leaves if not (field.description or "").strip()] == []
    assert 40 <= len({name for name, _ in leaves}) <= 80


def settings_of(section: type[BaseModel], prefix: str = ""):
    for name, field in section.model_fields.items():
        inner = recipes.section_in(field.annotation)
        if inner is None:
            yield prefix + name, field
        elif inner.__name__ != "Source":
            yield from settings_of(inner, f"{prefix}{name}.")


def test_the_run_directory_follows_the_file(tmp_path: Path) -> None:
    one = read(tmp_path, SHORT)
    assert recipes.directory(one, "a/b/lesson.yaml") == Path("runs/lesson")
    assert recipes.directory(read(tmp_path, SHORT, "directory=x/y"), "lesson.yaml") == Path("x/y")


def test_shipped_recipes_are_valid() -> None:
    """Each in `examples/` reads, and the schema agrees."""
    shipped = sorted((Path(__file__).parents[1] / "examples").glob("sft/*/*.yaml"))
    assert shipped
    for path in shipped:
        one = recipes.read(path)
        assert schema_faults(one.model_dump(mode="json"), SCHEMA, SCHEMA) == []
        assert not math.isinf(one.optim.learning_rate) and re.fullmatch(r"[\w./:-]+", one.model.path)

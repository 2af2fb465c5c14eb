"""Read a recipe: YAML with line numbers, then `key=value`, then one validation that shows every error at once."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from schoolhouse import peers
from schoolhouse.config import Recipe
from schoolhouse.errors import ConfigError, SafetyError

Key = tuple[str | int, ...]
"""A dotted key, split: `("optim", "learning_rate")`; list positions are integers."""


EXPONENT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
"""`1e-5` is a number, as in YAML 1.2 and JSON, and not a word, as in YAML 1.1."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with the numbers of `EXPONENT`."""


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read back as a word."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))
SOURCES = (("data", "train"), ("data", "validation"))
"""Settings that are a source, or a list of them: one alone is the first of the list."""
BROKEN = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError)
"""What PyYAML raises on text that is no YAML, and on values that their tag does not allow."""


def read(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file with `key=value` overrides put over it; raises ConfigError naming every mistake."""
    path = Path(path)
    values, places, doubtful = _parse(path)
    for override in overrides:
        _override(values, places, override)
    for key, place in doubtful.items():
        if places.get(key) == place and not any(one[: len(key)] == key for one in places if one != key):
            _refuse_empty(key, place)
    _leave_out(values)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise _config_error(error, path, places) from None


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every setting, also those left at their default."""
    return written(recipe.model_dump(mode="json"))


def written(settings: Mapping[str, Any]) -> str:
    """Settings as YAML that `read` takes for what they are."""
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `{"optim.learning_rate": 1e-5, …}`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def way(recipe: Recipe) -> str:
    """What is trained, over how many processes a conversation is split, and with whose kernels: `LoRA r32 SP2`."""
    trained = f"all but {'+'.join(recipe.model.freeze)}" if recipe.model.freeze else "full"
    if recipe.lora is not None:
        trained = f"LoRA r{recipe.lora.rank}"
    split = f" SP{recipe.parallel.ulysses}" if recipe.parallel.ulysses > 1 else ""
    return f"{trained}{split}{' Liger' if recipe.model.liger else ''}"


def directory(recipe: Recipe, path: str | Path) -> Path:
    """The run directory: the recipe's own, else `runs/` and the name of the recipe's file."""
    return Path(recipe.directory or f"runs/{Path(path).stem}")


def _parse(path: Path) -> tuple[dict[str, Any], dict[Key, str], dict[Key, str]]:
    """The settings of a file, the place of each, and the places of those of which nobody knows what they mean."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"there is no recipe {path}", required="a YAML file", where=str(path), remedy=_nearest_recipe(path)
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the recipe cannot be read: {error}", required="a YAML file in UTF-8", where=str(path),
            remedy="check the path and the file's permissions and encoding",
        ) from None
    places: dict[Key, str] = {}
    try:
        _refuse_aliases(text, path)
        node = yaml.compose(text, Loader=_Loader)
        _note_places(node, (), path, places)
        values = yaml.load(text, Loader=_Loader)
    except BROKEN as error:
        marked = isinstance(error, yaml.MarkedYAMLError) and error.problem_mark
        where = f"{path}:{marked.line + 1}:{marked.column + 1}" if marked else str(path)
        if marked and "tag:yaml.org,2002:python" in str(error.problem):
            raise SafetyError(
                "the recipe asks YAML to make objects of Python", required="YAML with plain values", where=where,
                remedy="do not use this file: nothing that needs such a tag belongs in a recipe",
            ) from None
        raise ConfigError(
            f"the recipe is not valid YAML: {error.problem if marked else ' '.join(str(error).split())}",
            required="YAML with plain values", where=where, remedy="mend the line; text with `: ` or `#` needs quotes",
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(
            "the recipe holds no settings", required="`key: value` lines, at least `model` and `data`",
            where=str(path), remedy="start from a recipe in examples/sft",
        )
    return values, places, {key: places[key] for key in _doubtful(node)}


def _leave_out(values: dict[str, Any], section: type[BaseModel] = Recipe) -> None:
    """Leave out sections that are always there and in which nothing stands: they say nothing."""
    for name, value in [*values.items()]:
        field = section.model_fields.get(name)
        inner = section_in(field.annotation) if field else None
        if field and value is None and field.default is not None and (inner or isinstance(field.default, dict)):
            del values[name]
        elif inner and isinstance(value, dict):
            _leave_out(value, inner)


def _doubtful(node: yaml.Node | None, section: type[BaseModel] = Recipe, above: Key = ()) -> Iterator[Key]:
    """Sections that may be there or not and in which nothing stands, as where all was commented out: to YAML they are
    not there, to who wrote them perhaps they are."""
    for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
        field = section.model_fields.get(str(name.value))
        inner = section_in(field.annotation) if field else None
        if inner is not None:
            key = (*above, str(name.value))
            if isinstance(value, yaml.ScalarNode) and not value.value and not value.style and field.default is None:
                yield key
            yield from _doubtful(value, inner, key)


def _refuse_empty(key: Key, place: str) -> None:
    name, section = _dotted(key), _section(key)
    needs = any(field.is_required() for field in section.model_fields.values())
    defaults = "" if needs else f", or `{key[-1]}: {{}}` for their defaults"
    raise ConfigError(
        f"nothing stands in {name}", required=f"settings{defaults}, or `{key[-1]}: null` to go without it", where=place,
        remedy=f"write one of them, or indent the lines that belong to {name}",
    )


def _note_places(node: yaml.Node | None, key: Key, path: Path, places: dict[Key, str]) -> None:
    """Remember the file and line of every key; a key that stands twice is an error."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            inner = (*key, str(name.value))
            place = f"{path}:{name.start_mark.line + 1}"
            if inner in places:
                raise ConfigError(
                    f"{_dotted(inner)} stands twice", required="each key once",
                    where=f"{places[inner]} and {place}", remedy="delete one of them",
                )
            places[inner] = place
            _note_places(value, inner, path, places)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            places[(*key, index)] = f"{path}:{value.start_mark.line + 1}"
            _note_places(value, (*key, index), path, places)


def _override(values: dict[str, Any], places: dict[Key, str], override: str) -> None:
    """Put one `a.b=value` (value in YAML) into the nested settings."""
    name, separator, text = override.partition("=")
    keys = name.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(
            f"{override!r} is no setting", required="key=value with a dotted key, e.g. optim.learning_rate=1e-4",
            where="command line", remedy=f"write {name.strip() or 'key'}=VALUE",
        )
    if not text.strip():
        raise ConfigError(
            f"{name.strip()}= has no value", required="key=value", where="command line",
            remedy=f"write {name.strip()}=null, if it is to have none; was a variable of the shell not set?",
        )
    value = _value(text)
    if keys == ["model"] and isinstance(value, str) and isinstance(values.get("model"), dict):
        keys = ["model", "path"]  # another student; what else the recipe says of it holds
    _put(values, tuple(keys), (), value)
    for place in [place for place in places if place[: len(keys)] == tuple(keys)]:
        del places[place]
    places[tuple(keys)] = f"command line: {override}"


def _value(text: str) -> Any:
    """What stands behind `key=`: YAML, of which JSON is a part that PyYAML does not read in full; else a word."""
    for read_value in (json.loads, lambda given: yaml.load(given, Loader=_Loader)):
        with contextlib.suppress(*BROKEN):
            return read_value(text)
    return text


def _put(values: Any, keys: tuple[str, ...], above: tuple[str, ...], value: Any) -> Any:
    """`values` with the one below `keys` replaced; short forms on the way (a word, a single source) are opened."""
    if not keys:
        return value
    name, rest = keys[0], keys[1:]
    if name == "0" and above in SOURCES and isinstance(values, str | dict):
        values = [values]
    if isinstance(values, list) and name.isdigit() and int(name) < len(values):
        values[int(name)] = _put(values[int(name)], rest, (*above, name), value)
        return values
    if isinstance(values, str):
        values = {"train" if above == ("data",) else "path": values}
    elif not isinstance(values, dict):
        values = {}
    values[name] = _put(values.get(name), rest, (*above, name), value)
    return values


def _refuse_aliases(text: str, path: Path) -> None:
    """An alias can hold itself, and hides where a value comes from."""
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(
                f"the recipe uses the alias *{event.anchor}", required="plain values",
                where=f"{path}:{event.start_mark.line + 1}", remedy="write the value out",
            )


def _config_error(error: ValidationError, path: Path, places: Mapping[Key, str]) -> ConfigError:
    """All mistakes as one error: a single one in four parts, several a line each."""
    faults = [_fault(one, path, places) for one in error.errors(include_url=False)]
    if len(faults) == 1:
        found, where, required, remedy = faults[0]
        return ConfigError(found, required=required, where=where, remedy=remedy)
    lines = "".join(f"\n{where} {found}; {remedy}" for found, where, _, remedy in faults)
    return ConfigError(
        f"{len(faults)} mistakes in the recipe", required="settings as `schoolhouse schema` lists them",
        where=str(path), remedy=f"mend each of these{lines}",
    )


def _fault(one: Mapping[str, Any], path: Path, places: Mapping[Key, str]) -> tuple[str, str, str, str]:
    """One mistake as found, where, required, remedy."""
    key = tuple(part for part in one["loc"] if isinstance(part, int) or not part.startswith(("function-", "one-of-")))
    where = _place(key, path, places)
    if one["type"] == "extra_forbidden":
        near = _nearest_key(key)
        remedy = f"did you mean {near}?{_first_sentence(near)}" if near else "see `schoolhouse schema` for all settings"
        where = where.partition("=")[0]  # an unknown key may be meant to hold a token, whose value is shown to nobody
        return f"{_dotted(key)}: unknown key", where, "a setting of the recipe", remedy
    if one["type"] == "missing":
        return f"{_dotted(key)} is missing", where, _documentation(key), f"add {_dotted(key)}"
    text = one["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not key:
        return text, where, "settings that fit together", "change one of them"
    return f"{_dotted(key)} is {one['input']!r:.60}: {text}", where, _documentation(key), f"change {_dotted(key)}"


def _place(key: Key, path: Path, places: Mapping[Key, str]) -> str:
    """The file and line of a key, of the nearest key around it, or of one inside it."""
    for length in range(len(key), 0, -1):
        if key[:length] in places:
            return places[key[:length]]
    return next((places[other] for other in places if key and other[: len(key)] == key), str(path))


def _dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


def _section(key: Key) -> type[BaseModel] | None:
    """The section class that a key's parent names."""
    section: type[BaseModel] = Recipe
    for part in key:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        inner = section_in(field.annotation) if field else None
        if inner is None:
            return None
        section = inner
    return section


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section class that an annotation holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_in(part))), None)


def _all_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        inner = section_in(field.annotation)
        keys += [prefix + name] + (_all_keys(inner, f"{prefix}{name}.") if inner else [])
    return keys


def _nearest_key(key: Key) -> str | None:
    """What other trainers mean by this key, else the known key that looks most like it: first among its siblings, then
    by last name anywhere."""
    parent, name = key[:-1], str(key[-1])
    known_as = peers.NAMES.get(name.lower().replace("-", "_"))
    if known_as is not None:
        return known_as
    section = _section(parent)
    if section is not None:
        near = difflib.get_close_matches(name, section.model_fields, n=1)
        if near:
            return _dotted((*parent, near[0]))
    every = {known.rsplit(".", 1)[-1]: known for known in reversed(_all_keys())}
    near = difflib.get_close_matches(name, every, n=1)
    return every[near[0]] if near else None


def _description(key: Key) -> str:
    """What the schema says of a setting; empty where it says nothing."""
    section = _section(key[:-1]) if key else None
    field = section.model_fields.get(str(key[-1])) if section else None
    return (field.description if field else None) or ""


def _documentation(key: Key) -> str:
    """The setting's own description."""
    return _description(key) or "settings that fit together"


def _first_sentence(name: str) -> str:
    """Of a setting's description, in brackets: units differ from those of others."""
    text = _description(tuple(name.split(".")))
    return f" ({text.partition('. ')[0].rstrip('.')})" if text else ""


def _nearest_recipe(path: Path) -> str:
    shipped = sorted(str(found) for found in Path("examples").glob("sft/*/*.yaml"))
    near = difflib.get_close_matches(str(path), shipped, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else "`schoolhouse ls` lists the recipes"

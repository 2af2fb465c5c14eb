"""A run directory as one frozen value, read as far as it is there: a run may be under way, killed, or torn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from schoolhouse.errors import ConfigError

Record = Mapping[str, Any]
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step. A figure the record lacks, or holds as no number, is NaN."""

    step: int
    epoch: float
    loss: float
    accuracy: float
    grad_norm: float
    learning_rate: float
    examples: float
    tokens: float
    supervised_tokens: float
    seconds: float
    data_seconds: float
    peak_memory_gib: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens through the model in a second of this step."""
        return self.tokens / self.seconds if self.seconds > 0 else math.nan


@dataclass(frozen=True, slots=True)
class ValidationRecord:
    """The loss on the validation rows, after `step` steps."""

    step: int
    loss: float
    accuracy: float
    supervised_tokens: float
    seconds: float


@dataclass(frozen=True, slots=True)
class ExamRecord:
    """The graded exam after `step` steps."""

    step: int
    correct: int
    count: int
    seconds: float

    @property
    def score(self) -> float:
        """The share of questions answered right."""
        return self.correct / self.count


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of an exam."""

    step: int
    index: int
    question: Any
    """Text, or a list of messages."""
    reference: str
    text: str
    extracted: str | None
    correct: bool
    stopped: bool
    tokens: int


@dataclass(frozen=True, slots=True)
class Run:
    """Everything a run directory says. Records stand in order of their step, each step once."""

    directory: Path
    facts: Record
    """`run.json`."""
    ledgers: Mapping[str, Record]
    """`data.json`: `train` and `validation`, where they are."""
    steps: tuple[StepRecord, ...]
    validations: tuple[ValidationRecord, ...]
    exams: tuple[ExamRecord, ...]
    answers: tuple[Answer, ...]
    examples: tuple[Record, ...]
    """Rows of `data.show.to_json`."""
    events: tuple[Record, ...]
    faults: tuple[str, ...]
    """What could not be read, and where."""

    @property
    def recipe(self) -> Record:
        """The resolved recipe."""
        return self.section("recipe")

    @property
    def status(self) -> str:
        """`running`, `done`, `stopped` or `failed`, as last recorded."""
        return str(self.facts.get("status", "unknown"))

    def section(self, name: str) -> Record:
        """A mapping of `run.json`; empty where there is none."""
        value = self.facts.get(name)
        return value if isinstance(value, Mapping) else {}


def read(directory: str | Path) -> Run:
    """Read a run directory; raises ConfigError where it has no `run.json`, and notes everything else that is torn."""
    directory, faults = Path(directory), []
    _require(directory)
    metrics = list(_lines(directory / "metrics.jsonl", faults))
    evals = [record for record in metrics if record.get("kind") == "eval"]
    data = _object(directory / "data.json", faults)
    return Run(
        directory=directory,
        facts=_object(directory / "run.json", faults),
        ledgers={name: data[name] for name in ("train", "validation") if isinstance(data.get(name), Mapping)},
        steps=_by_step(_step, (record for record in metrics if record.get("kind") == "step"), faults),
        validations=_by_step(_validation, (record for record in evals if record.get("name") == "validation"), faults),
        exams=_by_step(_exam, (record for record in evals if record.get("name") == "exam"), faults),
        answers=_answers(_lines(directory / "samples.jsonl", faults), faults),
        examples=tuple(filter(_is_example, _lines(directory / "examples.jsonl", faults))),
        events=tuple(_lines(directory / "events.jsonl", faults)),
        faults=tuple(faults),
    )


def number(record: Record, key: str) -> float:
    """A figure of a record; NaN where it is missing or no number."""
    value = record.get(key)
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # JSON knows integers of any length
        return math.nan


def _require(directory: Path) -> None:
    if not (directory / "run.json").is_file():
        raise ConfigError(
            f"{directory} is not a run directory" if directory.is_dir() else f"there is no directory {directory}",
            required="a directory that holds the run.json of a run", where=str(directory),
            remedy="name the `directory` of a recipe that has been run; without one it is runs/ and the recipe's name",
        )


def _object(path: Path, faults: list[str]) -> Record:
    """A JSON file that holds an object; empty, and noted, where it is torn."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # not JSON, or not text: a JSONDecodeError or a UnicodeDecodeError
        value = None
    if not isinstance(value, dict):
        faults.append(f"{path.name} is torn and was left out")
        return {}
    return value


def _lines(path: Path, faults: list[str]) -> Iterator[Record]:
    """The objects of a JSON-lines file; a line that is none is noted and passed over."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for place, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if isinstance(value, dict):
                yield value
            else:
                faults.append(f"{path.name}:{place} is torn and was left out")


def _by_step(make: Callable[[Record], Value], records: Iterable[Record], faults: list[str]) -> tuple[Value, ...]:
    """Records as values in order of their step; of a step that was trained again after a kill, the last one."""
    last: dict[int, Value] = {}
    for record in records:
        try:
            last[_place(record)] = make(record)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            faults.append(f"a record of kind {record.get('kind')} was left out: {type(error).__name__} {error}")
    return tuple(last[step] for step in sorted(last))


def _place(record: Record) -> int:
    """The step that a record is of."""
    step = int(record["step"])
    if not 0 <= step < 1 << 53:
        raise ValueError(f"there is no step {step}")
    return step


def _step(record: Record) -> StepRecord:
    figures = {name: number(record, name) for name in StepRecord.__dataclass_fields__ if name != "step"}
    return StepRecord(step=int(record["step"]), **figures)


def _validation(record: Record) -> ValidationRecord:
    figures = {name: number(record, name) for name in ValidationRecord.__dataclass_fields__ if name != "step"}
    return ValidationRecord(step=int(record["step"]), **figures)


def _exam(record: Record) -> ExamRecord:
    correct, count = int(record["correct"]), int(record["count"])
    if not 0 <= correct <= count or count == 0:
        raise ValueError(f"{correct} of {count} correct")
    return ExamRecord(int(record["step"]), correct, count, number(record, "seconds"))


def _answers(records: Iterable[Record], faults: list[str]) -> tuple[Answer, ...]:
    """Answers in order of step and question, each once."""
    last: dict[tuple[int, int], Answer] = {}
    for record in records:
        try:
            answer = _answer(record)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            faults.append(f"an answer was left out: {type(error).__name__} {error}")
            continue
        last[answer.step, answer.index] = answer
    return tuple(last[key] for key in sorted(last))


def _answer(record: Record) -> Answer:
    extracted = record.get("extracted")
    return Answer(
        step=int(record["step"]),
        index=int(record["index"]),
        question=record["question"],
        reference=str(record.get("reference", "")),
        text=str(record["answer"]),
        extracted=None if extracted is None else str(extracted),
        correct=bool(record["correct"]),
        stopped=bool(record.get("stopped", True)),
        tokens=int(record.get("tokens", 0)),
    )


def _is_example(record: Record) -> bool:
    """A row that the renderers of `data.show` can take."""
    lists = all(isinstance(record.get(name), list) for name in ("turns", "ids", "weights", "pieces"))
    return lists and {"source", "row", "verdict"} <= record.keys() and all(map(_is_piece, record["pieces"]))


def _is_piece(piece: Any) -> bool:
    return isinstance(piece, Mapping) and isinstance(piece.get("weight"), int | float) and "text" in piece

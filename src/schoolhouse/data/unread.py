"""What a row says beside its conversation, and would lose without a word: refused, or it would not be taught as it is.

A row template (`data.messages`) says itself which columns are taught; what is refused here is for rows whose columns
decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from schoolhouse.data.messages import to_messages
from schoolhouse.errors import DataError

_SHOWN = ("context", "input")
"""Columns that belong to the question, where the form of a row has no place for them."""
_MEDIA = {"videos": "video", "video": "video", "audios": "audio", "audio": "audio"}
_WEIGHTS = ("weight", "sample_weight", "loss_weight")
_LABEL = "label"
_QUESTIONS = ("prompt", "question", "query", "instruction")


def refuse(unread: Mapping[str, Any], where: str, *, form: str, named: bool, selected: bool) -> None:
    """Raise DataError for a column, of those that the form of a row leaves `unread`, which changes what is taught.

    `named`: the recipe names the form, which leaves out what belongs to the question. `selected`: the user's function
    has chosen the row, whatever its label says.
    """
    filled = [column for column in unread if _filled(unread[column])]
    for column in filled:
        if column in _SHOWN and form not in ("messages", "sharegpt") and not named:
            raise DataError(
                f"the row has a `{column}` that its question and answer would leave out", where=where,
                required="to know where it goes",
                remedy=f"say it with data.messages, or leave it out with data.format: {form}",
            )
        if column in _MEDIA:
            raise DataError(
                f"the row shows {_MEDIA[column]} (`{column}`), which no model here takes", where=where,
                required="text and images",
                remedy="delete the row, or leave the column out with data.messages or data.function"
                + ("; a content may show a video as its frames" if _MEDIA[column] == "video" else ""),
            )
    for column in unread:
        if column in _WEIGHTS and _number(unread[column]) not in (None, 1.0):
            raise DataError(
                f"the row has a {column} of {unread[column]!r:.40}, and only messages have weights", where=where,
                required="1, or a weight in the messages that it is meant for",
                remedy='give the answer\'s message a "weight" of its own with data.function, or remove the column',
            )
    if isinstance(unread.get(_LABEL), bool) and not selected:
        raise DataError(
            f"preference data: the row's answer is marked with {_LABEL}: {str(unread[_LABEL]).lower()}", where=where,
            required="rows whose answers are all to be learnt",
            remedy="choose the good answers with data.function, or remove the column if it means something else",
        )


def is_preference(row: Mapping[str, Any]) -> bool:
    """Whether a row has a better and a worse answer beside what was asked."""
    return _filled(row.get("chosen")) and _filled(row.get("rejected"))


def preference(row: Mapping[str, Any], where: str) -> DataError:
    """The error for a row of preference data, with the setting that teaches its better answers."""
    columns = _chosen_columns(row)
    remedy = "join what was asked and the chosen answer with data.function"
    if columns is not None:
        written = ", ".join(f"{field}: {column}" for field, column in columns.items())
        remedy = f"data.columns: {{{written}}} teaches the chosen answers"
    return DataError(
        "preference data: chosen and rejected answers", required="answers that are all to be learnt", where=where,
        remedy=remedy,
    )


def _chosen_columns(row: Mapping[str, Any]) -> Mapping[str, str] | None:
    """The `data.columns` that read the chosen answer; None where a function must."""
    chosen = row["chosen"]
    question = next((column for column in _QUESTIONS if _filled(row.get(column))), None)
    if isinstance(chosen, list | tuple):
        try:
            if to_messages(chosen, "chosen")[0].role != "assistant":
                return {"messages": "chosen"}
        except DataError:
            return None
    elif not isinstance(chosen, str):
        return None
    if question == "instruction":
        return None if isinstance(chosen, list | tuple) else {"instruction": "instruction", "output": "chosen"}
    return None if question is None else {"prompt": question, "completion": "chosen"}


def _filled(value: object) -> bool:
    """Whether a value holds anything: a list of nothing, or the nulls that Arrow writes for it, do not."""
    if isinstance(value, list | tuple):
        return any(map(_filled, value))
    if isinstance(value, dict):
        return any(map(_filled, value.values()))
    return bool(value)


def _number(value: object) -> float | None:
    """The number in a cell, which a `.csv` file has as text."""
    try:
        return float(value) if isinstance(value, bool | int | float | str) else None
    except (ValueError, OverflowError):
        return None

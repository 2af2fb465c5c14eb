"""Rows of GSM8K in another form than they come in."""

from __future__ import annotations


def reasoning(row: dict) -> dict:
    """The steps as what is thought, the number behind `####` as what is said."""
    steps, _, result = row["answer"].rpartition("####")
    asked = f'{row["question"]} Output the final answer after "####".'
    return {"messages": [
        {"role": "user", "content": asked},
        {"role": "assistant", "reasoning_content": steps.strip(), "content": f"#### {result.strip()}"},
    ]}


def one_step(row: dict) -> dict | None:
    """Only problems that are solved in one calculation; others are dropped."""
    return _of_steps(row, 1)


def two_steps(row: dict) -> dict | None:
    """Only problems that are solved in two calculations; others are dropped."""
    return _of_steps(row, 2)


def _of_steps(row: dict, steps: int) -> dict | None:
    if row["answer"].count("<<") != steps:
        return None
    return {"messages": [
        {"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]},
    ]}

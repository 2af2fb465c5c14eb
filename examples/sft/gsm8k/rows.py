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

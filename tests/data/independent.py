"""A second implementation of 'supervised exactly as served', as simple as can be: render, encode, concatenate.

It shares no code with the program: transformers renders and tokenizes, and every turn is an example of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase


def supervised(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, template: str, stops: list[str]
) -> Iterator[tuple[list[int], list[int]]]:
    """For each assistant message of a row: the ids it is written after, and the ids that are learnt."""
    messages, tools = as_messages(row)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt, full = (
                tokenizer.apply_chat_template(
                    part, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=asked
                )
                for part, asked in ((messages[:index], True), (messages[: index + 1], False))
            )
            assert full.startswith(prompt)
            answer = full[len(prompt):]
            answer = answer[: min(answer.index(stop) + len(stop) for stop in stops if stop in answer)]
            yield tuple(tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))


ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


def as_messages(row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """The messages of the three forms that the real conversations have, and their tools."""
    if "instruction" in row:
        question = row["instruction"] + (f"\n{row['input']}" if row["input"] else "")
        return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}], None
    if "messages" in row:
        return [openai(message) for message in row["messages"]], row.get("tools") or None
    messages = [sharegpt(message) for message in row["conversations"]]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": row["system"]})
    tools = json.loads(row["tools"]) if row.get("tools") else []
    return messages, [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools] or None


def openai(message: dict[str, Any]) -> dict[str, Any]:
    """An OpenAI message with its arguments as objects."""
    message = {**message, "content": message.get("content") or ""}
    for call in message.get("tool_calls") or []:
        if isinstance(call["function"]["arguments"], str):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return message


def sharegpt(message: dict[str, Any]) -> dict[str, Any]:
    """A ShareGPT message; a function call's content is the call."""
    if message["from"] != "function_call":
        return {"role": ROLES[message["from"]], "content": message["value"]}
    call = json.loads(message["value"])
    calls = [{"type": "function", "function": one} for one in (call if isinstance(call, list) else [call])]
    return {"role": "assistant", "content": "", "tool_calls": calls}

"""Looking at a student: the loss on held-out rows, and answers it writes and that are graded. No [S, V] logits."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from schoolhouse.config import Exam, Recipe
from schoolhouse.data import formats, loader, plan, prepare, sources
from schoolhouse.data.served import Served
from schoolhouse.data.store import Store
from schoolhouse.errors import DataError
from schoolhouse.graders import Grader
from schoolhouse.model import attention, families
from schoolhouse.model.load import Student
from schoolhouse.types import Conversation


@dataclass(frozen=True, slots=True)
class Question:
    """One question of an exam: what is shown, and the reference answer."""

    conversation: Conversation
    prompt: str
    prompt_ids: tuple[int, ...]
    reference: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What the student wrote."""

    text: str
    tokens: int
    stopped: bool
    """It ended in a stop token, and not at the limit."""


@torch.no_grad()
def validation(student: Student, store: Store, batch_tokens: int) -> dict[str, Any]:
    """Loss and accuracy by the training equation: sums over every validation row once, divided once."""
    started = time.perf_counter()
    nll, correct, supervised, tokens = 0.0, 0, 0.0, 0
    with _evaluating(student):
        for pack in plan.partition(store.lengths, batch_tokens):
            loss = student.loss(loader.micro_batch(store, pack, student.device))
            nll += float(loss.nll)
            correct += int(loss.correct)
            supervised += float(loss.supervised)
            tokens += loss.tokens
    return {
        "loss": nll / supervised, "accuracy": correct / tokens, "supervised_tokens": tokens,
        "seconds": time.perf_counter() - started,
    }


def questions(recipe: Recipe, served: Served) -> list[Question]:
    """The recipe's exam: a conversation's last assistant message is the reference, what stands before it is shown."""
    source = recipe.exam.data
    if source is None:
        return []
    settings, asked = prepare.row_settings(recipe.data, source), []
    for origin, row in sources.read(source):
        if isinstance(row, DataError):
            raise row
        conversation = formats.to_conversation(row, settings, origin)
        if conversation is not None:
            asked.append(_question(conversation, served))
    return asked


def _question(conversation: Conversation, served: Served) -> Question:
    last = _last_answer(conversation)
    prompt = served.prompt(conversation, last)
    return Question(conversation, prompt, tuple(served.tokenize([prompt])[0]), conversation.messages[last].text)


def _last_answer(conversation: Conversation) -> int:
    return max(index for index, message in enumerate(conversation.messages) if message.role == "assistant")


def exam(
    student: Student, served: Served, asked: Sequence[Question], grade: Grader, settings: Exam, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask every question: the score with its counts, and a record of each answer in the order of the questions."""
    started = time.perf_counter()
    answers = generate(student, served, [question.prompt_ids for question in asked], settings, seed)
    samples = []
    for index, (question, answer) in enumerate(zip(asked, answers, strict=True)):
        mark = grade(answer.text, question.reference)
        samples.append({
            "index": index, "question": _shown(question.conversation), "reference": question.reference,
            "answer": answer.text, "extracted": mark.extracted, "correct": mark.correct,
            "stopped": answer.stopped, "tokens": answer.tokens,
        })
    correct = sum(sample["correct"] for sample in samples)
    score = {
        "score": correct / len(samples), "correct": correct, "count": len(samples),
        "seconds": time.perf_counter() - started,
    }
    return score, samples


@torch.no_grad()
def generate(
    student: Student, served: Served, prompts: Sequence[Sequence[int]], settings: Exam, seed: int
) -> list[Answer]:
    """An answer to each prompt (token ids), many at a time with a key/value cache and the stop tokens of training."""
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: list[Answer | None] = [None] * len(prompts)
    with _evaluating(student), _serving(student), torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(by_length), settings.examples):
            chosen = by_length[start : start + settings.examples]
            written = _generate_batch(student, served, [prompts[index] for index in chosen], settings)
            for index, ids in zip(chosen, written, strict=True):
                answers[index] = _answer(ids, served)
    return answers


def _generate_batch(
    student: Student, served: Served, prompts: Sequence[Sequence[int]], settings: Exam
) -> list[list[int]]:
    """New token ids of each prompt; prompts are padded on the left, so that all end at the same place."""
    longest = max(map(len, prompts))
    pad = served.stops.ids[0]
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=student.device)
    shown = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=ids.device)
    drawn = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if settings.temperature else {}
    written = student.model.generate(
        input_ids=ids, attention_mask=shown, max_new_tokens=settings.max_new_tokens, do_sample=bool(drawn),
        eos_token_id=list(served.stops.ids), pad_token_id=pad, **drawn,
    )
    return written[:, longest:].tolist()


def _answer(ids: list[int], served: Served) -> Answer:
    """The text of generated ids up to their first stop token."""
    end = next((place for place, token in enumerate(ids) if token in served.stops.ids), None)
    kept = ids[:end]
    return Answer(served.tokenizer.decode(kept, skip_special_tokens=True), len(kept), end is not None)


def _shown(conversation: Conversation) -> list[dict[str, str]]:
    """The messages before the answer, for the record."""
    shown = conversation.messages[: _last_answer(conversation)]
    return [{"role": message.role, "content": message.text} for message in shown]


@contextlib.contextmanager
def _evaluating(student: Student) -> Iterator[None]:
    """Dropout off inside."""
    training = student.model.training
    student.model.eval()
    try:
        yield
    finally:
        student.model.train(training)


@contextlib.contextmanager
def _serving(student: Student) -> Iterator[None]:
    """An attention inside that knows a key/value cache and padding, and none of the model's own sampling settings."""
    own = student.model.generation_config
    student.model.set_attn_implementation(families.serving_attention(student.model))
    student.model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        student.model.set_attn_implementation(attention.NAME)
        student.model.generation_config = own

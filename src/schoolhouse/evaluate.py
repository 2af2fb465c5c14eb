"""Looking at a student: the loss on held-out rows, and answers it writes and that are graded. No [S, V] logits.

An exam asks for the last answer of each conversation, or plays conversations turn by turn: then the student's own
earlier answers stand in the history it is shown, as they do when it is served.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from schoolhouse import graders, memory
from schoolhouse.config import Exam, Recipe
from schoolhouse.data import ahead, formats, loader, plan, prepare, sources, turns
from schoolhouse.data.served import Served
from schoolhouse.data.store import Store
from schoolhouse.data.vision import Sight
from schoolhouse.errors import DataError, TemplateError
from schoolhouse.graders import Grader
from schoolhouse.model import attention, families, sight
from schoolhouse.model.load import Student
from schoolhouse.parallel import fsdp
from schoolhouse.types import Conversation, Message, Part, Picture


@dataclass(frozen=True, slots=True)
class Question:
    """One conversation of an exam, with the answers that the student writes."""

    conversation: Conversation
    """As the data has it: its own answers are the references."""
    written: tuple[int, ...]
    """Places of the messages that the student writes, in order; what it wrote is shown to it at the later ones."""
    graded: tuple[int, ...]
    """Those of them that are graded."""
    prompt: str
    """What is shown before the first of them."""
    prompt_ids: tuple[int, ...]
    images: tuple[Picture, ...] = ()
    """The images it shows."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the student wrote."""

    text: str
    tokens: int
    stopped: bool
    """It ended in a stop token, and not at the limit."""


UNANSWERED = Answer("", 0, stopped=False)
"""A turn that was not reached, because the template cannot show the student's earlier answers."""


@dataclass(slots=True)
class Played:
    """A conversation as far as it was played."""

    conversation: Conversation
    """With the student's answers in the place of the data's."""
    answers: dict[int, Answer]
    """By the place of their message."""


@torch.no_grad()
def validation(
    student: Student, store: Store, batch_tokens: int, seeing: Sight | None = None
) -> dict[str, Any]:
    """Loss and accuracy by the training equation: sums over every validation row once, divided once."""
    started = time.perf_counter()
    mesh = student.mesh
    sums = torch.zeros(4, dtype=torch.float64, device=student.device)
    every = plan.whole(store, batch_tokens, mesh.data_ranks, shares=not student.apart)
    packs = every[mesh.data_rank :: mesh.data_ranks]
    seen = loader.pixels(store, packs, seeing, len(store), student.device, mesh.seat)
    with _evaluating(student):
        for pack in packs:
            micro = loader.micro_batch(store, pack, seeing, next(seen), mesh.ulysses)
            loss = student.loss(micro)
            sums += torch.stack([loss.nll, loss.correct, loss.supervised, torch.full_like(sums[0], loss.tokens)])
            mesh.pulse.beat()
    nll, correct, supervised, tokens = mesh.sum(sums).tolist()
    return {
        "loss": nll / supervised, "accuracy": correct / tokens, "supervised_tokens": int(tokens),
        "seconds": time.perf_counter() - started,
    }


def questions(recipe: Recipe, served: Served, *, graded: bool = True) -> list[Question]:
    """The recipe's exam; raises, before anything is trained, DataError for a row that cannot be asked and, where
    answers will be `graded`, for one that no answer can meet, and ConfigError for a grader that is not there."""
    source = recipe.exam.data
    if source is None:
        return []
    if graded:
        graders.grader(recipe.exam.grader)
    settings, asked = prepare.row_settings(recipe.data, source), []
    for origin, row in sources.read(source):
        if isinstance(row, DataError):
            raise row
        conversation = formats.to_conversation(row, settings, origin)
        if conversation is not None:
            asked.append(_question(conversation, served, recipe.exam, graded=graded))
    if not asked:
        raise DataError(
            "the exam has no question", required="at least one row that becomes a conversation", where=source.path,
            remedy="check the rows and the function that reads them",
        )
    return asked


def _question(conversation: Conversation, served: Served, settings: Exam, *, graded: bool) -> Question:
    answers = [place for place, message in enumerate(conversation.messages) if message.role == "assistant"]
    if settings.turns == "last":
        written = compared = tuple(answers[-1:])
    else:
        written, compared = _every_turn(conversation, answers)
    shown = [served.seen_prompt(conversation, place) for place in written]  # all, so that a template refuses here
    for place in compared if graded else ():
        why = graders.unanswerable(settings.grader, conversation.messages[place].text)
        if why:
            raise DataError(
                f"the answer of this row {why}, so that none can be right by exam.grader={settings.grader}",
                required="references that the grader understands", where=f"{conversation.origin} (exam.data)",
                remedy="set exam.grader=exact or contains, or mend the row",
            )
    prompt, images = shown[0]
    return Question(conversation, written, compared, prompt, tuple(served.tokenize([prompt])[0]), images)


def _every_turn(conversation: Conversation, answers: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The answers that the student writes, which are all after the first question, and those that are graded."""
    messages = conversation.messages
    asked = min((place for place, message in enumerate(messages) if message.role == "user"), default=0)
    written = tuple(place for place in answers if place > asked)
    weighed = {place for place, _ in turns.taught(messages, "every")}
    graded = tuple(place for place in written if place in weighed)
    calling = next((place for place in written if messages[place].tool_calls), None)
    if calling is not None or not graded:
        raise DataError(
            "no answer of this conversation is graded" if calling is None
            else f"message {calling + 1} of this conversation calls a tool, and nobody would answer the student's",
            required="answers in words, at least one of them with a weight above 0",
            where=f"{conversation.origin} (exam.data)", remedy="leave the row out, or set exam.turns=last",
        )
    return written, graded


def exam(
    student: Student, served: Served, asked: Sequence[Question], grade: Grader, settings: Exam, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask every question: the score with its counts, and a record of each graded answer in the order of the rows."""
    started = time.perf_counter()
    samples: list[dict[str, Any]] = []
    for number, (question, played) in enumerate(zip(asked, play(student, served, asked, settings, seed), strict=True)):
        for place in question.graded:
            reference = question.conversation.messages[place].text
            answer = played.answers.get(place, UNANSWERED)
            mark = grade(answer.text, reference)
            samples.append({
                "index": len(samples), "conversation": number, "turn": place,
                "question": _shown(played.conversation.messages[:place]), "reference": reference,
                "answer": answer.text, "extracted": mark.extracted, "correct": mark.correct,
                "stopped": answer.stopped, "tokens": answer.tokens,
            })
    correct = sum(sample["correct"] for sample in samples)
    score = {
        "score": correct / len(samples), "correct": correct, "count": len(samples),
        "seconds": time.perf_counter() - started,
    }
    return score, samples


def play(
    student: Student, served: Served, asked: Sequence[Question], settings: Exam, seed: int
) -> list[Played]:
    """Let the student write its turns, one after another in each conversation and in all conversations together."""
    played = [Played(question.conversation, {}) for question in asked]
    for turn in range(max(len(question.written) for question in asked)):
        going = [
            (one, question.written[turn], prompt) for one, question in zip(played, asked, strict=True)
            if (prompt := _prompt(served, one, question.written[turn : turn + 1])) is not None
        ]
        prompts = served.tokenize([text for _, _, (text, _) in going])
        seen = [images for _, _, (_, images) in going]
        for (one, place, _), answer in zip(
            going, generate(student, served, prompts, settings, seed + turn, seen), strict=True
        ):
            one.conversation = _with_answer(one.conversation, place, answer)
            one.answers[place] = answer
    return played


def _prompt(served: Served, played: Played, places: Sequence[int]) -> tuple[str, tuple[Picture, ...]] | None:
    """What is shown before the message at the place, if there is one and the template can show what was written."""
    try:
        return served.seen_prompt(played.conversation, places[0]) if places else None
    except TemplateError:  # the data's own history was rendered before training: it is the student's that fails
        return None


def _with_answer(conversation: Conversation, place: int, answer: Answer) -> Conversation:
    """The conversation with the student's answer in the place of the data's."""
    messages = list(conversation.messages)
    messages[place] = Message("assistant", (Part("text", answer.text),))
    return dataclasses.replace(conversation, messages=tuple(messages))


@torch.no_grad()
def generate(
    student: Student, served: Served, prompts: Sequence[Sequence[int]], settings: Exam, seed: int,
    seen: Sequence[Sequence[Picture]] = (),
) -> list[Answer]:
    """An answer to each prompt (token ids) with the images it shows, many at a time with a key/value cache.

    Of several processes each holds all weights meanwhile and answers every so many of the batches. What is drawn in a
    batch depends on nothing but the seed and the batch, so the answers are the same on every layout.
    """
    mesh = student.mesh
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    batches = [by_length[start : start + settings.examples] for start in range(0, len(prompts), settings.examples)]
    mine: list[tuple[int, list[int]]] = []
    with _evaluating(student), _serving(student), fsdp.gathered(student), _own_draws(student.device):
        for number in range(mesh.rank, len(batches), mesh.world):
            chosen = batches[number]
            torch.manual_seed(seed + number)
            images = [picture for index in chosen if seen for picture in seen[index]]
            written = _generate_batch(student, served, [prompts[index] for index in chosen], images, settings)
            mine += zip(chosen, written, strict=True)
            mesh.pulse.beat()
    everyone = dict(pair for part in mesh.gather(mine) for pair in part)
    return [_answer(everyone[index], served) for index in range(len(prompts))]


def _own_draws(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Inside, draws on the processor and on this device leave those outside as they were."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device.index], device_type=device.type)


def _generate_batch(
    student: Student, served: Served, prompts: Sequence[Sequence[int]], images: Sequence[Picture], settings: Exam
) -> list[list[int]]:
    """New token ids of each prompt; prompts are padded on the left, so that all end at the same place."""
    longest = max(map(len, prompts))
    pad = served.stops.ids[0]
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=student.device)
    shown = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=ids.device)
    drawn = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if settings.temperature else {}
    written = student.model.generate(
        input_ids=ids, attention_mask=shown, max_new_tokens=settings.max_new_tokens, do_sample=bool(drawn),
        eos_token_id=list(served.stops.ids), pad_token_id=pad, synced_gpus=False, **drawn,
        **_images(student, served, images, ids),
    )
    return written[:, longest:].tolist()


def _images(
    student: Student, served: Served, images: Sequence[Picture], ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The images of a batch of prompts, as plain transformers is given them."""
    if not images or served.sight is None:
        return {}
    vision = ahead.vision(served.sight, images, ids.device, "an image of a prompt")
    return sight.own_inputs(student.model, vision, ids == served.sight.token)


def _answer(ids: list[int], served: Served) -> Answer:
    """The text of generated ids up to their first stop token."""
    end = next((place for place, token in enumerate(ids) if token in served.stops.ids), None)
    kept = ids[:end]
    return Answer(served.tokenizer.decode(kept, skip_special_tokens=True), len(kept), end is not None)


def _shown(messages: Sequence[Message]) -> list[dict[str, str]]:
    """The messages before an answer, for the record."""
    return [{"role": message.role, "content": message.text} for message in messages]


@contextlib.contextmanager
def _evaluating(student: Student) -> Iterator[None]:
    """Dropout off inside. What was freed is given back behind it: training makes matrices of other sizes."""
    training = student.model.training
    student.model.eval()
    try:
        yield
    finally:
        student.model.train(training)
        fsdp.rest(student)
        memory.give_back(student.device)


@contextlib.contextmanager
def _serving(student: Student) -> Iterator[None]:
    """An attention inside that knows a key/value cache and padding, and none of the model's own sampling settings."""
    own = student.model.generation_config
    sight.set_attention(student.model, families.serving_attention(student.model))
    student.model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        sight.attend(student.model, attention.NAME)
        student.model.generation_config = own

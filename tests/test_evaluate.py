"""Looking at a student: the loss as in training over each row once, and answers that are the student's own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_sft import plain_gradient
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from schoolhouse import evaluate, graders, places
from schoolhouse.config import Exam, Recipe
from schoolhouse.data import choose, plan, prepare, served
from schoolhouse.data.served import Served
from schoolhouse.data.store import Store
from schoolhouse.data.tokens import Stops
from schoolhouse.errors import DataError, TemplateError
from schoolhouse.model import attention, layouts
from schoolhouse.model.load import Student
from schoolhouse.types import Conversation, Message, Origin, Part

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}
FAMILIES = {
    "qwen3": {}, "llama": {}, "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6, "final_logit_softcapping": 300.0, "attn_logit_softcapping": 0.5},
}
GREEDY = Exam(max_new_tokens=12, examples=4)


@pytest.fixture(scope="module")
def model(cache: Path) -> Served:
    """The starter student's tokenizer, template and stop token."""
    recipe = recipe_of()
    return served.load(served.serving(recipe.model, places.model_directory(recipe.model.path)))


def recipe_of(**settings: object) -> Recipe:
    data = {"train": {"path": "starter/arithmetic", "limit": 24}, "workers": 1}
    return Recipe.model_validate({"model": "starter/qwen3", "data": data, **settings})


@pytest.fixture(scope="module")
def store(cache: Path) -> Store:
    recipe = recipe_of()
    serving = served.serving(recipe.model, places.model_directory(recipe.model.path))
    return prepare.prepare(recipe.data, choose.choices(recipe)["train"], serving, served.rules(recipe))


def student(family: str = "qwen3", **changes: Any) -> Student:
    """A miniature in float64 with weights large enough that it prefers some tokens clearly over others."""
    attention.register()
    settings = {**SMALL, **FAMILIES[family], "vocab_size": 1024, "eos_token_id": 2, "pad_token_id": 0, **changes}
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **settings)
    made = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=torch.float64).train()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return Student(made)


def prompts(number: int, seed: int = 0) -> list[list[int]]:
    """Token ids of very different lengths."""
    draw = np.random.default_rng(seed)
    return [draw.integers(5, 1024, int(length)).tolist() for length in draw.integers(1, 40, number)]


# The validation loss.


def test_validation_is_the_plain_loss_over_each_row_once(store: Store) -> None:
    """Float64 against one row at a time through transformers' own forward: sums in another order differ by 1e-12.

    Norms of the model are computed in float32 whatever its type, so 1e-7 of the loss is what two orders can agree to.
    """
    one = student()
    wanted, _ = plain_gradient(one.model, [store[index] for index in range(len(store))])
    found = evaluate.validation(one, store, 256)
    assert found["loss"] == pytest.approx(wanted, rel=1e-7)
    assert found["supervised_tokens"] == int(store.supervised_tokens.sum()) > 500


def test_validation_depends_on_no_packing(store: Store) -> None:
    one = student()
    results = [evaluate.validation(one, store, tokens) for tokens in (int(store.lengths.max()), 300, 100_000)]
    assert [one["loss"] for one in results[1:]] == pytest.approx([results[0]["loss"]] * 2, rel=1e-7)
    assert len({one["accuracy"] for one in results}) == 1


def test_validation_counts_right_answers(store: Store) -> None:
    """Accuracy is the share of supervised positions whose most likely token is the target, computed plainly."""
    one, right = student(), 0
    plain = student()
    plain.model.eval().set_attn_implementation("eager")
    for index in range(len(store)):
        logits = plain.model(input_ids=torch.tensor(store[index].input_ids[None].astype("int64"))).logits[0]
        hits = logits.argmax(1).numpy() == store[index].labels
        right += int(hits[store[index].weights != 0].sum())
    assert evaluate.validation(one, store, 300)["accuracy"] == right / int(store.supervised_tokens.sum())


def test_every_pack_is_a_sign_of_life(store: Store) -> None:
    """A long validation is no hang: the only collective stands at its end."""
    one, packs = student(), len(plan.whole(store, 256, 1, shares=True))
    beats = []
    object.__setattr__(one.mesh.pulse, "beat", lambda: beats.append(1))
    evaluate.validation(one, store, 256)
    assert len(beats) >= packs > 1


def test_looking_leaves_no_trace(store: Store, model: Served) -> None:
    """Weights, gradients, mode, attention and random numbers are as before: an exam cannot change what is trained."""
    one = student(attention_dropout=0.5)
    before = {name: value.clone() for name, value in one.model.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = evaluate.validation(one, store, 300)
    evaluate.generate(one, model, prompts(3), Exam(max_new_tokens=5, temperature=1.0), seed=0)
    assert evaluate.validation(one, store, 300)["loss"] == first["loss"], "dropout is off"
    assert torch.equal(state, torch.get_rng_state()) and one.model.training
    assert one.model.config._attn_implementation == attention.NAME
    assert all(parameter.grad is None for parameter in one.model.parameters())
    assert all(torch.equal(before[name], value) for name, value in one.model.state_dict().items())


# Written answers.


def plain_answer(one: Student, prompt: Sequence[int], tokens: int) -> list[int]:
    """The most likely token, again and again, by the forward that is trained; no cache, no padding, no batch."""
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            row = torch.tensor([ids])
            hidden = one.model.base_model(
                input_ids=row, attention_mask=None, position_ids=torch.arange(len(ids))[None], use_cache=False,
                layout=layouts.layout((0, len(ids)), row.device),
            ).last_hidden_state[0, -1]
        scores = (hidden @ one.head.weight.T).tolist()
        ids.append(int(np.argmax(scores)))
    return ids[len(prompt):]


def unstoppable(model: Served) -> Served:
    """Stop tokens that are never written, so that answers go on to the limit."""
    return dataclasses.replace(model, stops=Stops((1023,), ("never",)))


def ids_of(one: Student, model: Served, asked: Sequence[Sequence[int]], settings: Exam, seed: int = 0) -> list[str]:
    return [answer.text for answer in evaluate.generate(one, model, asked, settings, seed)]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_model_that_is_trained(family: str, model: Served) -> None:
    """Batched, padded on the left and with a cache, each prompt gets what the packed forward finds most likely."""
    one, asked, never = student(family), prompts(7), unstoppable(model)
    one.model.float()  # transformers' eager mask is the least float64, which its float32 softmax turns into NaN
    found = evaluate.generate(one, never, asked, GREEDY, seed=0)
    one.model.eval()
    wanted = [model.tokenizer.decode(plain_answer(one, prompt, 12), skip_special_tokens=True) for prompt in asked]
    assert [answer.text for answer in found] == wanted
    assert {(answer.tokens, answer.stopped) for answer in found} == {(12, False)}
    assert len(set(wanted)) > 3, "the answers must differ for the order to be seen"


def test_greedy_is_the_most_likely_token_whatever_the_model_ships(model: Served) -> None:
    """A model's own generation settings (Qwen2.5-Instruct: repetition penalty, top-k) do not enter the exam."""
    one, never = student(), unstoppable(model)
    plain = ids_of(one, never, prompts(5), GREEDY)
    for name, value in {
        "repetition_penalty": 5.0, "do_sample": True, "top_k": 3, "top_p": 0.1, "temperature": 9.0,
        "no_repeat_ngram_size": 1, "suppress_tokens": [7],
    }.items():
        setattr(one.model.generation_config, name, value)
    assert ids_of(one, never, prompts(5), GREEDY) == plain


@pytest.mark.parametrize("examples", [1, 2, 3, 64])
def test_the_number_answered_at_once_changes_nothing(examples: int, model: Served) -> None:
    one, asked = student(), prompts(6, seed=2)
    settings = Exam(max_new_tokens=10, examples=examples)
    alone = [ids_of(one, unstoppable(model), [prompt], settings)[0] for prompt in asked]
    assert ids_of(one, unstoppable(model), asked, settings) == alone


def test_an_answer_ends_at_its_first_stop_token(model: Served) -> None:
    """The text before it, without it, counted without it; another prompt of the batch goes on."""
    one, asked = student(), prompts(5)
    written = [plain_answer(one.model.eval() and one, prompt, 12) for prompt in asked]
    stop = next(token for token in written[0] if written[0].index(token) > 2)
    stopping = dataclasses.replace(model, stops=Stops((stop, 1023), ("stop", "never")))
    for ids, answer in zip(written, evaluate.generate(one, stopping, asked, GREEDY, seed=0), strict=True):
        end = ids.index(stop) if stop in ids else 12
        assert (answer.tokens, answer.stopped) == (end, stop in ids)
        assert answer.text == model.tokenizer.decode(ids[:end], skip_special_tokens=True)


def test_drawn_answers_depend_on_the_seed_alone(model: Served) -> None:
    """The same seed, the same answers, whatever was drawn before; another seed, others."""
    one, asked = student(), prompts(6)
    drawn = Exam(max_new_tokens=12, temperature=1.5, examples=4)
    first = ids_of(one, unstoppable(model), asked, drawn, seed=3)
    torch.rand(17)
    assert ids_of(one, unstoppable(model), asked, drawn, seed=3) == first
    assert ids_of(one, unstoppable(model), asked, drawn, seed=4) != first
    cold = Exam(max_new_tokens=12, temperature=1e-4, examples=4)
    assert ids_of(one, unstoppable(model), asked, cold, seed=3) == ids_of(one, unstoppable(model), asked, GREEDY)


class Largest(TorchDispatchMode):
    """Remembers the most values that any tensor made inside held."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.values = max([self.values, *sizes])
        return made


def test_neither_exam_nor_validation_makes_full_logits(model: Served, store: Store) -> None:
    """Of a prompt only the last position meets the vocabulary, of a row only supervised ones, a chunk at a time."""
    one = student()
    with Largest() as largest:
        evaluate.generate(one, model, [[7] * 300] * 4, Exam(max_new_tokens=2), seed=0)
    assert largest.values < 4 * 300 * 1024 / 4
    with Largest() as plain, torch.no_grad():
        one.model.eval().set_attn_implementation("sdpa")
        one.model(input_ids=torch.full((4, 300), 7))
    assert plain.values >= 4 * 300 * 1024, "the measure would see them"


# The exam.


def test_an_exam_is_graded_in_the_order_of_its_questions(model: Served) -> None:
    """Counts, shares and samples belong together, and each sample says what was asked, written and compared."""
    source = {"path": "starter/arithmetic:exam", "limit": 9}
    recipe = recipe_of(exam={"data": source, "max_new_tokens": 6, "examples": 4})
    asked = evaluate.questions(recipe, model)
    one = student()
    score, samples = evaluate.exam(one, model, asked, even_length, recipe.exam, seed=0)
    right = [len(sample["answer"]) % 2 == 0 for sample in samples]
    assert [sample["correct"] for sample in samples] == right and 0 < sum(right) < 9
    assert (score["correct"], score["count"], score["score"]) == (sum(right), 9, sum(right) / 9)
    assert [sample["index"] for sample in samples] == list(range(9))
    alone = evaluate.generate(one, model, [question.prompt_ids for question in asked], recipe.exam, seed=0)
    for sample, question, answer in zip(samples, asked, alone, strict=True):
        assert sample["question"] == [{"role": "user", "content": question.conversation.messages[0].text}]
        assert (sample["reference"], sample["answer"]) == (question.conversation.messages[1].text, answer.text)
        assert (sample["conversation"], sample["turn"]) == (sample["index"], 1)
        assert sample["tokens"] == answer.tokens
        assert sample["extracted"] == "seen" and sample["stopped"] == answer.stopped
    assert json.loads(json.dumps(samples)) == samples


def even_length(answer: str, reference: str) -> graders.Grade:
    """A grader that an untrained student sometimes satisfies."""
    return graders.Grade(len(answer) % 2 == 0, "seen")


def test_questions_are_shown_as_training_shows_them(model: Served) -> None:
    """The prompt of a question is, token for token, what stands before the answer in a training example of the row."""
    recipe = recipe_of(exam={"data": {"path": "starter/arithmetic", "limit": 24}})
    asked = evaluate.questions(recipe, model)
    rows = prepare.rows_of(recipe.data, choose.choices(recipe)["train"])
    for question, (settings, (origin, row)) in zip(asked, rows, strict=True):
        example = model.encode(row, settings, origin, served.rules(recipe)).examples[0]
        first = int(example.weights.nonzero()[0][0])
        assert list(question.prompt_ids) == example.input_ids[: first + 1].tolist()
        assert question.conversation.messages[question.graded[0]].text == row["answer"]


def questions_of(path: Path, rows: list[dict[str, Any]], model: Served) -> list[evaluate.Question]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return evaluate.questions(recipe_of(exam={"data": str(path), "grader": "exact"}), model)


def test_the_last_answer_of_a_conversation_is_the_reference(tmp_path: Path, model: Served) -> None:
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    asked = questions_of(tmp_path / "exam.jsonl", [{"messages": turns}], model)[0]
    assert asked.written == asked.graded == (3,)
    assert asked.prompt.count("b") == 1 and "d" not in asked.prompt.split("c")[1][:1]
    shown = Conversation(tuple(Message(one["role"], (Part("text", one["content"]),)) for one in turns), Origin("x", 1))
    assert asked.prompt == model.prompt(shown, 3)


@pytest.mark.parametrize("row", [
    {"messages": [{"role": "user", "content": "a question without an answer"}]}, {"question": "no answer"}, {"x": 1},
])
def test_a_row_that_is_no_question_is_named(tmp_path: Path, model: Served, row: dict[str, Any]) -> None:
    """Exit 3 with the row's place, not a traceback after the first steps of training."""
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = [good if "messages" in row else {"question": "a", "answer": "b"}, row]
    with pytest.raises(DataError) as caught:
        questions_of(tmp_path / "exam.jsonl", rows, model)
    assert "exam.jsonl:2" in caught.value.where


def test_no_exam_no_questions(model: Served) -> None:
    assert evaluate.questions(recipe_of(), model) == []


# The exam that is played turn by turn.


def talk(*weights: float | None) -> dict[str, Any]:
    """A conversation of as many turns as there are weights of its answers."""
    messages: list[dict[str, Any]] = []
    for number, weight in enumerate(weights):
        marked = {} if weight is None else {"weight": weight}
        messages += [{"role": "user", "content": f"{number} apples"}, {"role": "assistant", "content": "yes", **marked}]
    return {"messages": messages}


def exam_of(path: Path, rows: list[dict[str, Any]], **settings: Any) -> Recipe:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe_of(exam={"data": str(path), "turns": "every", "grader": "exact", "max_new_tokens": 5, **settings})


def test_a_played_conversation_holds_the_students_own_answers(tmp_path: Path, model: Served) -> None:
    """Against the plainest player: one conversation at a time, the whole history rendered and answered anew."""
    rows = [talk(None, None, None), talk(None), talk(None, None), {"messages": talk(None, None)["messages"][1:]}]
    recipe, one = exam_of(tmp_path / "exam.jsonl", rows, examples=3), student()
    asked = evaluate.questions(recipe, model)
    _, samples = evaluate.exam(one, model, asked, even_length, recipe.exam, seed=0)
    wanted = []
    for number, row in enumerate(rows):
        history: list[Message] = []
        for place, message in enumerate(row["messages"]):
            if message["role"] == "assistant" and place:
                prompt = model.prompt(Conversation(tuple(history), Origin("x", 1)), place)
                ids = model.tokenize([prompt])
                said = evaluate.generate(one, model, ids, recipe.exam, seed=0)[0].text
                wanted.append((number, place, [(one.role, one.text) for one in history], said))
                history.append(Message("assistant", (Part("text", said),)))
            else:
                history.append(Message(message["role"], (Part("text", message["content"]),)))
    found = [
        (one["conversation"], one["turn"], [(said["role"], said["content"]) for said in one["question"]], one["answer"])
        for one in samples
    ]
    assert found == wanted and len(found) == 7
    assert len({answer for *_, answer in found} | {"yes"}) > 2, "the student says its own words"


def test_only_marked_answers_of_a_played_conversation_are_graded(tmp_path: Path, model: Served) -> None:
    recipe = exam_of(tmp_path / "exam.jsonl", [talk(0, None, 0, 1.0), talk(1, 0)])
    asked = evaluate.questions(recipe, model)
    assert [(one.written, one.graded) for one in asked] == [((1, 3, 5, 7), (3, 7)), ((1, 3), (1,))]
    score, samples = evaluate.exam(student(), model, asked, even_length, recipe.exam, seed=0)
    assert [(one["conversation"], one["turn"], one["index"]) for one in samples] == [(0, 3, 0), (0, 7, 1), (1, 1, 2)]
    assert score["count"] == 3 and json.loads(json.dumps(samples)) == samples


def test_the_first_prompt_of_a_played_conversation_is_the_one_trained(tmp_path: Path, model: Served) -> None:
    recipe = exam_of(tmp_path / "exam.jsonl", [talk(None, None)])
    asked = evaluate.questions(recipe, model)[0]
    row = model.encode(talk(None, None), recipe.data, Origin("x", 1), served.rules(recipe))
    assert asked.prompt == row.turns[0].prompt and list(asked.prompt_ids) == model.tokenize([asked.prompt])[0]


def test_a_turn_that_the_template_cannot_show_is_wrong_not_a_crash(tmp_path: Path, model: Served) -> None:
    """After hours of training the last exam must not stop the run because of what the student wrote."""
    class Picky:
        template = model.template

        def __getattr__(self, name: str) -> Any:
            return {"tokenize": model.tokenize, "stops": model.stops, "tokenizer": model.tokenizer}[name]

        def seen_prompt(self, conversation: Conversation, place: int) -> tuple[str, tuple]:
            if any(one.role == "assistant" and one.text != "yes" for one in conversation.messages[:place]):
                raise TemplateError("no", required="yes", where="x:1", remedy="none")
            return model.seen_prompt(conversation, place)

    recipe = exam_of(tmp_path / "exam.jsonl", [talk(None, None, None)])
    asked = evaluate.questions(recipe, Picky())
    _, samples = evaluate.exam(student(), Picky(), asked, graders.exact, recipe.exam, seed=0)
    assert [one["answer"] for one in samples[1:]] == ["", ""] and samples[0]["answer"]
    assert not any(one["correct"] or one["stopped"] for one in samples[1:])


@pytest.mark.parametrize("messages", [
    talk(0, 0)["messages"],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
     {"role": "tool", "tool_call_id": "1", "content": "b"}, {"role": "assistant", "content": "c"}],
], ids=["nothing graded", "tools"])
def test_a_conversation_that_cannot_be_played_is_refused_by_name(
    tmp_path: Path, model: Served, messages: list[dict[str, Any]]
) -> None:
    recipe = exam_of(tmp_path / "exam.jsonl", [talk(None), {"messages": messages}])
    with pytest.raises(DataError, match=r"is graded|calls a tool") as caught:
        evaluate.questions(recipe, model)
    assert "exam.jsonl:2" in caught.value.where


def test_drawn_answers_of_a_played_exam_are_the_same_again(tmp_path: Path, model: Served) -> None:
    recipe, one = exam_of(tmp_path / "exam.jsonl", [talk(None, None)] * 3, temperature=1.0), student()
    asked = evaluate.questions(recipe, model)
    first, second, other = (evaluate.exam(one, model, asked, even_length, recipe.exam, seed)[1] for seed in (0, 0, 1))
    assert first == second != other


@pytest.mark.parametrize(("reference", "grader", "fine"), [
    ("4", "gsm8k", False), ("#### four", "gsm8k", False), ("2 + 2 = 4\n#### 4", "gsm8k", True), ("4", "exact", True),
])
def test_a_reference_that_no_answer_can_meet_is_refused(
    reference: str, grader: str, fine: bool, tmp_path: Path, model: Served
) -> None:
    """Else every exam of the run would say 0 %."""
    path = tmp_path / "exam.jsonl"
    path.write_text(json.dumps({"question": "2 + 2?", "answer": reference}) + "\n")
    recipe = recipe_of(exam={"data": str(path), "grader": grader})
    if fine:
        assert len(evaluate.questions(recipe, model)) == 1
        return
    with pytest.raises(DataError, match="exact or contains") as caught:
        evaluate.questions(recipe, model)
    assert "exam.jsonl:1" in caught.value.where

"""The students: ordinary Hugging Face directories, the same each time they are made, that can learn."""

import hashlib
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

from schoolhouse.errors import ConfigError
from schoolhouse.starter import lessons, students

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": "6"},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    place = tmp_path_factory.mktemp("student")
    students.build("qwen3", place)
    return place


@pytest.fixture(scope="module")
def tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def model(directory):
    return AutoModelForCausalLM.from_pretrained(directory)


def digests(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def test_the_directory_holds_the_usual_files_and_nothing_else(directory):
    assert {path.name for path in directory.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }


def test_a_rebuild_is_bit_identical_and_leaves_the_callers_random_numbers_alone(directory, tmp_path):
    torch.manual_seed(1234)
    before = torch.random.get_rng_state()
    with torch.device("meta"):  # as a caller that loads large models may have set it
        students.build("qwen3", tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert digests(tmp_path) == digests(directory)


def test_plain_transformers_loads_it_whole(directory):
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert 800_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 1_500_000


def test_the_tokenizer_loads_as_it_was_made(directory, tokenizer):
    made = json.loads((directory / "tokenizer.json").read_text())
    assert json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] == made["pre_tokenizer"]
    text = "Mia has 47+38 = <<47+38=85>>85 apples.\n#### 85"
    assert tokenizer(text)["input_ids"] == students._tokenizer({}, "qwen3")(text)["input_ids"]


def test_answers_end_at_the_end_of_the_turn(directory, model, tokenizer):
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id == end
    assert model.generation_config.pad_token_id == model.config.pad_token_id == tokenizer.pad_token_id == pad
    assert end != pad
    assert tokenizer.bos_token_id is None
    assert model.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("token", ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "user\n"])
def test_marks_are_one_token(tokenizer, token):
    assert len(tokenizer(token)["input_ids"]) == 1


def test_thinking_marks_stay_in_decoded_text_and_turn_marks_go(tokenizer):
    ids = tokenizer("<|im_start|><think>a</think><|im_end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a</think>"


def test_no_token_joins_a_digit_to_anything(tokenizer):
    written = {token: tokenizer.decode([index]) for token, index in tokenizer.get_vocab().items()}
    assert sorted(text for text in written.values() if re.search(r"\d", text)) == list("0123456789")


@given(st.integers(min_value=0, max_value=10**30), st.text(max_size=5), st.text(max_size=5))
@settings(deadline=None, max_examples=100)
def test_each_digit_is_a_token_wherever_it_stands(tokenizer, number, before, after):
    tokens = [tokenizer.decode([index]) for index in tokenizer(f"{before}{number}{after}")["input_ids"]]
    assert "".join(token for token in tokens if token in list("0123456789")).find(str(number)) >= 0


@given(st.text())
@settings(deadline=None, max_examples=300)
def test_no_character_is_ever_lost(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@given(st.text(alphabet=" \n\t\r.$<=>#é£中🙂a1", max_size=40))
@settings(deadline=None, max_examples=300)
def test_no_blank_is_ever_lost(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_lesson_is_written_in_few_tokens(tokenizer):
    lengths = []
    for row in lessons.rows("arithmetic", "exam"):
        turn = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        lengths.append(len(tokenizer(tokenizer.apply_chat_template(turn, tokenize=False))["input_ids"]))
    assert sum(lengths) / len(lengths) < 80
    assert max(lengths) < 140


def test_the_template_writes_chatml(tokenizer):
    assert tokenizer.apply_chat_template(TALK[:3], tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
        "<|im_start|>assistant\n4<|im_end|>\n"
    )


def test_every_prompt_is_a_prefix_of_what_follows(tokenizer):
    full = tokenizer.apply_chat_template(TALK, tokenize=False)
    for index in (2, 4):
        prompt = tokenizer.apply_chat_template(TALK[:index], tokenize=False, add_generation_prompt=True)
        assert prompt.endswith("<|im_start|>assistant\n")
        assert full.startswith(prompt + TALK[index]["content"] + "<|im_end|>")


def test_the_template_keeps_reasoning_and_refuses_what_it_cannot_write(tokenizer):
    answer = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
    assert tokenizer.apply_chat_template([TALK[1], answer], tokenize=False).endswith(
        "<|im_start|>assistant\n<think>\n2 and 2\n</think>\n\n4<|im_end|>\n"
    )
    with pytest.raises(TemplateError, match="no role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "4"}], tokenize=False)


def test_it_learns_four_problems_by_heart(directory, tokenizer):
    """Sixty plain steps from random weights; the answers are then written without a fault, to their stop token."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    rows = [row for _, row in zip(range(4), lessons.rows("arithmetic", "train"), strict=False)]
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": row["question"]}], tokenize=False,
                                             add_generation_prompt=True) for row in rows]
    pairs = [(tokenizer(prompt)["input_ids"], tokenizer(row["answer"] + "<|im_end|>")["input_ids"])
             for prompt, row in zip(prompts, rows, strict=True)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        for prompt, answer in pairs:
            labels = torch.tensor([[-100] * len(prompt) + answer])
            model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for prompt, answer in pairs:
        written = model.generate(torch.tensor([prompt]), max_new_tokens=100, do_sample=False)[0, len(prompt):]
        assert written.tolist() == answer


def test_the_fingerprint_follows_everything_that_decides_the_student(monkeypatch, tmp_path):
    first = students.fingerprint("qwen3")
    assert first == students.fingerprint("qwen3")
    seen = {first}
    with monkeypatch.context() as patch:
        patch.setattr(lessons, "fingerprint", lambda name, split: "other rows")
        seen.add(students.fingerprint("qwen3"))
    with monkeypatch.context() as patch:
        (tmp_path / "chat_template.jinja").write_text("other template")
        patch.setattr(students, "_TEMPLATE", tmp_path / "chat_template.jinja")
        seen.add(students.fingerprint("qwen3"))
    with monkeypatch.context() as patch:
        patch.setattr(students, "version", lambda library: "0.0")
        seen.add(students.fingerprint("qwen3"))
    assert len(seen) == 4


@pytest.mark.parametrize("ask", [students.fingerprint, lambda name: students.build(name, None)])
def test_a_wrong_name_is_answered_with_the_nearest(ask):
    with pytest.raises(ConfigError, match="did you mean `starter/qwen3`") as caught:
        ask("qwen")
    assert caught.value.exit_code == 2

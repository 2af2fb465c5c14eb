"""The throughput benchmark's arithmetic on recorded numbers, and the recipe it hands to us; TRL is not needed."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

from schoolhouse import recipe as recipes

PLACE = Path(__file__).parents[2] / "benchmarks" / "throughput.py"


@pytest.fixture(scope="module")
def throughput() -> ModuleType:
    """The command as a module; `benchmarks` is no package."""
    sys.path.insert(0, str(PLACE.parent))
    spec = importlib.util.spec_from_file_location("throughput", PLACE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["throughput"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["throughput"]
    sys.path.remove(str(PLACE.parent))


def measurement(throughput: ModuleType, seconds: list[float], peak: float, supervised: int = 400):
    """Steps of 1,000 tokens that took `seconds` each."""
    steps = [{"seconds": one, "tokens": 1000, "supervised_tokens": supervised, "loss": 2.0} for one in seconds]
    return throughput.Measurement(baseline_mib=300.0, peak_mib=peak, others=0.0, steps=tuple(steps))


def options_of(**changes: object) -> Namespace:
    """As the command line has them where nothing is said."""
    return Namespace(**{"examples": 32, "tokens": 2048, "device": "cpu", "size": "small", "lora": None,
                        "recompute": False, "length": None, "precision": "float32"} | changes)


def recorded(throughput: ModuleType) -> dict:
    """Ours and two of TRL's layouts, three turns each; one turn of each was disturbed."""
    ours = throughput.Contender("schoolhouse", "packed:2048", "float32")
    padded, packed = (throughput.Contender("TRL", layout, "float32") for layout in ("padded:4", "packed:0"))

    def turns(step: float, peak: float) -> list:
        calm, slow = [50.0, 50.0, step, step, 100 * step], [50.0, 50.0, 10 * step, 10 * step, 10 * step]
        return [measurement(throughput, seconds, peak) for seconds in (calm, slow, calm)]

    return {ours: turns(0.25, 500.0), padded: turns(0.5, 800.0), packed: turns(1.0, 700.0)}


def test_warm_up_and_disturbed_steps_do_not_count(throughput):
    found = measurement(throughput, [99.0, 99.0, 0.5, 0.5, 30.0], 500.0)
    assert found.rate("tokens") == 2000
    assert found.rate("supervised_tokens") == 800
    assert found.loss == 2.0


def test_ratios_are_of_medians_over_turns(throughput):
    ratios = {contender.layout: values for contender, values in throughput.ratios(recorded(throughput)).items()}
    assert ratios["padded:4"] == {
        "tokens/s": 2.0, "supervised/s": 2.0, "peak MiB": pytest.approx(0.625), "above imports": pytest.approx(0.4)
    }
    assert ratios["packed:0"]["tokens/s"] == 4.0


def test_the_verdict_is_against_the_fastest_of_theirs(throughput):
    text = throughput.report(recorded(throughput))
    assert text.splitlines()[-1] == (
        "against the fastest (TRL padded:4 float32): 2.00 x tokens/s, 0.62 x peak memory (0.40 x above the imports)"
    )
    assert "schoolhouse packed:2048 float32          4,000          1,600" in text


def test_other_supervised_tokens_are_named(throughput):
    turns = recorded(throughput)
    equal = throughput.unequal(turns, {"supervised_tokens": 2000})
    assert equal[0] == "supervised tokens of schoolhouse packed:2048 float32: all 2,000"
    assert "NOT EQUAL: [2000] of 2,001" in throughput.unequal(turns, {"supervised_tokens": 2001})[0]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_our_recipe_validates(throughput, tmp_path, precision):
    options = options_of(precision=precision)
    page = tmp_path / "recipe.yaml"
    page.write_text(throughput.inputs.recipe(options, tmp_path))
    recipe = recipes.read(page, [f"directory={tmp_path / 'run'}"])
    assert recipe.model.precision == precision
    assert (recipe.batch.examples, recipe.batch.tokens, recipe.train.epochs) == (32, 2048, 1)
    assert (recipe.optim.schedule, recipe.optim.warmup, recipe.optim.clip) == ("constant", 0.0, 1.0)
    assert recipe.validation.every == 0 and recipe.data.validation is None and recipe.exam.data is None


def test_trl_is_started_with_what_its_worker_knows(throughput, tmp_path):
    options = options_of(steps=8)
    command = throughput.peer_command(throughput.Contender("TRL", "packed:1024", "autocast"), options, tmp_path)
    named = dict(zip(command[2::2], command[3::2], strict=True))
    worker = PLACE.with_name("_peer.py").read_text()
    assert named["--layout"] == "packed" and named["--size"] == "1024" and named["--numbers"] == "autocast"
    assert all(f'"{option}"' in worker for option in named)


def test_a_command_reports_its_memory(throughput):
    options = Namespace(threads=1, patience=0.0)
    finished = throughput.run([sys.executable, "-c", f"print(len(bytearray({2**27})))"], options)
    assert finished.output == f"{2**27}\n"
    assert finished.peak_mib > 128 and 0 <= finished.others <= 1


def test_a_command_that_fails_ends_the_benchmark_with_its_words(throughput):
    with pytest.raises(throughput.Failed, match="no such thing"):
        throughput.run([sys.executable, "-c", "raise SystemExit('no such thing')"], Namespace(threads=1, patience=0.0))


@pytest.mark.parametrize(("size", "parameters"), [
    ("qwen2.5-0.5b", 494_032_768), ("qwen3-8b", 8_190_735_360), ("qwen3-vl-2b", 2_127_532_032),
])
def test_sizes_are_those_of_the_models_they_are_named_after(throughput, size, parameters):
    """By their number of weights, as the hub tells it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    family = AutoModelForImageTextToText if size in throughput.inputs.SEE else AutoModelForCausalLM
    with torch.device("meta"):
        model = family.from_config(AutoConfig.for_model(**throughput.inputs.SIZES[size]))
    assert sum(one.numel() for one in model.parameters()) == parameters


def test_rows_are_joined_to_examples_of_nearly_a_length(throughput):
    options = options_of(length=700, rows=None, tokenizer=None, vocabulary=4096)
    tokenizer = throughput.inputs.cut_tokenizer(options)
    rows = itertools.islice(throughput.inputs.long_rows(options, tokenizer), 20)
    lengths = [len(throughput.inputs.encode(tokenizer, row)["input_ids"]) for row in rows]
    assert max(lengths) <= 702 and min(lengths) > 550, lengths  # a stop token; a row that did not fit any more


def test_a_peer_that_fails_is_left_out(throughput, monkeypatch, tmp_path, capsys):
    ours = throughput.Contender("schoolhouse", "packed:2048", "float32")
    theirs = [throughput.Contender("TRL", layout, "float32") for layout in ("padded:4", "padded:8")]
    seen = []

    def fails(contender, *_):
        seen.append(contender)
        if contender.layout == "padded:8":
            raise throughput.Failed("a command\nended with 1:\ntorch.OutOfMemoryError: CUDA out of memory")
        return measurement(throughput, [1.0] * 3, 1.0)

    monkeypatch.setattr(throughput, "schoolhouse", fails)
    monkeypatch.setattr(throughput, "peer", fails)
    turns = throughput.alternate([ours, *theirs], options_of(rounds=2), tmp_path)
    assert list(turns) == [ours, theirs[0]] and len(turns[ours]) == 2 and seen.count(theirs[1]) == 1
    assert "TRL padded:8 float32: left out: torch.OutOfMemoryError: CUDA out of memory" in capsys.readouterr().out
    broken = throughput.Contender("schoolhouse", "padded:8", "float32")
    with pytest.raises(throughput.Failed):
        throughput.alternate([broken], options_of(rounds=1), tmp_path)


def test_mfu_of_a_peer_is_in_proportion(throughput):
    turns = recorded(throughput)
    assert throughput.mfus(turns) == []
    ours = next(iter(turns))
    told = [{**step, "mfu": 0.5} for step in turns[ours][0].steps]
    turns[ours] = [throughput.Measurement(300.0, 500.0, 0.0, tuple(told))] * 3
    assert throughput.report(turns).splitlines()[-1] == "MFU: schoolhouse 0.500, TRL padded:4 float32 0.250"


@pytest.mark.parametrize(("program", "layout", "why"), [
    ("TRL", "padded:4", ""), ("TRL", "packed:0+liger", ""), ("Trainer", "padded:8", ""),
    ("Trainer", "packed:1024", "Trainer pads"), ("TRL", "padded:3", "32 examples"), ("TRL", "padded:64", "32 examples"),
    ("TRL", "padded", "a layout is"), ("TRL", "paded:4", "a layout is"), ("TRL", "padding_free:0", "32 examples"),
])
def test_layouts_that_would_compare_something_else_are_refused(throughput, program, layout, why):
    found = throughput.misfit(program, layout, 32)
    assert why in found and bool(why) == bool(found)


def test_a_layout_whose_examples_see_one_another_is_left_out_even_if_named(throughput, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(throughput, "leaks", lambda kind, numbers, *_: kind == "packed")
    found = throughput.named("TRL", ["padded:4", "packed:512", "padding_free:4"], options_of(), tmp_path)
    assert [one.layout for one in found] == ["padded:4", "padding_free:4"]
    assert "TRL packed:512 float32: left out" in capsys.readouterr().out

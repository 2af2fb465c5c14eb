"""Rows that a template makes several examples of, all the way: what they begin with is planned and computed once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_regressions import store_of

from schoolhouse import cli, fitting
from schoolhouse import recipe as recipes
from schoolhouse.data import loader
from schoolhouse.data import plan as plans
from schoolhouse.data.plan import Plan
from schoolhouse.data.store import Store

TEMPLATE = (
    "{% for one in messages %}<|im_start|>{{ one.role }}\n{% if one.role == 'assistant' and loop.last %}<think>\n\n"
    "</think>\n\n{% endif %}{{ one.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""What it shows of an answer it no longer shows once another turn follows, as templates of thinking models do."""
TOKENS = 500


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    place = tmp_path_factory.mktemp("split")
    (place / "history.jinja").write_text(TEMPLATE)
    path = place / "recipe.yaml"
    path.write_text(
        f"model: {{path: starter/qwen3, chat_template: {place / 'history.jinja'}}}\ndirectory: {place / 'run'}\n"
        "data: {train: {path: starter/recall, limit: 30}, validation: {path: starter/recall:validation, limit: 5}, "
        f"workers: 1}}\nbatch: {{examples: 24, tokens: {TOKENS}}}\ntrain: {{steps: 3}}\n"
    )
    return path


@pytest.fixture(scope="module")
def store(page: Path) -> Store:
    return store_of(page)


def test_what_a_row_shares_is_stored(store: Store) -> None:
    """Each example begins with what the one before it in its row does, but for its own answer."""
    assert store.ledger.verdicts == {"split": 30} and len(store) > 60
    for one in range(len(store)):
        ids, _, weights = store.tokens(one)
        if one == 0 or store.origin(one) != store.origin(one - 1):
            assert store.shared[one] == 0
            continue
        before = store.tokens(one - 1)[0]
        size = int(store.shared[one])
        assert np.array_equal(ids[:size], before[:size]) and size > len(before) / 3
        assert ids[size] != before[size] and not weights[:size].any()


@pytest.mark.parametrize("ranks", [1, 2])
def test_packs_hold_what_is_computed_at_a_time(page: Path, store: Store, ranks: int) -> None:
    """More than would fit, if every token were computed; and what the plan counts on is always found."""
    plan = plans.plan(store, recipes.read(page), ranks)
    whole = []
    for pack in plan.step(1).packs:
        micro = loader.micro_batch(store, pack)
        planned = plan.lengths[list(pack)].sum() - plan.shared(np.asarray(pack)).sum()
        computed = len(pack) if micro.shared is None else len(micro.shared.kept)
        assert micro.shared is not None and computed <= planned <= TOKENS
        whole.append(micro.boundaries[-1])
    assert max(whole) > TOKENS


def weight(plan: Plan, pack: tuple[int, ...], *, together: bool = True) -> tuple[int, int, int]:
    """Tokens of a pack that are computed, by what the plan counts on; all; and supervised ones."""
    chosen = np.asarray(pack)
    spared = plan.shared(chosen).sum() if together else 0
    return tuple(int(one) for one in (plan.lengths[chosen].sum() - spared, plan.lengths[chosen].sum(),
                                      plan.supervised_tokens[chosen].sum()))


def rows_of(number: int, lengths: list[int], shared: list[int], examples: int, tokens: int) -> Plan:
    """Many rows that were split alike; every example has a hundred targets."""
    sizes, split = np.tile(lengths, number), plans.Split(np.arange(number) * len(lengths), np.tile(shared, number))
    return Plan(sizes, np.ones(len(sizes)), np.full(len(sizes), 100), examples, tokens, 0, split=split)


HISTORY = [0, *range(300, 6000, 300)]
PLANS = {
    "rows longer than what fits": rows_of(40, [600, 900, 1200, 1500, 1800], HISTORY[:5], 8, 6400),
    "rows of more examples than a step": rows_of(40, [one + 300 for one in HISTORY], HISTORY, 8, 13000),
    "longer thoughts earlier": rows_of(10, [4000, 3900], [0, 3000], 16, 8000),
    "short beside long": rows_of(30, [100, 3000, 3050, 3100], [0, 60, 2990, 3040], 10, 3600),
}


@pytest.mark.parametrize("name", PLANS)
def test_f14_no_step_is_heavier_than_what_is_rehearsed(name: str) -> None:
    """Of what is computed, attended to and supervised; examples share nothing but where they lie together."""
    plan = PLANS[name]
    none = np.zeros(len(plan.lengths))
    rehearsed = [weight(plan, pack, together=False) for pack in fitting.heaviest_packs(plan, none)]
    rehearsed += [weight(plan, pack) for pack in fitting.heaviest_together(plan)]
    met = [weight(plan, pack) for index in range(1, 4 * plan.steps_per_epoch) for pack in plan.step(index).packs]
    assert all(computed <= plan.tokens for computed, *_ in rehearsed + met)
    for kind in range(3):
        assert max(one[kind] for one in rehearsed) >= 0.95 * max(one[kind] for one in met), (kind, "filled in turn")


def test_what_is_rehearsed_is_what_was_chosen(page: Path, store: Store) -> None:
    """Examples apart share nothing, even where they stand one behind the other; those together what is planned."""
    plan, met = plans.plan(store, recipes.read(page)), []
    for pack in fitting.heaviest_together(plan):
        micro = loader.as_planned(store, loader.micro_batch(store, pack))
        assert (len(micro.shared.kept), micro.boundaries[-1]) == weight(plan, pack)[:2]
        met.append(len(micro.shared.kept))
    assert TOKENS - int(store.lengths.min()) < max(met) <= TOKENS


def test_a_run_computes_little_more_than_its_rows(page: Path, cache: Path) -> None:
    """The steps of a run, and its validation; the table of what is in force says so."""
    cli.main(["run", str(page)])
    run = page.parent / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [one for one in lines if one["kind"] == "step"]
    assert len(steps) == 3 and all(one["computed_tokens"] < 0.6 * one["tokens"] for one in steps)
    in_force = {row["what"]: row["value"] for row in json.loads((run / "run.json").read_text())["in_force"]}
    assert in_force["shared prefixes"] == "what several examples of a micro-batch begin with is computed once"


@pytest.mark.parametrize("words", [(), ("--nproc", "2", "parallel.ulysses=2"), ("--nproc", "2", "parallel.shard=2")],
                         ids=["alone", "ulysses", "shards"])
def test_the_step_is_that_of_plain_transformers(page: Path, words: tuple[str, ...]) -> None:
    """`selfcheck`: one example at a time, by the model's own forward."""
    command = [sys.executable, "-m", "schoolhouse", "selfcheck", str(page), "--rows", "6", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agrees") == 14 and "differs" not in done.stdout


def test_the_overview_says_what_splitting_costs(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["check", str(page), "--json"])
    found = json.loads(capsys.readouterr().out)["train"]
    assert found["split_cost"] > 2 > found["computed_cost"] >= 1
    cli.main(["check", str(page)])
    assert f"{found['computed_cost']:.2f} where what they begin with is computed once" in " ".join(
        capsys.readouterr().out.split())

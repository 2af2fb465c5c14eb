"""Blocks that are computed again in backward: not a bit changes, whatever of them is kept or lies in host memory.

Copies go through streams that do nothing until they are waited for, so that what is used too soon, or given up before
it was copied, shows on a processor as it would on a GPU.
"""

from __future__ import annotations

import collections
import gc
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import adapters, student
from test_invariance import PACKS, a_step, examples
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from schoolhouse import config, train
from schoolhouse.errors import ConfigError
from schoolhouse.model import attended, blocks, layouts, load, varlen
from schoolhouse.model.load import Student
from schoolhouse.model.offload import Offload
from schoolhouse.starter import miniatures

CPU = torch.device("cpu")
WAYS = {"again": {}, "but attention": {"keep_attention": True}, "offloaded": {"keep_attention": True, "offload": True}}


class Counted(TorchDispatchMode):
    """Calls of PyTorch's attention kernels inside, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, operation: Any, kinds: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.calls[operation.name()] += operation.name() in attended.KERNELS
        return operation(*args, **(kwargs or {}))


def recomputed(one: Student, *, offload: bool = False, **how: bool) -> Student:
    blocks.compute_again(one.model, **how, offload=Offload(CPU, least=0) if offload else None)
    return one


def gradients(one: Student, rows: list, packs: str = "planned") -> dict[str, Tensor | float]:
    loss, *_ = train.compute_gradient(one, a_step(rows, PACKS[packs](rows)), seed=0)
    found = {name: each.grad for name, each in one.model.named_parameters() if each.grad is not None}
    return {"loss": torch.tensor(loss), **found}


def check_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and len(wanted) > 1
    assert all(torch.equal(found[name], one) for name, one in wanted.items())


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("way", ["full", "lora"])
@pytest.mark.parametrize("family", miniatures.ARCHITECTURES)
def test_not_a_bit_changes(family: str, way: str, how: str) -> None:
    rows = examples("fractional", number=8, seed=6)
    plain, again = (student(family, adapters(family) if way == "lora" else None) for _ in range(2))
    check_same_bits(gradients(recomputed(again, **WAYS[how]), rows), gradients(plain, rows))


def test_in_bfloat16_by_way_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    from schoolhouse.model import products

    monkeypatch.setattr(products, "wide_is_faster", lambda place: True)
    rows, found = examples("whole", number=6, seed=2), []
    for how in ({}, {"precision": "bfloat16", "keep_attention": True, "offload": True}):
        one = student("qwen3")
        one.model.bfloat16()
        with products.fastest(CPU, "bfloat16"):
            found.append(gradients(recomputed(one, **how) if how else one, rows))
    check_same_bits(*found)


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma3_text", "qwen3_moe"])
def test_long_examples_attend_once(family: str) -> None:
    """Kernels are called once for each group and layer in all, twice where their results are not kept."""
    rows, calls = examples("whole", number=8, seed=6), {}
    for how in ("again", "but attention"):
        one = recomputed(student(family), **WAYS[how])
        with Counted() as counted:
            gradients(one, rows)
        calls[how] = counted.calls.total()
    micros = a_step(rows, PACKS["planned"](rows)).micro_batches
    groups = sum(len(layouts.layout(micro.boundaries, CPU).groups) for micro in micros)
    once = groups * one.model.config.num_hidden_layers
    assert calls == {"again": 2 * once, "but attention": once}


def test_results_of_the_kernel_for_any_length_are_kept() -> None:
    """PyTorch's own operation, by shapes alone."""
    ends = varlen.ends((0, 100, 256), torch.device("meta"))
    empty = torch.empty(256, 4, 64, dtype=torch.bfloat16, device="meta")
    given = [empty.clone().requires_grad_() for _ in range(3)]

    def attend(*states: Tensor) -> Tensor:
        return varlen.attend("varlen", *(one * 2 for one in states), ends, varlen.Rule()).sin()

    for forward, calls in ((attend, 2), (attended.twice(attend), 1)):
        with Counted() as counted:
            torch.autograd.grad(checkpoint(forward, *given, use_reentrant=False).sum(), given)
        assert counted.calls["torch_attn::_varlen_attn"] == calls


def test_what_forward_keeps() -> None:
    """Beside what is kept without it, results of attention and their logarithms: counted in bytes that are alive."""
    tokens, sizes = 200, {}
    for how in ("again", "but attention"):
        one = recomputed(student("llama"), **WAYS[how])
        given = {"position_ids": torch.arange(tokens)[None], "layout": layouts.layout((0, tokens), CPU)}
        before = {id(each) for each in _tensors()}
        out = one.model.model(torch.arange(tokens)[None] % 90, **given, use_cache=False).last_hidden_state
        storages = [each.untyped_storage() for each in _tensors() if id(each) not in before]
        sizes[how] = sum({one.data_ptr(): one.nbytes() for one in storages}.values())
        del out
    config = one.model.config
    numbers = config.num_attention_heads * (config.head_dim + 1)
    assert sizes["but attention"] - sizes["again"] == config.num_hidden_layers * tokens * numbers * 8  # of float64


def _tensors() -> list[Tensor]:
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is Tensor]


# --- host memory ------------------------------------------------------------------------------------------------------


class Lazy:
    """A stream whose copies happen when another stream waits for it, as late as a device may make them."""

    def __init__(self, place: torch.device | None = None) -> None:
        self.waiting: list[tuple[Callable[[], Tensor | None], Callable[[], Tensor | None]]] = []
        self.seen = 0

    def wait_stream(self, other: Lazy) -> None:
        while other.waiting:
            into, source = (one() for one in other.waiting.pop(0))
            if into is not None and on_host(into) and source is None:
                raise AssertionError("a tensor was given up before it was copied")
            if into is None and on_host(source):
                raise AssertionError("memory was given up while it was being written")
            if into is not None:  # a copy to host memory that nobody wants any more does no harm
                into.copy_(source)
                self.seen += 1


def on_host(tensor: Tensor) -> bool:
    return vars(tensor).get("on_host", False)


class Device(types.SimpleNamespace):
    """As much of torch.cuda as offloading asks for."""

    def __init__(self) -> None:
        super().__init__(Stream=Lazy, main=Lazy(), now=None)

    def current_stream(self, place: torch.device) -> Lazy:
        return self.now or self.main

    def stream(self, chosen: Lazy) -> Any:
        device = self

        class Chosen:
            def __enter__(self) -> None:
                device.now = chosen

            def __exit__(self, *_: object) -> None:
                device.now = None

        return Chosen()


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> Device:
    """A device that copies when it must, into memory that holds nonsense till then."""
    device = Device()
    copy, empty_like = Tensor.copy_, torch.empty_like

    def late(into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if not non_blocking or device.now is None:
            return copy(into, source, non_blocking)
        held = (lambda: source) if on_host(source) else weakref.ref(source)  # pinned memory waits for its copies
        device.now.waiting.append((weakref.ref(into), held))
        return into

    def nonsense(like: Tensor, **named: Any) -> Tensor:
        made = empty_like(like, **named).fill_(torch.nan)
        made.on_host = isinstance(named["device"], str)  # named so, and not the place that is trained on
        return made

    monkeypatch.setattr(torch, "get_device_module", lambda place: device)
    monkeypatch.setattr(Tensor, "copy_", late)
    monkeypatch.setattr(torch, "empty_like", nonsense)
    return device


def chain(number: int, offload: Offload, seen: list[weakref.ref[Tensor]]) -> nn.Sequential:
    """Blocks that are computed again, whose inputs are noted."""

    def noted(forward: Callable) -> Callable:
        def block(states: Tensor) -> Tensor:
            seen.append(weakref.ref(states.untyped_storage()))
            return forward(states)

        return block

    torch.manual_seed(0)
    found = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(number)))
    for one in found:
        forward = one.forward
        one.forward = noted(offload.around(
            lambda states, forward=forward: checkpoint(forward, states, use_reentrant=False)))
    return found


def test_copies_are_waited_for(lazy: Device) -> None:
    """Two micro-batches, the second of another length: the gradients of no offloading, to the bit."""
    found = []
    for least in (0, 1 << 40):
        model = chain(6, Offload(CPU, least), [])
        for tokens in (5, 9):
            model(torch.linspace(-1, 1, tokens * 8).view(tokens, 8).requires_grad_()).sum().backward()
        found.append([one.grad for one in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert lazy.main.seen > 0


def test_a_copy_that_is_not_waited_for_is_seen(lazy: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device of these tests finds the faults it is there for."""
    offload = Offload(CPU, 0)
    model = chain(6, offload, [])
    monkeypatch.setattr(lazy.main, "wait_stream", lambda other: None)
    with pytest.raises(AssertionError, match="before it was copied"):
        model(torch.ones(5, 8, requires_grad=True)).sum().backward()
        assert not any(one.grad.isnan().any() for one in model.parameters()), "before it was copied"


def test_a_backward_that_fails_gives_up_no_memory_that_is_written(lazy: Device) -> None:
    """As where a block does not fit and a smaller micro-batch is tried: the next one is right."""
    offload, fails = Offload(CPU, 0), [True]

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, states: Tensor) -> Tensor:
            return states.clone()

        @staticmethod
        def backward(ctx, above: Tensor) -> Tensor:
            if fails:
                raise MemoryError(fails.pop())
            return above

    model = chain(6, offload, [])
    forward = model[3].forward
    model[3].forward = lambda states: Failing.apply(forward(states))
    with pytest.raises(MemoryError):
        model(torch.ones(5, 8, requires_grad=True)).sum().backward()
    gc.collect()
    model.zero_grad()
    found = []
    for one in (model, chain(6, Offload(CPU, 1 << 40), [])):
        one(torch.ones(5, 8, requires_grad=True)).sum().backward()
        found.append([each.grad for each in one.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_block_that_changes_its_input_is_refused(blocks: int) -> None:
    """As autograd does; the copy in host memory would be of before, or of in between."""

    def changes(states: Tensor) -> Tensor:
        out = (states * 2).sin()
        states.add_(1)
        return out * states

    kept = Offload(CPU, 0).around(lambda states: checkpoint(changes, states, use_reentrant=False))
    with pytest.raises(RuntimeError, match="changes its input in place"):
        states = torch.ones(4, requires_grad=True) * 1
        for _ in range(blocks):
            states = kept(states)
        states.sum().backward()


def test_what_draws_is_drawn_again() -> None:
    """A kernel with dropout is not kept: what is dropped after it would be others."""
    given = [torch.randn(1, 4, 8, 4, requires_grad=True) for _ in range(3)]

    def forward(*states: Tensor) -> Tensor:
        with attended.kernel(dropout=0.5):
            out = nn.functional.scaled_dot_product_attention(*states)
        return nn.functional.dropout(out, 0.5)

    for one, calls in ((forward, 2), (attended.twice(forward), 2)):
        with Counted() as counted:
            checkpoint(one, *given, use_reentrant=False).sum().backward()
        assert counted.calls.total() == calls


def test_kept_results_serve_once() -> None:
    given = torch.randn(1, 2, 8, 4, requires_grad=True)

    def attend(states: Tensor) -> Tensor:
        with attended.kernel():
            return nn.functional.scaled_dot_product_attention(states, states, states).sin()

    out = checkpoint(attended.twice(attend), given, use_reentrant=False).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be had once"):
        out.backward()


def test_the_device_holds_one_input_between_forward_and_backward() -> None:
    seen: list[weakref.ref] = []
    model = chain(6, Offload(CPU, 0), seen)
    out = model(torch.ones(5, 8).mul(2).requires_grad_()).sum()
    gc.collect()
    assert [one() is not None for one in seen[1:]] == [False] * 4 + [True]
    out.backward()
    del out
    gc.collect()
    assert not any(one() is not None for one in seen[1:])


def test_host_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """After backward, and where there is none."""
    hosts, empty_like = [], torch.empty_like

    def noted(*given: Any, **named: Any) -> Tensor:
        made = empty_like(*given, **named)
        hosts.append(weakref.ref(made.untyped_storage()))
        return made

    monkeypatch.setattr(torch, "empty_like", noted)
    model = chain(4, Offload(CPU, 0), [])
    for backward in (True, False):
        out = model(torch.ones(5, 8, requires_grad=True)).sum()
        if backward:
            out.backward()
        del out
        gc.collect()
        assert hosts and not any(one() is not None for one in hosts)


def test_it_is_for_accelerators(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**miniatures.settings("qwen3", 97)))
    model.save_pretrained(tmp_path)
    settings = config.Model(path=str(tmp_path), activation_checkpointing=True, activation_offload=True)
    with pytest.raises(ConfigError, match=r"activation_offload=true: .* on cpu is in host memory already"):
        load.load(tmp_path, settings, CPU)


def test_only_inputs_of_what_is_computed_again_leave() -> None:
    with pytest.raises(ValueError, match="activation_offload needs activation_checkpointing=true"):
        config.Model(path="x", activation_offload=True)

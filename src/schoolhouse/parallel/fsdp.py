"""Weights cut over processes (FSDP2; Zhao et al., 2023, arXiv:2304.11277), gradients added by SUM.

Every block of the model is a group of its own: gathered when it is used, let go afterwards, gathered once more for its
backward, which leaves every process with its part of the added gradient. What remains (embeddings, head, last norm, and
blocks too small to be worth a gathering) belongs to the student itself, and is whole while a micro-batch is computed.
Trained weights, gradient sums and moments are float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Set

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from schoolhouse.errors import MeshError
from schoolhouse.parallel.mesh import Mesh

SMALL = 1 << 20
"""So many weights to be cut make a block a group of its own: fewer are gathered sooner than a message is waited for."""


def shard(
    student: nn.Module, mesh: Mesh, precision: torch.dtype, *, offload: bool, kept: Set[nn.Parameter] = frozenset()
) -> None:
    """Cut the weights of a student over the mesh, block by block, and let its gradients be added, not averaged.

    Weights may still lie in their file (mapped, in the type they are stored in): one block at a time becomes float32,
    what is frozen `precision`, is moved to the device, and only this process's part of it stays. Parameters that are
    `kept` stay what they are, whole and where they are, in every process.
    """
    if offload and mesh.parameters.device_type == "cpu":
        raise MeshError(
            "parallel.offload=true: the weights are in host memory already", required="an accelerator",
            where="parallel.offload", remedy="set parallel.offload=false",
        )
    axes = mesh.parameters if mesh.degrees.replicate > 1 else mesh.parameters["shard"]
    # inputs are cast nowhere: the embeddings decide the type of what flows, as they do in one process
    narrow = {"param_dtype": precision, "reduce_dtype": torch.float32} if precision == torch.bfloat16 else {}
    policy = MixedPrecisionPolicy(**narrow, cast_forward_inputs=False)
    place = CPUOffloadPolicy() if offload else OffloadPolicy()
    cut = ((block, set(block.parameters()) - kept) for block in blocks(student))
    large = [block for block, parameters in cut if sum(one.numel() for one in parameters) >= SMALL]
    for group in (*large, student):
        for parameter in group.parameters():
            if not isinstance(parameter, DTensor):  # of a group inside it, which is cut already
                _give_number(parameter, precision, kept)
        fully_shard(group, mesh=axes, mp_policy=policy, offload_policy=place, ignored_params=set(kept))
    in_order = [student, *large]
    for group, before in zip(in_order, [in_order[-1], *in_order[:-1]], strict=True):
        group.set_gradient_divide_factor(1.0)
        group.set_force_sum_reduction_for_comms(True)
        # by default the order of the last forwards decides what backward gathers ahead; a process that wrote answers
        # has had other forwards than its peers, and would gather in another order than they
        group.set_modules_to_backward_prefetch([before])


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a model: the members of its lists of modules that lie in no other such list."""
    found: list[nn.Module] = []
    for child in model.children():
        found += list(child) if isinstance(child, nn.ModuleList) else blocks(child)
    return [block for block in found if any(True for _ in block.parameters())]


def groups(student: nn.Module) -> list[FSDPModule]:
    """The parts of a student whose weights are gathered together; empty where nothing is cut."""
    return [module for module in student.modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def streamed(model: nn.Module, place: torch.device, kept: Set[nn.Parameter] = frozenset()) -> Iterator[None]:
    """Inside, a model whose weights lie in their file runs in float32 on `place`, one block there at a time.

    Parameters that are `kept` are there already, in a format of their own.
    """
    inside = blocks(model)
    within = {parameter for block in inside for parameter in block.parameters()}
    rest = nn.ParameterList(parameter for parameter in model.parameters() if parameter not in within)
    home: dict[nn.Parameter, Tensor] = {}

    def bring(group: nn.Module, *_: object) -> None:
        for parameter in group.parameters():
            if parameter in kept:
                continue
            home[parameter] = parameter.data
            parameter.data = parameter.data.to(place, torch.float32)

    def take_back(group: nn.Module, *_: object) -> None:
        for parameter in group.parameters():
            if parameter not in kept:
                parameter.data = home.pop(parameter)

    for buffer in model.buffers():
        buffer.data = buffer.data.to(place)
    bring(rest)
    hooks = [hook for block in inside
             for hook in (block.register_forward_pre_hook(bring), block.register_forward_hook(take_back))]
    try:
        yield
    finally:
        take_back(rest)
        for hook in hooks:
            hook.remove()


def bring(model: nn.Module, place: torch.device, precision: torch.dtype, kept: Set[nn.Parameter]) -> None:
    """Move a model whose weights lie in their file to `place`, each in its number format."""
    for parameter in model.parameters():
        _give_number(parameter, precision, kept, place)


def _give_number(
    parameter: nn.Parameter, precision: torch.dtype, kept: Set[nn.Parameter], place: torch.device | None = None
) -> None:
    """A copy of the weights, out of their file: in float32 at least where they are trained, else in `precision`."""
    if parameter.is_floating_point() and parameter not in kept:
        number = torch.promote_types(parameter.dtype, torch.float32) if parameter.requires_grad else precision
        parameter.data = parameter.data.to(place, number, copy=True)


def expect(student: nn.Module, *, last: bool) -> None:
    """Say whether the next backward is the step's last: only then is the gradient added over the replicas."""
    if isinstance(student, FSDPModule):
        student.set_requires_all_reduce(last)


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rest(student: nn.Module) -> None:
    """Cut the student's own weights again after a forward without a backward, which leaves them whole."""
    if isinstance(student, FSDPModule):
        student.reshard()


@contextlib.contextmanager
def gathered(student: nn.Module) -> Iterator[None]:
    """Inside, every process holds all weights, in the type of the matrix products: for writing answers.

    All processes must enter together; inside, each may run the model as often as it likes.
    """
    cut = groups(student)
    for group in cut:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    try:
        yield
    finally:
        for group in cut:
            group.reshard()
            group.set_reshard_after_forward(group is not student, recurse=False)


def as_cut(part: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that is cut as `like` is; where `like` is whole, the part is the whole."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part.to(like.device), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )

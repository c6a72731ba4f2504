"""Loops of your own on several processes of ``torch.distributed``: gradients are reduced once a step.

    # torchrun --nproc-per-node 2 mine.py
    torch.distributed.init_process_group()
    ba.distributed.broadcast(model)
    for batch in batches_of_this_process:
        opt.zero_grad()
        solver.backward(problem, model, batch)
        ba.distributed.reduce_gradients(model, len(batch))
        opt.step()

Hypergradients come from ``torch.autograd.grad``, which the hooks of DistributedDataParallel and FSDP do not see, so
that solvers refuse a network that is wrapped in one. What is remembered by example stays with the process that has the
example: give each example to one process. Batch statistics are each process's own, and can be averaged
(:func:`average_statistics`); in training by the run command they can be those of the whole batch (:func:`synchronise`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .batch_statistics import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d
from .errors import InputError
from .modes import check_unwrapped
from .shares import together

__all__ = ["SyncBatchNorm", "average_statistics", "broadcast", "reduce_gradients", "synchronise", "together"]

BUCKET = 25 * 2**20  # bytes, as DistributedDataParallel has it


def _processes(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def broadcast(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Give every process the parameters and buffers of the group's first; nothing on one process."""
    if _processes(group) > 1:
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor, group=group, group_src=0)


def reduce_gradients(model: nn.Module, examples: int, group: dist.ProcessGroup | None = None) -> None:
    """Replace each ``.grad`` by its mean over the examples of all processes:

        grad ← Σ_r n_r grad_r / Σ_r n_r

    which is the gradient of the mean loss of all of them, as one process would have it. Gradients are reduced in flat
    buckets of 25 MiB, and nothing waits for the device. On one process, or without a process group, nothing happens.

    Every process must call this as often as the others, one without examples with ``examples=0``. A parameter that
    has no gradient counts as zero, and has a gradient of zeros afterwards; so have all where no process has examples.

    Args:
        model: the network, not wrapped.
        examples: n_r, the number of examples that ``.grad`` is the mean of.
        group: the processes; all by default.

    Raises:
        InputError: where the network is wrapped, a gradient is sparse, or ``examples`` is negative.
    """
    check_unwrapped(model)
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 0:
        raise InputError(f"examples is {examples!r}; it must be a whole number, at least 0")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if _processes(group) == 1 or not named:
        return
    total = torch.tensor([examples], dtype=torch.float64, device="cpu").to(next(iter(named.values())).device)
    dist.all_reduce(total, group=group)
    sum_gradients(named, examples / total.clamp(min=1), group)


def sum_gradients(
    named: Mapping[str, nn.Parameter], factor: Tensor | None = None, group: dist.ProcessGroup | None = None
) -> None:
    """Replace each ``.grad`` by its sum over all processes, as :func:`reduce_gradients` reduces.

    Args:
        named: the parameters by name, the same on every process.
        factor: multiplies this process's gradients before.
        group: the processes; all by default.
    """
    parameters = list(named.values())
    for name, p in named.items():
        if p.grad is not None and p.grad.layout != torch.strided:
            raise InputError(f"the gradient of {name} is sparse; it must be dense (nn.Embedding(…, sparse=False))")
    with torch.no_grad():
        for bucket in _buckets(parameters):
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
            if factor is not None:
                flat *= factor.to(flat)
            dist.all_reduce(flat, group=group)
            for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                if p.grad is None:
                    p.grad = part.view_as(p).clone()
                else:
                    p.grad.copy_(part.view_as(p))


KINDS: dict[type[nn.Module], type[SyncBatchNorm]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
}


def synchronise(model: nn.Module) -> None:
    """Make every nn.BatchNorm of the network a :class:`SyncBatchNorm`, in place.

    Modules stay the same objects, with their parameters, buffers, hooks and flags, and so does the ``state_dict``.

    Raises:
        InputError: for another class of batch normalisation (a subclass, torch's SyncBatchNorm), of which nobody knows
            what its statistics are; nothing is changed then.
    """
    normalising = [(name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
    for name, module in normalising:
        if type(module) not in KINDS and not isinstance(module, SyncBatchNorm):
            raise InputError(
                f"{name or 'the network'} is a {type(module).__name__}, which cannot be made a SyncBatchNorm; use "
                "nn.BatchNorm1d, 2d or 3d"
            )
    for _, module in normalising:
        module.__class__ = KINDS.get(type(module), type(module))


def average_statistics(model: nn.Module, examples: int, group: dist.ProcessGroup | None = None) -> None:
    """Replace running means and variances of batch normalisation by their means over the processes' examples.

    Other buffers are left alone, and so are those of :class:`SyncBatchNorm`, which are the same everywhere. Where no
    process has examples, all are as they were. Every process has to call this; on one process nothing happens.

    Args:
        model: the network, not wrapped.
        examples: the number of examples that this process's statistics are of, since they were last averaged.
        group: the processes; all by default.
    """
    if _processes(group) == 1:
        return
    running = [
        buffer
        for module in model.modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    if not running:
        return
    with torch.no_grad():
        flat = torch.cat([*(buffer.flatten() for buffer in running), running[0].new_ones(1)]) * examples
        dist.all_reduce(flat, group=group)
        *means, total = flat.split([*(buffer.numel() for buffer in running), 1])
        for buffer, mean in zip(running, means, strict=True):
            buffer.copy_(torch.where(total > 0, mean / total, buffer.flatten()).view_as(buffer))


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one type and device, in their order, of at most :data:`BUCKET` bytes or one parameter."""
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for p in parameters:
        kinds.setdefault((p.dtype, p.device), []).append(p)
    for alike in kinds.values():
        bucket: list[nn.Parameter] = []
        size = 0
        for p in alike:
            length = p.numel() * p.element_size()
            if bucket and size + length > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(p)
            size += length
        yield bucket

"""``run FILE --dry-run``: what would be trained and what a step of it costs, without training."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ..batch import Batch
from ..data import ImageSet, Loader, NotThere, load_data, stand_in
from ..diagnose import StepCost, describe, estimate
from ..errors import BilevelError, InputError
from ..runs.recipe import Recipe
from ..solvers.exact import Exact, exact_solver
from .plan import Plan
from .prepare import attacks_of, check_threat, extra_images, held_out_share, kink_note, network_for, try_a_step

__all__ = ["dry_run", "training_operations"]

PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def dry_run(plan: Plan, console: Console) -> None:
    """Print the composition, and what a step and an epoch cost. Writes no file and downloads nothing.

    Everything is computed on the CPU, and most of it without values (:func:`~bilevel_at.diagnose.estimate`).

    Raises:
        InputError: where the run itself would.
    """
    attacks_of(plan)  # which checks their names
    train, usual = _training_images(plan)
    extra = extra_images(plan, train)
    check_threat(plan, train)
    few = train[slice(0, max(4, plan.options.batch_size))]
    model = network_for(plan, few)
    try_a_step(plan, model, few)
    batch = _batch(plan, few, usual)
    rows = [("training", _training(plan, train, model, usual))]
    parts = describe(plan.problem, plan.solver)
    rows += [(part.role, f"{part.name}   ({part.about})" if part.about else part.name) for part in parts]
    rows.append(("exact", _exact(plan, model, batch)))
    if note := kink_note(plan, model):
        rows.append(("note", note))
    examples = len(train) + (0 if extra is None else len(extra))
    steps = _steps(plan, train)
    try:
        cost, but = _cost(plan, model, batch, examples)
    except (BilevelError, InputError) as error:
        rows.append(("a step", f"its cost cannot be told: {error}"))
    else:
        rows += _costs(cost, but, plan, len(batch), steps)
    _print(rows, console)


def training_operations(plan: Plan) -> float:
    """Floating-point operations of all epochs, as ``--dry-run`` counts those of an epoch: of updates, not of looks.

    Raises:
        InputError, BilevelError: where a step's cost cannot be told.
    """
    train, usual = _training_images(plan)
    extra = extra_images(plan, train)
    few = train[slice(0, max(4, plan.options.batch_size))]
    examples = len(train) + (0 if extra is None else len(extra))
    cost, _ = _cost(plan, network_for(plan, few), _batch(plan, few, usual), examples)
    return plan.options.epochs * cost.seconds(1, _steps(plan, train))


def _batch(plan: Plan, images: ImageSet, usual: bool) -> Batch:
    """A batch as training has it."""
    size = plan.options.batch_size
    return next(iter(Loader(images[slice(0, size)], size, 0, _augment(plan, usual)).epoch(0)))


def _steps(plan: Plan, train: ImageSet) -> int:
    """Of an epoch."""
    return len(Loader(train, plan.options.batch_size)) * plan.options.replays


def _training_images(plan: Plan) -> tuple[ImageSet, bool]:
    """The images that would be trained on, and whether they stand in for a named set that is not there."""
    options, usual = plan.options, False
    try:
        train, _ = load_data(options.data, options.data_dir, download=False)
    except NotThere:
        train, usual = stand_in(options.data), True
    if options.examples is not None:
        train = train.sample(options.examples)
    share = held_out_share(plan, len(train))
    # A slice, where a run splits at random: of the same length, and of a set that stands in it takes no memory.
    return train[slice(max(1, round(share * len(train))), None)], usual


def _augment(plan: Plan, usual: bool) -> Any:
    """How the images are augmented; what stands in for streamed images lies in memory."""
    augment = plan.options.augment
    return "none" if usual and augment == "resized-crop-flip" else augment


def _training(plan: Plan, train: ImageSet, model: nn.Module, usual: bool) -> str:
    options = plan.options
    channels, height, width = train.shape
    about = f"{options.data} is not in {options.data_dir}/, so this is its usual size" if usual else ""
    parameters = sum(p.numel() for p in model.parameters())
    return (
        f"{plan.file.path.stem} on {options.data}: {len(train):,} images of {channels}×{height}×{width} in "
        f"{train.classes} classes{f' ({about})' if about else ''}; {options.model} of {parameters:,} parameters"
    )


def _exact(plan: Plan, model: nn.Module, batch: Batch) -> str:
    """Which solver is exact, and what keeps the chosen one from being that."""
    problem, model = copy.deepcopy(plan.problem), copy.deepcopy(model).train()
    try:
        with plan.file.blame("its problem cannot be solved: "):
            exact: Exact = exact_solver(problem, model, batch[:2], torch.Generator().manual_seed(0))
    except (BilevelError, InputError) as error:
        return f"cannot be told: {error}"
    but = exact.of(plan.solver)
    return f"{exact.solver or 'none'}: {exact.why}{f'; {but}' if but else ''}"


def _cost(plan: Plan, model: nn.Module, batch: Batch, examples: int) -> tuple[StepCost, str]:
    """Of a step of the last epoch, where everything has begun that begins late; else of the first, and why not."""
    recipe: Recipe = plan.options
    sgd = partial(torch.optim.SGD, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    tell = partial(estimate, plan.problem, plan.solver, model, batch, examples=examples, optimizer=sgd)
    with plan.file.blame("a step cannot be made: "):
        try:
            return tell(epoch=recipe.epochs - 1, epochs=recipe.epochs), ""
        except (BilevelError, InputError) as error:  # what it goes on from is not there, perhaps
            reason = str(error)
        return tell(epoch=0, epochs=recipe.epochs), f"; of the first epoch, as in the last {reason}"


def _costs(cost: StepCost, but: str, plan: Plan, batch_size: int, steps: int) -> list[tuple[str, str]]:
    rows = [
        ("remembers", _remembered(cost)),
        ("a step", _operations(cost, batch_size) + but),
        ("memory", _memory(cost, plan)),
    ]
    epochs, operations = plan.options.epochs, cost.seconds(1, steps)
    epoch = f"{steps:,} step{'s' if steps > 1 else ''}, {_scaled(operations)}FLOP"
    if plan.options.tflops is not None:
        seconds = cost.seconds(plan.options.tflops * 1e12, steps)
        epoch += (
            f"; {_time(seconds)} at {plan.options.tflops:g} TFLOP/s, and all {epochs} epochs {_time(epochs * seconds)}"
        )
    rows.append(("an epoch", epoch))
    if cost.real_examples:
        taken = f"a step of {cost.real_examples} real examples"
        if cost.real_examples < batch_size:
            taken = (
                f"steps of {cost.real_examples // 2} and {cost.real_examples} real examples, extended to {batch_size}"
            )
        rows.append(("counted on", f"{taken}, because torch's meta device cannot take it ({cost.reason})"))
    return rows


def _remembered(cost: StepCost) -> str:
    if not cost.remembered:
        return "nothing"
    parts = ", ".join(f"{path} {_mebibytes(size)}" for path, size in cost.remembered.items())
    return f"{parts}, with {cost.examples:,} examples"


def _operations(cost: StepCost, batch_size: int) -> str:
    line = (
        f"{cost.multiple:.2f} × plain training in operations: {_scaled(cost.flops)}FLOP for a batch of {batch_size}, "
        f"{_scaled(cost.plain_flops)}FLOP plain"
    )
    if not math.isclose(cost.first_flops, cost.flops, rel_tol=1e-3):
        line += f"; the first of an epoch, and each that does the same, {cost.first_flops / cost.plain_flops:.2f} ×"
    return line


def _memory(cost: StepCost, plan: Plan) -> str:
    stays = (
        f"{_mebibytes(cost.memory_bytes)} stay from step to step (network {_mebibytes(cost.network_bytes)}, optimiser "
        f"{_mebibytes(cost.optimizer_bytes)}, remembered {_mebibytes(sum(cost.remembered.values()))})"
    )
    if plan.options.averages:
        stays += f"; the averaged network besides, {_mebibytes(cost.network_bytes)}"
    if cost.peak_bytes is None:
        return f"{stays}; the peak cannot be told: this torch has no torch.distributed, whose MemTracker estimates it"
    half = " (less in bfloat16, for which it is not told)" if plan.options.precision == "bfloat16" else ""
    peak = f"{_mebibytes(cost.peak_bytes)} at the peak of a step in float32{half}, by torch's MemTracker"
    return f"{peak}; of these {stays}"


def _scaled(value: float) -> str:
    """``1.58 T``: the number to three digits, and the prefix of its unit."""
    size, prefix = next((pair for pair in PREFIXES if value >= pair[0]), (1.0, ""))
    return f"{value / size:.3g} {prefix}"


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def _print(rows: list[tuple[str, str]], console: Console) -> None:
    """A line for each row; a part of a player is indented below it."""
    shown = [("  " * role.count(".") + role.rpartition(".")[2], text) for role, text in rows]
    width = max(len(role) for role, _ in shown)
    for role, text in shown:
        console.print(f"{role:<{width}}  {text}", highlight=False, markup=False, soft_wrap=True)

"""The images, attacks and network of a run, checked before anything is written."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from .. import policy, shares
from ..batch import Batch
from ..data import Images, ImageSet, extra_from_npz, load_data
from ..distributed import synchronise
from ..errors import InputError
from ..evaluate import Attack, Threat, attack_from_name, norm_of
from ..evaluate.threat import check_set
from ..models import build_model
from ..models.activations import kinks
from ..modes import autocast
from ..runs.networks import load
from ..train.steps import check_coupling
from .device import resolve_device
from .plan import Plan
from .processes import one_after_the_other

__all__ = [
    "Prepared",
    "attacks_of",
    "check_threat",
    "extra_images",
    "held_out_share",
    "kink_note",
    "network_for",
    "prepare",
    "try_a_step",
]

MOST_HELD_OUT = 5_000  # a tenth of CIFAR's; a tenth of ImageNet would take longer to attack than to train on


@dataclass(frozen=True)
class Prepared:
    """The network, images and attacks of a run.

    model: on the device of the images.
    name: the network's.
    train, held_out, test: the images.
    extra: more training images, where there are any.
    attacks: of the final table.
    select: the attack on the held-out images that picks the best epoch.
    threat: the threat model.
    """

    model: nn.Module
    name: str
    train: ImageSet
    held_out: ImageSet
    test: ImageSet
    attacks: Sequence[Attack]
    select: Attack
    threat: Threat
    extra: Images | None = None

    @property
    def strongest(self) -> Attack:
        """The last attack of the table that perturbs images, or else the attack that selects the best epoch."""
        return next((attack for attack in reversed(self.attacks) if attack.stages), self.select)


def prepare(plan: Plan) -> Prepared:
    """Load the images, make the attacks and the network, and try one step.

    Raises:
        InputError: if any of them cannot work.
    """
    options = plan.options
    if options.sync_batch_norm and options.compile and shares.count() > 1:
        raise InputError("--sync-batch-norm is not for --compile: no graph has the statistics of several processes")
    device = resolve_device(options.device)
    threat = plan.threat
    attacks, select = attacks_of(plan)
    train, held_out, test = _images(plan, device)
    extra = extra_images(plan, train)
    check_threat(plan, train)
    model = network_for(plan, train)
    if options.sync_batch_norm:
        synchronise(model)
    if options.compile and shares.count() > 1 and any(m.p > 0 for m in model.modules() if isinstance(m, _DropoutNd)):
        raise InputError(
            "--compile is not for networks with dropout on several processes: within a graph it would drop the same "
            "units of different examples; use --dropout 0, or leave out --compile"
        )
    try_a_step(plan, model, train)
    return Prepared(model, options.model, train, held_out, test, attacks, select, Threat.of(threat), extra)


def check_threat(plan: Plan, train: ImageSet) -> None:
    """Try to project onto a threat of the user's own."""
    if norm_of(plan.threat) is None:
        with plan.file.blame("the threat cannot be projected onto: "):
            check_set(plan.threat, train[slice(0, 4)].pixels())


def attacks_of(plan: Plan) -> tuple[list[Attack], Attack]:
    """The attacks of the final table, and the one that picks the best epoch."""
    names = [*dict.fromkeys(plan.options.attacks), plan.options.select]
    *attacks, select = [attack_from_name(name, plan.threat, surrogates=load) for name in names]
    return attacks, select


def _images(plan: Plan, device: torch.device) -> tuple[ImageSet, ImageSet, ImageSet]:
    """(training, held-out, test) images on the device."""
    options = plan.options
    train, test = one_after_the_other(lambda: load_data(options.data, options.data_dir, options.download))
    if options.examples is not None:
        train = train.sample(options.examples)
    if options.test_examples is not None:
        test = test.sample(options.test_examples)
    train, held_out = (part.to(device) for part in train.split(held_out_share(plan, len(train))))
    return train, held_out, test.to(device)


def held_out_share(plan: Plan, count: int) -> float:
    """The share of ``count`` training images that is held out."""
    asked = plan.options.held_out
    if asked > count - 2:  # one image has no batch statistics
        raise InputError(f"--held-out is {asked}, and there are {count} training images")
    return asked / count if asked else min(0.1, MOST_HELD_OUT / count)


def extra_images(plan: Plan, train: ImageSet) -> Images | None:
    """The images of ``--extra``, on the device of the training images."""
    if plan.options.extra is None:
        return None
    if not isinstance(train, Images):
        raise InputError(f"--extra is for images in memory; {plan.options.data} is streamed from files")
    return extra_from_npz(Path(plan.options.extra), train).to(train.device)


def network_for(plan: Plan, train: ImageSet) -> nn.Module:
    """The network on the data's device, after a check of its output for two images."""
    options = plan.options
    torch.manual_seed(options.seed)
    if options.model != "file":
        model = build_model(options.model, train.shape, train.classes, train, options.activation, options.dropout)
    elif plan.file.model is None:
        raise InputError(f"--model file, but {plan.file.path} defines no model(shape, classes)")
    else:
        model = plan.file.make(plan.file.model, nn.Module, shape=train.shape, classes=train.classes)
    model = model.to(train.device)
    with torch.no_grad(), plan.file.blame(f"the model does not take {train.shape} images: "):
        out = model.eval()(train[slice(0, 2)].pixels())
    shape = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
    if shape != (2, train.classes):
        whose = f"{plan.file.path}'s model" if options.model == "file" else f"the model {options.model}"
        raise InputError(f"{whose} gives {shape} for 2 images; {train.classes} classes need (2, {train.classes})")
    return model


def kink_note(plan: Plan, model: nn.Module) -> str:
    """What a solver of differences is worth on a network with kinks, in a line; "" where there is nothing to say."""
    branches = [solver for _, solver in plan.solver.mixture()]
    names = kinks(model)
    if not names or not any(solver.implicit and solver.first_order for solver in branches):
        return ""
    return (
        f"{type(plan.solver).__name__} takes differences, which are for smooth networks, and this one has "
        f"{', '.join(names)}: units that change their side are an error that does not vanish (docs/solvers.md). "
        "--activation softplus, or a solver with double backward, has none"
    )


def try_a_step(plan: Plan, model: nn.Module, train: ImageSet) -> None:
    """Compute one hypergradient on copies, so that errors are raised before anything is written."""
    few = train[slice(0, min(4, plan.options.batch_size))]
    batch = Batch(few.pixels(), few.y, torch.arange(len(few), device=few.device))
    generator = torch.Generator(few.device).manual_seed(0)
    with plan.file.blame("its problem cannot be solved: "):
        problem, model = copy.deepcopy(plan.problem), copy.deepcopy(model).train()
        with autocast(plan.options.precision, few.device):
            step = plan.solver.hypergradient(problem, model, batch, generator=generator)
        # Of a solver that tosses a coin, all that it may take: a rare one would be refused after hours.
        for _, solver in copy.deepcopy(plan.solver).mixture() if plan.options.compile else ():
            solver.compile("eager")  # traces, and leaves out what takes a minute
            for number in range(3):  # a schedule by update shows in the second step
                policy.set_step((problem, solver), number, 3)
                with autocast(plan.options.precision, few.device), shares.alone():
                    solver.backward(problem, model, batch, generator)
    check_coupling(step.losses, plan.options.accumulate)

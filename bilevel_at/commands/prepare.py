"""What a run needs besides its directory: images, attacks and the network, checked before anything is written."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..batch import Batch
from ..constraints import Constraint
from ..data import ImageSet, load_data
from ..errors import InputError
from ..evaluate import Attack, attack_from_name
from ..models import build_model
from ..runs.networks import load
from .device import resolve_device
from .plan import Plan

__all__ = ["Prepared", "prepare"]

MOST_HELD_OUT = 5_000  # a tenth of CIFAR's; a tenth of ImageNet would take longer to attack than to train on


@dataclass(frozen=True)
class Prepared:
    """What is trained, on what, and how it is looked at.

    model: on the device of the images.
    train, held_out, test: the images.
    attacks: of the final table.
    select: the attack on the held-out images that picks the best epoch.
    constraint: where the attacker may move.
    """

    model: nn.Module
    train: ImageSet
    held_out: ImageSet
    test: ImageSet
    attacks: Sequence[Attack]
    select: Attack
    constraint: Constraint

    @property
    def epsilon(self) -> float:
        """The radius of the constraint."""
        return self.constraint.radius

    @property
    def strongest(self) -> Attack:
        """The last attack of the table that does something; the selecting one where none does."""
        return next((attack for attack in reversed(self.attacks) if attack.stages), self.select)


def prepare(plan: Plan) -> Prepared:
    """Load the images, make the attacks and the network, and try one step. :class:`InputError` for what cannot work."""
    options = plan.options
    device = resolve_device(options.device)
    constraint = getattr(plan.problem.lower, "constraint", None)
    if constraint is None:
        raise InputError(f"{plan.file.path}: the lower problem has no constraint")
    attacks = [attack_from_name(name, constraint, surrogates=load) for name in dict.fromkeys(options.attacks)]
    select = attack_from_name(options.select, constraint, surrogates=load)
    train, held_out, test = _images(plan, device)
    model = _network(plan, train)
    _try_a_step(plan, model, train)
    return Prepared(model, train, held_out, test, attacks, select, constraint)


def _images(plan: Plan, device: torch.device) -> tuple[ImageSet, ImageSet, ImageSet]:
    """(training, held-out, test) images on the device; a tenth of the training set is held out."""
    options = plan.options
    train, test = load_data(options.data, options.data_dir, options.download)
    if options.examples is not None:
        train = train.sample(options.examples)
    if options.test_examples is not None:
        test = test.sample(options.test_examples)
    train, held_out = (part.to(device) for part in train.split(min(0.1, MOST_HELD_OUT / len(train))))
    return train, held_out, test.to(device)


def _network(plan: Plan, train: ImageSet) -> nn.Module:
    """The network on the data's device, after a look at what it gives for two images."""
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


def _try_a_step(plan: Plan, model: nn.Module, train: ImageSet) -> None:
    """One hypergradient on copies, so that what cannot work is said before anything is written."""
    few = train[slice(0, min(4, plan.options.batch_size))]
    batch = Batch(few.pixels(), few.y, torch.arange(len(few), device=few.device))
    generator = torch.Generator(few.device).manual_seed(0)
    with plan.file.blame("its problem cannot be solved: "):
        problem, model = copy.deepcopy(plan.problem), copy.deepcopy(model).train()
        plan.solver.hypergradient(problem, model, batch, generator=generator)

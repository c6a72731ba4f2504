"""The rate and the momentum of every update, against PyTorch's schedulers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import bilevel_at as ba
from bilevel_at.commands.plan import understand
from bilevel_at.runs.recipe import CIFAR, IMAGENET, Recipe
from bilevel_at.train.schedules import momentum_at, rate_at


def sgd(recipe):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.lr, momentum=recipe.momentum)


@pytest.mark.parametrize(("epochs", "per_epoch"), [(1, 1), (2, 3), (3, 4), (20, 7)])
def test_the_published_cycle_is_that_of_cyclic_lr(epochs, per_epoch):
    """CyclicLR as the authors call it, from its first step on: at its start the rate is 0, and nothing is learnt."""
    recipe = dataclasses.replace(CIFAR, epochs=epochs)
    optimizer, half = sgd(recipe), (epochs * per_epoch + 1) / 2
    cycle = torch.optim.lr_scheduler.CyclicLR(
        optimizer, base_lr=0, max_lr=recipe.lr, step_size_up=half, base_momentum=0.8, max_momentum=0.9
    )
    for step in range(epochs * per_epoch):
        optimizer.step()
        cycle.step()
        (group,) = optimizer.param_groups
        assert rate_at(recipe, step, per_epoch) == pytest.approx(group["lr"])
        assert momentum_at(recipe, step, per_epoch) == pytest.approx(group["momentum"])
        assert 0.8 <= momentum_at(recipe, step, per_epoch) <= 0.9


@pytest.mark.parametrize("schedule", ["one-cycle", "one-cycle-by-epoch"])
@pytest.mark.parametrize(("epochs", "per_epoch"), [(10, 3), (30, 5), (100, 2)])
def test_one_cycle_is_that_of_torch(schedule, epochs, per_epoch):
    """OneCycleLR with its default arguments, which moves the momentum 0.95 → 0.85 → 0.95; an update or an epoch."""
    recipe = Recipe(epochs=epochs, lr=0.1, schedule=schedule, momentum=0.95, peak_momentum=0.85)
    optimizer, by_update = sgd(recipe), schedule == "one-cycle"
    total = epochs * per_epoch if by_update else epochs
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=total)
    for step in range(epochs * per_epoch):
        (group,) = optimizer.param_groups
        assert rate_at(recipe, step, per_epoch) == pytest.approx(group["lr"])
        assert momentum_at(recipe, step, per_epoch) == pytest.approx(group["momentum"])
        optimizer.step()
        if (by_update or (step + 1) % per_epoch == 0) and step + 1 < epochs * per_epoch:
            cycle.step()


def test_the_shortest_cycles_have_a_rate():
    for epochs, schedule in ((1, "one-cycle"), (1, "one-cycle-by-epoch"), (2, "one-cycle"), (3, "one-cycle-by-epoch")):
        recipe = Recipe(epochs=epochs, lr=0.1, schedule=schedule, peak_momentum=0.8)
        for step in range(epochs):
            assert 0 < rate_at(recipe, step, 1) <= 0.1 and 0.8 <= momentum_at(recipe, step, 1) <= 0.9


def test_a_single_epoch_is_not_spent_at_the_last_rate():
    """OneCycleLR with one step in all takes lr/25/1e4, with which nothing is learnt."""
    by_update, by_epoch = (
        [rate_at(Recipe(epochs=1, schedule=schedule), step, 20) for step in range(20)]
        for schedule in ("one-cycle", "one-cycle-by-epoch")
    )
    assert by_update == by_epoch and max(by_epoch) == pytest.approx(0.1)


def test_multistep_is_that_of_torch():
    recipe = Recipe(epochs=6, lr=0.3, schedule="multistep", milestones=(2, 5))
    optimizer = sgd(recipe)
    decays = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5])
    for epoch in range(6):
        assert all(rate_at(recipe, 4 * epoch + i, 4) == pytest.approx(decays.get_last_lr()[0]) for i in range(4))
        optimizer.step()
        decays.step()


def test_momentum_is_constant_without_a_peak_or_another_schedule():
    plain = Recipe(epochs=2, lr=0.3)
    assert {momentum_at(plain, step, 3) for step in range(6)} == {0.9}
    for schedule in ({"schedule": "constant"}, {"schedule": "multistep", "milestones": (1,)}):
        changed = dataclasses.replace(CIFAR, **schedule)
        assert changed.peak_momentum is None and momentum_at(changed, 5, 10) == 0.9
    assert (CIFAR.peak_momentum, IMAGENET.peak_momentum) == (0.8, None)
    with pytest.raises(ba.InputError, match="--peak-momentum is -1; it must be at least 0"):
        Recipe(peak_momentum=-1)


def test_the_momentum_is_a_flag():
    fastat = ["problems/fastat.py", "--data", "cifar10"]
    assert understand(fastat).options.training().peak_momentum == 0.8
    assert understand([*fastat, "--peak-momentum", "0.9"]).options.training().peak_momentum == 0.9
    assert understand([*fastat, "--peak-momentum", "None"]).options.training().peak_momentum is None
    assert understand(["problems/fastat.py"]).options.training().peak_momentum is None


def test_the_trainer_follows_both():
    from evaluating import TRAIN, Attack, linear

    from bilevel_at.problems import standard
    from bilevel_at.solvers import ZeroIG
    from bilevel_at.train import Trainer

    recipe = Recipe(epochs=2, batch_size=16, lr=0.1, peak_momentum=0.5)
    few, seen = TRAIN[slice(0, 48)], []
    trainer = Trainer(standard.problem(), ZeroIG(), linear(), few, few, recipe, Attack("clean"))
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: (seen.append(dict(trainer.optimizer.param_groups[0])), step())
    list(trainer.epochs())
    assert [group["momentum"] for group in seen] == pytest.approx([momentum_at(recipe, i, 3) for i in range(6)])
    assert [group["lr"] for group in seen] == pytest.approx([rate_at(recipe, i, 3) for i in range(6)])

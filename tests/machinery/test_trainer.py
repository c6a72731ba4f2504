"""The training loop: replays, accumulation, the moving average, and the signs of catastrophic overfitting."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from networks import F64
from transcriptions import assert_moved, assert_same, ce, clip, seeded, sign_step

import bilevel_at as ba
from bilevel_at.data import Images, Loader
from bilevel_at.evaluate.attacks import attack_from_name
from bilevel_at.problems import fgsm, free, standard
from bilevel_at.runs.metrics import catastrophic_overfitting, last_is_first_to_fall
from bilevel_at.runs.recipe import Recipe
from bilevel_at.solvers import ZeroIG
from bilevel_at.train import Trainer
from bilevel_at.train.schedules import momentum_at


def images(n=22, side=3, classes=3, seed=0):
    g = seeded(seed)
    return Images(
        torch.rand((n, 1, side, side), generator=g, dtype=F64), torch.randint(0, classes, (n,), generator=g), 3
    )


def dense_network(seed=0, dtype=F64):
    torch.manual_seed(seed)
    layers = [torch.nn.Flatten(), torch.nn.Linear(9, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3)]
    return torch.nn.Sequential(*layers).to(dtype)


def trained(problem, recipe, model, epochs=1, data=None, seed=4):
    """A trainer after so many epochs."""
    data = images() if data is None else data
    trainer = Trainer(problem, ZeroIG(), model, data, data, recipe, attack_from_name("clean", 0.1), seed)
    for epoch in range(epochs):
        trainer.train_epoch(epoch)
    return trainer


PLAIN = Recipe(epochs=2, batch_size=8, lr=0.2, schedule="constant", momentum=0.9, weight_decay=1e-3)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)


@pytest.mark.parametrize("replays", [1, 3])
def test_the_trainer_replays_each_batch(replays):
    """m updates of θ on a batch before the next one; δ is carried, and a short batch uses its first rows."""
    model, epsilon = dense_network(), 0.1
    twin = copy.deepcopy(model)
    trainer = trained(free.problem(epsilon), replace(PLAIN, replays=replays), model, epochs=2)
    assert trainer.steps_per_epoch == 3 * replays
    optimizer, delta = sgd(twin), torch.zeros(8, 1, 3, 3, dtype=F64)
    loader, updates = Loader(images(), 8, seed=4), 0
    for epoch in range(2):
        for batch in loader.epoch(epoch):
            for _ in range(replays):
                rows = len(batch)
                used = clip(delta[:rows], batch.x, epsilon)
                at = (batch.x + used).requires_grad_()
                optimizer.zero_grad()
                ce(twin, at, batch.y).mean().backward()
                optimizer.step()
                delta[:rows] = (delta[:rows] + epsilon * at.grad.sign()).clamp(-epsilon, epsilon)
                updates += 1
    assert updates == 2 * trainer.steps_per_epoch
    assert_same(model, twin)


def test_replays_are_at_least_one_and_do_not_go_with_accumulation():
    with pytest.raises(ba.InputError, match="--replays is 0; it must be a whole number, at least 1"):
        Recipe(replays=0)
    with pytest.raises(ba.InputError, match="--replays is 2 and --accumulate 3; one of them must be 1"):
        Recipe(replays=2, accumulate=3)


@pytest.mark.parametrize(
    "problem", [lambda: standard.problem(0.1), lambda: fgsm.problem(0.1)], ids=["standard", "fgsm"]
)
@pytest.mark.parametrize("n", [22, 24])
def test_accumulated_batches_are_one_large_batch(problem, n):
    """Without batch norm; with 22 examples the last group is a batch of 4 and one of 2, and their weights differ."""
    data = images(n)
    data = Images(data.x.float(), data.y, 3)
    small, large = dense_network(dtype=torch.float32), dense_network(dtype=torch.float32)
    untouched = copy.deepcopy(small)
    trained(problem(), replace(PLAIN, batch_size=4, accumulate=4), small, data=data)
    one = trained(problem(), replace(PLAIN, batch_size=16), large, data=data)
    assert one.steps_per_epoch == 2
    assert_same(small, large, rtol=1e-4, atol=1e-6)
    assert_moved(small, untouched)
    wrong = dense_network(dtype=torch.float32)
    trained(problem(), replace(PLAIN, batch_size=4), wrong, data=data)
    with pytest.raises(AssertionError):
        assert_same(wrong, large, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_the_moving_average_is_the_recursion(decay):
    """a_1 = θ_1, a_t = decay · a_{t−1} + (1 − decay) · θ_t, after every update."""
    model = dense_network()
    twin = copy.deepcopy(model)
    trainer = trained(fgsm.problem(0.1), replace(PLAIN, ema=decay), model, epochs=2)
    optimizer, average = sgd(twin), None
    loader = Loader(images(), 8, seed=4)
    for epoch in range(2):
        for batch in loader.epoch(epoch):
            delta = sign_step(twin, batch.x, batch.y, torch.zeros_like(batch.x), 0.1, 0.1)
            optimizer.zero_grad()
            ce(twin, batch.x + delta, batch.y).mean().backward()
            optimizer.step()
            now = [p.detach().clone() for p in twin.parameters()]
            average = (
                now if average is None else [decay * a + (1 - decay) * p for a, p in zip(average, now, strict=True)]
            )
    assert_same(model, twin)
    assert trainer.evaluated is not model
    for got, want in zip(trainer.evaluated.parameters(), average, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    assert_moved(trainer.evaluated, model)


def with_batch_norm():
    torch.manual_seed(0)
    layers = [torch.nn.Flatten(), torch.nn.Linear(9, 10), torch.nn.BatchNorm1d(10), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(10, 3)).double()


def test_the_equal_average_is_the_mean_of_the_epochs_ends():
    recipe = replace(PLAIN, epochs=4, average_from=2)
    model, data = dense_network(), images()
    trainer = Trainer(standard.problem(), ZeroIG(), model, data, data, recipe, attack_from_name("clean", 0.1), 4)
    ends = []
    for epoch in trainer.epochs():
        if epoch.epoch == 1:
            assert trainer.evaluated is model and "average" not in trainer.state_dict()
        ends.append([p.detach().clone() for p in model.parameters()])
    means = [torch.stack(parts).mean(0) for parts in zip(*ends[1:], strict=True)]
    for got, want in zip(trainer.evaluated.parameters(), means, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    fresh = Trainer(standard.problem(), ZeroIG(), dense_network(), data, data, recipe, trainer.attack, 4)
    fresh.load_state_dict(trainer.state_dict())
    assert_same(fresh.evaluated, trainer.evaluated)


@pytest.mark.parametrize("how", [{"ema": 0.7}, {"average_from": 1}])
def test_statistics_of_averaged_weights_are_those_of_the_training_images(how):
    """Their mean and variance over the batches of the epoch, each batch weighing the same, as ``update_bn`` has it."""
    model = with_batch_norm()
    trainer = trained(fgsm.problem(0.1), replace(PLAIN, **how, reestimate=True), model, epochs=2)
    network = trainer.evaluated
    assert network is not model
    batches = [network[1](batch.x.flatten(1)) for batch in Loader(images(), 8, seed=4).epoch(1)]
    mean = torch.stack([b.mean(0) for b in batches]).mean(0)
    variance = torch.stack([b.var(0) for b in batches]).mean(0)
    torch.testing.assert_close(network[2].running_mean, mean)
    torch.testing.assert_close(network[2].running_var, variance)
    averaged = trained(fgsm.problem(0.1), replace(PLAIN, **how), with_batch_norm(), epochs=2).evaluated
    assert not torch.allclose(averaged[2].running_mean, mean)
    for got, want in zip(network.parameters(), averaged.parameters(), strict=True):
        torch.testing.assert_close(got, want)


def test_averages_that_contradict_each_other():
    for recipe, says in (
        ({"ema": 0.9, "average_from": 2}, "--ema is 0.9 and --average-from 2; one of them must be 0"),
        ({"reestimate": True}, "--reestimate is for averaged weights"),
        ({"average_from": 9, "epochs": 3}, "--average-from is 9, and there are 3 epochs"),
        ({"average_from": -1}, "--average-from is -1; it must be a whole number, at least 0"),
    ):
        with pytest.raises(ba.InputError, match=says):
            Recipe(**recipe)


def test_policies_are_told_every_update():
    seen, data = [], images(22)

    class Noting(ZeroIG):
        def set_step(self, step, steps):
            seen.append((step, steps))

    recipe = Recipe(epochs=2, batch_size=4, accumulate=2)
    trainer = Trainer(fgsm.problem(0.1), Noting(), dense_network(), data, data, recipe, attack_from_name("clean", 0.1))
    list(trainer.epochs())
    assert seen == [(step, 6) for step in range(6)]


def lines(robust, train, perturbation=0.03):
    return [
        {"epoch": i + 1, "robust": r, "train": t, "perturbation": perturbation, "attack": "pgd-10"}
        for i, (r, t) in enumerate(zip(robust, train, strict=True))
    ]


@pytest.mark.parametrize(
    ("robust", "train", "perturbation", "expected"),
    [
        ([0.30, 0.40, 0.45, 0.02], [0.40, 0.50, 0.55, 0.90], 0.03, (3, 4)),  # collapse, from the best epoch
        ([0.30, 0.40, 0.03, 0.02], [0.40, 0.50, 0.80, 0.90], 0.03, (2, 3)),  # the first epoch of it
        ([0.30, 0.45, 0.02, 0.46], [0.40, 0.55, 0.90, 0.60], 0.03, (2, 3)),  # recovered since: it happened all the same
        ([0.30, 0.40, 0.45, 0.43], [0.40, 0.50, 0.55, 0.60], 0.03, None),  # robust overfitting is another thing
        ([0.30, 0.40, 0.45, 0.02], [0.40, 0.50, 0.55, 0.30], 0.03, None),  # everything got worse: divergence
        ([0.30, 0.40, 0.45, 0.02], [0.40, 0.50, 0.55, 0.90], 0.0, None),  # standard training has nothing to lose
        ([0.05, 0.01], [0.3, 0.9], 0.03, None),  # never robust by as much as could be lost
        ([], [], 0.03, None),
        ([0.4], [0.5], 0.03, None),
    ],
)
def test_catastrophic_overfitting(robust, train, perturbation, expected):
    collapse = catastrophic_overfitting(lines(robust, train, perturbation))
    assert (None if collapse is None else (collapse.before["epoch"], collapse.after["epoch"])) == expected
    if collapse is not None:
        assert f"epoch {expected[1]}" in str(collapse) and "pgd-10" in str(collapse)


def test_the_last_good_epoch_is_the_one_before_the_fall():
    """Training accuracy may rise an epoch or two after robustness is gone; the weights to keep are from before it."""
    metrics = lines([0.40, 0.10, 0.02], [0.50, 0.45, 0.90])
    collapse = catastrophic_overfitting(metrics)
    assert (collapse.before["epoch"], collapse.after["epoch"], collapse.last_good) == (1, 3, 1)
    assert [last_is_first_to_fall(metrics[:n]) for n in range(4)] == [False, False, True, False]
    again = lines([0.40, 0.10, 0.38, 0.35, 0.02], [0.50, 0.45, 0.50, 0.55, 0.90])  # it recovers, and then is lost
    assert catastrophic_overfitting(again).last_good == 4
    assert [last_is_first_to_fall(again[:n]) for n in range(6)] == [False, False, True, False, False, True]


class Lazy(ZeroIG):
    """A solver that remembers, and reads a schedule."""

    def __init__(self):
        self.calls, self.weight = ba.Counter(), ba.Schedule(lambda epoch, epochs: epoch / epochs)


def test_solvers_are_told_the_epoch_and_saved():
    data, recipe = images(22), Recipe(epochs=2, batch_size=11)
    made = []
    for _ in range(2):
        attack = attack_from_name("clean", 0.1)
        made.append(Trainer(fgsm.problem(0.1), Lazy(), dense_network(), data, data, recipe, attack))
    trainer, fresh = made
    list(trainer.epochs())
    assert trainer.solver.weight.value == 0.5
    assert trainer.solver.calls.count == 2  # two batches in the last epoch
    fresh.load_state_dict(trainer.state_dict())
    assert fresh.solver.calls.count == 2


def test_the_trainer_moves_the_momentum():
    data, momenta = images(22), []
    recipe = Recipe(epochs=1, batch_size=11, momentum=0.9, peak_momentum=0.3)
    trainer = Trainer(fgsm.problem(0.1), ZeroIG(), dense_network(), data, data, recipe, attack_from_name("clean", 0.1))
    trainer.optimizer.register_step_pre_hook(lambda o, *_: momenta.append(o.param_groups[0]["momentum"]))
    list(trainer.epochs())
    assert momenta == [momentum_at(recipe, step, 2) for step in range(2)]
    assert momenta[0] < 0.9

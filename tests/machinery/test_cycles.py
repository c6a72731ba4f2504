"""Steps that go in a circle: leaving them early changes no result, and saves most of PGD's passes."""

from __future__ import annotations

import dataclasses
import random
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from evaluating import EPS, TEST
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bilevel_at as ba
from bilevel_at.evaluate import Attack, attack_from_name
from bilevel_at.evaluate.cycles import LONGEST, Cycles
from bilevel_at.evaluate.robust import attacked


class Counting(nn.Module):
    """A network that counts the rows it sees."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.rows = network, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows += len(x)
        return self.network(x)


def to_the_end(attack: Attack) -> Attack:
    """The same attack, all of whose steps are taken."""
    return dataclasses.replace(attack, stages=[dataclasses.replace(stage, cycles=False) for stage in attack.stages])


@given(st.integers(1, LONGEST), st.integers(0, 6), st.integers(1, 30))
def test_what_the_last_iterate_is(period, before, steps):
    """Rows that enter a cycle of ``period`` after ``before`` steps end where taking all the steps ends."""

    def iterate(number: int) -> torch.Tensor:
        place = number if number < before else before + (number - before) % period
        return torch.full((1, 2), float(place))

    watch = Cycles(steps, torch.Generator())
    for number in range(1, steps + 1):
        ending = watch.see(iterate(number))
        assert (ending is not None) == (number >= max(before, 1) + period)
        if ending is not None:
            cycling, last = ending
            assert cycling.all() and torch.equal(last, iterate(steps))
            break


@pytest.mark.parametrize("name", ["pgd-50", "pgd-49", "pgd-37-2", "pgd-50-any", "pgd-50-2-any"])
def test_the_result_is_that_of_all_steps(convolutional, name):
    attack = attack_from_name(name, EPS)
    early, late = attacked(convolutional, TEST, attack), attacked(convolutional, TEST, to_the_end(attack))
    assert torch.equal(early.broken, late.broken) and torch.equal(early.said, late.said)
    batch = ba.Batch(TEST.x, TEST.y)
    ours, whole = (
        each.perturb(convolutional, batch, torch.Generator().manual_seed(3)) for each in (attack, to_the_end(attack))
    )
    same = (ours == whole).flatten(1).all(1).float().mean()
    assert same > 0.99  # a pass on fewer images rounds otherwise, and the sign of a gradient of 1e-9 may differ


def test_half_of_the_passes_are_saved(convolutional):
    rows = []
    for attack in (attack_from_name("pgd-50", EPS), to_the_end(attack_from_name("pgd-50", EPS))):
        network = Counting(convolutional)
        attacked(network, TEST, attack)
        rows.append(network.rows)
    assert rows[0] < rows[1] / 2


def test_a_look_at_every_step_is_the_pass_of_the_next(convolutional):
    """PGD that counts every step makes one pass a step, not two."""
    steps, attack = 6, attack_from_name("pgd-6-any", EPS)
    network, batch = Counting(convolutional), ba.Batch(TEST.x, TEST.y)
    moved = to_the_end(attack).stages[0](network, batch, torch.Generator().manual_seed(0))
    assert network.rows <= steps * len(TEST)
    # The same by its definition: broken where any of the iterates is misclassified.
    lower, generator, delta = attack.stages[0].lower, torch.Generator().manual_seed(0), None
    broken = torch.zeros(len(TEST), dtype=torch.bool)
    for _ in range(steps):
        delta = lower.solve(convolutional, batch, delta, generator).delta
        broken |= convolutional(batch.x + delta).argmax(1) != batch.y
    assert broken.any() and torch.equal(convolutional(moved).argmax(1) != batch.y, broken)


class Holding(nn.Module):
    """A network that notes whether the activations of its last pass are still in memory as the next one begins."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.last, self.held = network, lambda: None, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.held += self.last() is not None
        inner = x * 1
        self.last = weakref.ref(inner)
        return self.network(inner.square())


@pytest.mark.parametrize("name", ["pgd-6", "pgd-6-any"])
def test_the_graph_of_a_step_is_gone_before_the_next(convolutional, name):
    """The output that a look at every step uses has the graph of its pass, which is most of an attack's memory."""
    network, batch = Holding(convolutional), ba.Batch(TEST.x, TEST.y)
    attack_from_name(name, EPS).stages[0](network, batch, torch.Generator().manual_seed(0))
    assert network.held == 0


@pytest.mark.parametrize("name", ["pgd-50-2", "pgd-50-2-any"])
def test_stored_results_of_earlier_versions_are_of_the_same_attack(name):
    """Their identity has the stages' repr (``runs/evaluations.py``), with the fields that stages had then."""
    attack = attack_from_name(name, EPS)
    for stage in attack.stages:
        text = repr(stage)
        assert "keep_output=False" in text and "cycles" not in text


class Noisy(nn.Module):
    """A network with noise in its input."""

    def __init__(self, network: nn.Module, draw: Callable[[], float | torch.Tensor]) -> None:
        super().__init__()
        self.network, self.draw = network, draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x + 1e-12 * self.draw())


DRAWS = {"torch": lambda: torch.randn(1), "numpy": np.random.randn, "python": random.random}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_steps_that_draw_are_all_taken(convolutional, draw):
    """The noise is too small to change a sign, so the iterates repeat; but another draw might have changed one."""
    network = Counting(Noisy(convolutional, draw))
    batch, attack = ba.Batch(TEST.x, TEST.y), attack_from_name("pgd-30", EPS)
    attack.stages[0](network, batch, torch.Generator().manual_seed(0))
    assert network.rows == 30 * len(TEST)


def test_the_attackers_own_draws_count_too(convolutional):
    generator = torch.Generator().manual_seed(0)
    watch, still = Cycles(9, generator), torch.zeros(4, 2)
    assert watch.see(still) is None
    torch.rand(1, generator=generator)
    assert watch.see(still) is None  # it is where it was, by a step that drew


class Centred(nn.Module):
    """A network that sees each image beside the mean of its batch, in eval mode too."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x - 0.5 * (x.mean(0) - 0.3))


def test_no_image_leaves_a_batch_that_the_others_depend_on(convolutional):
    attack, batch = attack_from_name("pgd-30", EPS), ba.Batch(TEST.x, TEST.y)
    network = Counting(Centred(convolutional))
    ours = attack.stages[0](network, batch, torch.Generator().manual_seed(0))
    assert network.rows == 30 * len(TEST) + len(TEST) + len(TEST) // 2  # all steps, and a look at who depends on whom
    whole = to_the_end(attack).stages[0](Centred(convolutional), batch, torch.Generator().manual_seed(0))
    assert torch.equal(ours, whole)


def test_batch_statistics_in_eval_mode():
    """A batch of one image has none, and a batch of some has others."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(32, track_running_stats=False)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), norm, nn.ReLU(), nn.Linear(32, 10)).eval()
    attack, batch = attack_from_name("pgd-40", EPS), ba.Batch(TEST.x[:20], TEST.y[:20])
    ours = attack.stages[0](network, batch, torch.Generator().manual_seed(0))
    assert torch.equal(ours, to_the_end(attack).stages[0](network, batch, torch.Generator().manual_seed(0)))

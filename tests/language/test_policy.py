"""Policies: how they are found, observed and told the epoch, and what is saved of them."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from networks import ATK, batch_of, dense
from transcriptions import seeded

import bilevel_at as ba
from bilevel_at.problems import asgd_bca, atas, fastbat, free, gradalign, trades
from bilevel_at.solvers import HessianFreeKKT, ZeroIG


class Noting(ba.Policy):
    """Notes what it is told."""

    def __init__(self, **parts):
        self.steps, self.epochs = [], []
        for name, part in parts.items():
            setattr(self, name, part)

    def observe(self, step):
        self.steps.append(step)

    def set_epoch(self, epoch, epochs):
        self.epochs.append((epoch, epochs))


class NotingLoss(ba.CrossEntropy):
    """The cross-entropy, which counts what it observes and may scale itself."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def observe(self, step):
        self.steps += 1

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def indexed(n=4):
    return batch_of(n, 6).replace(index=torch.arange(n))


def test_policies_are_found_under_their_paths():
    inner, listed, named, deep = Noting(), Noting(), Noting(), Noting()
    root = Noting(inner=inner, several=[listed, 3, (deep,)], by_name={"a": named, "b": None}, number=1.5)
    assert ba.policies(root) == {
        "": root, "inner": inner, "several.0": listed, "several.2.0": deep, "by_name.a": named
    }  # fmt: skip


def test_each_object_is_found_once_under_its_first_path():
    shared = Noting()
    middle = Noting(again=shared)
    root = Noting(first=shared, middle=middle, list=[shared, middle])
    shared.root = root  # a circle is no endless walk
    assert ba.policies(root) == {"": root, "first": shared, "middle": middle}


def test_equal_policies_are_not_the_same():
    @dataclasses.dataclass
    class Equal(ba.Policy):
        value: int = 1

    one, two = Equal(), Equal()
    assert one == two
    parts = ba.policies(Noting(one=one, two=two))
    assert set(parts) == {"", "one", "two"} and parts["one"] is not parts["two"]


def test_other_objects_are_not_walked_into():
    """A network is not part of a problem, nor is what an object holds that is no policy."""

    class Holder:
        def __init__(self):
            self.policy = Noting()

    assert set(ba.policies(Noting(holder=Holder(), network=torch.nn.Linear(2, 2)))) == {""}
    assert set(ba.policies(Holder())) == {"policy"}  # but the root may be any object


STEPPED = {"lower.attack_loss", "lower.anchor", "lower.anchor.start", "lower.anchor.step"}


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (fastbat.problem(), {"upper.criterion", *STEPPED}),  # the step is the anchor's and the problem's
        (trades.problem(), {"upper.criterion", "lower.attack_loss.loss", *STEPPED}),
        (atas.problem(), {"upper.criterion", "lower.attack_loss", "lower.anchor", "lower.anchor.start", "lower.step"}),
        (gradalign.problem(), {"upper.criterion", "upper.attack_loss", "lower.anchor", "lower.step"}),
        (free.problem(), {"upper.criterion", "lower.anchor"}),
    ],
    ids=["fastbat", "trades", "atas", "gradalign", "free"],
)
def test_of_a_problem_every_part_is_found_once(problem, expected):
    parts = ba.policies(problem)
    assert set(parts) == {"upper", "lower", *expected}
    assert len({id(part) for part in parts.values()}) == len(parts)
    for path, part in parts.items():  # and its path leads to it
        at = problem
        for name in path.split("."):
            at = getattr(at, name)
        assert at is part


def test_backward_and_set_epoch_tell_each_policy_once():
    """Problem and solver alike, also where a policy is shared by both players, in a list, or within another."""
    shared, listed, inner, of_solver = Noting(), Noting(), Noting(), Noting()

    class Own(ba.UpperProblem):
        """Has parts; its own override neither calls super() nor passes anything on."""

        def __init__(self):
            super().__init__()
            self.parts, self.epochs = [shared, listed, Noting(inner=inner)], []

        def set_epoch(self, epoch, epochs):
            self.epochs.append(epoch)

        def observe(self, step):
            self.last = step

    lower = ba.Linearized(ATK, ba.LinfBall(0.1), "zero")
    lower.shared = shared
    problem, solver = ba.BilevelProblem(Own(), lower), ZeroIG()
    solver.part = of_solver
    problem.set_epoch(2, 5)
    step = solver.backward(problem, dense(6, 5, 3), batch_of(3, 6))
    for policy in (shared, listed, inner, of_solver):
        assert policy.steps == [step]
    for policy in (shared, listed, inner):
        assert policy.epochs == [(2, 5)]
    assert problem.upper.epochs == [2] and problem.upper.last is step


@pytest.mark.parametrize("attack", [lambda loss: loss, ba.minus], ids=["itself", "minus"])
def test_a_loss_shared_by_both_players_observes_once(attack):
    loss = NotingLoss()
    problem = ba.BilevelProblem(ba.UpperProblem(loss), ba.Linearized(attack(loss), ba.LinfBall(0.1), "zero"))
    for n in (1, 2, 3):
        ZeroIG().backward(problem, dense(6, 5, 3), batch_of(3, 6))
        assert loss.steps == n
    assert problem.state_dict() == {"upper.criterion": {"steps": 3}}


def test_a_step_shared_by_anchor_and_problem_observes_once():
    step = ba.Adaptive(gamma=0.2, c=0.5)
    lower = ba.Linearized(ATK, ba.LinfBall(0.3), "gradient-step", "taylor", step)
    assert lower.anchor.step is step and lower.step is step
    problem, model, batch = ba.BilevelProblem(ba.UpperProblem(), lower), dense(6, 5, 3), indexed()
    solution = ZeroIG().backward(problem, model, batch, seeded(0)).solution
    square = solution.attack_gradient.square().sum(1)
    torch.testing.assert_close(step.memory.read(batch, torch.zeros_like(square)), 0.5 * square)


def test_state_is_by_path_and_only_of_those_that_have_one():
    problem, model, batch = atas.problem(epsilon=0.1), dense(6, 5, 3), indexed()
    assert set(problem.state_dict()) == {"lower.anchor", "lower.step"}
    problem.set_epoch(6, 30)
    ZeroIG().backward(problem, model, batch)
    state = problem.state_dict()
    assert torch.equal(state["lower.anchor"]["values"][:4], problem.lower.anchor.memory.values[:4])
    assert fastbat.problem().state_dict() == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {}, "the state is of no policy; this problem keeps lower.anchor, lower.step"),
        (lambda state: {"lower.anchor": state["lower.anchor"]}, "the state is of lower.anchor; this problem keeps"),
        (
            lambda state: {**state, "upper.nobody": {"a": 1}},
            "the state is of lower.anchor, lower.step, upper.nobody; this",
        ),
    ],
)
def test_the_state_of_other_policies_is_refused_and_nothing_loaded(change, message):
    problem, model, batch = atas.problem(epsilon=0.1), dense(6, 5, 3), indexed()
    problem.set_epoch(6, 30)
    ZeroIG().backward(problem, model, batch)
    fresh = atas.problem(epsilon=0.1)
    with pytest.raises(ba.InputError, match=message):
        fresh.load_state_dict(change(problem.state_dict()))
    assert fresh.lower.anchor.memory.values is None and fresh.lower.step.memory.values is None
    with pytest.raises(ba.InputError, match="this problem keeps none"):
        fastbat.problem().load_state_dict(problem.state_dict())


@pytest.mark.parametrize(
    "make",
    [
        lambda: atas.problem(epsilon=0.1, reset_every=3, warmup_epochs=2),
        lambda: asgd_bca.problem(epsilon=0.1, eta=0.2),
        lambda: free.problem(0.1, restart_every=3),
        lambda: ba.BilevelProblem(Weighted(), ba.Linearized(ATK, ba.LinfBall(0.1))),
    ],
    ids=["atas", "asgd_bca", "free", "schedule and counter"],
)
@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5])
def test_resuming_is_set_epoch_then_the_state(make, cut):
    """Cut after every batch of five epochs of three, training goes on as if it had not been."""
    batches = [indexed(), indexed(3), indexed(2)]

    def train(problem, model, first, last):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        losses = []
        for number in range(first, last):
            epoch, place = divmod(number, 3)
            if place == 0:
                problem.set_epoch(epoch, 5)
            optimizer.zero_grad()
            losses.append(ZeroIG().backward(problem, model, batches[place], seeded(number)).loss.item())
            optimizer.step()
        return losses

    whole, model = make(), dense(6, 5, 3)
    expected = train(whole, model, 0, 15)
    for within in (0, 1, 2):
        at = 3 * (cut - 1) + within
        first, half = make(), dense(6, 5, 3)
        train(first, half, 0, at)
        state = copy.deepcopy(first.state_dict())
        second = make()
        second.set_epoch(max(at - 1, 0) // 3, 5)
        second.load_state_dict(state)
        assert train(second, half, at, 15) == expected[at:]
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), half.parameters(), strict=True))


class Weighted(ba.UpperProblem):
    """The loss times a weight by epoch, and twice that on every second batch."""

    def __init__(self):
        super().__init__()
        self.weight, self.counter = ba.Schedule(lambda epoch, epochs: (epoch + 1) / epochs), ba.Counter()

    def loss_at(self, model, batch, solution, generator=None):
        factor = self.weight.value * (1 + self.counter.count % 2)
        return factor * super().loss_at(model, batch, solution, generator)


def test_schedules_and_counters():
    problem, model, batch = ba.BilevelProblem(Weighted(), ba.AtAnchor(ba.LinfBall(0.1))), dense(6, 5, 3), batch_of(3, 6)
    plain = ba.cross_entropy(model, batch, torch.zeros_like(batch.x)).mean().item()
    assert problem.upper.weight.value == 1  # before an epoch is said to begin it is the first of one
    for epoch in range(4):
        problem.set_epoch(epoch, 4)
        for place in range(3):
            assert problem.upper.counter.count == place
            loss = ZeroIG().backward(problem, model, batch).loss.item()
            assert loss == pytest.approx(plain * (epoch + 1) / 4 * (1 + place % 2))
    assert problem.state_dict() == {"upper.counter": {"count": 3}}


def test_solvers_have_policies_too():
    """A solver's own state is its owner's to save; what it observes is the same step."""

    class Averaging(HessianFreeKKT):
        """Keeps the mean implicit norm."""

        def __post_init__(self):
            super().__post_init__()
            self.norms = []

        def observe(self, step):
            self.norms.append(step.implicit_norm.item())

    solver = Averaging()
    problem = ba.BilevelProblem(ba.UpperProblem(), ba.Linearized(ATK, ba.LinfBall(0.3), "zero", "taylor", 0.5))
    step = solver.backward(problem, dense(6, 5, 3), batch_of(3, 6))
    assert solver.norms == [step.implicit_norm.item()] and solver.norms[0] > 0


# Numbers that depend on time.


def ramp(top, share):
    """``top``, reached linearly after a share of all steps."""
    return ba.Schedule(lambda step, steps: top * min(1.0, (step + 1) / (share * steps)), by="step")


def test_a_schedule_follows_its_own_clock_and_so_do_its_multiples():
    by_epoch, by_step = ba.Schedule(lambda epoch, epochs: epoch / epochs), ramp(0.4, 0.5)
    parts = Noting(a=by_epoch, b=by_step, c=3 * by_step, d=by_epoch / 2, e=by_step * 2)
    for policy in ba.policies(parts).values():
        policy.set_epoch(1, 4)
        policy.set_step(2, 20)
    assert (by_epoch.value, parts.d.value) == (0.25, 0.125)
    assert (by_step.value, by_step.last) == (pytest.approx(0.12), 0.4)
    assert (parts.c.value, parts.e.last) == (pytest.approx(0.36), 0.8)
    with pytest.raises(ba.InputError, match="by is 'batch'; choose from 'epoch', 'step'"):
        ba.Schedule(lambda step, steps: 1.0, by="batch")


@pytest.mark.parametrize("ball", [ba.LinfBall, ba.L2Ball])
def test_a_radius_may_grow(ball):
    x, space = torch.full((2, 6), 0.5, dtype=torch.float64), ball(ramp(0.4, 0.5))
    problem = ba.BilevelProblem(ba.UpperProblem(), ba.AtAnchor(space, ba.Uniform(ramp(0.8, 0.5))), ball(0.4))
    far = torch.full_like(x, 3.0)
    for step, radius in ((0, 0.04), (4, 0.2), (9, 0.4), (19, 0.4)):
        problem.set_step(step, 20)
        plain = ball(radius)
        assert space.radius == pytest.approx(radius) and problem.threat.radius == 0.4
        torch.testing.assert_close(space.project(far, x), plain.project(far, x))
        torch.testing.assert_close(space.sample(x, seeded(1)), plain.sample(x, seeded(1)))
        z, _ = problem.lower.anchor.draw(problem.lower, None, ba.Batch(x), seeded(1))
        torch.testing.assert_close(z, ba.Uniform(2 * radius).fresh(plain, x, seeded(1)))
    assert space.unbounded().radius == pytest.approx(0.4)


def test_a_radius_below_0_is_an_error_when_it_is_reached():
    space = ba.LinfBall(ba.Schedule(lambda epoch, epochs: 0.1 - 0.1 * epoch))
    problem = ba.BilevelProblem(ba.UpperProblem(), ba.AtAnchor(space))
    assert space.radius == 0.1
    problem.set_epoch(2, 4)
    with pytest.raises(ba.InputError, match="epsilon is -0.1; it must be a finite number, at least 0"):
        space.project(torch.zeros(1, 2), torch.zeros(1, 2))

"""Computing changes nothing: only ``observe``, which ``backward`` calls last, remembers.

Every problem file, and Fast-BAT under every solver: ``solve`` and ``hypergradient`` give the same bits twice and leave
memories, gradients and the caller's random generators as they were; a ``backward`` that fails leaves no trace.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import F64
from torch import Tensor, nn
from transcriptions import seeded

import bilevel_at as ba
import bilevel_at.problems
from bilevel_at.solvers import FullKKT, HessianFreeKKT, ZeroIG

NAMES = sorted(path.stem for path in Path(bilevel_at.problems.__file__).parent.glob("[!_]*.py"))
REMEMBERING = {"asgd_bca", "atas", "atta", "remembered_fastbat", "sgd_bca"}  # by example, so that a view is followed
KEEPING_STATE = REMEMBERING | {"free", "fgsm_pgi", "tdat", "liet", "nuat", "gat"}
# Steps short enough that coordinates stay between their bounds, where the implicit term is not zero.
ARGUMENTS = {"fastbat": {"step": 0.3}, "remembered_fastbat": {"max_step": 0.3}}
SOLVERS = {
    "fastbat": [ZeroIG(), HessianFreeKKT(), FullKKT(curvature="attack", damping=50.0)],
    "remembered_fastbat": [HessianFreeKKT()],
}
SIDE, PADDING = 4, 1


@dataclasses.dataclass
class Case:
    """A problem file, the solver it is trained with, and whether images come cropped and flipped."""

    name: str
    solver: ba.Solver
    cropped: bool

    def problem(self):
        """The problem in its seventh epoch, after ATAS' warm-up."""
        module = importlib.import_module(f"bilevel_at.problems.{self.name}")
        problem = module.problem(epsilon=0.2, **ARGUMENTS.get(self.name, {}))
        problem.set_epoch(6, 30)
        return problem

    def batch(self, visit=0):
        """Five examples; the second visit meets two of them again, and three new ones."""
        g = seeded(visit)
        index = torch.tensor([[3, 0, 7, 1, 5], [0, 9, 5, 8, 2]][visit])
        images = torch.rand((10, 1, SIDE, SIDE), generator=seeded(10), dtype=F64)[index]
        view = ba.CropFlip.draw(5, PADDING, g, torch.device("cpu")) if self.cropped else None
        x = images if view is None else view.apply(view.pad(images))
        return ba.Batch(x, index % 3, index, view)

    def visited(self, model, visits=1):
        """The problem after so many training steps, so that what remembers has something to remember."""
        problem = self.problem()
        for visit in range(visits):
            self.solver.backward(problem, copy.deepcopy(model), self.batch(visit), generator=seeded(visit))
        return problem

    def __str__(self):
        return f"{self.name}-{type(self.solver).__name__}{'-cropped' if self.cropped else ''}"


CASES = [
    Case(name, solver, cropped)
    for name in NAMES
    for solver in SOLVERS.get(name, [ZeroIG()])
    for cropped in ([False, True] if name in REMEMBERING else [False])
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
stateful_cases = pytest.mark.parametrize("case", [c for c in CASES if c.name in KEEPING_STATE], ids=str)


def network(batch_norm=False):
    """Smooth, and steep enough that signs are not ties."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(16, 3)]
    if batch_norm:
        layers.insert(1, nn.BatchNorm2d(4))
    return nn.Sequential(*layers).double().train()


def with_gradients(model):
    """Some ``.grad`` are numbers and some None, as between two parts of an accumulated batch."""
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = None if i % 2 else torch.randn(parameter.shape, generator=seeded(i), dtype=parameter.dtype)
    return model


def assert_same_bits(a, b, where="it"):
    """Tensors bit for bit, within dictionaries, lists, tuples and dataclasses."""
    assert type(a) is type(b), f"{where}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(one, other, f"{where}[{i}]")
    elif dataclasses.is_dataclass(a) and not isinstance(a, type):
        for f in dataclasses.fields(a):
            assert_same_bits(getattr(a, f.name), getattr(b, f.name), f"{where}.{f.name}")
    else:
        assert a == b, where


def assert_same_step(a, b):
    """Every number of two hypergradients."""
    names = ["loss", "losses", "v", "direct_norm", "implicit_norm", "implicit_cosine"]
    names += ["direct", "implicit", "grads"]  # by parameter name
    for name in names:
        assert_same_bits(getattr(a, name), getattr(b, name), name)
    assert_same_solution(a.solution, b.solution)


def assert_same_solution(a, b):
    for name in ("delta", "anchor", "lam", "gradient", "attack_gradient"):
        assert_same_bits(getattr(a, name), getattr(b, name), f"solution.{name}")
    assert_same_bits(dict(a.batch.more), dict(b.batch.more), "solution.batch.more")


def gradients_of(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def state_of(problem):
    return copy.deepcopy(problem.state_dict())


def attributes_of(value):
    """Everything that policies and objects of this library are made of, whether or not ``state_dict`` tells it."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: attributes_of(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [attributes_of(part) for part in value]
    if isinstance(value, ba.Policy) or (type(value).__module__.startswith("bilevel_at") and hasattr(value, "__dict__")):
        return {"type": type(value), **{name: attributes_of(part) for name, part in vars(value).items()}}
    return value


@pytest.fixture
def global_generators():
    """Those of torch, numpy and random must be, after the test, where they were before."""

    def states():
        return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002

    before = states()
    yield
    after = states()
    assert torch.equal(before[0], after[0]), "torch's global generator"
    assert all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True)), "numpy's global generator"
    assert before[2] == after[2], "random's global generator"


# --- computing ------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("visits", [0, 1])
def test_hypergradient_twice_gives_the_same_bits_and_changes_nothing(case, visits):
    model = network()
    problem = case.visited(model, visits)
    with_gradients(model)
    batch = case.batch(visits)
    before = state_of(problem), attributes_of(problem), attributes_of(case.solver), gradients_of(model)
    generators = seeded(5), seeded(5)
    first, second = (case.solver.hypergradient(problem, model, batch, generator=generator) for generator in generators)
    assert_same_step(first, second)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    after = state_of(problem), attributes_of(problem), attributes_of(case.solver), gradients_of(model)
    assert_same_bits(before, after)


@every_case
@pytest.mark.parametrize("differentiable", [False, True])
def test_solve_twice_gives_the_same_bits_and_changes_nothing(case, differentiable):
    model = network()
    problem = case.visited(model)
    with_gradients(model)
    batch = case.batch(1)
    before = state_of(problem), attributes_of(problem), gradients_of(model)
    first, second = (
        problem.lower.solve(model, batch, generator=seeded(5), differentiable=differentiable) for _ in range(2)
    )
    assert_same_solution(first, second)
    assert_same_bits(before, (state_of(problem), attributes_of(problem), gradients_of(model)))


@every_case
def test_computing_leaves_the_global_generators_alone(case, global_generators):
    state = torch.get_rng_state()
    model = network()  # seeds torch's generator
    torch.set_rng_state(state)
    problem = case.problem()
    case.solver.hypergradient(problem, model, case.batch(), generator=seeded(5))
    problem.lower.solve(model, case.batch(), generator=seeded(5))
    case.solver.backward(problem, model, case.batch(), generator=seeded(5))


@every_case
def test_computing_leaves_the_batch_alone(case):
    model, batch = network(), case.batch()
    before = copy.deepcopy((batch.x, batch.y, batch.index, dict(batch.more)))
    case.solver.backward(case.problem(), model, batch, generator=seeded(5))
    assert_same_bits(before, (batch.x, batch.y, batch.index, dict(batch.more)))
    assert not batch.x.requires_grad and batch.x.grad is None


@pytest.mark.parametrize("case", [c for c in CASES if not isinstance(c.solver, FullKKT)], ids=str)
def test_batch_statistics_are_all_that_a_hypergradient_changes_in_the_network(case):
    """Running means move as the network's own passes move them; parameters and modes do not."""
    model, batch = network(batch_norm=True), case.batch()
    twin = copy.deepcopy(model)
    problem = case.problem()
    before = state_of(problem)
    modes = [module.training for module in model.modules()]
    first = case.solver.hypergradient(problem, model, batch, generator=seeded(5))
    second = case.solver.hypergradient(problem, twin, batch, generator=seeded(5))
    assert_same_step(first, second)
    assert_same_bits(dict(model.named_buffers()), dict(twin.named_buffers()))
    assert_same_bits(dict(model.named_parameters()), dict(network(batch_norm=True).named_parameters()))
    assert [module.training for module in model.modules()] == modes
    assert_same_bits(before, state_of(problem))


def test_what_is_returned_cannot_be_changed():
    case = next(c for c in CASES if c.name == "fastbat")
    problem, model = case.problem(), network()
    step = case.solver.hypergradient(problem, model, case.batch(), generator=seeded(5))
    for frozen, name in ((step, "losses"), (step.solution, "delta")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, torch.zeros(1))


def test_the_implicit_term_is_seen_by_these_tests():
    model = network()
    for case in CASES:
        step = case.solver.hypergradient(case.problem(), model, case.batch(), generator=seeded(5))
        assert (step.implicit_norm > 0) == (not isinstance(case.solver, ZeroIG)), str(case)


# --- backward -------------------------------------------------------------------------------------------------------


@every_case
def test_backward_is_hypergradient_then_add_to_then_observe(case):
    whole, parts = case.problem(), case.problem()
    model = with_gradients(network())
    twin = with_gradients(network())
    for visit in (0, 1, 0):
        batch = case.batch(visit)
        first = case.solver.backward(whole, model, batch, generator=seeded(visit))
        second = case.solver.hypergradient(parts, twin, batch, generator=seeded(visit))
        second.add_to(twin)
        parts.observe(second)
        assert_same_step(first, second)
        assert_same_bits(gradients_of(model), gradients_of(twin))
        assert_same_bits(state_of(whole), state_of(parts))


@stateful_cases
def test_backward_remembers(case):
    """So that the tests of what does not change are about something that can."""
    model, problem = network(), case.problem()
    states = [state_of(problem)]
    for visit in (0, 1):
        case.solver.backward(problem, model, case.batch(visit), generator=seeded(visit))
        states.append(state_of(problem))
    for earlier, later in zip(states, states[1:], strict=False):
        with pytest.raises(AssertionError):
            assert_same_bits(earlier, later)


def test_add_to_takes_a_weight():
    case = next(c for c in CASES if c.name == "fastbat")
    model = with_gradients(network())
    before = gradients_of(model)
    step = case.solver.hypergradient(case.problem(), model, case.batch(), generator=seeded(5))
    step.add_to(model, weight=0.25)
    for name, parameter in model.named_parameters():
        expected = 0.25 * step.grads[name] + (0 if before[name] is None else before[name])
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-14, atol=0)


def test_gradients_are_the_sum_of_the_two_terms():
    case = next(c for c in CASES if c.name == "fastbat" and isinstance(c.solver, HessianFreeKKT))
    step = case.solver.hypergradient(case.problem(), network(), case.batch(), generator=seeded(5))
    assert step.grads.keys() == step.direct.keys()
    for name, gradient in step.grads.items():
        implicit = step.implicit.get(name)
        expected = step.direct[name] if implicit is None else step.direct[name] + implicit
        torch.testing.assert_close(gradient, expected, rtol=1e-14, atol=0)


# --- a backward that fails ------------------------------------------------------------------------------------------


class Broken(Exception):
    """Raised by a test; nothing in the library handles it."""


class BrokenUpper(ba.UpperProblem):
    """Another upper problem, whose losses are then changed or raise."""

    def __init__(self, upper, change):
        self.upper, self.change = upper, change

    def prepare(self, model, batch, generator):
        return self.upper.prepare(model, batch, generator)

    def loss_at(self, model, batch, solution, generator=None):
        return self.change(self.upper.loss_at(model, batch, solution, generator))


class BreaksAfter(nn.Module):
    """A network whose first ``passes`` forward passes succeed, and no later one."""

    def __init__(self, inner, passes):
        super().__init__()
        self.inner, self.passes, self.count = inner, passes, 0

    def forward(self, x):
        self.count += 1
        if self.count > self.passes:
            raise Broken(f"pass {self.count}")
        return self.inner(x)


def raises(losses):
    raise Broken("upper loss")


def loses_one(losses):
    return losses[:-1] if losses.ndim else losses.expand(2)


def assert_fails_without_a_trace(solver, problem, model, batch, error, match=None):
    """``backward`` raises, and ``.grad``, states, modes and every attribute are what they were."""
    with_gradients(model)
    modes = [module.training for module in model.modules()]
    before = state_of(problem), attributes_of(problem), attributes_of(solver), gradients_of(model)
    with pytest.raises(error, match=match):
        solver.backward(problem, model, batch, generator=seeded(5))
    after = state_of(problem), attributes_of(problem), attributes_of(solver), gradients_of(model)
    assert_same_bits(before, after)
    assert [module.training for module in model.modules()] == modes


@every_case
@pytest.mark.parametrize(
    ("change", "error"), [(raises, Broken), (loses_one, ba.InputError)], ids=["raises", "wrong shape"]
)
def test_an_upper_loss_that_fails_leaves_no_trace(case, change, error):
    model = network()
    sound = case.visited(model)
    problem = ba.BilevelProblem(BrokenUpper(sound.upper, change), sound.lower, sound.threat)
    assert_fails_without_a_trace(case.solver, problem, model, case.batch(1), error)


@every_case
def test_a_network_that_fails_in_any_pass_leaves_no_trace(case):
    model = network()
    problem = case.visited(model)
    counting = BreaksAfter(model, passes=10_000)
    case.solver.hypergradient(problem, counting, case.batch(1), generator=seeded(5))
    total = counting.count
    for passes in sorted({0, min(1, total - 1), total // 2, total - 1}):
        assert_fails_without_a_trace(case.solver, problem, BreaksAfter(model, passes), case.batch(1), Broken)


def concave(model, batch, delta):
    """An attack loss whose Hessian is that of the network less 20 I."""
    return ba.cross_entropy(model, batch, delta) - 10 * delta.flatten(1).square().sum(1)


@pytest.mark.parametrize("method", ["dense", "cg"])
def test_a_solver_that_refuses_the_curvature_leaves_no_trace(method):
    case, model = Case("atas", ZeroIG(), False), network()
    steps = ba.Adaptive(gamma=1.0, c=1.0)
    lower = ba.Linearized(concave, ba.LinfBall(50.0, bounds=None), ba.Remembered(start="zero"), "taylor", steps)
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    ZeroIG().backward(problem, copy.deepcopy(model), case.batch(0), generator=seeded(0))
    solver = FullKKT(method=method, curvature="attack")
    message = "not positive definite on the free directions"
    assert_fails_without_a_trace(solver, problem, model, case.batch(1), ba.CurvatureError, message)
    before = state_of(problem)  # with damping the same step succeeds, and is remembered
    FullKKT(method=method, curvature="attack", damping=1000.0).backward(
        problem, model, case.batch(1), generator=seeded(5)
    )
    with pytest.raises(AssertionError):
        assert_same_bits(before, state_of(problem))


@every_case
def test_training_goes_on_after_a_failure_as_if_it_had_not_been(case):
    model = network()
    problem, undisturbed = case.visited(model), case.visited(model)
    with pytest.raises(Broken):
        case.solver.backward(problem, BreaksAfter(model, 0), case.batch(1), generator=seeded(1))
    for visit in (1, 0):
        first = case.solver.backward(problem, model, case.batch(visit), generator=seeded(visit))
        second = case.solver.backward(undisturbed, model, case.batch(visit), generator=seeded(visit))
        assert_same_step(first, second)
    assert_same_bits(state_of(problem), state_of(undisturbed))


# --- copies, hashes and equality ------------------------------------------------------------------------------------


@every_case
def test_a_deep_copy_shares_no_memory(case):
    model = network()
    problem = case.visited(model)
    twin = copy.deepcopy(problem)
    before = state_of(twin)
    assert_same_bits(before, state_of(problem))
    case.solver.backward(problem, model, case.batch(1), generator=seeded(1))
    assert_same_bits(before, state_of(twin))
    case.solver.backward(twin, model, case.batch(1), generator=seeded(1))
    assert_same_bits(state_of(problem), state_of(twin))
    shared = {id(policy) for policy in ba.policies(problem).values()}
    assert shared.isdisjoint(id(policy) for policy in ba.policies(twin).values())


@stateful_cases
def test_a_state_that_was_loaded_is_not_written_to(case):
    """Two problems that continue from one state do not meet in it."""
    model = network()
    state = state_of(case.visited(model))
    before = copy.deepcopy(state)
    one, other = case.problem(), case.problem()
    for problem in (one, other):
        problem.load_state_dict(state)
    for visit in (0, 1):
        case.solver.backward(one, model, case.batch(visit), generator=seeded(visit))
    assert_same_bits(before, state)
    assert_same_bits(before, state_of(other))


def hash_of(value):
    """The hash, or the fact that the object has none."""
    try:
        return hash(value)
    except TypeError:
        return "unhashable"


@every_case
def test_hashes_and_equality_do_not_change_by_solving(case):
    model = network()
    problem, other = case.problem(), case.problem()

    def facts():
        ours, theirs = ([*ba.policies(p).values(), p, case.solver] for p in (problem, other))
        equal = [a == b for a, b in zip(ours, theirs, strict=True)]
        return [hash_of(a) for a in ours], equal, [a == a for a in ours]

    before = facts()
    problem.lower.solve(model, case.batch(), generator=seeded(0))
    assert facts() == before
    case.solver.hypergradient(problem, model, case.batch(), generator=seeded(0))
    assert facts() == before
    case.solver.backward(problem, model, case.batch(), generator=seeded(0))
    case.solver.backward(other, model, case.batch(), generator=seeded(0))
    assert facts()[0] == before[0]
    assert all(facts()[2])


@every_case
def test_policies_have_one_path_each(case):
    problem = case.problem()
    paths = ba.policies(problem)
    assert {"upper", "lower"} <= paths.keys()
    assert len({id(policy) for policy in paths.values()}) == len(paths)
    assert set(problem.state_dict()) <= set(paths)

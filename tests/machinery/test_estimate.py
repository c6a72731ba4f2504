"""What a step costs, told before it is run, against steps that are run: operations, memory, what is remembered."""

from __future__ import annotations

import copy
import importlib
import sys
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import bilevel_at as ba
from bilevel_at.diagnose import StepCost, describe, estimate
from bilevel_at.diagnose.counting import Moment, extended
from bilevel_at.problems import atas, fastat, fastbat, fgsm_sdi, minmax, standard
from bilevel_at.runs.problem_file import packaged_problems
from bilevel_at.solvers import FullKKT, HessianFreeKKT, Lazy, ProjectionAdjoint, ZeroIG

PROBLEMS = sorted(path.stem for path, _ in packaged_problems())
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
SEARCHES = {"ssat"}  # how many examples a pass has depends on their predictions


def convolutional():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4)]
    return nn.Sequential(*layers).train()


def dense():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4)).train()


def batch(n=10, view=True):
    torch.manual_seed(1)
    crop = ba.CropFlip.draw(n, 1, None, torch.device("cpu")) if view else None
    return ba.Batch(torch.rand(n, 3, 8, 8), torch.arange(n) % 4, torch.arange(n), crop)


def composed(name):
    module = importlib.import_module(f"bilevel_at.problems.{name}")
    return module.problem(epsilon=0.1), module.solver() if hasattr(module, "solver") else ZeroIG()


def operations(compute):
    with FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", PROBLEMS)
def test_operations_are_those_of_a_real_step(name):
    problem, solver = composed(name)
    model, few = convolutional(), batch()
    cost = estimate(problem, solver, model, few)
    problem.set_epoch(0, 1)
    first, second = (operations(lambda: solver.backward(problem, model, few)) for _ in range(2))
    model.zero_grad()
    plain = operations(lambda: nn.functional.cross_entropy(model(few.x), few.y).backward())
    assert cost.plain_flops == plain
    if name in SEARCHES:
        look = operations(lambda: model(few.x))
        attacked = operations(lambda: ZeroIG().backward(fastat.problem(0.1), model, few))
        assert attacked <= cost.flops <= attacked + 2 * look and attacked <= second <= attacked + 2 * look
        return
    # Where a step of 10 was extended from those of 2 and 4, all but a nuclear norm is linear in their number.
    norm = 8 * 10 * 4 * 4 if name == "nuat" and cost.real_examples else 0
    assert abs(cost.first_flops - first) <= norm and abs(cost.flops - second) <= norm
    assert cost.multiple == cost.flops / plain


class Alive(TorchDispatchMode):
    """The bytes of all tensors that an operation has returned and that are still there; written apart from torch's."""

    def __init__(self, before):
        super().__init__()
        self.sizes, self.now, self.most = {}, 0, 0
        for tensor in before:
            self.see(tensor)

    def see(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.see, result)
        return result


def tables(problem):
    return [t for state in problem.state_dict().values() for t in state.values() if isinstance(t, torch.Tensor)]


MEASURED = {
    "Fast-AT": (fastat.problem(0.1), ZeroIG()),
    "Fast-BAT": (fastbat.problem(0.1), HessianFreeKKT()),
    "ATAS": (atas.problem(0.1, warmup_epochs=0), ZeroIG()),
    "PGD": (minmax.problem(0.1, steps=4), ZeroIG()),
    "Fast-BAT, whose projections go on for as long as they must": (fastbat.problem(0.1), ProjectionAdjoint()),
}


@pytest.mark.parametrize("optimizer", [None, SGD])
@pytest.mark.parametrize("name", MEASURED)
def test_the_peak_is_that_of_the_tensors_of_a_real_step(name, optimizer):
    """To the byte: between two operations, all tensors that are alive."""
    (problem, solver), model, few = copy.deepcopy(MEASURED[name]), convolutional(), batch()
    cost = estimate(problem, solver, model, few, optimizer=optimizer)
    made = optimizer(model.parameters()) if optimizer else None

    def step():
        model.zero_grad()
        solver.backward(problem, model, few)
        if made:
            made.step()

    problem.set_epoch(0, 1)
    step()
    momenta = [m["momentum_buffer"] for m in made.state.values()] if made else []
    own = [*model.parameters(), *model.buffers()]
    before = [*own, few.x, few.y, few.index, *vars(few.view).values()]
    there = [t for t in before if isinstance(t, torch.Tensor)]
    with Alive([*there, *momenta, *tables(problem), *(p.grad for p in model.parameters())]) as alive:
        step()
    assert cost.peak_bytes == alive.most
    assert cost.optimizer_bytes == sum(m.numel() * 4 for m in momenta)
    assert cost.network_bytes == sum(t.numel() * t.element_size() for t in own)


def test_operations_that_only_one_step_makes():
    """What both make before and after is extended one by one; of what is between, the maxima, or the one there is."""
    fewer = [Moment("a", 1), Moment("loop", 2), Moment("end", 2), Moment("c", 3)]
    more = [Moment("a", 2), Moment("loop", 3), Moment("loop", 4), Moment("end", 3), Moment("c", 6)]
    assert [moment.alive for moment in extended(more, fewer, 10)] == [12, 13, 4, 13, 36]
    other = [Moment("a", 1), Moment("round", 1), Moment("ring", 3), Moment("c", 3)]
    assert [moment.alive for moment in extended(more, other, 10)] == [12, 4 + 10 * (4 - 3), 36]
    assert extended(fewer, fewer, 10) == fewer and extended(fewer[:2], fewer[:2], 3) == fewer[:2]
    assert extended([], [], 2) == []


@pytest.mark.parametrize("name", ["Fast-AT", "Fast-BAT", "ATAS", "PGD"])
def test_the_peak_is_what_torch_s_profiler_measures(name):
    """On a network of matrix products, whose kernels take next to nothing for themselves; a thousandth is allowed."""
    (problem, solver), model, few = copy.deepcopy(MEASURED[name]), dense(), batch(64, view=False)
    cost = estimate(problem, solver, model, few)
    problem.set_epoch(0, 1)
    solver.backward(problem, model, few)
    model.zero_grad()
    before = [*model.parameters(), *model.buffers(), few.x, few.y, few.index, *tables(problem)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        solver.backward(problem, model, few)
    now = most = sum(t.numel() * t.element_size() for t in before)
    for event in measured.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    assert most == pytest.approx(cost.peak_bytes, rel=1e-3)


@pytest.mark.parametrize("name", ["atas", "atta", "fgsm_pgi", "free", "remembered_fastbat", "tdat"])
def test_what_is_remembered_is_told_for_all_examples(name):
    """As large as the state is after an epoch of 200 examples, the last first, so that no table grows twice."""
    problem, solver = composed(name)
    model, few = convolutional(), batch()
    cost = estimate(problem, solver, model, few, examples=200, epoch=9, epochs=10)
    problem.set_epoch(9, 10)
    for i in [19, *range(19)]:
        solver.backward(problem, model, few.replace(index=few.index + 10 * i))
    sizes = {path: sum(t.numel() * t.element_size() for t in state.values() if isinstance(t, torch.Tensor))
             for path, state in problem.state_dict().items() if path in cost.remembered}  # fmt: skip
    if name == "fgsm_pgi":  # whose state has two tables in it
        state = next(iter(problem.state_dict().values()))
        tensors = [t for part in state.values() if isinstance(part, dict) for t in part.values()]
        sizes = dict.fromkeys(cost.remembered, sum(t.numel() * t.element_size() for t in tensors))
    assert dict(cost.remembered) == sizes and sum(sizes.values()) > 0
    assert cost.memory_bytes == cost.network_bytes + sum(sizes.values())
    less = estimate(*composed(name), model, few, epoch=9, epochs=10)
    assert cost.peak_bytes - less.peak_bytes == sum(sizes.values()) - sum(less.remembered.values())


def test_real_examples_tell_what_the_meta_device_tells(monkeypatch):
    """A step that looks at values is taken on 2 and on 4 examples, and extended."""
    model, few = convolutional(), batch(12)
    refused = []

    class Looks(ba.CrossEntropy):
        def value(self, output, batch):
            if output.device.type == "meta":
                refused.append(output.shape)
            output.sum().item()
            return super().value(output, batch)

    lower = ba.Linearized(ba.minus(ba.CrossEntropy()), ba.LinfBall(0.1, bounds=None), "zero", "sign", 0.1, "train")
    plain = estimate(ba.BilevelProblem(ba.UpperProblem(), lower), ZeroIG(), model, few, optimizer=SGD)
    looks = estimate(ba.BilevelProblem(ba.UpperProblem(Looks()), lower), ZeroIG(), model, few, optimizer=SGD)
    assert refused and looks.real_examples == 4 and "meta" in looks.reason
    told = ("flops", "first_flops", "plain_flops", "peak_bytes", "network_bytes", "optimizer_bytes")
    assert [getattr(plain, name) for name in told] == [getattr(looks, name) for name in told]


def test_nothing_changes():
    problem, solver = atas.problem(0.1), ZeroIG()
    model, few = convolutional(), batch()
    solver.backward(problem, model, few)
    before = copy.deepcopy((model.state_dict(), problem.state_dict(), [p.grad for p in model.parameters()]))
    state = torch.get_rng_state()
    estimate(problem, solver, model.eval(), few, examples=50, optimizer=SGD)
    after = (model.state_dict(), problem.state_dict(), [p.grad for p in model.parameters()])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state()) and not model.training


def test_a_large_network_takes_no_time_on_the_meta_device():
    """PreActResNet-18 at batch 128, whose real step would take minutes and 0.6 GB; FGSM-SDI's needs no values."""
    from bilevel_at.models import build_model

    model = build_model("preact_resnet18", (3, 32, 32), 10)
    few = ba.Batch(torch.rand(128, 3, 32, 32), torch.zeros(128, dtype=torch.int64))
    cost = estimate(fgsm_sdi.problem(), ZeroIG(), model, few)
    assert cost.real_examples == 0 and 7 / 3 < cost.multiple < 7 / 3 + 0.06
    assert cost.peak_bytes > 128 * 64 * 32 * 32 * 4 * 17  # of 17 convolutions, at least what one saves


def test_a_solver_that_tosses_a_coin_costs_its_mean():
    model, few, problem = convolutional(), batch(), fastbat.problem(0.1)
    costs = [estimate(problem, s, model, few) for s in (ZeroIG(), HessianFreeKKT(), Lazy(HessianFreeKKT(), 0.25))]
    direct, whole, lazy = costs
    assert lazy.flops == pytest.approx(0.75 * direct.flops + 0.25 * whole.flops, rel=1e-12)
    assert lazy.peak_bytes == whole.peak_bytes > direct.peak_bytes
    assert estimate(problem, Lazy(HessianFreeKKT(), 1.0), model, few).flops == whole.flops


def test_without_torch_s_estimator_only_the_peak_is_not_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.distributed._tools.mem_tracker", None)
    cost = estimate(fastat.problem(0.1), ZeroIG(), convolutional(), batch(), optimizer=SGD)
    assert cost.peak_bytes is None and cost.multiple > 1 and cost.memory_bytes > 0


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def forward(self, x, scale):
        return self.layer(scale * x).flatten(1)


def test_mistakes():
    model, few = convolutional(), batch()
    with pytest.raises(ba.InputError, match="examples is 3; it must be a whole number, at least 10"):
        estimate(standard.problem(), ZeroIG(), model, few, examples=3)
    with pytest.raises(ba.InputError, match="no parameter of the model requires a gradient"):
        estimate(standard.problem(), ZeroIG(), convolutional().requires_grad_(False), few)
    far = ba.BilevelProblem(ba.UpperProblem(lambda net, batch, delta: net(batch.x + delta, 1).sum(1)),
                            ba.AtAnchor(ba.LinfBall(0.1)))  # fmt: skip
    with pytest.raises(ba.InputError, match=r"plain training is model\(batch.x\), which fails: .* missing 1 required"):
        estimate(far, ZeroIG(), Scaled(), few)
    cost = StepCost(20.0, 30.0, 10.0, None, 4, 0)
    assert cost.seconds(10.0) == 3 and cost.seconds(10.0, 5) == 3 + 4 * 2
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ba.InputError, match="flops_per_second is"):
            cost.seconds(wrong)
    with pytest.raises(ba.InputError, match="steps is 0"):
        cost.seconds(1.0, 0)


def test_a_step_s_own_error_is_raised():
    problem = ba.BilevelProblem(ba.UpperProblem(), ba.Proximal(ba.minus(ba.cross_entropy), ba.LinfBall(0.1), 1e-3,
                                                                max_iter=1))  # fmt: skip
    with pytest.raises(ba.BilevelError, match="did not reach tol"):
        estimate(problem, FullKKT(), convolutional(), batch())


class Corners(ba.Start):
    """Every corner is as likely. The second sentence is not told."""

    def __init__(self, size, twice=False):
        self.size, self.twice = size, twice


class Own(ba.LowerProblem):
    constraint = ba.L2Ball(0.5, bounds=(0, 1))
    anchor = Corners(0.25)


def test_words_come_from_the_objects():
    def told(problem, solver=None):
        return {part.role: part for part in describe(problem, solver or ZeroIG())}

    parts = told(fastbat.problem(0.1, step=20.0), HessianFreeKKT(ig_weight=0.005))
    assert parts["lower"].name == "Linearized" and parts["lower.direction"].name == "taylor"
    assert parts["lower.anchor"].name == "Steps(start=Uniform(radius=0.1), direction=taylor, step=20)"
    assert parts["lower.step"].name == "20" and parts["lower.mode"].name == "train"
    assert parts["lower.attack_loss"].name == "minus(cross_entropy)" and parts["threat"].name == "LinfBall(epsilon=0.1)"
    assert parts["solver"].name == "HessianFreeKKT(ig_weight=0.005)"
    own = told(ba.BilevelProblem(ba.UpperProblem(), Own(), threat=ba.LinfBall(8 / 255)))
    assert own["lower.anchor"].name == "Corners(size=0.25)"
    assert own["lower.anchor"].about == "Every corner is as likely"
    assert (
        own["lower.constraint"].name == "L2Ball(epsilon=0.5, bounds=(0, 1))"
        and own["threat"].name == "LinfBall(epsilon=0.03137)"
    )
    for name in PROBLEMS:
        for part in describe(*composed(name)):
            assert part.name and " at 0x" not in part.name and "\n" not in part.name + part.about

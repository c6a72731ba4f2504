"""Losses: values against formulas, what is prepared once per solve, minus, shared outputs, and label errors."""

from __future__ import annotations

import pytest
import torch
from networks import F64, batch_of, dense, network
from torch.nn import functional as F
from transcriptions import ce, clip, input_gradient, kl, seeded

import bilevel_at as ba
from bilevel_at.losses import as_loss
from bilevel_at.solvers import HessianFreeKKT, ZeroIG
from bilevel_at.testing import hypergradcheck


class Counting(torch.nn.Module):
    """Counts forward passes, and those under a graph."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.passes, self.graphs = inner, 0, 0

    def forward(self, x):
        out = self.inner(x)
        self.passes, self.graphs = self.passes + 1, self.graphs + out.requires_grad
        return out


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7, 1.0])
def test_label_smoothing_is_torchs(smoothing):
    model, batch, delta = dense(6, 5, 3), batch_of(4, 6), 0.1 * torch.randn(4, 6, dtype=F64)
    ours = ba.CrossEntropy(smoothing)(model, batch, delta)
    theirs = torch.nn.CrossEntropyLoss(reduction="none", label_smoothing=smoothing)(model(batch.x + delta), batch.y)
    torch.testing.assert_close(ours, theirs)
    logs = F.log_softmax(model(batch.x + delta), 1)
    target = (1 - smoothing) * F.one_hot(batch.y, 3) + smoothing / 3  # spread over all classes, the label's too
    torch.testing.assert_close(ours, -(target * logs).sum(1))


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, float("nan")])
def test_label_smoothing_is_a_share(smoothing):
    with pytest.raises(ba.InputError, match="label_smoothing is .*; it must be from 0 to 1"):
        ba.CrossEntropy(smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.4, 0.95, 1.0])
def test_label_smoothing_over_the_other_classes_leaves_the_rest_on_the_label(smoothing):
    model, batch, delta = dense(6, 5, 3), batch_of(4, 6), 0.1 * torch.randn(4, 6, dtype=F64)
    target = torch.full((4, 3), smoothing / 2, dtype=F64).scatter(1, batch.y[:, None], 1 - smoothing)
    ours = ba.CrossEntropy(smoothing, over="others")(model, batch, delta)
    torch.testing.assert_close(ours, -(target * F.log_softmax(model(batch.x + delta), 1)).sum(1))


def test_label_smoothing_may_change_by_epoch():
    model, batch = dense(6, 5, 3), batch_of(4, 6)
    loss = ba.CrossEntropy(ba.Schedule(lambda epoch, epochs: epoch / epochs))
    problem = ba.BilevelProblem(ba.UpperProblem(loss), ba.AtAnchor(ba.LinfBall(0.1)))
    for epoch in range(3):
        problem.set_epoch(epoch, 4)
        want = F.cross_entropy(model(batch.x), batch.y, label_smoothing=epoch / 4)
        torch.testing.assert_close(ZeroIG().hypergradient(problem, model, batch).loss, want.detach())


def test_smoothing_of_the_upper_level_trains_on_it():
    model, batch = dense(6, 5, 3), batch_of(4, 6)
    upper = ba.UpperProblem(ba.CrossEntropy(0.2))
    lower = ba.AtAnchor(ba.LinfBall(0.1))
    step = ZeroIG().hypergradient(ba.BilevelProblem(upper, lower), model, batch)
    loss = F.cross_entropy(model(batch.x), batch.y, label_smoothing=0.2)
    for got, want in zip(step.grads.values(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_divergence_computes_its_reference_once_per_solve(steps):
    model, x, y = network()
    counting, batch = Counting(model), ba.Batch(x, y)
    loss, ball = ba.minus(ba.kl_divergence), ba.LinfBall(0.1)
    lower = ba.Linearized.pgd(loss, ball, steps, 0.03, ba.Gaussian(1e-3))
    solution = lower.solve(counting, batch, generator=seeded(1))
    assert counting.passes == steps + 1 and counting.graphs == steps  # and the reference without a graph
    delta = clip(1e-3 * torch.randn(x.shape, generator=seeded(1), dtype=F64), x, 0.1)
    reference = model(x).detach()
    for _ in range(steps):
        gradient = input_gradient(lambda at: kl(reference, model(at)), x + delta)
        delta = clip(delta + 0.03 * gradient.sign(), x, 0.1)
    torch.testing.assert_close(solution.delta, delta, rtol=1e-12, atol=1e-14)
    assert "clean_log_probabilities" not in batch.more  # the caller's batch is as it was
    torch.testing.assert_close(solution.batch.more["clean_log_probabilities"], F.log_softmax(reference, 1))


def test_the_divergence_of_the_upper_level_moves_both_arguments():
    """Its reference is prepared with a graph; of the attack's it is a constant."""
    model, batch = dense(6, 5, 3), batch_of(4, 6)
    lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(0.3), "zero", "sign", 0.1)
    problem = ba.BilevelProblem(ba.UpperProblem(ba.kl_divergence), lower)
    counting = Counting(model)
    step = ZeroIG().hypergradient(problem, counting, batch)
    assert counting.passes == 3
    loss = kl(model(batch.x), model(batch.x + step.solution.delta))
    torch.testing.assert_close(step.losses, loss.detach())
    expected = torch.autograd.grad(loss.mean(), list(model.parameters()))
    for got, want in zip(step.grads.values(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_the_divergence_without_a_prepared_batch_is_the_same():
    model, batch, delta = dense(6, 5, 3), batch_of(4, 6), 0.1 * torch.randn(4, 6, dtype=F64)
    prepared = ba.kl_divergence.prepare(model, batch, None)
    direct = ba.kl_divergence(model, batch, delta)
    assert torch.equal(ba.kl_divergence(model, prepared, delta), direct)
    torch.testing.assert_close(direct, kl(model(batch.x), model(batch.x + delta)))
    assert torch.equal(ba.minus(ba.kl_divergence)(model, batch, delta), -direct)


def squared(model, batch, delta):
    """A plain function."""
    return model(batch.x + delta).square().sum(1)


@pytest.mark.parametrize("loss", [squared, ba.cross_entropy, ba.kl_divergence, ba.negative_margin])
def test_minus_is_the_negative_of_functions_and_losses(loss):
    model, batch, delta = dense(6, 5, 3), batch_of(4, 6), 0.1 * torch.randn(4, 6, dtype=F64)
    value = loss(model, batch, delta)
    assert torch.equal(ba.minus(loss)(model, batch, delta), -value)
    assert torch.equal(ba.minus(ba.minus(loss))(model, batch, delta), value)
    seen, other = (made.prepare(model, batch, None) for made in (ba.minus(loss), as_loss(loss)))
    assert seen.more.keys() == other.more.keys()
    assert all(torch.equal(seen.more[name], other.more[name]) for name in seen.more)
    gradients = [ba.input_gradient(made, model, batch, delta)[0] for made in (loss, ba.minus(loss))]
    assert torch.equal(gradients[0], -gradients[1]) and gradients[0].any()


def test_losses_say_what_they_are():
    losses = [ba.minus(ba.cross_entropy), ba.minus(squared), ba.CrossEntropy(0.1), ba.minus(ba.kl_divergence)]
    expected = ["minus(cross_entropy)", "minus(squared)", "CrossEntropy(0.1)", "minus(kl_divergence)"]
    assert [repr(loss) for loss in losses] == expected


def test_a_plain_function_has_no_output_to_keep():
    model, batch = dense(6, 5, 3), batch_of(4, 6)
    with pytest.raises(ba.InputError, match=r"kept only of a ba.Loss, which has forward and value apart; squared is"):
        ba.Linearized(ba.minus(squared), ba.LinfBall(0.1), keep_output=True).solve(model, batch)
    solution = ba.Linearized(ba.minus(squared), ba.LinfBall(0.1)).solve(model, batch)
    with pytest.raises(ba.InputError, match="not kept; compose the lower problem with keep_output=True"):
        solution.output  # noqa: B018


class Shared(ba.UpperProblem):
    """The cross-entropy under δ*, and the squares of the logits at the anchor, whose pass the attack has made."""

    def loss_at(self, model, batch, solution, generator=None):
        losses = super().loss_at(model, batch, solution, generator)
        return losses + solution.output.square().sum(1)


@pytest.mark.parametrize(("solver", "direction"), [(ZeroIG(), "sign"), (HessianFreeKKT(), "taylor")])
def test_an_output_kept_at_the_anchor_is_shared_by_the_upper_loss(solver, direction):
    """Also where the implicit term differentiates the same pass."""
    model, batch = dense(6, 5, 3), batch_of(4, 6)
    lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(0.3), "zero", direction, 0.1, keep_output=True)
    problem, counting = ba.BilevelProblem(Shared(), lower), Counting(model)
    step = solver.hypergradient(problem, counting, batch)
    assert counting.passes == 2 and (step.implicit_norm > 0) == (direction == "taylor")
    expected = ce(model, batch.x + step.solution.delta, batch.y) + model(batch.x).square().sum(1)
    torch.testing.assert_close(step.losses, expected.detach())
    assert hypergradcheck(problem, solver, model, batch, eps=1e-5, rtol=1e-6)


def test_label_errors_are_named():
    model, x = dense(6, 5, 3), torch.rand(4, 6, dtype=F64)
    zero = torch.zeros_like(x)
    for y, message in (
        (None, r"this loss needs class labels: pass Batch\(x, y\)"),
        (torch.zeros(4), r"y is torch.float32 of shape \(4,\); class labels are int64 \[4\]"),
        (torch.zeros(4, 3).long(), r"y is torch.int64 of shape \(4, 3\)"),
        (torch.tensor([0, 1, 2, 3]), "label 3 is out of range: the model has 3 outputs, 0 … 2"),
        (torch.tensor([0, 1, 2, -1]), "label -1 is out of range"),
    ):
        for loss in (ba.cross_entropy, ba.CrossEntropy(0.1), ba.minus(ba.cross_entropy), ba.negative_margin):
            with pytest.raises(ba.InputError, match=message):
                loss(model, ba.Batch(x, y), zero)
        with pytest.raises(ba.InputError, match=message):
            ba.margins(model, ba.Batch(x, y), zero)
        with pytest.raises(ba.InputError, match=message):
            ba.logits(model, ba.Batch(x, y), zero)
    flat = torch.nn.Flatten(0)
    with pytest.raises(ba.InputError, match=r"the model's output has shape \(24,\); logits are \[4, classes\]"):
        ba.cross_entropy(flat, ba.Batch(x, torch.zeros(4).long()), zero)


def test_an_output_that_is_no_tensor_is_named():
    class Output(torch.nn.Module):
        def forward(self, x):
            return {"logits": x}

    x = torch.rand(4, 6)
    batch = ba.Batch(x, torch.zeros(4).long())
    for loss in (ba.cross_entropy, ba.minus(ba.cross_entropy), ba.negative_margin, ba.kl_divergence, ba.logits):
        with pytest.raises(ba.InputError, match=r"model's output is a dict; losses take logits.*network\(x\).logits"):
            loss(Output(), batch, torch.zeros_like(x))


def test_a_coupled_attack_loss_is_one_number():
    """Its input gradient is that of the number, and steps go down it."""
    model, batch = dense(6, 5, 3), batch_of(4, 6)

    def coupled(model, batch, delta):
        return -ba.cross_entropy(model, batch, delta).mean().square()

    lower = ba.Linearized(coupled, ba.LinfBall(0.3), "zero", "taylor", 0.1)
    x = batch.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(-ce(model, x, batch.y).mean().square(), x)
    torch.testing.assert_close(lower.solve(model, batch).delta, clip(-0.1 * gradient, batch.x, 0.3))


def test_the_negative_margin_reads_targets():
    model, batch = dense(6, 5, 3), batch_of(4, 6)
    zero, out = torch.zeros_like(batch.x), model(batch.x)
    moved = out - out.gather(1, batch.y[:, None])
    target = (batch.y + 1) % 3
    aimed = ba.negative_margin(model, batch.replace(target=target), zero)
    assert torch.equal(aimed, moved.gather(1, target[:, None])[:, 0])
    others = torch.stack([moved.gather(1, ((batch.y + k) % 3)[:, None])[:, 0] for k in (1, 2)])
    assert torch.equal(ba.negative_margin(model, batch, zero), others.amax(0))


def test_regression_needs_no_labels():
    """y may be real numbers, where the losses take them so."""
    model, x = dense(6, 5, 1), torch.rand(4, 6, dtype=F64)
    batch = ba.Batch(x, x.sum(1))

    def error(model, batch, delta):
        return (model(batch.x + delta)[:, 0] - batch.y).square()

    lower = ba.Linearized(ba.minus(error), ba.Range(), "zero", "taylor", 0.01)
    problem = ba.BilevelProblem(ba.UpperProblem(error), lower)
    assert hypergradcheck(problem, HessianFreeKKT(), model, batch, eps=1e-5, rtol=1e-6)


class InTuple(ba.Loss):
    """The cross-entropy of networks that return a tuple."""

    def value(self, output, batch):
        return ba.cross_entropy.value(output[0], batch)


class ReturnsTuple(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = dense(6, 5, 3)

    def forward(self, x):
        return (self.inner(x),)


class SharedAny(ba.UpperProblem):
    """Its loss under δ* and at the anchor, whatever the output is."""

    def loss_at(self, model, batch, solution, generator=None):
        return super().loss_at(model, batch, solution) + self.criterion.value(solution.output, batch)


def test_a_kept_output_need_not_be_a_tensor():
    steps = []
    for loss, model in ((ba.cross_entropy, dense(6, 5, 3)), (InTuple(), ReturnsTuple())):
        lower = ba.Linearized(ba.minus(loss), ba.LinfBall(0.3), "zero", "taylor", 0.1, keep_output=True)
        steps.append(HessianFreeKKT().hypergradient(ba.BilevelProblem(SharedAny(loss), lower), model, batch_of(3, 6)))
    for name, g in steps[0].grads.items():
        torch.testing.assert_close(steps[1].grads[f"inner.{name}"], g)

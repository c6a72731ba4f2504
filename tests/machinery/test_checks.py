"""The checks: what masks gradients is noticed, and honest networks set off nothing."""

from __future__ import annotations

import warnings

import pytest
import torch
from evaluating import EPS, FEW, TEST, cnn, linear, mlp, trained
from marks import fast
from torch import nn

from bilevel_at.evaluate import EvaluationWarning, ball, evaluate
from bilevel_at.evaluate.checks import LIMITS, check


class Wrapped(nn.Module):
    """A trained network behind something that hides its gradients."""

    def __init__(self, network, before=lambda x: x, after=lambda out: out):
        super().__init__()
        self.network, self.before, self.after = network, before, after

    def forward(self, x):
        return self.after(self.network(self.before(x)))


class _Backwards(torch.autograd.Function):
    """The identity, whose gradient points the other way where ``where(x)``."""

    @staticmethod
    def forward(context, x, where):
        context.save_for_backward(where(x).expand_as(x))
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        (there,) = context.saved_tensors
        return torch.where(there, -gradient, gradient), None


def everywhere(x):
    return torch.ones_like(x, dtype=torch.bool)


def between_the_grey_levels(x):
    """``[B, 1, 1, 1]``: an image that is not one of the digits, whose values are 0, 1/16, ..., 1."""
    return ((16 * x - (16 * x).round()).abs() > 1e-4).flatten(1).any(1).reshape(-1, 1, 1, 1)


def overfitted(x):
    """Undoes a step of exactly ±EPS in all pixels, which FGSM takes, and nothing else."""
    off = 16 * x - (16 * x).floor()
    level, up, down = ((off - t).abs() < 1e-3 for t in (0, 0.2, 0.8))
    level |= (off - 1).abs() < 1e-3
    taken = (level | up | down).flatten(1).all(1).reshape(-1, 1, 1, 1)
    return torch.where(taken & up, x - EPS, torch.where(taken & down, x + EPS, x))


def noise(x):
    return x + 0.05 * torch.randn_like(x)


def quantised(x):
    return (8 * x).round() / 8


MASKED = {
    "quantised": ({"before": quantised}, {"vanishing-gradients", "unbounded-attack", "black-box"}),
    "temperature": ({"after": lambda out: 1000 * out}, {"vanishing-gradients"}),
    "noise": ({"before": noise}, {"random"}),
    "backwards": ({"before": lambda x: _Backwards.apply(x, everywhere)}, {"black-box", "unbounded-attack"}),
    "lost": (
        {"before": lambda x: _Backwards.apply(x, between_the_grey_levels)},
        {"single-step", "black-box", "unbounded-attack"},
    ),
    "overfitted": ({"before": overfitted}, {"catastrophic-overfitting"}),
}


@pytest.mark.parametrize("how", MASKED)
def test_what_masks_gradients_is_noticed(plain, how):
    hidden, names = MASKED[how]
    with pytest.warns(EvaluationWarning):
        result = evaluate(Wrapped(plain, **hidden).eval(), TEST, ["clean", "fgsm", "pgd-10-1"], EPS)
    said = {finding.name: finding.message for finding in result.warnings}
    assert names <= set(said), (said, result.measured)
    for name in said:
        assert result.measured[name] > LIMITS[name].most
        assert "{" not in said[name] and "\n" not in said[name] and said[name] in str(result)
    if how != "noise":
        assert "random" not in said


HONEST = {
    "adversarially trained": lambda: trained(mlp, "minmax", 15),
    "adversarially trained in one step": lambda: trained(cnn, "fastat", 15),
    "standard": lambda: trained(cnn, "standard", 8),
    "standard, fully connected": lambda: trained(mlp, "standard", 8),
    "linear": lambda: trained(linear, "standard", 8),
    "robust linear": lambda: trained(linear, "minmax", 8),
    **{f"random {seed}": lambda seed=seed: (torch.manual_seed(seed), cnn().eval())[1] for seed in range(4)},
    **{f"random linear {seed}": lambda seed=seed: (torch.manual_seed(seed), linear().eval())[1] for seed in range(2)},
}


PAIRS = [(which, norm) for which in HONEST for norm in ("linf", "l2")]
QUICK = [("adversarially trained", "linf"), ("adversarially trained", "l2"), ("standard", "linf"), ("random 0", "linf")]


@pytest.mark.parametrize(("which", "norm"), fast(PAIRS, QUICK))
def test_honest_networks_set_off_nothing(which, norm):
    with warnings.catch_warnings():
        warnings.simplefilter("error", EvaluationWarning)
        evaluate(HONEST[which](), TEST, ["clean", "fgsm", "pgd-10-1"], {"linf": EPS, "l2": 1.0}[norm], norm=norm)


@pytest.mark.parametrize(("n", "seed"), fast([(20, 2), (5, 0), (10, 0)], [(5, 0)]))
def test_one_image_of_a_few_is_no_reason_for_doubt(n, seed):
    few = TEST.sample(n, seed=seed)
    result = evaluate(trained(cnn, "fastat", 15), few, ["pgd-50-10", "fgsm", "square"], EPS)
    assert not result.warnings, result.measured


@pytest.mark.parametrize("attack", fast(["pgd-2-1", "beta-1", "fgsm"], ["fgsm"]))
def test_a_weak_attack_is_not_a_masked_network(robust, attack):
    """Square finds more than two steps do on any network; that says nothing of its gradients."""
    result = evaluate(robust, FEW, [attack, "square"], EPS)
    assert not result.warnings, result.measured


def test_square_beside_pgd_on_a_masked_network(plain):
    masked = Wrapped(plain, before=lambda x: _Backwards.apply(x, everywhere)).eval()
    with pytest.warns(EvaluationWarning, match="gradient"):
        result = evaluate(masked, FEW[slice(0, 20)], ["pgd-20-2", "square"], EPS)
    said = [finding.name for finding in result.warnings if finding.name.startswith("black-box")]
    assert len(said) == 2 and all(result.measured[name] > LIMITS[name].most for name in said)


class Counting(nn.Module):
    """A running mean that is assigned, not written into."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(10))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


@pytest.mark.parametrize("layer", [lambda: nn.BatchNorm1d(10), lambda: nn.Dropout(0.5), Counting])
def test_train_mode_is_said_and_changes_nothing(robust, layer):
    model = nn.Sequential(robust, layer()).train()
    try:
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.warns(EvaluationWarning, match="left in train mode"):
            result = evaluate(model, FEW, ["clean"], EPS)
        assert "train-mode" in [finding.name for finding in result.warnings] and model.training
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    finally:
        robust.eval()


def test_train_mode_with_a_last_batch_of_one(robust):
    """Batch statistics of one example: PyTorch refuses them."""
    model = nn.Sequential(mlp(), nn.BatchNorm1d(10)).train()
    with pytest.warns(EvaluationWarning, match="left in train mode"):
        evaluate(model, FEW, ["clean"], EPS, batch_size=39)


def test_checks_alone(robust):
    measured, findings = check(robust, FEW, ball("linf", EPS))
    assert findings == [] and measured["n"] == 40 and measured["fgsm"] >= measured["pgd"] > 0
    assert check(robust, FEW, None)[0].keys() == {"n", "random", "vanishing-gradients"}
    assert check(robust, FEW, ball("linf", 0.0))[0].keys() == {"n", "random", "vanishing-gradients"}

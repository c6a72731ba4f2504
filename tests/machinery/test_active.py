"""The active test: planted adversarial examples are there, honest networks pass, and masked ones fail."""

from __future__ import annotations

import pytest
import torch
from evaluating import EPS, TEST, cnn, linear, mlp, trained
from evaluating_runs import complaint, evaluate, read
from test_checks import Wrapped, _Backwards, everywhere, quantised

from bilevel_at.errors import InputError
from bilevel_at.evaluate import attack_from_name, ball
from bilevel_at.evaluate.active import active_findings, active_test, checks_asked, plant

FEW = TEST.sample(8)
NAMES = ["pgd-20-2", "nearest-20-2"]


def outcome(model, norm="linf", names=NAMES, images=FEW):
    space = ball(norm, {"linf": EPS, "l2": 1.0}[norm])
    return active_test(model, images, space, [attack_from_name(name, space) for name in names])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_is_planted_is_in_the_ball_and_is_adversarial(robust, norm):
    space, generator = ball(norm, EPS), torch.Generator().manual_seed(0)
    for i in range(5):
        x = TEST[slice(i, i + 1)].pixels()
        made = plant(robust, x, space, generator)
        delta = made.point - x
        assert torch.allclose(space.project(delta, x), delta, atol=1e-6)
        assert made.network(x).argmax() == 0 and made.network(made.point).argmax() != 0
        own = robust(x).topk(2).values[0]
        new = made.network(x).topk(2).values[0]
        assert torch.allclose(new[0] - new[1], own[0] - own[1], rtol=1e-4)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("network", [lambda: trained(mlp, "minmax", 15), lambda: trained(linear, "standard", 8)])
def test_honest_networks_pass(network, norm):
    result = outcome(network(), norm)
    assert result.planted == len(FEW) and result.random <= 0.5 and set(result.shares) == set(NAMES)
    assert all(share == 1 for share in result.shares.values()) and active_findings(result.asdict()) == []


MASKS = {
    "quantised": ({"before": quantised}, NAMES),
    "backwards": ({"before": lambda x: _Backwards.apply(x, everywhere)}, NAMES),
    "saturated": ({"after": lambda out: 1e6 * out}, ["pgd-20-2"]),  # attacks on margins see through it
}


@pytest.mark.parametrize("how", MASKS)
def test_masked_networks_fail_attack_by_attack(how):
    hidden, fail = MASKS[how]
    result = outcome(Wrapped(trained(cnn, "standard", 8), **hidden).eval())
    warned = {finding.name for finding in active_findings(result.asdict())}
    assert warned == {f"active:{name}" for name in fail}, result


BY_GRADIENT = ["fgsm", "pgd-50-10", "beta-30", "nearest-40-3-2", "apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t"]
WITHOUT = ["square", "autoattack"]  # the second has the first in it


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_GRADIENT + WITHOUT)
def test_every_named_attack_is_tested(name):
    """Each finds what is planted in an honest network; behind quantised inputs, only those that need no gradient do."""
    few = TEST.sample(4)
    assert outcome(trained(mlp, "minmax", 15), names=[name], images=few).shares == {name: 1.0}
    masked = Wrapped(trained(cnn, "standard", 8), before=quantised).eval()
    assert outcome(masked, names=[name], images=few).shares == {name: 1.0 if name in WITHOUT else 0.0}


def test_the_network_is_left_as_it_came(robust):
    before = {name: value.clone() for name, value in robust.state_dict().items()}
    outcome(robust.train(), images=TEST.sample(1))
    assert robust.training and all(torch.equal(before[name], v) for name, v in robust.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in robust.eval().modules())


@pytest.mark.parametrize(
    ("words", "asked"),
    [((), (100, 0)), (("0",), (0, 0)), (("active",), (100, 50)), (("20", "active:5"), (20, 5))],
)
def test_the_flag(words, asked):
    assert checks_asked(words) == asked


@pytest.mark.parametrize("word", ["aktive", "active:0", "active:x", "-1", "1.5", "passive:3"])
def test_bad_flags_are_one_line(word):
    with pytest.raises(InputError, match="--checks is") as error:
        checks_asked([word])
    assert "\n" not in str(error.value)


def test_the_command_records_it(run_here):
    evaluate("run", "--which", "last", "--examples", 20, "--attacks", "clean", "fgsm", "--checks", "0", "active:4")
    entry = read("run/checks.json")["last"]
    assert set(entry["active"]["found"]) == {"fgsm"} and entry["active"]["images"] == 4
    assert entry["measured"]["active"]["fgsm"] == entry["active"]["found"]["fgsm"] and entry["network"] == {}
    evaluate("run", "--which", "last", "--examples", 20, "--attacks", "pgd-3-1", "--checks", "0", "active:4")
    assert set(read("run/checks.json")["last"]["active"]["found"]) == {"fgsm", "pgd-3-1"}
    assert "--checks is" in complaint("run", "--checks", "aktive")

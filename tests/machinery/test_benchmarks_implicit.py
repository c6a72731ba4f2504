"""The page about the implicit term: its own derivatives, and the script at the smallest size."""

from __future__ import annotations

import copy
import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from benchmarking import script

import bilevel_at as ba
from bilevel_at.models.small import one_layer_cnn
from bilevel_at.problems import fastbat
from bilevel_at.solvers import HessianFreeKKT

pytestmark = pytest.mark.usefixtures("small_cifar10")


@pytest.fixture
def measures():
    script("implicit")
    import implicit_page  # noqa: F401

    return sys.modules["implicit_measures"]


def small(measures, anchor):
    """A smooth network in float64, a batch, and a problem in which some coordinates are free."""
    torch.manual_seed(0)
    model = one_layer_cnn((1, 4, 4), 3, torch.nn.Softplus).double()
    batch = ba.Batch(0.3 + 0.4 * torch.rand(6, 1, 4, 4).double(), torch.arange(6) % 3)
    return model, batch, measures.with_start(fastbat.problem(epsilon=0.1, step=0.8, anchor=anchor))


def test_the_derivative_through_the_anchor_is_that_of_central_differences(measures):
    model, batch, problem = small(measures, "gradient-step")
    through = measures.Through().hypergradient(problem, model, batch, generator=measures.generator())
    held = HessianFreeKKT().hypergradient(problem, model, batch, generator=measures.generator())
    assert 0.1 < HessianFreeKKT.active(problem.lower, model, held.solution).fraction_free() < 0.95
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    u = torch.randn(before.shape, generator=measures.generator(1), dtype=torch.float64)

    def objective(t, anchor):
        torch.nn.utils.vector_to_parameters(before + t * u, model.parameters())
        solution = problem.lower.solve(model, batch, anchor, measures.generator())
        return ba.cross_entropy(model, batch, solution.delta).mean().item()

    for step, anchor in ((through, None), (held, held.solution.anchor)):
        difference = (objective(1e-5, anchor) - objective(-1e-5, anchor)) / 2e-5
        assert (measures.flat(step.grads) @ u).item() == pytest.approx(difference, rel=1e-6)
    one, other = measures.flat(through.implicit), measures.flat(held.implicit)
    assert (one - other).norm() > 0.1 * other.norm()


def test_from_a_uniform_start_there_is_nothing_to_go_through(measures):
    model, batch, problem = small(measures, "uniform")
    through, held = (
        solver.hypergradient(problem, model, batch, generator=measures.generator())
        for solver in (measures.Through(), HessianFreeKKT())
    )
    for name, part in held.implicit.items():
        torch.testing.assert_close(through.implicit[name], part)


def test_noise_is_as_long_as_the_term(measures):
    model, batch, problem = small(measures, "gradient-step")
    noise, held = (
        solver.hypergradient(problem, model, batch, generator=measures.generator())
        for solver in (measures.Noise(ig_weight=0.5), HessianFreeKKT(ig_weight=0.5))
    )
    assert noise.implicit_norm.item() == pytest.approx(held.implicit_norm.item(), rel=1e-9)
    assert abs(measures.cosine(measures.flat(noise.implicit), measures.flat(held.implicit))) < 0.5


def test_the_coin_keeps_the_term_or_turns_it(measures):
    model, batch, problem = small(measures, "uniform")
    coin, held = measures.Coin(), HessianFreeKKT()
    z = problem.lower.solve(model, batch, generator=measures.generator()).anchor
    cosines = [
        measures.cosine(*(measures.flat(solver.hypergradient(problem, model, batch, z, g).implicit) for solver in pair))
        for g in map(measures.generator, range(12))
        for pair in [(coin, held)]
    ]
    assert {round(c, 6) for c in cosines} == {-1.0, 1.0}


def test_a_start_that_is_handed_on_changes_no_anchor(measures):
    model, batch, problem = small(measures, "gradient-step")
    plain = fastbat.problem(epsilon=0.1, step=0.8)
    one, other = (p.lower.solve(model, batch, generator=measures.generator()) for p in (problem, plain))
    assert torch.equal(one.anchor, other.anchor) and torch.equal(one.delta, other.delta)


def test_small_steps_decrease_as_predicted(measures):
    from bilevel_at.data import Images

    model, batch, problem = small(measures, "gradient-step")
    images = Images(batch.x.float(), batch.y, 3)
    found = measures.decreases(problem, model.float(), images, images)
    for name in ("h", "d"):
        ratio = found[name]["own"][0] / (measures.LENGTHS[0] * found[name]["slope"])
        assert ratio == pytest.approx(1, rel=1e-3)
    assert found["h"]["slope"] == pytest.approx(found["h"]["norm"] ** 2) and found["h"]["anew"] == found["h"]["other"]
    lengths = (0.1, 1.0, 10.0)
    for decrease, expected in (((0.06, 0.6, 1), 1.0), ((0.04, 0.6, 6), None), ((0.1, 1, 10), 10.0)):
        assert measures.valid_length(1.0, decrease, lengths) == expected


def test_on_a_smooth_network_the_derivative_integrates_to_the_change(measures):
    from bilevel_at.data import Images

    model, batch, problem = small(measures, "gradient-step")
    images, after = Images(batch.x, batch.y, 3), copy.deepcopy(model)
    with torch.no_grad():
        for p in after.parameters():
            p += 0.3 * torch.randn(p.shape, generator=measures.generator(2), dtype=p.dtype)
    found = measures.segment(problem, model, after, images, 200)
    assert abs(found["change"]) > 0.01 and found["integral"] == pytest.approx(found["change"], rel=1e-3)
    assert found["direct"] + found["implicit"] == pytest.approx(found["integral"])
    assert abs(found["implicit"]) > 0.02 * abs(found["direct"])


def test_cells_pair_by_seed_and_say_what_is_beyond_chance(measures):
    cells = sys.modules["implicit_cells"]
    one, other = ({s: {"v": v} for s, v in enumerate(values)} for values in ((5.0, 7.0, 9.0), (1.0, 3.0, 5.5)))
    assert cells.difference(one, other, lambda r: r["v"]) == "+3.8 ± 0.2\\*"
    assert cells.difference(other, one, lambda r: r["v"]) == "−3.8 ± 0.2\\*"
    assert cells.difference({0: {"v": 1.0}, 1: {"v": 9.0}}, one, lambda r: r["v"]) == "−1.0 ± 3.0"
    assert cells.difference({0: {"v": 1.0}}, one, lambda r: r["v"]) == cells.mean({}, lambda r: r["v"]) == "–"
    assert cells.unbiased(1 / 8) == 0 and cells.unbiased(1.0) == 1
    assert cells.geometric([1e-3, 1e-5], 1e-6) == "1.0e-04" and cells.geometric([None], 1e-6) == "3.2e-07"


def test_lines_are_chosen_by_their_settings(measures):
    run = sys.modules["implicit_runs"].Run
    settings = [run("scan", 20.0, w, s) for w in (0.0, 1.0) for s in (0, 1)] + [run("after", 20.0, 1.0, 0, lr=0.01)]
    lines = sys.modules["implicit_cells"].Lines([{"key": r.key, "settings": asdict(r)} for r in settings])
    assert lines.row(weight=1.0).keys() == {0, 1} and not lines.row(part="after")
    assert lines.row(part="after", weight=1.0, lr=0.01).keys() == {0}
    assert lines.values("lr", part="after") == [0.01] and lines.values("weight") == [0.0, 1.0]


def test_runs_are_named_and_ordered():
    script("implicit")
    runs = sys.modules["benchmark_implicit"].runs_of(("scan", "causes", "after", "rates", "smaller"), 5, None)
    keys = [run.key for run in runs]
    assert len(set(keys)) == len(keys) and all(run.after in keys[:i] for i, run in enumerate(runs) if run.after)
    assert {run.seed for run in runs if run.part in ("rates", "smaller")} == {0, 1, 2}
    assert {run.seed for run in runs if run.part == "scan"} == set(range(5))


def test_the_least_curvature_is_that_of_a_dense_hessian(measures):
    from bilevel_at.data import Images

    model, batch, problem = small(measures, "uniform")
    images = Images(batch.x.float(), batch.y, 3)
    model = model.float()
    least = measures.least_curvature(problem, model, images)
    delta = problem.lower.solve(model, measures.batch_of(images), generator=measures.generator()).delta
    one = ba.Batch(images.x[:1], images.y[:1])
    hessian = torch.autograd.functional.hessian(lambda d: -ba.cross_entropy(model, one, d).sum(), delta[:1])
    expected = torch.linalg.eigvalsh(hessian.reshape(16, 16).double())[0].item()
    assert len(least) == 6 and least[0] == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_the_page_is_written_from_lines_that_are_not_repeated(monkeypatch):
    implicit = script("implicit")
    flags = ["--seeds", "1", "--epochs", "1", "--examples", "40", "--parts", "scan", "causes", "after", "--jobs", "1"]
    flags += ["--folder", "runs", "--write", "pages"]
    monkeypatch.setattr(implicit, "STEPS", {20.0: (), 0.3: ()})
    assert implicit.command([*flags, "--minutes", "0.002"]) == 3
    assert implicit.command(flags) == 0
    lines, page = Path("pages/implicit.jsonl").read_text(), Path("pages/implicit.md").read_text()
    assert Path("pages/implicit.png").exists() and "Fingerprint of the lines" in page
    titles = re.findall(r"^## (.*)$", page, re.M)
    assert len(titles) == 6 and page.count("\n| 0.2 | 20 | 1 | ") == 2
    scan = re.findall(r"^\| 0\.[12] \| (20|0\.3) \| (\S+)(?: \(0\.1 λ\))? \| 1 \|(.*)$", page, re.M)
    assert [(step, weight) for step, weight, _ in scan[:6]] == [
        (step, weight) for step, published in (("20", "0.005"), ("0.3", "0.333")) for weight in ("0", published, "1")
    ]
    assert all(len(cells.split(" | ")) == 9 for *_, cells in scan)
    assert re.search(r"^\| ReLU \| 0\.01 \| exact \| 1 \| −?[\d.]+ \| −?[\d.]+ \|", page, re.M)
    words = sys.modules["implicit_words"]
    assert words.FINDINGS[:40] not in page  # they are of other lines

    def never(*args):
        raise AssertionError("a run that has its line is repeated")

    monkeypatch.setattr(sys.modules["lines"].multiprocessing, "get_context", never)
    assert implicit.command(flags) == 0 and Path("pages/implicit.jsonl").read_text() == lines
    assert Path("pages/implicit.md").read_text() == page
    assert implicit.command([*flags, "--page-only"]) == 0
    for mistake, message in (
        (["--parts", "nothing"], "--parts nothing is not known; choose from scan"),
        (["--parts", "after", "scan"], "after goes on from networks of scan and causes"),
        (["--seeds", "0"], "--seeds is 0"),
    ):
        with pytest.raises(ba.InputError, match=message):
            implicit.command(mistake)

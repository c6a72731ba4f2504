"""Every solver on a batch that several processes share: the sum of their parts is one process's hypergradient."""

from __future__ import annotations

import pytest
from marks import thorough
from ranks import HEAD, ONLY_LINUX, printed

SOLVERS = (
    HEAD
    + '''
import dataclasses

from bilevel_at.solvers import (
    FullKKT, GaussNewtonKKT, HessianFreeKKT, Lazy, Neumann, ProjectionAdjoint, ValueFunction, ZeroIG,
)

ATK, BALL, WIDE = ba.minus(ba.cross_entropy), ba.LinfBall(0.3), ba.LinfBall(50.0, bounds=None)


def taylor(constraint=BALL, **more):
    return ba.Linearized(ATK, constraint, "zero", "taylor", **{"step": 0.3, **more})


def proximal(**more):
    return ba.Proximal(ATK, ba.L2Ball(0.6), 20.0, "zero", tol=1e-13, **more)


attack = {"curvature": "attack"}
CASES = [
    (ZeroIG(), taylor), (HessianFreeKKT(), taylor), (HessianFreeKKT(cross_at="solution"), taylor),
    (ProjectionAdjoint(), taylor), (Lazy(HessianFreeKKT(), 0.5), taylor), (GaussNewtonKKT(damping="auto"), taylor),
    (Neumann(terms=3), proximal), (Neumann(terms=3, **attack), taylor), (ValueFunction(s=0.01), taylor),
    (ValueFunction(s=0.01), proximal), (FullKKT(), proximal), (FullKKT(method="cg"), proximal),
    (FullKKT(method="dense"), proximal), (FullKKT(damping=5.0, **attack), taylor),
    (ValueFunction(), lambda **more: taylor(step=ba.Adaptive(0.02, 0.1), **more)),
]
# The attack sees the whole batch's statistics: what couples rows couples processes.
COUPLED = [
    (ZeroIG(), taylor), (HessianFreeKKT(), taylor), (HessianFreeKKT(cross_at="solution"), taylor),
    (HessianFreeKKT(cross_at="merged"), taylor), (ProjectionAdjoint(), taylor), (Lazy(FullKKT(), 0.5), taylor),
    (FullKKT(damping=20.0, **attack), taylor), (FullKKT(), proximal), (FullKKT(cross_at="merged"), proximal),
    (Neumann(terms=4), proximal), (Neumann(terms=4, alpha=0.02, **attack), taylor), (ValueFunction(s=0.01), proximal),
    (ValueFunction(s=0.01), taylor), (FullKKT(method="cg", damping=20.0, tol=1e-13, **attack), taylor),
]


def network(batch_norm):
    torch.manual_seed(0)
    between = [nn.BatchNorm1d(5)] if batch_norm else []
    return nn.Sequential(nn.Linear(6, 5), *between, nn.Tanh(), nn.Linear(5, 3)).double()


def hypergradient(solver, lower, model, batch, scale=1.0):
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    generator = torch.Generator().manual_seed(3)
    step = solver.hypergradient(problem, model, batch, generator=generator, scale=scale)
    zero = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    parts = [{**zero, **{n: g for n, g in part.items() if g is not None}} for part in (step.direct, step.implicit)]
    return [list(part.values()) for part in parts], step.v


def batches():
    """(whole, share): dealt by place unevenly; by example, where rank 1 has most of it; and the last processes idle."""
    for examples, indexes in ((13, None), (13, torch.tensor([1] * 9 + [count - 1, 0, 0, 1])), (1 + count // 4, None)):
        g = torch.Generator().manual_seed(examples)
        x, y = torch.rand(examples, 6, generator=g, dtype=torch.float64), torch.arange(examples) % 3
        index = torch.arange(examples) if indexes is None else indexes + count * torch.arange(examples)
        share = shares.deal([index], indexes is not None)[0]
        yield ba.Batch(x, y, index), dataclasses.replace(share, by_index=True)  # for the memory of an adaptive step


def own(batch, share):
    return batch[share.rows]


def compare(cases, batch_norm, mode):
    worst = 0.0
    for solver, make in cases:
        for batch, share in batches():
            if batch_norm and mode == "train" and len(batch) == 1:
                continue
            plain, model = (network(batch_norm).train(len(batch) > 1) for _ in range(2))
            ba.distributed.synchronise(model)
            (direct, implicit), v = hypergradient(solver, make(mode=mode), plain, batch, 2.0)
            merged = getattr(solver, "cross_at", "") == "merged"
            if solver.implicit and not isinstance(solver, Lazy) and not merged and len(batch) > 2:
                assert max(g.abs().max() for g in implicit) > 1e-6, solver
            with shares.sharing(share):
                parts, own_v = hypergradient(solver, make(mode=mode), model, own(batch, share), 2.0)
            name = f"{solver} {make.__name__} {mode} {len(batch)}"
            # What an iteration solves to a tolerance has its error in it, divided by s for a difference.
            exact = 2e-10 if isinstance(solver, ValueFunction) else 1e-10
            for whole, part in zip((direct, implicit), parts):
                worst = max(worst, close(name, everywhere(part), whole, exact))
            close(name + " v", [own_v], [share.of(v) * (not share.idle)], 1e-10)
            buffers = [[torch.zeros(1), *(b.double() for b in m.buffers())] for m in (model, plain)]
            close(name + " buffers", *buffers, 1e-12)
    return worst


def raises(kind, text, solver, lower, model, batch, share):
    try:
        with shares.sharing(share):
            hypergradient(solver, lower, model, own(batch, share))
    except kind as error:
        assert type(error) is kind and text in str(error) and "\\n" not in str(error), (rank, str(error))
        return error
    raise AssertionError(f"rank {rank}: no {kind.__name__}")


def raised_here(*what):
    """The samples of the error, or nothing where this process has none: it is for the job to end the others."""
    try:
        return raises(*what).samples
    except AssertionError as nothing:
        assert "no " in str(nothing)
        return ()


with shares.together():
    independent = max(compare(CASES, False, "eval"), compare(CASES[-4:], True, "eval"))
    coupled = compare(COUPLED, True, "train")

    # Errors name samples by their place in the whole batch. Where batches are coupled, all processes raise them.
    batch, share = next(batches())
    model = network(False)
    dense = FullKKT(method="dense", curvature="attack")
    try:
        hypergradient(dense, taylor(step=30.0, constraint=WIDE), model, batch)
    except ba.CurvatureError as alone:
        own_samples = raised_here(ba.CurvatureError, "not positive definite", dense, taylor(step=30.0, constraint=WIDE),
                                  model, batch, share)
        everyones = sorted(sum(shares.gathered(own_samples), ()))
        assert everyones == sorted(alone.samples) and alone.samples, (everyones, alone.samples)
    error = raises(ba.ConvergenceError, "in max_iter=2 steps", HessianFreeKKT(), proximal(max_iter=2), model, batch,
                   share)
    assert len(error.samples) == 13, error.samples
    bn = network(True)
    ba.distributed.synchronise(bn)
    error = raises(ba.CurvatureError, "the batch as a whole", FullKKT(curvature="attack"),
                   taylor(WIDE, mode="train", step=1.0), bn, batch, share)
    assert error.samples == tuple(range(13))
    error = raises(ba.ConvergenceError, "in max_iter=1 steps", FullKKT(curvature="attack", damping=20.0, max_iter=1),
                   taylor(mode="train"), bn, batch, share)
    raises(ba.InputError, "samples that share nothing", GaussNewtonKKT(), taylor(mode="train"), bn, batch, share)
    lost = ba.Batch(batch.x.clone().index_fill_(0, torch.tensor([5]), float("nan")), batch.y, batch.index)
    own_samples = raised_here(ba.ConvergenceError, "is not a number on sample 5", GaussNewtonKKT(), taylor(WIDE), model,
                              lost, share)
    assert sum(shares.gathered(own_samples), ()) == (5,)
print(f"solvers of {count} processes: independent {independent:.1e}, coupled {coupled:.1e}", flush=True)
dist.barrier()  # gloo aborts where another process has left already
dist.destroy_process_group()
'''
)


@pytest.mark.slow
@ONLY_LINUX
@pytest.mark.parametrize("count", [2, 4])
def test_every_solver_on_several_processes_is_as_on_one(tmp_path, count):
    if count > 2 and not thorough():
        pytest.skip("two processes here; more of them with --hypothesis-profile thorough")
    results = printed(tmp_path, count, SOLVERS)
    assert f"solvers of {count} processes" in results[0]

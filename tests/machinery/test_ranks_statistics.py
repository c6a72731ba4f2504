"""Batch statistics over several processes: to rounding those of one process with nn.BatchNorm, in every derivative."""

from __future__ import annotations

import copy

import pytest
import torch
from ranks import HEAD, ONLY_LINUX, printed
from torch import nn

import bilevel_at as ba
from bilevel_at import shares
from bilevel_at.batch_statistics import SyncBatchNorm, couples

STATISTICS = (
    HEAD
    + '''
def passes(model, x, y, w, times):
    """(outputs, grad_theta of a loss, grad_x of another, a product with its Hessian, the cross derivative)"""
    named = list(model.parameters())
    rows = x.repeat_interleave(times, 0).requires_grad_()
    out = model(rows)
    losses = nn.functional.cross_entropy(out, y.repeat_interleave(times), reduction="none")
    share = shares.current()
    part = losses.sum() * (0 if share is not None and share.idle else 1)
    theta = torch.autograd.grad(part, named, retain_graph=True)
    (g,) = torch.autograd.grad(losses.sum(), rows, create_graph=True)  # as a lower level: an idle row's loss too
    product, *cross = torch.autograd.grad(g, [rows, *named], w.repeat_interleave(times, 0))
    return out, g, product, list(theta), cross


def network(kind, **settings):
    torch.manual_seed(0)
    if kind == 1:
        layers = [nn.Linear(6, 5), nn.BatchNorm1d(5, **settings), nn.Softplus(), nn.Linear(5, 4)]
        return nn.Sequential(nn.Flatten(), *layers, nn.BatchNorm1d(4, **settings)).double(), (6,)
    convs = [nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3, **settings), nn.Tanh(), nn.Conv2d(3, 3, 2), nn.BatchNorm2d(3)]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(12, 4)).double(), (2, 4, 4)


worst = 0.0
with shares.together():
    for kind, settings in ((1, {}), (2, {"momentum": None}), (2, {"affine": False, "track_running_stats": False})):
        # 13 examples are dealt unevenly, and 2 leave processes idle where there are more.
        for examples, by_index, times in ((13, False, 1), (13, True, 3), (2, False, 1)):
            plain, shape = network(kind, **settings)
            # Of 2 examples outputs are all but ±1: derivatives are differences of nearly equal numbers.
            exact = 1e-12 if examples > 2 else 1e-10
            model = copy.deepcopy(plain)
            ba.distributed.synchronise(model)
            assert model.state_dict().keys() == plain.state_dict().keys()
            for step in range(3):
                torch.manual_seed(step)
                x = torch.randn(examples, *shape, dtype=torch.float64) * 2 + 3
                y, index = torch.randint(0, 4, (examples,)), torch.randperm(40)[:examples] ** 2
                w = torch.randn(examples, *shape, dtype=torch.float64)
                expected = passes(plain, x, y, w, times)
                share = shares.deal([index], by_index)[0]
                with shares.sharing(share):
                    own = passes(model, x[share.rows], y[share.rows], w[share.rows] * (not share.idle), times)
                if not share.idle:
                    worst = max(worst, close("rows", own[:3], [share.of(e) for e in expected[:3]], exact))
                for mine, all_of_it in zip(own[3:], expected[3:]):
                    worst = max(worst, close("parameters", everywhere(mine), all_of_it, exact))
                buffers = [[torch.zeros(1), *(b.double() for b in m.buffers())] for m in (model, plain)]
                worst = max(worst, close("buffers", *buffers, 1e-12))
            # Outside a share, and in eval mode, it is nn.BatchNorm bit for bit, and nothing waits.
            if rank == 0:
                assert torch.equal(model(x), plain(x))
            if settings.get("track_running_stats", True):
                model.load_state_dict(plain.state_dict())
                with shares.sharing(share):
                    assert rank or torch.equal(model.eval()(x), plain.eval()(x))

    # float32: as close to float64 as nn.BatchNorm's own, where means are far from 0.
    for offset in (0.0, 10.0, 1000.0):
        torch.manual_seed(1)
        x = torch.randn(64, 3, 8, 8) + offset
        exact = nn.BatchNorm2d(3).double()(x.double())
        bn = nn.BatchNorm2d(3)
        alone = (bn(x) - exact).abs().max().item()
        ba.distributed.synchronise(bn)
        with shares.sharing(shares.deal([torch.arange(64)], False)[0]):
            rows = shares.current().rows
            apart = (bn(x[rows]) - exact[rows]).abs().max().item()
        assert apart <= 2 * alone + 1e-6, (offset, apart, alone)
        half = bn(x[rows].bfloat16())
        assert half.dtype == torch.bfloat16

    # Some rows only: other processes would wait.
    share = shares.Share(torch.arange(4), 8, False)
    with shares.sharing(share):
        try:
            bn(x[:3])
        except ba.InputError as error:
            assert "has 3 rows of a batch of which this process has 4" in str(error) and "\\n" not in str(error)
        else:
            raise AssertionError("a pass on some rows went through")

    model, _ = network(2)
    model[1].running_mean.fill_(rank)
    model[4].running_var.fill_(rank + 1)
    model[1].num_batches_tracked.fill_(rank)
    ba.distributed.average_statistics(model, 3)
    assert model[1].running_mean.eq((count - 1) / 2).all() and model[4].running_var.eq((count + 1) / 2).all()
    assert model[1].num_batches_tracked == rank
print(f"statistics of {count} processes: within {worst:.1e}", flush=True)
dist.barrier()  # gloo aborts where another process has left already
dist.destroy_process_group()
'''
)


@ONLY_LINUX
@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_statistics_of_several_processes_are_those_of_one(tmp_path, count):
    results = printed(tmp_path, count, STATISTICS)
    assert f"statistics of {count} processes" in results[0]


def test_conversion_keeps_all_but_the_class():
    plain = nn.Sequential(
        nn.BatchNorm1d(3, eps=1e-3, momentum=None), nn.BatchNorm2d(3, affine=False), nn.BatchNorm3d(3).eval()
    )
    plain.append(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.InstanceNorm2d(3), nn.GroupNorm(1, 3)))
    before, modules = copy.deepcopy(plain), list(plain.modules())
    parameters = list(plain.parameters())
    ba.distributed.synchronise(plain)
    ba.distributed.synchronise(plain)  # again changes nothing
    assert list(plain.modules()) == modules and [id(p) for p in plain.parameters()] == [id(p) for p in parameters]
    assert list(plain.state_dict()) == list(before.state_dict())
    assert [isinstance(m, SyncBatchNorm) for m in plain.modules()] == [False, *[True] * 3, False, True, False, False]
    for one, other in zip(plain.modules(), before.modules(), strict=True):
        settings = ("eps", "momentum", "affine", "track_running_stats", "training")
        assert all(getattr(one, name, None) == getattr(other, name, None) for name in settings)
    assert isinstance(plain[1], nn.BatchNorm2d) and not couples(plain)
    assert plain[1]._check_input_dim(torch.zeros(2, 3, 1, 1)) is None
    torch.nn.Module.load_state_dict(copy.deepcopy(plain), before.state_dict())


def test_in_one_process_it_is_batch_normalisation_bit_for_bit():
    torch.manual_seed(0)
    plain, x = nn.BatchNorm2d(3), torch.randn(5, 3, 4, 4)
    model = copy.deepcopy(plain)
    ba.distributed.synchronise(model)
    assert torch.equal(model(x), plain(x)) and torch.equal(model.running_var, plain.running_var)
    assert shares.summed_with_graph(x) is x
    before = model.running_mean.clone()
    ba.distributed.average_statistics(model, 3)
    assert torch.equal(model.running_mean, before)


def test_other_batch_normalisation_is_refused_in_one_line():
    class Own(nn.BatchNorm2d):
        pass

    for module in (Own(3), nn.SyncBatchNorm(3), nn.LazyBatchNorm2d()):
        model = nn.Sequential(nn.BatchNorm2d(3), module)
        with pytest.raises(
            ba.InputError, match=r"1 is a \w+, which cannot be made a SyncBatchNorm; use nn.BatchNorm1d"
        ):
            ba.distributed.synchronise(model)
        assert type(model[0]) is nn.BatchNorm2d

"""Diagnostics of what training has recorded: histories, deciles, and the gap between best and last epoch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diagnosing import history, line

import bilevel_at as ba
from bilevel_at import diagnose


def save(folder, **arrays):
    np.savez(folder / "history.npz", **arrays)
    return folder


def test_a_history_is_read_as_it_was_written(tmp_path):
    assert diagnose.read_history(tmp_path) is None
    kept = history()
    norm = kept.gradient_norm.half()
    norm[0, 3], norm[:, 4] = math.nan, math.nan
    arrays = {"gradient_norm": norm.numpy(), "step": kept.step.numpy(), "label": kept.label.int().numpy()}
    found = diagnose.read_history(save(tmp_path, **arrays, filters=kept.filters.numpy()))
    assert torch.equal(found.label, kept.label) and torch.equal(found.filters, kept.filters)
    assert torch.equal(found.step, kept.step) and found.gradient_norm.dtype == torch.float32
    average = diagnose.average_gradient_norm(found)
    assert average[4].isnan() and average[3] == pytest.approx(norm[1:, 3].float().mean().item())
    torch.testing.assert_close(average[5:], norm[:, 5:].float().mean(0))
    assert diagnose.read_history(save(tmp_path, **arrays)).filters is None


def test_a_damaged_history_is_refused(tmp_path):
    kept = history()
    good = {"gradient_norm": kept.gradient_norm.numpy(), "step": kept.step.numpy(), "label": kept.label.numpy()}
    for change, said in (
        ({"label": np.array([{}], dtype=object)}, "not an archive of plain arrays"),
        ({"label": good["label"][:3]}, "must be .epochs, N., .epochs, N. and .N."),
        ({"label": good["label"].astype(float)}, "label is float64; it must hold whole numbers"),
        ({"step": np.array("x")}, "step is <U1; it must hold floating-point numbers"),
        ({"filters": np.zeros((2, 4, 1, 3, 3))}, "must be .7, O, I, kh, kw."),
    ):
        with pytest.raises(ba.InputError, match=f"history.npz.*{said}"):
            diagnose.read_history(save(tmp_path, **{**good, **change}))
    with pytest.raises(ba.InputError, match="has no step"):
        diagnose.read_history(save(tmp_path, gradient_norm=good["gradient_norm"], label=good["label"]))
    whole = save(tmp_path, **good) / "history.npz"
    data = whole.read_bytes()
    for damaged in (b"", b"not an archive", data[:200], data[:400] + bytes(40) + data[440:]):
        whole.write_bytes(damaged)
        with pytest.raises(ba.InputError, match="not an archive of plain arrays"):
            diagnose.read_history(tmp_path)


def test_deciles_are_ordered_and_of_equal_size_with_ties_too():
    g = torch.Generator().manual_seed(0)
    values = torch.rand(1003, generator=g)
    found = diagnose.deciles(values, torch.arange(1003) % 4)
    sizes = torch.bincount(found.group)
    assert len(sizes) == 10 and sizes.max() - sizes.min() <= 1
    for place in range(9):
        assert values[found.group == place].max() < values[found.group == place + 1].min()
    # The paper's rule, where there are no ties.
    rank = (values[None] < values[:, None]).sum(1)
    assert torch.equal(found.group, rank * 10 // 1003)
    torch.testing.assert_close(found.balance.sum(1), torch.ones(10))
    assert "between" in str(found) and "100 to 101 examples" in str(found)
    assert len(found.rows(1, 10)) == 1003 and len(found.rows(3, 4)) == (sizes[2] + sizes[3])

    label = torch.arange(1003) % 4
    skewed = diagnose.deciles(values + label, label)
    assert skewed.balance.max() == 1 and skewed.balance.min() == 0
    even = diagnose.deciles(values + label, label, by_class=True)
    assert (even.balance - 1 / 4).abs().max() < 0.01
    assert torch.equal(even.group[label == 2], diagnose.deciles(values[label == 2]).group)

    tied = values.mul(5).round()
    tied[7] = math.nan
    again = diagnose.deciles(tied)
    sizes = torch.bincount(again.group[again.group >= 0])
    assert again.group[7] == -1 and len(sizes) == 10 and sizes.max() - sizes.min() <= 1
    for place in range(9):
        assert tied[again.group == place].max() <= tied[again.group == place + 1].min()
    assert torch.equal(diagnose.deciles(torch.ones(30)).group, torch.arange(30) // 3)


def test_deciles_of_too_little():
    with pytest.raises(ba.InputError, match="9 of the values are known"):
        diagnose.deciles(torch.ones(9))
    with pytest.raises(ba.InputError, match="must be .N."):
        diagnose.deciles(torch.ones(20), torch.ones(19, dtype=torch.int64))
    with pytest.raises(ba.InputError, match="there are no labels"):
        diagnose.deciles(torch.rand(20), by_class=True)
    with pytest.raises(ba.InputError, match="deciles 0 … 3 do not exist"):
        diagnose.deciles(torch.rand(20)).rows(0, 3)


def test_the_gap_between_best_and_last():
    found = diagnose.best_last_gap([line(1, 0.3), line(2, 0.5), line(3, 0.5, 0.8), line(4, 0.45)])
    assert (found.best_epoch, found.last_epoch, found.best, found.last) == (2, 4, 0.5, 0.45)
    assert found.gap == pytest.approx(0.05) and "5.0 points" in str(found)
    assert diagnose.best_last_gap([line(1, 0.3), line(2, 0.3)]).best_epoch == 2  # as best.pt: the later of equals
    with pytest.raises(ba.InputError, match="no epochs"):
        diagnose.best_last_gap([])

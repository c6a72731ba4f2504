"""A run that is stopped anywhere goes on to the same bits: inside an epoch, in mid-replay, in the held-out attack."""

from __future__ import annotations

import pytest
import torch
from marks import fast
from preempting import differences, finished, small_trainer, stopped_at, through_a_file, untimed
from running import PROBLEMS

from bilevel_at.solvers import HessianFreeKKT, Lazy


def assert_goes_on(make, calls):
    """Every stop is compared with the unbroken run: weights, averages, optimiser, memories, metrics, history."""
    whole = make()
    lines, history = finished(whole)
    end = whole.state_dict()
    done = 0
    for call in calls:
        state, before, written = stopped_at(make(), call)
        if state is None:
            break
        again = make()
        again.load_state_dict(state)
        again.recorder.restore(written, again.done)
        after, arrays = finished(again)
        assert untimed([*before, *after]) == untimed(lines), call
        assert differences(arrays, history) == [], call
        assert differences(again.state_dict(), end) == [], call
        done += 1
    return done


@pytest.mark.parametrize("name", fast(PROBLEMS, ["fastbat", "atas", "free", "fgsm_sdi", "awp", "subat"]))
def test_a_run_stopped_between_any_two_updates_is_the_unbroken_one(name):
    """4 updates an epoch (12 of Free-AT's), 3 batches of held-out attacks: stops 1, 3, … in all of them."""
    stops = assert_goes_on(lambda: small_trainer(name), range(1, 26, 3))
    assert stops >= 6
    print(f"{name}: {stops} stops")


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 2},
        {"ema": 0.9},
        {"average_from": 2, "reestimate": True},
        {"schedule": "one-cycle", "epsilon_warmup": 0},
        {"solver": lambda: Lazy(HessianFreeKKT(), 0.5)},
    ],
    ids=str,
)
def test_every_part_of_the_recipe_is_in_the_position(changes):
    def make():
        own = dict(changes)
        solver = own.pop("solver", lambda: None)()
        return small_trainer("fastbat", solver=solver, **own)

    assert assert_goes_on(make, (1, 2, 6, 9, 13)) == 5


class Dropping(torch.nn.Sequential):
    """A network that draws at random itself."""

    def __init__(self):
        layers = [torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 3)]
        super().__init__(*layers)


def test_dropout_goes_on_where_it_was():
    """The global generator is not at the epoch's beginning any more."""

    def make():
        torch.manual_seed(1)
        return small_trainer("fastat", model=Dropping())

    assert assert_goes_on(make, (1, 2, 5, 8)) == 4
    state, _, _ = stopped_at(make(), 2)
    state["position"]["random"][1] = torch.Generator().manual_seed(5).get_state()
    other = make()
    other.load_state_dict(state)
    lines, _ = finished(other)
    assert untimed(lines) != untimed(finished(make())[0])  # the test would notice


def test_a_position_without_its_sums_or_draws_would_be_noticed():
    for spoil in ("means", "looks", "random"):
        make = lambda: small_trainer("fastat")  # noqa: E731
        state, _, _ = stopped_at(make(), 2)
        part = state["position"][spoil]
        if spoil == "random":
            part[0] = torch.Generator().manual_seed(5).get_state()
        else:
            part.add_(1)
        again = make()
        again.load_state_dict(state)
        assert untimed(finished(again)[0]) != untimed(finished(make())[0]), spoil


def test_a_state_between_epochs_is_as_before():
    trainer = small_trainer("fastat")
    next(trainer.epochs())
    state = through_a_file(trainer.state_dict())
    assert state["epochs"] == 1 and "position" not in state

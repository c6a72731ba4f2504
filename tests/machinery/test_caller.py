"""What is the caller's is left alone: random states, threads, grad mode, modes; and threads share a network."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
from preempting import small_trainer
from torch import nn

import bilevel_at as ba
from bilevel_at import modes
from bilevel_at.evaluate import evaluate
from bilevel_at.problems import fastbat
from bilevel_at.solvers import HessianFreeKKT
from bilevel_at.train import load


def network():
    """With a layer that stays in eval mode, deliberately."""
    layers = [torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Dropout(0.2)]
    model = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(144, 3))
    model[1].eval()
    return model


def of_the_caller(model):
    states = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002
    return [*states, torch.get_num_threads(), torch.is_grad_enabled(), [m.training for m in model.modules()]]


def batch(n=8):
    g = torch.Generator().manual_seed(0)
    return ba.Batch(torch.rand(n, 1, 8, 8, generator=g), torch.randint(0, 3, (n,), generator=g), torch.arange(n))


def hypergradient(model):
    plain = torch.nn.Sequential(*[m for m in model if not isinstance(m, torch.nn.Dropout)])  # which draws itself
    generator = torch.Generator().manual_seed(0)
    HessianFreeKKT().hypergradient(fastbat.problem(0.1), plain, batch(), generator=generator)


def attacked(model):
    examples = batch(12)
    evaluate(model, (examples.x, examples.y), ("clean", "fgsm", "pgd-2-2"), 0.1, checks=4)


def epochs(model):
    trainer = small_trainer("fastat", model=model)
    before = of_the_caller(model)
    for _ in trainer.epochs():
        assert of_the_caller(model) == before


@pytest.mark.filterwarnings("ignore::bilevel_at.evaluate.EvaluationWarning")
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("use", [hypergradient, attacked], ids=lambda f: f.__name__)
def test_what_is_the_caller_s_is_left_alone(use, mode):
    model = network() if mode == "train" else network().eval()
    before = of_the_caller(model)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            use(model)
            assert torch.is_grad_enabled() == grad
    assert of_the_caller(model) == before


def test_training_leaves_it_alone_after_every_epoch():
    epochs(network())
    with torch.no_grad():
        epochs(network())


def test_loading_leaves_it_alone(trained_run):
    model = network()
    before = of_the_caller(model)
    load(trained_run, "last")
    assert of_the_caller(model) == before


class Watched(torch.nn.Linear):
    """Counts passes of each mode, and lets other threads run within a pass."""

    def __init__(self):
        super().__init__(64, 3)
        self.seen = {True: 0, False: 0}

    def forward(self, x):
        before = self.training
        event.wait(0.001)
        self.seen[before] += 1
        assert self.training == before, "another thread has changed the mode within a pass"
        return super().forward(x.flatten(1))


event = threading.Event()  # never set: a wait for it hands over to other threads


def in_threads(*tasks):
    errors = []

    def guarded(task):
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return errors


@pytest.mark.parametrize("training", [True, False])
def test_two_threads_attack_one_network(training):
    """Each gets what it gets alone, every pass is in eval mode, and the network's own mode is back at the end."""
    model = Watched().train(training)
    examples, answers = batch(24), {}

    def task(name, seed):
        def run():
            answers[name] = evaluate(
                model, (examples.x, examples.y), ("clean", "pgd-5-1"), 0.1, seed=seed, batch_size=4, checks=0
            )

        return run

    assert in_threads(task("a", 0), task("b", 1), task("c", 2)) == []
    assert model.training == training and model.seen[True] == 0 and model.seen[False] > 0
    for name, seed in (("a", 0), ("b", 1), ("c", 2)):
        together = answers[name]
        task(name, seed)()
        assert {k: s.accuracy for k, s in together.scores.items()} == {
            k: s.accuracy for k, s in answers[name].scores.items()
        }


def test_threads_of_both_modes_take_turns():
    model = Watched()

    def passes(mode):
        def run():
            for _ in range(20):
                with ba.attack_mode(model, mode):
                    assert model.training == (mode == "train")
                    model(torch.zeros(1, 64))
                    assert model.training == (mode == "train")

        return run

    assert in_threads(passes("train"), passes("eval"), passes("eval")) == []
    assert model.training and model.seen == {True: 20, False: 40}


@contextlib.contextmanager
def a_thread_inside(model):
    """Another thread has the network in eval mode."""
    inside, done = threading.Event(), threading.Event()

    def other():
        with ba.attack_mode(model, "eval"):
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(60)
    try:
        yield
    finally:
        done.set()
        thread.join(60)


def test_a_thread_that_would_change_the_mode_under_another_is_refused():
    model = Watched().eval()
    with (
        a_thread_inside(model),
        ba.attack_mode(model, "eval"),
        ba.attack_mode(model, "eval"),
        pytest.raises(ba.InputError, match="another thread uses this network in eval mode"),
        ba.attack_mode(model, "train"),
    ):
        pass
    with ba.attack_mode(model, "train"), ba.attack_mode(model, "eval"):
        assert not copy.deepcopy(model).training
    assert not model.training


def entered(model, mode):
    """Whether another thread can be inside in this mode, within five seconds."""
    inside = threading.Event()

    def other():
        with ba.attack_mode(model, mode):
            inside.set()

    threading.Thread(target=other, daemon=True).start()
    return inside.wait(5)


def test_a_generator_that_another_thread_closes_leaves_the_mode():
    model = Watched().train()

    def passes():
        with ba.attack_mode(model, "eval"):
            yield

    started = passes()
    assert in_threads(lambda: next(started)) == [] and not model.training
    started.close()
    assert model.training and entered(model, "train")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_process_waits_for_no_thread_of_its_parent():
    model = Watched().train()
    with a_thread_inside(model):
        child = os.fork()
        if not child:
            signal.alarm(5)
            training = model.training
            with ba.attack_mode(model, "train"):
                os._exit(0 if training and model.training else 1)
        assert os.waitpid(child, 0)[1] == 0
    assert model.training


def test_threads_that_wait_for_each_other_are_told(monkeypatch):
    """One is in train mode until the other, which is to be in eval mode, is done."""
    monkeypatch.setattr(modes, "LONGEST_WAIT", 0.2)
    model, messages = nn.Linear(2, 2), []

    def other():
        try:
            with ba.attack_mode(model, "eval"):
                pass
        except ba.InputError as error:
            messages.append(str(error))

    with ba.attack_mode(model, "train"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(30)
    assert not thread.is_alive()
    assert "has been in train mode in another thread" in messages[0] and "give each thread a copy" in messages[0]

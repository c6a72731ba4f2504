"""Evaluations in a run directory: interrupted anywhere they go on to the same end; what is reused, and what is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluating import EPS, FEW, mlp, trained
from marks import fast

import bilevel_at as ba
from bilevel_at.data import Images
from bilevel_at.evaluate import Attack, Trace, attack_examples, attack_from_name, ball
from bilevel_at.evaluate.ensemble import Component
from bilevel_at.evaluate.robust import attacked
from bilevel_at.runs.evaluations import Store
from bilevel_at.train import RunDir


def quick_autoattack():
    """The cheaper parts of AutoAttack; all of it is interrupted in test_evaluate_command.py."""
    parts = [Component(part, "linf", EPS) for part in ("apgd-ce", "apgd-dlr")]
    return Attack("autoattack", ba.LinfBall(EPS), [*parts, Component("square", "linf", EPS, queries=50)])


def attack_to_interrupt(name):
    return quick_autoattack() if name == "autoattack" else attack_from_name(name, EPS)


NAMES = [("pgd-5-3", 40), ("beta-5-2", 20), ("autoattack", 20)]
INTERRUPTED = pytest.mark.parametrize(("name", "n"), fast(NAMES, [("pgd-5-3", 40), ("autoattack", 20)]))


@INTERRUPTED
def test_an_interrupted_attack_goes_on_to_the_same_end(robust, tmp_path, name, n):
    images, attack = FEW[slice(0, n)], attack_to_interrupt(name)
    unbroken = attacked(robust, images, attack, seed=3, batch_size=16)
    batches = sum(1 for _ in attack_examples(robust, images, attack, seed=3, batch_size=16))
    assert batches > len(attack.stages)
    for k in range(batches + 1):
        trace = Trace.start(n)
        some = attack_examples(robust, images, attack, seed=3, batch_size=16, trace=trace)
        for _ in range(k):
            next(some)
        some.close()
        np.savez(tmp_path / "trace.npz", **trace.arrays())
        with np.load(tmp_path / "trace.npz", allow_pickle=False) as arrays:
            again = Trace.from_arrays(arrays)
        rest = list(attack_examples(robust, images, attack, seed=3, batch_size=16, trace=again))
        assert len(rest) == batches - k
        assert torch.equal(again.broken, unbroken.broken) and torch.equal(again.said, unbroken.said), k
        assert again.seconds >= trace.seconds


def counted(model):
    calls = [0]

    def count(*_):
        calls[0] += 1

    return calls, model.register_forward_hook(count)


@INTERRUPTED
def test_a_store_goes_on_wherever_it_was_stopped(robust, tmp_path, name, n):
    images, attack = FEW[slice(0, n)], attack_to_interrupt(name)
    settings = {"usual": EPS, "seed": 3, "batch_size": 16}
    unbroken = attacked(robust, images, attack, seed=3, batch_size=16)
    batches = sum(1 for _ in attack_examples(robust, images, attack, seed=3, batch_size=16))
    for k in range(1, batches + 1):
        run, said = RunDir(tmp_path / str(k)), []

        def stop(*state, said=said, k=k):
            said.append(state)
            if len(said) == k:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Store(run, "best", robust, images, **settings).score(attack, stop)
        assert not (run.path / "results.json").exists()
        store = Store(run, "best", robust, images, **settings)
        key, score = store.score(attack, stop)
        assert len(said) == batches
        assert torch.equal(store.traces[key].broken, unbroken.broken) and torch.equal(
            store.traces[key].said, unbroken.said
        )
        assert score.accuracy == unbroken.correct.float().mean().item()
    calls, hook = counted(robust)
    with hook:
        assert Store(run, "best", robust, images, **settings).score(attack) == (key, score)
    assert calls == [0]


def test_what_a_store_reuses_and_what_not(robust, tmp_path):
    run, half = RunDir(tmp_path), FEW[slice(0, 20)]

    def score(model=robust, images=FEW, eps=EPS, name="pgd-3-2", again=False, **options):
        store = Store(run, "best", model, images, **{"usual": EPS, "batch_size": 16, **options})
        calls, hook = counted(model)
        with hook:
            key, score = store.score(attack_from_name(name, eps), again=again)
        expected = attacked(model, images, attack_from_name(name, eps), seed=options.get("seed", 0), batch_size=16)
        assert torch.equal(store.traces[key].broken, expected.broken)
        assert store.results()["best"][key] == score.asdict()
        with np.load(tmp_path / score.file, allow_pickle=False) as arrays:
            assert arrays["label"].tolist() == images.y.tolist()
            assert arrays["correct"].tolist() == expected.correct.tolist() and arrays["correct"].dtype == bool
        return key, calls[0] > 0

    assert score() == ("pgd-3-2", True) and score() == ("pgd-3-2", False)
    assert score(again=True) == ("pgd-3-2", True)
    key, computed = score(eps=0.1)
    assert computed and key.startswith("pgd-3-2@") and score() == ("pgd-3-2", False)
    assert score(eps=0.1) == (key, False)
    key, computed = score(images=half)
    assert computed and key == "pgd-3-2[n=20]" and score(images=half) == (key, False) and score() == ("pgd-3-2", False)
    relabelled = Images(FEW.x, FEW.y.roll(1), 10)
    for change in ({"seed": 1}, {"model": trained(mlp, "standard", 3)}, {"images": relabelled}):
        assert score(**change)[1] and not score(**change)[1]
    assert score(model=trained(mlp, "minmax", 1))[1]
    score()
    for damage in (b"", b"PK", b"not a file of arrays", next(tmp_path.rglob("*.npz")).read_bytes()[:200]):
        (tmp_path / "evaluation/best/pgd-3-2.npz").write_bytes(damage)
        assert score() == ("pgd-3-2", True)


def test_a_state_file_of_one_array_or_of_objects_is_not_used(robust, tmp_path):
    """What np.load opens, but not as an archive, or only by unpickling."""
    store, attack = Store(RunDir(tmp_path), "best", robust, FEW, usual=EPS), attack_from_name("pgd-2-1", EPS)
    _, first = store.score(attack)
    path = tmp_path / first.file
    with np.load(path) as arrays:
        kept = dict(arrays)
    changes = [{name: np.array([{}], dtype=object)} for name in ("broken", "said", "position", "identity")]
    changes += [{"position": np.array([9, 0, 0])}, {"position": np.array([1])}, {"broken": np.array(["a"] * len(FEW))}]
    changes += [{"broken": kept["broken"][:5], "said": kept["said"][:5]}, {"identity": np.array("{}")}]
    changes += [{"seconds": np.array("soon")}, {"broken": np.array(3), "said": np.array(3)}]
    for change in changes:
        with open(path, "wb") as file:
            np.savez(file, **{**kept, **change})
        assert store.score(attack)[1].accuracy == first.accuracy
        with np.load(path, allow_pickle=False) as arrays:
            assert (arrays["broken"] == kept["broken"]).all()
    for array in (np.zeros(3), np.array([{}], dtype=object)):
        with open(path, "wb") as file:
            np.save(file, array, allow_pickle=True)
        assert store.score(attack)[1].accuracy == first.accuracy


def test_results_of_another_norm_are_kept_apart(robust, tmp_path):
    """An l2 result of the same attack, at the same or the only radius, does not take the place of the l∞ one."""
    store = Store(RunDir(tmp_path), "best", robust, FEW, usual=EPS)
    keys = [store.score(attack_from_name("pgd-2-1", ball(norm, EPS)))[0] for norm in ("linf", "l2")]
    assert len(set(keys)) == 2 and {e["norm"] for e in store.results()["best"].values()} == {"linf", "l2"}


def test_results_of_weights_that_are_gone_are_dropped(robust, tmp_path):
    """A run that was trained on: what is known of the old checkpoint says nothing of the new one."""
    other = mlp().eval()
    for model in (robust, other):
        store = Store(RunDir(tmp_path), "best", model, FEW, usual=EPS)
        for name in ("clean", "fgsm") if model is robust else ("clean",):
            store.score(attack_from_name(name, EPS))
    assert set(store.results()["best"]) == {"clean"}

"""What the tests of evaluation on several processes do on one, two and four: ``python evaluating_together.py``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from evaluating import EPS, TEST, mlp

import bilevel_at as ba
from bilevel_at import shares
from bilevel_at.commands import flags, target
from bilevel_at.commands.evaluate import PROG, command
from bilevel_at.diagnose import compare_solvers, gradient_alignment, loss_landscape, random_step_norm
from bilevel_at.evaluate import Attack, attack_from_name, evaluate
from bilevel_at.evaluate.active import active_test
from bilevel_at.evaluate.ensemble import Component
from bilevel_at.problems import fastbat
from bilevel_at.runs import evaluations
from bilevel_at.runs.directory import RunDir
from bilevel_at.runs.doubts import record_checks
from bilevel_at.solvers import HessianFreeKKT, ZeroIG

IMAGES = TEST[slice(0, 44)]  # six batches of 8, the last one of 4: no multiple of the processes
FEW = IMAGES[slice(0, 20)]  # three batches
BATCH = 8
SECOND = BATCH + 3  # an image of the second batch
BALL = ba.LinfBall(EPS)
LONG = "pgd-4-4"


def autoattack(*parts):
    square = Component("square", "linf", EPS, queries=50)
    return Attack("autoattack", BALL, [*(Component(part, "linf", EPS) for part in parts), square])


def network(weights):
    model = mlp()
    model.load_state_dict(torch.load(weights))
    return model.eval()


def record(trace):
    return {name: array.tolist() for name, array in trace.arrays().items() if name != "seconds"}


def attacks(model):
    """Every kind of attack in Python, with checks on more than a batch of images."""
    names, seen, found = ["clean", "pgd-5-3", "beta-5-2", "nearest-5-2-1"], [], []
    for images, attacks, checks in ((IMAGES, names, 10), (FEW, [autoattack("apgd-ce", "apgd-t", "fab-t")], 0)):
        result = evaluate(
            model, images, attacks, EPS, seed=3, batch_size=BATCH, checks=checks, progress=lambda *_: seen.append(0)
        )
        plain = {name: {**score.asdict(), "seconds": None} for name, score in result.items()}
        traces = {name: record(trace) for name, trace in result.traces.items()}
        found += [traces, plain, result.measured, [str(warning) for warning in result.warnings]]
    return *found, len(seen)


def store(model, folder, which="best"):
    run = RunDir(folder)
    return evaluations.Store(run, which, model, IMAGES, usual=EPS, seed=5, batch_size=BATCH, twins=("best",))


def stored(model, folder):
    """A run's directory: attacked, then read again, then read by a checkpoint of the same weights; and its checks."""
    ours, told = store(model, folder), []
    for attack in (Attack("clean"), attack_from_name("pgd-5-2", EPS), autoattack("apgd-ce")):
        name, score = ours.score(attack, lambda *_: told.append(0))
        assert score.accuracy == ours.traces[name].correct.float().mean().item()
    batches = len(told)
    again, twin = store(model, folder), store(model, folder, "last")
    for attack in (Attack("clean"), attack_from_name("pgd-5-2", EPS)):
        assert again.score(attack, lambda *_: told.append(0)) == ours.score(attack)
        name, score = twin.score(attack, lambda *_: told.append(0))
        assert twin.copied == {name: "best"} | twin.copied
    findings = record_checks(
        RunDir(folder), ours, IMAGES, BALL, 9, active=5, attacks=[attack_from_name("pgd-5-2", EPS)]
    )
    assert len(told) == batches  # the rest was on record
    return str(ours.worst_case()), [str(finding) for finding in findings], score.seconds


def directory(folder):
    """What the files hold, without dates and times."""
    found = {}
    for path in sorted(Path(folder).rglob("*.npz")):
        with np.load(path, allow_pickle=False) as arrays:
            found[path.name] = {name: arrays[name].tolist() for name in arrays.files if name != "seconds"}
    for name in ("results.json", "checks.json"):
        found[name] = RunDir(folder).read_json(name)
    for entries in found["results.json"].values():
        for entry in entries.values():
            assert entry.pop("seconds") > 0
            assert entry.pop("date")
    return found


def diagnostics(model):
    numbers = [gradient_alignment(model, IMAGES, BALL, batch_size=BATCH, samples=2)]
    norms = random_step_norm(model, IMAGES, EPS, draws=3, batch_size=BATCH)
    numbers += [norms.mean, norms.error, norms.square]
    plane = loss_landscape(model, IMAGES.pixels()[:2], IMAGES.y[:2], EPS, points=5, batch_size=12)
    numbers += [plane.loss, plane.predicted, plane.margin]
    batch = ba.Batch(IMAGES.pixels(), IMAGES.y)
    solvers = {"KKT": HessianFreeKKT(), "ZeroIG": ZeroIG(), "damped": HessianFreeKKT(damping=1.0)}
    couplings = compare_solvers(fastbat.problem(EPS), model, batch, solvers)
    attacks = [attack_from_name("pgd-5-1", EPS), attack_from_name("fgsm", EPS)]
    planted = active_test(model, IMAGES[slice(0, 7)], BALL, attacks)
    return [tensor.tolist() for tensor in numbers], str(couplings), planted


class Broken(torch.nn.Module):
    """Logits that are not a number on one image."""

    def __init__(self, model, image):
        super().__init__()
        self.model, self.x = model, image

    def forward(self, x):
        same = (x == self.x).flatten(1).all(1)
        return self.model(x).masked_fill(same[:, None], torch.nan)


def mistakes(model):
    """What each process says of an error of one batch, of one that all share, and of data that differ."""

    def error(function):
        try:
            function()
        except Exception as caught:
            return f"{type(caught).__name__}: {caught}"

    broken, other = Broken(model, IMAGES.pixels()[SECOND]), IMAGES[slice(0, 44 - shares.rank())]
    return [
        error(lambda: evaluate(broken, IMAGES, ["clean", "fgsm"], EPS, batch_size=BATCH, checks=0)),
        error(lambda: gradient_alignment(model, IMAGES, OwnSet(), batch_size=BATCH)),
        error(lambda: evaluate(model, other, ["clean"], batch_size=BATCH, checks=0)),
        error(lambda: evaluate(model, IMAGES, ["pgd-0"], EPS)),
    ]


class OwnSet(ba.Constraint):
    """One without uniform draws."""

    def project(self, delta, x):
        return delta


def kill_after(model, passes):
    """The process ends after so many passes of the network."""
    left = [passes]

    def hook(*_):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    model.register_forward_hook(hook)


def main(meeting, folder):
    folder = Path(folder)
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    model = network(folder / "weights.pt")
    with shares.together():
        assert (shares.rank(), shares.count()) == (rank, count)
        own = RunDir(folder / f"stored-{count}")
        result = {
            "attacks": attacks(model),
            "diagnostics": diagnostics(model),
            "stored": stored(model, own.path),
            "mistakes": mistakes(model),
        }
        gone_on = folder / "interrupted-2"
        if count == 2:
            result["gone on"] = record(go_on(model, gone_on))
        torch.save(result, folder / f"result-{count}-{rank}.pt")
        if count == 4:
            if rank == 1:  # in the second round of the first stage: two passes of clean images, and five for a batch
                kill_after(model, 9)
            store(model, folder / "interrupted").score(attack_from_name(LONG, EPS))
    dist.barrier()
    leave(0)


def leave(status):
    """End without C++ destructors: those of gloo's threads abort one process in some tens."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def go_on(model, folder):
    ours, attack = store(model, folder), attack_from_name(LONG, EPS)
    name, _ = ours.score(attack)
    return ours.traces[name]


SMALL = ["--batch-size", "8", "--examples", "44"]
COMMANDS = {
    "evaluated": [
        "run",
        "--attacks",
        "clean",
        "pgd-3-2",
        "--which",
        "last",
        "best",
        *SMALL,
        "--checks",
        "9",
        "active:3",
    ],
    "unknown": ["run", "--attacks", "pgd-0"],
    "nowhere": ["elsewhere"],
    "not finite": ["run", "--attacks", "fgsm", "--which", "last", *SMALL, "--checks", "0"],
}


def commands(meeting, folder):
    """The command, as ``python -m bilevel_at.evaluate`` is, with several sets of flags one after the other."""
    os.chdir(folder)
    honest = target.Target.model

    def with_an_error(self, which):
        return Broken(honest(self, which), TEST.sample(44).pixels()[SECOND])

    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name, words in COMMANDS.items():
        place = f"file://{meeting}-{name}".replace(" ", "-")
        dist.init_process_group("gloo", init_method=place, rank=rank, world_size=count)
        target.Target.model = with_an_error if name == "not finite" else honest
        sys.argv = ["evaluate", *words]
        status = flags.status_of(command, PROG)
        print(f"{name}: {status}", file=sys.stderr, flush=True)
    leave(0)


if __name__ == "__main__":
    {"main": main, "commands": commands}[sys.argv[1]](*sys.argv[2:])

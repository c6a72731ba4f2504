"""What the tests of stopping share: trainers of a few images, and comparing all that a run leaves."""

from __future__ import annotations

import importlib
import io
import json
from pathlib import Path

import numpy as np
import torch

from bilevel_at.data import Images
from bilevel_at.evaluate.attacks import attack_from_name
from bilevel_at.models import build_model
from bilevel_at.runs.recipe import Recipe
from bilevel_at.solvers import ZeroIG
from bilevel_at.train import Trainer

UNTIMED = {"seconds": 0, "train_seconds": 0, "memory": 0}


class Leave(Exception):
    """As a signal: raised between two updates."""


def small_trainer(name, seed=0, solver=None, images=None, **changes):
    """A trainer of a problem file on 44 noisy images of 8×8, three epochs; every part is made anew."""
    g = torch.Generator().manual_seed(0)
    if images is None:
        x = torch.randint(0, 256, (44, 1, 8, 8), generator=g, dtype=torch.uint8)
        images = Images(x, torch.randint(0, 3, (44,), generator=g), 3)
    module = importlib.import_module(f"bilevel_at.problems.{name}")
    if solver is None:
        solver = module.solver() if hasattr(module, "solver") else ZeroIG()
    settings = {
        "epochs": 3,
        "batch_size": 12,
        "lr": 0.05,
        "augment": "crop-flip",
        "replays": 3 if name == "free" else 1,
    }
    problem = module.problem(**{"epsilon": 0.2} | changes.pop("problem", {}))
    options = {key: changes.pop(key) for key in ("between", "skip_nonfinite", "extra") if key in changes}
    torch.manual_seed(seed)
    model = changes.pop("model", None) or build_model("small_cnn", images.shape, images.classes)
    recipe = Recipe(**settings | changes)
    attack = attack_from_name("pgd-2-1", problem.threat)
    return Trainer(problem, solver, model, images, images[slice(0, 20)], recipe, attack, seed, **options)


def through_a_file(state):
    """The state, written and read as a checkpoint is."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def stopped_at(trainer, call):
    """The state in the ``call``-th pause between updates (from 1), the epochs' metrics before it, and their history."""
    count, left = [0], {}

    def between():
        count[0] += 1
        if count[0] == call:
            left["state"] = through_a_file(trainer.state_dict())
            raise Leave

    trainer.between = between
    lines, history = [], {}
    try:
        for epoch in trainer.epochs():
            lines.append(epoch.asdict())
            history = trainer.recorder.arrays()  # as the command writes it at an epoch's end
    except Leave:
        return left["state"], lines, history
    return None, lines, history


def finished(trainer):
    """(metrics, history) of the epochs that are left."""
    return [epoch.asdict() for epoch in trainer.epochs()], trainer.recorder.arrays()


def differences(a, b, path=""):
    """Where two nested states differ in a bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        both = [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{path}/{key}")]
        return [*both, *(f"{path}/{key}" for key in a.keys() ^ b.keys())]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, pair in enumerate(zip(a, b, strict=True)) for d in differences(*pair, f"{path}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        a, b = a.cpu().numpy(), b.cpu().numpy()
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        nan = a.dtype.kind == "f"
        return [] if a.dtype == b.dtype and np.array_equal(a, b, equal_nan=nan) else [path]
    return [] if type(a) is type(b) and a == b else [path]


def untimed(lines):
    return [line | UNTIMED for line in lines]


def left_by(run):
    """What a run directory holds of its training, without times: all checkpoints, metrics, history and scores."""
    run = Path(run)
    checkpoints = {p.name: torch.load(p, weights_only=True) for p in run.glob("*.pt")}
    with np.load(run / "history.npz", allow_pickle=False) as archive:
        history = {name: archive[name] for name in archive.files}
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((run / "results.json").read_text())
    scores = {which: {a: entry["accuracy"] for a, entry in row.items()} for which, row in results.items()}
    return {"checkpoints": checkpoints, "history": history, "metrics": untimed(metrics), "results": scores}

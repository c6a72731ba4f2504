"""Train a robust model from a problem file, and show what it got.

    python -m bilevel_at.run problems/fastbat.py [flags]

The file's ``problem(...)``, and its ``solver(...)`` if there is one, give flags by their typed keyword arguments.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import figures
from ..data import ImageSet, load_data
from ..errors import BilevelError, InputError
from ..evaluate import Attack, Score, attack_from_name, norm_of
from ..runs.checkpoints import weights
from ..runs.directory import plainly
from ..runs.evaluations import Store
from ..runs.metrics import last_is_first_to_fall
from ..runs.networks import load
from ..train import Epoch, RunDir, Trainer, catastrophic_overfitting, rank
from .plan import Plan, build, probe, resolve_device, understand

__all__ = ["run"]

MOST_HELD_OUT = 5_000  # a tenth of CIFAR's; a tenth of ImageNet would take longer to attack than to train on


def _run_dir(plan: Plan) -> RunDir:
    """Where the run goes: ``--out``, or the first free runs/NAME; with ``--resume`` the one that is there."""
    options = plan.options
    if options.out is not None:
        path = Path(options.out)
        if path.exists() and not path.is_dir():
            raise InputError(f"--out {path} is a file; it must be a directory, or not exist")
        if (path / "config.json").exists() and not options.resume:
            raise InputError(f"{path} already holds a run; add --resume to go on with it, or choose another --out")
    else:
        stem = f"{plan.file.path.stem}-{Path(options.data).stem}-seed{options.seed}"
        paths = [Path("runs") / stem, *(Path("runs") / f"{stem}-{i}" for i in range(2, 10_000))]
        free = next(i for i, path in enumerate(paths) if not path.exists())
        path = paths[max(0, free - 1)] if options.resume else paths[free]
    if options.resume and not (path / "config.json").exists():
        raise InputError(f"there is no run to resume in {path}")
    return RunDir(path)


def _resume(run: RunDir, config: dict[str, Any], trainer: Trainer, device: torch.device) -> None:
    """Load what the run has. Settings must be those it started with: half a run of each is neither."""
    before = run.read_json("config.json")
    now = _plain(config)
    try:
        settings = {section: dict(before[section]) for section in ("problem", "solver", "options")}
        file = before["file_sha256"]
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{run}/config.json is not one of bilevel_at.run; choose another --out") from None
    if file != now["file_sha256"]:
        raise InputError(f"{run} was started with another {before.get('file')}; it has changed since")
    if before.get("data_sha256") != now["data_sha256"]:
        raise InputError(f"{run} was started with other training images; the data has changed since")
    for section in ("problem", "solver", "options"):
        for key in sorted({*settings[section], *now[section]}):
            old, new = settings[section].get(key), now[section].get(key)
            if old != new and key not in ("device", "attacks", "data_dir", "download", "test_examples"):
                raise InputError(
                    f"{run} was started with {key} = {old}, and is resumed with {new}; give the same flags"
                )
    if (run.path / "last.pt").exists():
        state = run.restore("last.pt", device)
        try:
            trainer.load_state_dict(state)
        except Exception as error:  # torch's loaders fail in many ways on what is not theirs
            said = str(error).strip().split("\n")[0]
            raise InputError(
                f"{run}/last.pt is not a checkpoint of this run ({type(error).__name__}: {said})"
            ) from error
    trainer.recorder.restore(run.arrays("history.npz"), trainer.done)
    if len(run.metrics(epochs=trainer.done)) != trainer.done:
        raise InputError(f"{run}/metrics.jsonl does not have the {trainer.done} epochs that last.pt has")


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(config, default=plainly))
    return plain


def _train(trainer: Trainer, run: RunDir, console: Console) -> None:
    """Every epoch: a line of metrics, ``last.pt``, and ``best.pt`` where it is the best so far."""
    lines = run.metrics()
    columns = (
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[said]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("train", total=trainer.recipe.epochs, completed=trainer.done, said="")
        for epoch in trainer.epochs():
            state, line = trainer.state_dict(), epoch.asdict()
            if all(rank(line) > rank(earlier) for earlier in lines):
                run.save("best.pt", {"model": weights(state), "epochs": epoch.epoch})
            lines.append(line)
            collapse = catastrophic_overfitting(lines)
            earlier = collapse is not None and collapse.after is not line
            if not earlier and last_is_first_to_fall(lines):
                run.copy("last.pt", "last_good.pt")  # last.pt is still the epoch before
            if collapse is not None and collapse.after is line:
                console.print(f"{collapse}; last_good.pt keeps epoch {collapse.last_good}", highlight=False)
            run.append_metrics(line)
            if arrays := trainer.recorder.arrays():
                run.save_arrays("history.npz", arrays)
            run.save("last.pt", state)
            progress.update(task, completed=epoch.epoch, said=_say(epoch))
            if not console.is_terminal:
                console.print(f"epoch {epoch.epoch}/{trainer.recipe.epochs}  {_say(epoch)}", highlight=False)


def _say(epoch: Epoch) -> str:
    return f"loss {epoch.loss:.3f}  held-out clean {epoch.clean:.1%}  {epoch.attack} {epoch.robust:.1%}"


def _evaluate(
    trainer: Trainer,
    run: RunDir,
    test: ImageSet,
    attacks: Sequence[Attack],
    console: Console,
    usual: float,
    norm: str | None,
) -> dict[str, dict[str, Score]]:
    """Best and last epoch (and the last good one) on the test set, into ``results.json``, which grows with each attack.

    What is there already, of the same attack on the same images, is not computed again.
    """
    data = test.sha256()[:16]
    scores: dict[str, dict[str, Score]] = {}
    with console.status("evaluating") as status:
        for which in ("best", "last", "last_good"):
            if which == "last_good" and catastrophic_overfitting(run.metrics()) is None:
                (run.path / "last_good.pt").unlink(missing_ok=True)  # it was kept in case
                continue
            trainer.model.load_state_dict(weights(run.restore(f"{which}.pt", test.device)))
            store = Store(run, which, trainer.model, test, usual=usual, norm=norm, data=data)
            scores[which] = {}
            for attack in attacks:
                status.update(f"{which} epoch: {attack.name}")
                scores[which][attack.name] = store.score(attack)[1]
    return scores


def _table(scores: dict[str, dict[str, Score]], epochs: dict[str, int], test: ImageSet, epsilon: float) -> Table:
    title = f"test accuracy at ε = {epsilon:.4g} ({len(test)} images)"
    table = Table(title=title, min_width=len(title) + 2)
    table.add_column("epoch")
    for name in scores["best"]:
        table.add_column(name, justify="right")
    for which, row in scores.items():
        table.add_row(f"{which.replace('_', ' ')} ({epochs[which]})", *(f"{s.accuracy:.1%}" for s in row.values()))
    return table


def run(args: Sequence[str]) -> int:
    """The command: 0 when done. Raises :class:`InputError` for a mistake in what was asked."""
    console = Console()
    plan = understand(args)
    options = plan.options
    device = resolve_device(options.device)
    constraint = getattr(plan.problem.lower, "constraint", None)
    if constraint is None:
        raise InputError(f"{plan.file.path}: the lower problem has no constraint")
    attacks = [attack_from_name(name, constraint, surrogates=load) for name in dict.fromkeys(options.attacks)]
    select = attack_from_name(options.select, constraint, surrogates=load)
    epsilon = constraint.radius
    train, test = load_data(options.data, options.data_dir, options.download)
    if options.examples is not None:
        train = train.sample(options.examples)
    if options.test_examples is not None:
        test = test.sample(options.test_examples)
    train, held_out = (part.to(device) for part in train.split(min(0.1, MOST_HELD_OUT / len(train))))
    test = test.to(device)
    model = build(plan, train)
    probe(plan, model, train)

    run_dir = _run_dir(plan)
    config = plan.config(model, train)
    precision = "float32" if options.precision == "auto" else options.precision
    trainer = Trainer(
        plan.problem, plan.solver, model, train, held_out, options.recipe(), select, options.seed, precision
    )
    if options.resume:
        _resume(run_dir, config, trainer, device)
    else:
        try:
            run_dir.write_json("config.json", config)
            run_dir.metrics(epochs=0)  # what lies there belongs to no run
            (run_dir.path / "results.json").unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{run_dir} cannot be written: {error.strerror or error}") from None
    console.print(
        f"{plan.file.path.stem} with {type(plan.solver).__name__}, ε = {epsilon:.4g}, on {options.data}: "
        f"{len(train)} training, {len(held_out)} held-out, {len(test)} test images; {options.model} on {device}",
        highlight=False,
    )
    try:
        _train(trainer, run_dir, console)
        scores = _evaluate(trainer, run_dir, test, attacks, console, epsilon, norm_of(constraint))
    except KeyboardInterrupt:
        missing = [] if options.out else [f"--out {run_dir}"]
        missing += [] if options.resume else ["--resume"]
        same = " with ".join(["the same command", *([" ".join(missing)] if missing else [])])
        raise KeyboardInterrupt(f"{trainer.done} of {options.epochs} epochs are in {run_dir}; {same} goes on") from None
    except BilevelError as error:
        raise BilevelError(
            f"{error} (epoch {trainer.done + 1}; what was done is in {run_dir})", error.samples
        ) from error

    metrics = run_dir.metrics()
    best = max(metrics, key=rank)["epoch"]
    title = f"{plan.file.path.stem}, {type(plan.solver).__name__}, {options.data}, seed {options.seed}"
    figures.curves(metrics, run_dir.figures / "curves.png", title)
    strongest = [attack for attack in attacks if attack.stages][-1:] or [select]
    model.load_state_dict(weights(run_dir.restore("best.pt", device)))
    figures.examples(model, test, strongest[0], run_dir.figures / "examples.png")
    collapse = catastrophic_overfitting(metrics)
    epochs = {"best": best, "last": trainer.done, "last_good": collapse.last_good if collapse else 0}
    console.print(_table(scores, epochs, test, epsilon))
    if collapse:
        console.print(str(collapse), highlight=False)
    console.print(
        f"{run_dir}: config.json, metrics.jsonl, results.json, best.pt, last.pt, figures/; stronger attacks: "
        f"python -m bilevel_at.evaluate {run_dir} --attacks autoattack",
        highlight=False,
        soft_wrap=True,
    )
    return 0

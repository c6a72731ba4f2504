"""Train a robust model from a problem file, and print its accuracies.

    python -m bilevel_at.run problems/fastbat.py [flags]

The file's ``problem(...)``, and its ``solver(...)`` if there is one, define flags by their typed keyword arguments.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from .. import shares
from ..data import ImageSet
from ..distributed import broadcast
from ..errors import BilevelError
from ..evaluate import Score, Threat
from ..runs.directory import CHECKPOINTS, RunDir
from ..runs.evaluations import Store
from ..runs.headline import WorstCase
from ..runs.keeper import Keeper
from ..runs.lock import locked
from ..runs.metrics import Epoch, catastrophic_overfitting, rank
from ..runs.networks import load_weights
from ..train import Trainer
from ..train.memory_format import MemoryFormat
from .attacking import AttackBars
from .dry_run import dry_run
from .headline import caption
from .layout import memory_format_of
from .logs import Logs
from .plan import Plan, understand
from .prepare import Prepared, kink_note, prepare
from .processes import agreed, joined
from .saving import Saver
from .signals import Signals, Stopped
from .start import begin_or_resume, run_directory

__all__ = ["run"]


def run(args: Sequence[str]) -> int:
    """Run the command, and return exit status 0.

    Raises:
        InputError: if the arguments are invalid.
        Stopped: if a signal asks it to leave.
    """
    with Signals().heeded() as signals:
        return _run(args, signals)


def _run(args: Sequence[str], signals: Signals) -> int:
    with joined() as is_first, ExitStack() as stack:
        console = Console()
        plan = agreed(lambda: understand(args))
        if plan.options.dry_run:
            if is_first:
                dry_run(plan, console)
            return 0
        agreed(lambda: Logs.check(plan.options.logger))
        prepared = agreed(lambda: prepare(plan))
        if shares.count() > 1:  # a network of a user's own may draw its weights from any generator
            broadcast(prepared.model, shares.group())
        run_dir = RunDir(shares.first(lambda: run_directory(plan.options, plan.file.path.stem).path))
        if is_first:
            lock = locked(run_dir.path, "bilevel_at.run")
        shares.first(lambda: stack.enter_context(lock))
        return _in_directory(plan, prepared, run_dir, signals, console)


def _in_directory(plan: Plan, prepared: Prepared, run_dir: RunDir, signals: Signals, console: Console) -> int:
    """Train and evaluate in a directory that no other command writes into."""
    if plan.options.compile:
        plan.solver.compile()
    layout = shares.first(lambda: memory_format_of(plan, prepared, run_dir))
    trainer = agreed(lambda: _trainer(plan, prepared, layout.name))
    begin_or_resume(plan, prepared, run_dir, layout.asdict(), trainer)
    console.print(_opening(plan, prepared), highlight=False, markup=False)
    if note := kink_note(plan, prepared.model):
        console.print(f"note: {note}", highlight=False, markup=False)
    saver = trainer.between = Saver(trainer, run_dir, signals, plan.options.save_every)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    with contextlib.closing(Logs(plan.options.logger if shares.rank() == 0 else (), say)) as logs:
        scores, worst = _train_and_evaluate(plan, prepared, trainer, run_dir, saver, logs, console)
    if shares.rank() == 0:
        _close(scores, worst, prepared, plan.file.path, run_dir, console)
    return 0


def _train_and_evaluate(
    plan: Plan, prepared: Prepared, trainer: Trainer, run_dir: RunDir, saver: Saver, logs: Logs, console: Console
) -> tuple[dict[str, dict[str, Score]], dict[str, WorstCase]]:
    """Train, attack, and draw; what stops that says how to go on."""
    signals = saver.signals
    try:
        logs.begin(run_dir)
        with signals.waiting():
            _train(trainer, run_dir, saver, logs, console)
        scores, worst, attacked = _evaluate(trainer, run_dir, prepared, console)
        logs.results(trainer.done, scores)
        if shares.rank() == 0:
            with shares.alone():
                _draw(plan, prepared, run_dir, attacked)
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        raise Stopped(number, _how_to_go_on(plan, run_dir, saver)) from None
    except BilevelError as error:
        where = f"(epoch {trainer.done + 1}; what was done is in {run_dir})"
        raise BilevelError(f"{plan.file.path.stem}: {error} {where}", error.samples) from error
    return scores, worst


def _size(threat: Threat) -> str:
    """``ε = 0.2`` for a ball, ``threat Diamond(size=0.3)`` for another set."""
    return f"ε = {threat.epsilon:.4g}" if threat.is_ball else f"threat {threat.name}"


def _trainer(plan: Plan, prepared: Prepared, memory_format: MemoryFormat) -> Trainer:
    options = plan.options
    return Trainer(
        plan.problem,
        plan.solver,
        prepared.model,
        prepared.train,
        prepared.held_out,
        options.training(),
        prepared.select,
        options.seed,
        "float32" if options.precision == "auto" else options.precision,
        prepared.extra,
        memory_format,
        options.skip_nonfinite,
    )


def _opening(plan: Plan, prepared: Prepared) -> str:
    more = "" if prepared.extra is None else f" (and {len(prepared.extra)} extra)"
    sizes = f"{len(prepared.train)} training{more}, {len(prepared.held_out)} held-out, {len(prepared.test)} test images"
    size = _size(prepared.threat) + ("" if plan.feasible_set is None else f" (trained in {plan.feasible_set})")
    return (
        f"{plan.file.path.stem} with {type(plan.solver).__name__}, {size}, on {plan.options.data}: "
        f"{sizes}; {plan.options.model} on {prepared.test.device}"
    )


def _train(trainer: Trainer, run: RunDir, saver: Saver, logs: Logs, console: Console) -> None:
    """Train all epochs and save each one. Progress is a bar on a terminal, otherwise a line for each epoch."""
    keeper = Keeper(run)
    columns = (
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[measured]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("train", total=trainer.recipe.epochs, completed=trainer.done, measured="")
        for epoch in trainer.epochs():
            state = trainer.state_dict()  # every process has a part in it
            collapse = shares.first(partial(keeper.keep, epoch, state, trainer.recorder.arrays()))
            saver.close_epoch()
            logs.follow(keeper.lines if shares.rank() == 0 else ())
            if collapse is not None:
                console.print(f"{collapse}; last_good.pt keeps epoch {collapse.last_good}", highlight=False)
            progress.update(task, completed=epoch.epoch, measured=_measured(epoch))
            if not console.is_terminal:
                console.print(f"epoch {epoch.epoch}/{trainer.recipe.epochs}  {_measured(epoch)}", highlight=False)


def _measured(epoch: Epoch) -> str:
    return f"loss {epoch.loss:.3f}  held-out clean {epoch.clean:.1%}  {epoch.attack} {epoch.robust:.1%}"


def _evaluate(
    trainer: Trainer, run: RunDir, prepared: Prepared, console: Console
) -> tuple[dict[str, dict[str, Score]], dict[str, WorstCase], Tensor | None]:
    """Best and last epoch (and the last good one) on the test set, into ``results.json``, which grows with each attack.

    Stored results of the same attack on the same images are reused. Epochs of the same weights are attacked once.

    Returns:
        The scores, and the worst case of all attacks, by epoch; and the first images as the strongest attack has left
        them on the best epoch, or None where its result was stored before.
    """
    test = prepared.test
    data = test.sha256()[:16]
    scores: dict[str, dict[str, Score]] = {}
    worst: dict[str, WorstCase] = {}
    attacked = None
    with AttackBars(console) as bars:
        for which in CHECKPOINTS:
            if not shares.first(partial(_load, which, trainer, run, prepared)):
                continue
            if shares.count() > 1:  # the first process has read it
                broadcast(trainer.model, shares.group())
            store = Store(run, which, trainer.model, test, usual=prepared.threat, data=data)
            scores[which] = {}
            for attack in prepared.attacks:
                name, scores[which][attack.name] = bars.score(store, attack)
                if which == "best" and attack is prepared.strongest:
                    attacked = store.traces[name].pictured
            if (headline := shares.first(store.worst_case)) is not None:
                worst[which] = headline
    return scores, worst, attacked


def _load(which: str, trainer: Trainer, run: RunDir, prepared: Prepared) -> bool:
    """Load a checkpoint's weights, if the run has it."""
    if which == "last_good" and catastrophic_overfitting(run.metrics()) is None:
        run.remove_checkpoint(which)  # saved in case the collapse was confirmed
        return False
    load_weights(trainer.model, run, which, prepared.name, prepared.test.device)
    return True


def _how_to_go_on(plan: Plan, run: RunDir, saver: Saver) -> str:
    options, trainer = plan.options, saver.trainer
    missing = [] if options.out or options.resume == "auto" else [f"--out {run}"]
    missing += [] if options.resume != "no" else ["--resume"]
    same = " with ".join(["the same command", *([" ".join(missing)] if missing else [])])
    more = f" and {saver.updates} of the {trainer.steps_per_epoch} updates of the next" if saver.updates else ""
    return f"{trainer.done} of {options.epochs} epochs{more} are in {run}; {same} goes on"


def _draw(plan: Plan, prepared: Prepared, run: RunDir, attacked: Tensor | None) -> None:
    """Draw the run's figures: training curves, and images perturbed by the strongest attack of the table.

    attacked: those images, where the table's attack has just been made; where it was made before, its figure stays.
    """
    from .. import figures  # here: matplotlib takes a quarter as long to import as torch

    title = f"{plan.file.path.stem}, {type(plan.solver).__name__}, {plan.options.data}, seed {plan.options.seed}"
    figures.curves(run.metrics(), run.figures / "curves.png", title)
    if attacked is None and run.examples.exists():
        return
    load_weights(prepared.model, run, "best", prepared.name, prepared.test.device)
    figures.examples(prepared.model, prepared.test, prepared.strongest, run.examples, attacked)


def _close(
    scores: dict[str, dict[str, Score]],
    worst: dict[str, WorstCase],
    prepared: Prepared,
    file: Path,
    run: RunDir,
    console: Console,
) -> None:
    """Print the table, catastrophic overfitting if it occurred, and the paths of the files."""
    metrics = run.metrics()
    collapse = catastrophic_overfitting(metrics)
    epochs = {
        "best": max(metrics, key=rank)["epoch"],
        "last": metrics[-1]["epoch"],
        "last_good": collapse.last_good if collapse else 0,
    }
    console.print(_table(scores, worst, epochs, prepared.test, prepared.threat))
    if collapse:
        console.print(str(collapse), highlight=False)
    more = "--attacks autoattack" if prepared.threat.norm else f"--attacks pgd-100-20 --problem-file {file}"
    console.print(
        f"{run}: config.json, metrics.jsonl, results.json, best.pt, last.pt, figures/; stronger attacks: "
        f"python -m bilevel_at.evaluate {run} {more}; as a page: python -m bilevel_at.report {run}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _table(
    scores: dict[str, dict[str, Score]],
    worst: dict[str, WorstCase],
    epochs: dict[str, int],
    test: ImageSet,
    threat: Threat,
) -> Table:
    where = f"at {_size(threat)}" if threat.is_ball else f"in {threat.name}"
    title = f"test accuracy {where} ({len(test)} images)"
    table = Table(title=escape(title), min_width=len(title) + 2)
    table.add_column("epoch")
    if worst:
        table.add_column("worst case", justify="right")
        table.caption = escape(caption(worst))
    for name in scores["best"]:
        table.add_column(name, justify="right")
    for which, row in scores.items():
        headline = [f"{worst[which].accuracy:.1%}" if which in worst else ""] if worst else []
        cells = [*headline, *(f"{score.accuracy:.1%}" for score in row.values())]
        table.add_row(f"{which.replace('_', ' ')} ({epochs[which]})", *cells)
    return table

"""``python -m bilevel_at.evaluate``: attacks on the networks of a run, or on weights from elsewhere."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..data import ImageSet
from ..errors import InputError
from ..evaluate.attacks import ATTACKS, Attack, ball
from ..evaluate.evaluation import attacks_at
from ..evaluate.radius import radius_text
from ..evaluate.result import Finding, Score
from ..evaluate.robust import Trace
from ..runs.doubts import record_checks
from ..runs.evaluations import Store, remember_command
from ..runs.model_files import ModelFiles
from . import flags
from .device import resolve_device
from .options import EvaluateOptions
from .target import Target, find_target

__all__ = ["PROG", "command"]

PROG = "bilevel_at.evaluate"
USAGE = f"""usage: python -m {PROG} RUN [flags]
       python -m {PROG} WEIGHTS.pt --model NAME --data NAME --epsilon 8/255 [flags]

RUN is a directory that bilevel_at.run made; WEIGHTS.pt a state_dict of a network known by name.
python -m {PROG} RUN --help lists the flags; --list the attacks."""


def command(args: Sequence[str]) -> int:
    """0 when done. Raises :class:`InputError` for a mistake in what was asked."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if args[0] == "--list":
        width = max(map(len, ATTACKS))
        print("\n".join(f"  {name:<{width}}  {about}" for name, about in ATTACKS.items()))
        return 0
    if args[0].startswith("-"):
        raise InputError(f"the run comes first: python -m {PROG} RUN {' '.join(args[:2])}")
    about = "Attack the networks of a run, or weights from elsewhere."
    values = flags.parse(flags.flags_of(EvaluateOptions), args[1:], f"python -m {PROG} {args[0]}", about)
    options = EvaluateOptions(**values)
    device = resolve_device(options.device)
    files = ModelFiles(options.model_file)
    target, images = find_target(Path(args[0]), options, files)
    images = images.to(device)
    norm, radii = _balls(args[0], options, target)
    attacks = attacks_at(options.attacks, [ball(norm, radius) for radius in radii], options.seed, files.load)
    target.check()
    usual = target.epsilon if norm == target.norm else None
    if not target.run.exists:
        target.run.write_config(target.about)

    console = Console()
    told = f"{len(images)} test images on {device}"
    console.print(f"{args[0]}: {', '.join(target.names)}; {told}; {norm}", highlight=False, markup=False)
    job = Job(target, images, attacks, options, norm, usual if usual is not None else -1.0, console)
    try:
        found = {name: job.evaluate(name) for name in target.names}
    except KeyboardInterrupt:
        same_command = "the same command" + (" without --again" if options.again else "")
        raise KeyboardInterrupt(f"what is done is in {target.run}; {same_command} goes on") from None
    remember_command(target.run, [PROG, *args])
    console.print(job.table(found))
    for name in target.names:
        for finding in job.said.get(name, []):
            console.print(f"warning ({name}): {finding}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{target.run}: results.json, checks.json, evaluation/; python -m bilevel_at.report {target.run} makes a page",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 0


def _balls(name: str, options: EvaluateOptions, target: Target) -> tuple[str, list[float]]:
    """(norm, radii) to attack in: those of the flags, or else of the training."""
    norm = options.norm or target.norm
    same = norm == target.norm
    radii = options.epsilon or (() if target.epsilon is None or not same else (target.epsilon,))
    if not radii and not same and target.norm:
        raise InputError(f"{name} was trained in {target.norm}; for --norm {norm} give --epsilon, too")
    if norm is None or (not radii and set(options.attacks) != {"clean"}):
        raise InputError(f"{name} does not say which ball to attack in; give --norm linf and --epsilon 8/255, say")
    return norm, list(dict.fromkeys(radii))


class Job:
    """One command's work: every network, every attack, and the checks."""

    def __init__(
        self,
        target: Target,
        images: ImageSet,
        attacks: Sequence[Attack],
        options: EvaluateOptions,
        norm: str,
        usual: float,
        console: Console,
    ) -> None:
        self.target, self.images, self.attacks, self.options = target, images, attacks, options
        self.norm, self.usual, self.console = norm, usual, console
        self.data = images.sha256()[:16]
        self.said: dict[str, list[Finding]] = {}
        self.unions: dict[str, float] = {}

    def evaluate(self, name: str) -> dict[str, Score]:
        """Every attack on one network, with a bar that shows how many still stand; then the checks."""
        model = self.target.model(name).to(self.images.device)
        store = Store(
            self.target.run,
            name,
            model,
            self.images,
            usual=self.usual,
            norm=self.target.norm,
            seed=self.options.seed,
            batch_size=self.options.batch_size,
            data=self.data,
        )
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[said]}"),
            TimeElapsedColumn(),
        )
        found: dict[str, Score] = {}
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True) as bars:
            for attack in self.attacks:
                bar = bars.add_task(escape(f"{name}: {attack.name}"), total=None, said="")
                key, score = store.score(attack, functools.partial(_show, bars, bar, name), self.options.again)
                bars.remove_task(bar)
                said = f"{name}  {key}  {score.accuracy:.1%}  ({score.seconds:.1f} s)"
                self.console.print(said, highlight=False, markup=False)
                found[key] = score
            bar = bars.add_task(f"{name}: checks", total=None, said="")
            radius = self.usual if self.usual > 0 else max((a.epsilon for a in self.attacks), default=0.0)
            self.said[name] = record_checks(
                self.target.run,
                store,
                self.images,
                self.norm,
                radius,
                self.options.checks,
                key=name if self.norm == self.target.norm else f"{name}-{self.norm}",
                again=self.options.again,
                progress=lambda what: bars.update(bar, said=what),
            )
        here = [t.correct for key, t in store.traces.items() if store.attacks[key].epsilon in (0.0, self.usual)]
        if len(here) > 1:
            self.unions[name] = torch.stack(here).all(0).float().mean().item()
        return found

    def table(self, found: dict[str, dict[str, Score]]) -> Table:
        """Attacks by networks, in %, with the worst case of all at the usual radius."""
        radius = f" at ε = {radius_text(self.usual)}" if self.usual >= 0 else ""
        title = f"accuracy under attack{radius}, {self.norm} ({len(self.images)} images)"
        table = Table(title=title, min_width=len(title) + 2)
        table.add_column("attack")
        for name in found:
            table.add_column(name.replace("_", " "), justify="right")
        keys = list(dict.fromkeys(key for scores in found.values() for key in scores))
        for key in keys:
            table.add_row(
                escape(key), *(f"{scores[key].accuracy:.1%}" if key in scores else "" for scores in found.values())
            )
        if self.unions:
            table.add_section()
            table.add_row(
                "all together", *(f"{self.unions[name]:.1%}" if name in self.unions else "" for name in found)
            )
        return table


def _show(bars: Progress, bar: Any, which: str, name: str, stage: str, done: int, of: int, trace: Trace) -> None:
    standing = trace.correct.sum().item() if trace.stage else math.nan
    said = f"{stage}" + ("" if math.isnan(standing) else f"  {standing / len(trace.broken):.1%} standing")
    bars.update(bar, description=escape(f"{which}: {name}"), completed=done, total=of, said=said)

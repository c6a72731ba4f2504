"""``python -m bilevel_at.evaluate``: attacks on the networks of a run, or on weights from elsewhere."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..data import ImageSet, load_data
from ..errors import InputError
from ..evaluate.attacks import ATTACKS, Attack, ball
from ..evaluate.evaluation import attacks_at
from ..evaluate.radius import radius_text
from ..evaluate.result import Finding, Score
from ..evaluate.robust import Trace
from ..models import MODELS, ActivationName
from ..runs.directory import RunDir
from ..runs.doubts import record_checks
from ..runs.evaluations import Store
from ..runs.model_files import ModelFiles
from ..runs.networks import Which
from . import flags
from .plan import resolve_device
from .target import Target, from_checkpoint, from_run

__all__ = ["PROG", "Options", "command"]

PROG = "bilevel_at.evaluate"
USAGE = f"""usage: python -m {PROG} RUN [flags]
       python -m {PROG} WEIGHTS.pt --model NAME --data NAME --epsilon 8/255 [flags]

RUN is a directory that bilevel_at.run made; WEIGHTS.pt a state_dict of a network known by name.
python -m {PROG} RUN --help lists the flags; --list the attacks."""


@dataclass(frozen=True)
class Options:
    """The flags.

    attacks: what to attack with: clean, fgsm, pgd-50-10, beta-30, autoattack, ...; --list has them all.
    epsilon: radius of the ball, or several for a curve; that of the training if not given.
    norm: linf or l2; that of the training if not given.
    which: checkpoints of the run; all that it has if not given.
    examples: attack this many test examples only.
    checks: examples that the checks for masked gradients look at; 0 for none.
    data: the run's own if not given.
    data_dir: the run's own if not given.
    download: fetch a named data set that is not there.
    model: the network that the weights belong to.
    model_file: the problem file that defines the network of a run (or of transfer:RUN); it is run.
    activation: of that network.
    mean: per channel, where the weights do not say how inputs are normalised.
    std: per channel, likewise.
    batch_size: network rows at a time.
    seed: of every draw.
    device: cpu, cuda, or auto for a GPU where there is one.
    out: where results of weights from elsewhere go; WEIGHTS-evaluation if not given.
    again: do not reuse what is there.
    """

    attacks: tuple[str, ...] = ("clean", "pgd-50-10")
    epsilon: tuple[float, ...] = ()
    norm: Literal["linf", "l2"] | None = None
    which: tuple[Which, ...] = ()
    examples: int | None = None
    checks: int = 100
    data: str | None = None
    data_dir: str | None = None
    download: bool = True
    model: str | None = None
    model_file: tuple[str, ...] = ()
    activation: ActivationName = "relu"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    batch_size: int = 250
    seed: int = 0
    device: str = "auto"
    out: str | None = None
    again: bool = False

    def __post_init__(self) -> None:
        for name, least in (("examples", 1), ("checks", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed is {self.seed}; it must be at least 0 and below 2**32")


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
    options = Options(**flags.parse(flags.flags_of(Options), args[1:], f"python -m {PROG} {args[0]}", about))
    device = resolve_device(options.device)
    files = ModelFiles(options.model_file)
    target, images = _target(Path(args[0]), options, files)
    images = images.to(device)

    norm = options.norm or target.norm
    same = norm == target.norm
    radii = options.epsilon or (() if target.epsilon is None or not same else (target.epsilon,))
    if not radii and not same and target.norm:
        raise InputError(f"{args[0]} was trained in {target.norm}; for --norm {norm} give --epsilon, too")
    if norm is None or (not radii and set(options.attacks) != {"clean"}):
        raise InputError(f"{args[0]} does not say which ball to attack in; give --norm linf and --epsilon 8/255, say")
    spaces = [ball(norm, radius) for radius in dict.fromkeys(radii)]
    attacks = attacks_at(options.attacks, spaces, options.seed, files.load)
    target.check()
    usual = target.epsilon if same else None
    if not (target.run.path / "config.json").exists():
        target.run.write_json("config.json", target.about)

    console = Console()
    told = f"{len(images)} test images on {device}"
    console.print(f"{args[0]}: {', '.join(target.names)}; {told}; {norm}", highlight=False, markup=False)
    job = Job(target, images, attacks, options, norm, usual if usual is not None else -1.0, console)
    try:
        found = {name: job.evaluate(name) for name in target.names}
    except KeyboardInterrupt:
        same_command = "the same command" + (" without --again" if options.again else "")
        raise KeyboardInterrupt(f"what is done is in {target.run}; {same_command} goes on") from None
    job.remember([PROG, *args])
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


def _target(path: Path, options: Options, files: ModelFiles) -> tuple[Target, ImageSet]:
    """What is evaluated, and on which images."""
    transfers = any(name.startswith("transfer:") for name in options.attacks)
    if path.is_dir():
        for name in ("model", "mean", "std", "out"):
            if getattr(options, name):
                raise InputError(f"--{name} is for weights from elsewhere; {path} is a run, which says so itself")
        target = from_run(path, options.which or None, files)
        if options.model_file and not transfers and target.about.get("model") != "file":
            raise InputError(f"--model-file is for runs whose problem file defines the network; {path} is no such run")
        data = options.data or target.data
        images = _images(data, options.data_dir or target.data_dir, options, target.test_examples)
        expected = target.about.get("shape"), target.about.get("classes")
        if expected != (list(images.shape), images.classes):
            raise InputError(
                f"{path} was trained on images of {expected[0]} in {expected[1]} classes; {data} has "
                f"{list(images.shape)} in {images.classes}"
            )
        return target, images
    if not path.exists():
        raise InputError(f"{path} does not exist; give a run directory, or a file of weights with --model")
    if options.model is None:
        raise InputError(f"{path} is a file of weights; say whose with --model: {', '.join(MODELS)}")
    if options.which:
        raise InputError("--which is for runs; a file of weights has one network")
    if options.model_file and not transfers:
        raise InputError("--model-file is for runs; whose weights these are is said with --model")
    if not options.epsilon and set(options.attacks) != {"clean"}:
        raise InputError("--epsilon is missing: weights from elsewhere do not say which radius they were trained for")
    data = options.data or "digits"
    images = _images(data, options.data_dir or "data", options, None)
    out = Path(options.out) if options.out else path.with_name(f"{path.stem}-evaluation")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; it must be a directory, or not exist")
    epsilon = next((e for e in options.epsilon if e > 0), 0.0) if options.epsilon else None
    constraint = {"norm": options.norm or "linf", "epsilon": epsilon}
    record = {"data": data, "constraint": constraint}  # what a run's config.json says, too
    mean, std = options.mean or None, options.std or None
    target = from_checkpoint(path, images, options.model, options.activation, mean, std, out, record)
    known = target.run.read_json("config.json") if (out / "config.json").exists() else None
    if known is not None and (not isinstance(known, dict) or known.get("checkpoint") != str(path.resolve())):
        raise InputError(f"{out} holds something else; choose another --out")
    if known is not None:
        constraint = known.get("constraint", constraint)
    target.norm, target.epsilon = str(constraint["norm"]), epsilon
    if isinstance(constraint["epsilon"], float):
        target.epsilon = constraint["epsilon"]
    return target, images


def _images(data: str, data_dir: str, options: Options, usual: int | None) -> ImageSet:
    _, test = load_data(data, data_dir, options.download)
    count = options.examples if options.examples is not None else usual
    return test if count is None else test.sample(count)


class Job:
    """One command's work: every network, every attack, and the checks."""

    def __init__(
        self,
        target: Target,
        images: ImageSet,
        attacks: Sequence[Attack],
        options: Options,
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

    def remember(self, words: list[str]) -> None:
        """Add the command to those that made what is there."""
        folder = RunDir(self.target.run.path / "evaluation")
        try:
            known: Any = folder.read_json("commands.json") if (folder.path / "commands.json").exists() else []
        except InputError:  # damaged
            known = []
        commands = known if isinstance(known, list) else []
        if words not in commands:
            folder.write_json("commands.json", [*commands, words])

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

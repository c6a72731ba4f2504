"""``python -m bilevel_at.evaluate``: attacks on the networks of a run, or on weights from elsewhere."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from .. import shares
from ..constraints import Constraint
from ..data import ImageSet
from ..errors import InputError
from ..evaluate.active import checks_asked
from ..evaluate.attacks import ATTACKS, Attack
from ..evaluate.evaluation import attacks_at
from ..evaluate.result import Finding, Score, result_name
from ..evaluate.threat import SEEN, Threat, ball, check_set, norm_of
from ..runs.commands import remember_command
from ..runs.doubts import record_checks
from ..runs.evaluations import Store
from ..runs.headline import WorstCase
from ..runs.lock import locked
from ..runs.named_files import NamedFiles
from ..train.finite import first_not_finite
from . import flags
from .attacking import AttackBars
from .device import resolve_device
from .headline import caption
from .options import EVALUATE_GROUPS, EvaluateOptions, arranged
from .processes import agreed, joined
from .signals import Signals, Stopped
from .target import Target, find_target

__all__ = ["PROG", "command"]

PROG = "bilevel_at.evaluate"
USAGE = f"""usage: python -m {PROG} RUN [flags]
       python -m {PROG} WEIGHTS.pt --model NAME --data NAME --epsilon 8/255 [flags]

RUN is a directory that bilevel_at.run made; WEIGHTS.pt a state_dict of a network known by name.
python -m {PROG} RUN --help lists the flags; --list the attacks."""

GROUPS = {
    "attack": "In the run's own threat, where no flag says otherwise. Inputs are in [0, 1], and so is ε: 0.03 and "
    "8/255 are numbers.",
    "data": "The run's own test images, where no flag says otherwise.",
    "network": "What is attacked: of a run, its checkpoints.",
    "output": "Results go into the run's directory; what is there already is not computed again.",
}
EXAMPLES = f"""examples:
  python -m {PROG} runs/fastbat-digits-seed0 --attacks clean pgd-50-10 autoattack
  python -m {PROG} runs/fastbat-digits-seed0 --attacks pgd-50-10 --epsilon 0.1 0.2 0.3 --which last
  python -m {PROG} weights.pt --model resnet18 --data cifar10 --epsilon 8/255 --attacks autoattack"""


def command(args: Sequence[str]) -> int:
    """Run the command, and return exit status 0.

    Raises:
        InputError: if the arguments are invalid.
    """
    with Signals().heeded(), joined():
        return _command(args)


def _command(args: Sequence[str]) -> int:
    if not args:
        print(USAGE)
        return 0
    if args[0] in ("-h", "--help"):
        with contextlib.suppress(SystemExit):
            _options(["RUN", "--help"])
        return 0
    if args[0] == "--list":
        width = max(map(len, ATTACKS))
        print("\n".join(f"  {name:<{width}}  {about}" for name, about in ATTACKS.items()))
        return 0
    options = agreed(lambda: _options(args))
    device = agreed(lambda: resolve_device(options.device))
    files = agreed(lambda: NamedFiles(options.problem_file))
    target, images = find_target(Path(args[0]), options, files)
    images = images.to(device)
    spaces, attacks = agreed(lambda: _attacks(args[0], options, target, files, images))
    shares.first(target.check)
    with contextlib.ExitStack() as held:
        shares.first(lambda: held.enter_context(locked(target.run.path, PROG)))
        return _evaluate(args, target, images, attacks, options, spaces)


def _options(args: Sequence[str]) -> EvaluateOptions:
    if args[0].startswith("-"):
        raise InputError(f"the run comes first: python -m {PROG} RUN {' '.join(args[:2])}")
    about = (
        "Attack the networks of a run, or weights from elsewhere: RUN is a directory that bilevel_at.run made, or a "
        "file of weights, with --model NAME --data NAME --epsilon 8/255. --list prints the attacks."
    )
    known = arranged(flags.flags_of(EvaluateOptions), EVALUATE_GROUPS, "attack")
    prog = f"python -m {PROG} {args[0]}"
    return EvaluateOptions(**flags.parse(known, args[1:], prog, about, groups=GROUPS, epilogue=lambda: EXAMPLES))


def _attacks(
    name: str, options: EvaluateOptions, target: Target, files: NamedFiles, images: ImageSet
) -> tuple[list[Constraint], list[Attack]]:
    """The constraints, and every attack in each of them."""
    spaces = _spaces(name, options, target)
    for space in spaces:
        if norm_of(space) is None:
            check_set(space, images[slice(0, SEEN)].pixels())
    return spaces, attacks_at(options.attacks, spaces, options.seed, files.load)


def _evaluate(
    args: Sequence[str],
    target: Target,
    images: ImageSet,
    attacks: Sequence[Attack],
    options: EvaluateOptions,
    spaces: Sequence[Constraint],
) -> int:
    """Evaluate in a directory that no other command writes into."""
    shares.first(lambda: None if target.run.exists else target.run.write_config(target.about))
    console = Console()
    about_images = f"{len(images)} test images on {images.device}"
    opening = f"{args[0]}: {', '.join(target.names)}; {about_images}; {_threats(spaces, target)}"
    console.print(opening, highlight=False, markup=False)
    job = Job(target, images, attacks, options, spaces, console)
    try:
        scores = {name: job.evaluate(name) for name in target.names}
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        same_command = "the same command" + (" without --again" if options.again else "")
        raise Stopped(number, f"what is done is in {target.run}; {same_command} goes on") from None
    shares.first(lambda: remember_command(target.run, [PROG, *args]))
    for table in job.tables(scores):
        console.print(table)
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


def _spaces(name: str, options: EvaluateOptions, target: Target) -> list[Constraint]:
    """The constraints of attacks: balls given by flags, or else the run's threat; empty for clean accuracy only."""
    threat, clean_only = target.threat or Threat(), set(options.attacks) == {"clean"}
    norm = options.norm or threat.norm
    if not options.epsilon and norm == threat.norm:
        if not threat.is_ball:
            return [] if clean_only else [target.space()]
        if norm is not None and threat.epsilon is not None:
            return [ball(norm, threat.epsilon)]
    elif not options.epsilon and threat != Threat():
        raise InputError(f"the threat of {name} is {threat}; for --norm {norm} give --epsilon, too")
    if norm is None or (not options.epsilon and not clean_only):
        raise InputError(f"{name} does not say which ball to attack in; give --norm linf and --epsilon 8/255, say")
    return [ball(norm, radius) for radius in dict.fromkeys(options.epsilon)]


def _threats(spaces: Sequence[Constraint], target: Target) -> str:
    """The constraints in words: the norm of balls, or the name of another set."""
    threats = [Threat.of(space) for space in spaces] or [target.threat or Threat("linf")]
    return ", ".join(dict.fromkeys(threat.norm or str(threat) for threat in threats))


class Job:
    """The evaluation of every network under every attack, and the checks."""

    def __init__(
        self,
        target: Target,
        images: ImageSet,
        attacks: Sequence[Attack],
        options: EvaluateOptions,
        spaces: Sequence[Constraint],
        console: Console,
    ) -> None:
        self.target, self.images, self.attacks, self.options = target, images, attacks, options
        self.spaces, self.console = spaces, console
        self.usual = target.threat or Threat("linf")
        self.data = images.sha256()[:16]
        self.said: dict[str, list[Finding]] = {}
        self.worst: dict[str, WorstCase] = {}

    def evaluate(self, name: str) -> dict[str, Score]:
        """Evaluate one network under every attack, with a progress bar of the robust accuracy so far; then check it."""
        model = self.target.model(name).to(self.images.device)
        agreed(lambda: self._check_finite(name, model))
        store = Store(
            self.target.run,
            name,
            model,
            self.images,
            usual=self.usual,
            seed=self.options.seed,
            batch_size=self.options.batch_size,
            data=self.data,
            twins=list(self.said),
        )
        scores: dict[str, Score] = {}
        with AttackBars(self.console) as bars:
            for attack in self.attacks:
                key, score = bars.score(store, attack, self.options.again)
                took = f"the weights of {store.copied[key]}" if key in store.copied else f"{score.seconds:.1f} s"
                line = f"{name}  {key}  {score.accuracy:.1%}  ({took})"
                self.console.print(line, highlight=False, markup=False)
                scores[key] = score
            checked = self._checked()
            other = bool(self.spaces) and norm_of(checked) not in (None, self.usual.norm)
            passive, active = checks_asked(self.options.checks)
            key = f"{name}-{norm_of(checked)}" if other else name
            with bars.bar(f"{name}: checks") as show:
                self.said[name] = record_checks(
                    self.target.run,
                    store,
                    self.images,
                    checked,
                    passive,
                    active=active,
                    attacks=self.attacks,
                    key=key,
                    again=self.options.again,
                    progress=show,
                )
        worst = store.worst_case()
        if worst is not None:
            self.worst[name] = worst
        return scores

    def _check_finite(self, name: str, model: nn.Module) -> None:
        if (weight := first_not_finite(model)) is not None:
            raise InputError(
                f"{name} of {self.target.run} is not a finite network ({weight} is not), and has no accuracy"
            )

    def _checked(self) -> Constraint:
        """The constraint of the checks: the run's threat, or else the largest ball of the command."""
        sizes = [getattr(space, "radius", None) or 0.0 for space in self.spaces]
        largest = max(zip(sizes, range(len(sizes)), strict=True), default=None)
        asked = [Threat.of(space) for space in self.spaces]
        if self.usual.norm is not None and self.usual.epsilon and all(t.norm in (None, self.usual.norm) for t in asked):
            return ball(self.usual.norm, self.usual.epsilon)
        return ball(self.usual.norm or "linf", 0.0) if largest is None else self.spaces[largest[1]]

    def tables(self, scores: dict[str, dict[str, Score]]) -> list[Table]:
        """One table per threat, attacks by networks, in %. In the run's threat the worst case of all comes first."""
        asked = [Threat.of(space) for space in self.spaces]
        threats: list[Threat | None] = [*{threat.key: threat for threat in asked}.values()]
        keys = {result_name(attack, self.usual): attack.threat for attack in self.attacks}
        tables = []
        for threat in threats or [None]:
            what = "accuracy" if threat is None else f"accuracy under attack {threat.at}"
            title = f"{what} ({len(self.images)} images)"
            table = Table(title=escape(title), min_width=len(title) + 2)
            table.add_column("attack")
            for name in scores:
                table.add_column(name.replace("_", " "), justify="right")
            headlines = self.worst if threat is not None and threat.key == self.usual.key else {}
            if headlines:
                shares = (f"{headlines[name].accuracy:.1%}" if name in headlines else "" for name in scores)
                table.add_row("worst case of all", *shares)
                table.add_section()
                table.caption = escape(caption(headlines))
            for key in dict.fromkeys(key for row in scores.values() for key in row):
                own = keys.get(key.partition("[n=")[0])
                if own is not None and threat is not None and own.key != threat.key:
                    continue
                cells = (f"{row[key].accuracy:.1%}" if key in row else "" for row in scores.values())
                table.add_row(escape(key), *cells)
            tables.append(table)
        return tables

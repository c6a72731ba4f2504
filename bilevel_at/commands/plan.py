"""The parsed command line of ``run``, with everything a run needs, checked before anything is written."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..constraints import Constraint, LinfBall
from ..data import DATA_NAMES, ImageSet
from ..errors import InputError
from ..evaluate import Threat, set_name
from ..models import BEYOND, MODELS, libraries_of
from ..policy import Schedule, policies
from ..problem import BilevelProblem
from ..runs.problem_file import ProblemFile, packaged_problems
from ..runs.provenance import machine, today, versions
from ..runs.recipe import modern
from ..solver import Solver
from ..solvers import SOLVERS, WRAPPERS
from . import flags, helping
from .options import RUN_GROUPS, RunOptions, arranged
from .settings import defaults_of, lower_settings, settings_of, solver_defaults

__all__ = ["PROG", "Plan", "understand"]

PROG = "bilevel_at.run"
USAGE = f"""usage: python -m {PROG} FILE [flags]

FILE defines problem(...): problems/fastbat.py, another of problems/, or your own.
python -m {PROG} FILE --help lists its flags, with their defaults on each data set; --list the methods, models and data
sets known by name. --traceback after any flags shows the whole traceback of an error.

python -m {PROG} problems/fastbat.py
    trains on the embedded digits, in under a minute of computing, into runs/fastbat-digits-seed0/
python -m {PROG} problems/fastbat.py --data cifar10 --data-dir ~/data --epsilon 8/255 --out runs/mine
    trains on CIFAR-10 with the published recipe"""

NOT_RECORDED = ("out", "problem", "modern", "resume", "save_every", "dry_run", "logger", "tflops")
"""Options that are no part of what is trained, or recorded elsewhere."""

WORDS = [["no"], ["yes"], ["auto"]]  # of --resume


@dataclass
class Plan:
    """The parsed command line of ``run``, with everything a run needs.

    problem: what is trained; its ε may grow.
    stated: the same with ε as it is stated, whose threat is that of the run.
    """

    file: ProblemFile
    options: RunOptions
    problem: BilevelProblem
    stated: BilevelProblem
    solver: Solver
    problem_arguments: dict[str, Any]
    command: list[str]

    @property
    def threat(self) -> Constraint:
        """The threat model.

        Raises:
            InputError: if the problem does not define one, or one that changes as training goes on.
        """
        try:
            threat = self.stated.threat
        except InputError as error:
            raise InputError(f"{self.file.path}: {error}") from None
        if policies(threat):
            raise InputError(
                f"{self.file.path}: the {type(threat).__name__} of training changes with time, and what the network is "
                "to withstand must not; pass BilevelProblem(upper, lower, threat=...)"
            )
        return threat

    @property
    def feasible_set(self) -> str | None:
        """The name of the constraint used in training, if it is not the threat."""
        feasible = getattr(self.stated.lower, "constraint", None)
        if feasible is None or Threat.of(feasible).key == Threat.of(self.threat).key:
            return None
        return set_name(feasible)

    def _argument_files(self) -> dict[str, str]:
        """The checksums of the files that arguments of the problem name, such as another problem file."""
        texts = {name: text for name, text in self.problem_arguments.items() if isinstance(text, str)}
        paths = {name: Path(text) for name, text in texts.items() if os.path.isfile(text)}  # False for odd names too
        return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}

    def defaults(self) -> dict[str, dict[str, Any]]:
        """What each setting in the sections of ``config.json`` is where it is not given, as far as that is known."""
        of_options = {f.name: f.default for f in dataclasses.fields(RunOptions)}
        return {
            "options": of_options,
            "problem": defaults_of(self.file.problem),
            "solver": solver_defaults(self.solver),
        }

    def config(self, model: nn.Module, train: ImageSet, extra: ImageSet | None = None) -> dict[str, Any]:
        """The content of ``config.json``, sufficient to repeat the run."""
        return {
            "command": self.command,
            "file": str(self.file.path),
            "file_sha256": self.file.sha256,
            "problem": self.problem_arguments,
            "argument_sha256": self._argument_files(),
            "solver": settings_of(self.solver),
            "lower": lower_settings(self.stated.lower),
            "options": {k: v for k, v in vars(self.options).items() if k not in NOT_RECORDED},
            "constraint": Threat.of(self.threat).asdict(),
            **({} if self.feasible_set is None else {"feasible_set": self.feasible_set}),
            "model": self.options.model,
            "activation": self.options.activation,
            "parameters": sum(p.numel() for p in model.parameters()),
            "data_sha256": train.sha256(),
            **({} if extra is None else {"extra_sha256": extra.sha256()}),
            "shape": list(train.shape),
            "classes": train.classes,
            "versions": versions("torchvision", "numpy", "scikit-learn", *libraries_of(self.options.model)),
            "date": today(),
            "machine": machine(train.device),
        }


def understand(args: Sequence[str]) -> Plan:
    """Read the command line.

    Raises:
        InputError: if it is invalid.
    """
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0)
    if args[0] == "--list":
        print(known_names())
        raise SystemExit(0)
    if args[0].startswith("-"):
        raise InputError(f"the problem file comes first: python -m {PROG} FILE {' '.join(args[:2])}")
    file, rest = ProblemFile(args[0]), _spelled_out(args[1:])
    prog, about = f"python -m {PROG} {args[0]}", (file.module.__doc__ or "").strip().split("\n")[0]
    of_problem, of_factory, own = _flags(file, rest)
    common = [*of_problem, *of_factory, *own]
    groups = helping.run_groups(args[0], _peek(rest, "data") or "digits")
    # The flags of a solver depend on its class, which may in turn depend on flags.
    problem: Any = None
    solver: Any = None
    problem_arguments: dict[str, Any] = {}
    try:
        known = flags.parse(common, rest, prog, about, lenient=True, groups=groups)
        problem_arguments = {flag.name: known[flag.name] for flag in of_problem}
        problem = file.make(file.problem, BilevelProblem, **problem_arguments)
        solver = _make_solver(file, known)
    except InputError:
        if not {"-h", "--help"} & set(rest):  # help is shown even if required flags are missing
            raise
    of_solver = _solver_flags(solver, common)
    fields = [flag for part in of_solver for flag in part.values()]
    values = flags.parse(
        [*of_problem, *of_factory, *fields, *own],
        rest,
        prog,
        about,
        groups=groups,
        epilogue=lambda: helping.run_epilogue(file, args[0]),
    )

    options = RunOptions(**{flag.name: values[flag.name] for flag in own})
    given = [{n: values[f.name] for n, f in part.items() if values[f.name] is not None} for part in of_solver]
    solver = _with_fields(solver, given)
    trained = problem
    _refuse_beyond_the_range(problem.threat)
    if options.epsilon_warmup:
        trained = _warming_up(file, problem_arguments, problem, options.epsilon_warmup / options.epochs)
    if options.compile:
        _refuse_graphs_of_each_step(trained, solver)
    return Plan(file, options, trained, problem, solver, problem_arguments, [PROG, *args])


def _refuse_beyond_the_range(threat: Constraint) -> None:
    """Raise :class:`InputError` where an ℓ∞ ball is larger than all that inputs may be: 8 in place of 8/255."""
    if isinstance(threat, LinfBall) and threat.bounds is not None:
        low, high = threat.bounds
        if threat.radius > high - low:
            raise InputError(
                f"epsilon is {threat.radius:g}, and inputs are in [{low:g}, {high:g}], where every image would be any "
                f"other; for 8-bit images write {threat.radius:g}/255"
            )


def _spelled_out(args: Sequence[str]) -> list[str]:
    """``--resume`` by itself is ``--resume yes``."""
    bare = [i for i, word in enumerate(args) if word == "--resume" and args[i + 1 : i + 2] not in WORDS]
    return [word for i, given in enumerate(args) for word in ([given, "yes"] if i in bare else [given])]


def _warming_up(file: ProblemFile, arguments: dict[str, Any], stated: BilevelProblem, share: float) -> BilevelProblem:
    """The problem with an ε that grows linearly over a share of all updates.

    Raises:
        InputError: if the problem has no argument ``epsilon``, or does something with it that schedules cannot do.
    """
    if not isinstance(arguments.get("epsilon"), float | int):
        raise InputError(f"--epsilon-warmup is for problems with a number epsilon; {file.path} has none")
    top = float(arguments["epsilon"])
    growing = Schedule(lambda step, steps: top * min(1.0, (step + 1) / (share * steps)), by="step")
    try:
        made = file.make(file.problem, BilevelProblem, **{**arguments, "epsilon": growing})
    except InputError as error:
        raise InputError(f"--epsilon-warmup gives problem(...) a ba.Schedule as epsilon: {error}") from error
    return BilevelProblem(made.upper, made.lower, stated.threat)


def _refuse_graphs_of_each_step(problem: BilevelProblem, solver: Solver) -> None:
    for path, part in policies((problem, solver)).items():
        if isinstance(part, Schedule) and part.by == "step":
            raise InputError(
                f"--compile compiles a step for each number that it reads, and {path.partition('.')[2]} is another one "
                "with every step; leave out --compile, or what changes by the step (--epsilon-warmup)"
            )


def _flags(file: ProblemFile, args: Sequence[str]) -> tuple[list[flags.Flag], list[flags.Flag], list[flags.Flag]]:
    """The flags of ``problem(...)``, of ``solver(...)``, and of every run, with defaults from the file's recipe."""
    data = _peek(args, "data") or "digits"
    recipe = file.recipe(data)
    if _peek(args, "recipe") == "modern":
        recipe = modern(data, recipe, smooths="label_smoothing" in inspect.signature(file.problem).parameters)
    fields = (field.name for field in dataclasses.fields(recipe))
    settings = {name: getattr(recipe, name) for name in fields if name not in ("problem", "modern")}
    if file.model is not None:
        settings["model"] = "file"
    own = sorted(flags.flags_of(RunOptions, settings), key=lambda flag: flag.name in settings)
    own = arranged(own, RUN_GROUPS, "training")
    of_problem = [dataclasses.replace(f, group="problem") for f in flags.flags_of(file.problem, recipe.problem)]
    shared = [flag.name for flag in of_problem]
    made_with = flags.flags_of(file.solver, skip=["name", *shared]) if file.solver else []
    of_factory = [dataclasses.replace(flag, group="solver") for flag in made_with]
    return of_problem, of_factory, own


def _parts(solver: Any) -> list[Any]:
    """The solver and, from the outside in, those it wraps."""
    parts = [solver]
    while type(parts[-1]) in WRAPPERS.values():
        parts.append(parts[-1].inner)
    return parts


def _solver_flags(solver: Any, common: Sequence[flags.Flag]) -> list[dict[str, flags.Flag]]:
    """The fields of the chosen solver, and of the one it wraps, as flags; with a prefix if the name is taken."""
    taken = {flag.name for flag in common}
    found = []
    for part, prefix in zip(_parts(solver), ("solver", "inner"), strict=False):
        wrapped = ["inner"] if type(part) in WRAPPERS.values() else []  # it has flags of its own
        fields = flags.flags_of(type(part), skip=wrapped) if dataclasses.is_dataclass(part) else []
        found.append(
            {
                field.name: flags.Flag(
                    f"{prefix}_{field.name}" if field.name in taken else field.name,
                    field.type | None,
                    None,
                    field.help,
                    f"default: {helping.shown_value(getattr(part, field.name, None))}",
                    group="solver",
                )
                for field in fields
            }
        )
        taken |= {flag.name for flag in found[-1].values()}
    return found


def _with_fields(solver: Any, given: Sequence[Mapping[str, Any]]) -> Any:
    """The solver with these fields, and the one it wraps with those that follow."""
    fields = dict(given[0])
    if any(given[1:]):
        fields["inner"] = _with_fields(solver.inner, given[1:])
    return dataclasses.replace(solver, **fields) if fields else solver


def known_names() -> str:
    """The methods, models and data sets known by name, a line on each."""
    groups = {
        "methods": {path.stem: summary for path, summary in packaged_problems()},
        "models": {**{name: architecture.about for name, architecture in MODELS.items()}, **BEYOND},
        "data": {**DATA_NAMES, "FILE.npz": "your own: x_train, y_train, x_test, y_test"},
        "solvers": {name: str(kind.__doc__).strip().splitlines()[0] for name, kind in (SOLVERS | WRAPPERS).items()},
    }
    width = max(len(name) for names in groups.values() for name in names)
    lines = []
    for group, names in groups.items():
        lines += [group, *(f"  {name:<{width}}  {about}" for name, about in names.items())]
    return "\n".join(lines)


def _peek(args: Sequence[str], name: str) -> str | None:
    """The value of a flag, before the flags that depend on it are known."""
    for i, argument in enumerate(args):
        if argument.startswith(f"--{name}="):
            return argument.split("=", 1)[1]
        if argument == f"--{name}" and i + 1 < len(args):
            return args[i + 1]
    return None


def _make_solver(file: ProblemFile, values: dict[str, Any]) -> Any:
    """The solver of ``--solver``, around that of ``--inner`` if it wraps one, or the file's own choice."""
    name, inner = values["solver"], values["inner"]
    if name in WRAPPERS:
        made = _named_solver(file, values, inner)
        return made if isinstance(made, WRAPPERS[name]) else WRAPPERS[name](made)
    if inner is not None:
        raise InputError(f"--inner is the solver that --solver {' or '.join(WRAPPERS)} wraps; here nothing wraps one")
    return _named_solver(file, values, name)


def _named_solver(file: ProblemFile, values: dict[str, Any], name: str | None) -> Any:
    """The solver made by the file's ``solver(...)``, which takes ``name``, if any."""
    if file.solver is None:
        return SOLVERS[name or "zero-ig"]()
    parameters = inspect.signature(file.solver).parameters
    arguments = {p: values[p] for p in parameters if p != "name" and p in values}
    if name is not None and "name" in parameters:
        arguments["name"] = name
    solver = file.make(file.solver, Solver, **arguments)
    return solver if name is None or isinstance(solver, SOLVERS[name]) else SOLVERS[name]()

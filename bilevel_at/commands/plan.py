"""A command line, understood: everything a run needs, checked before anything is written."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..batch import Batch
from ..constraints import Constraint
from ..data import DATA_NAMES, ImageSet
from ..errors import InputError
from ..evaluate import Attack, norm_of
from ..models import MODELS, ActivationName, build_model
from ..problem import BilevelProblem
from ..runs.problem_file import ProblemFile, packaged_problems
from ..runs.provenance import machine, today, versions
from ..solver import Solver
from ..solvers import SOLVERS, SolverName
from ..train import Recipe
from . import flags

__all__ = ["PROG", "Plan", "RunOptions", "build", "probe", "resolve_device", "understand"]

PROG = "bilevel_at.run"
USAGE = f"""usage: python -m {PROG} FILE [flags]

FILE defines problem(...): problems/fastbat.py, another of problems/, or your own.
python -m {PROG} FILE --help lists its flags; --list the methods, models and data sets known by name."""


@dataclass(frozen=True)
class RunOptions(Recipe):
    """The flags that every problem file has: those of its recipe, and these.

    solver: how the players are coupled: zero-ig, hessian-free-kkt or full-kkt; the file's own choice if not given.
    data: a data set by name, or an .npz with x_train, y_train, x_test, y_test.
    data_dir: where named data sets lie, as NAME.npz or as torchvision keeps them.
    download: fetch a named data set that is not there.
    activation: of a network by name.
    dropout: in the blocks of a wide residual network; published adversarial training has none.
    examples: train on this many examples only.
    test_examples: evaluate on this many test examples only.
    attacks: what the final table shows, on the test set: clean, fgsm, pgd-STEPS-RESTARTS.
    select: the attack on the held-out tenth that picks the best epoch.
    device: cpu, cuda, or auto for a GPU where there is one.
    precision: float32, or bfloat16 for autocast; auto is float32.
    seed: of the weights, the order of the data, and every draw.
    out: run directory; runs/FILE-DATA-seedN if not given.
    resume: go on with the run that is there.
    """

    solver: SolverName | None = None
    data: str = "digits"
    data_dir: str = "data"
    download: bool = True
    activation: ActivationName = "relu"
    dropout: float = 0.0
    examples: int | None = None
    test_examples: int | None = None
    attacks: tuple[str, ...] = ("clean", "fgsm", "pgd-50-10")
    select: str = "pgd-20-1"
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    out: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.attacks:
            raise InputError("--attacks names no attack; clean, fgsm and pgd-50-10 are some")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed is {self.seed}; it must be at least 0 and below 2**32")
        if not 0 <= self.dropout < 1:
            raise InputError(f"--dropout is {self.dropout:g}; it must be at least 0 and below 1")
        if self.test_examples is not None and self.test_examples < 1:
            raise InputError(f"--test-examples is {self.test_examples}; it must be at least 1")
        if self.examples is not None and self.examples < 20:
            raise InputError(f"--examples is {self.examples}; it must be at least 20, a tenth of which is held out")

    def recipe(self) -> Recipe:
        return Recipe(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Recipe)})


@dataclass
class Plan:
    """A command line, understood: everything a run needs, before anything is written."""

    file: ProblemFile
    options: RunOptions
    problem: BilevelProblem
    solver: Solver
    problem_arguments: dict[str, Any]
    command: list[str]

    def config(self, model: nn.Module, train: ImageSet) -> dict[str, Any]:
        """``config.json``: what is needed to repeat the run."""
        constraint = getattr(self.problem.lower, "constraint", None)
        return {
            "command": self.command,
            "file": str(self.file.path),
            "file_sha256": self.file.sha256,
            "problem": self.problem_arguments,
            "solver": {"name": type(self.solver).__name__, **vars(self.solver)},
            "options": {k: v for k, v in vars(self.options).items() if k not in ("out", "problem", "resume")},
            "constraint": {"norm": norm_of(constraint), "epsilon": _radius(constraint)},
            "model": self.options.model,
            "activation": self.options.activation,
            "parameters": sum(p.numel() for p in model.parameters()),
            "data_sha256": train.sha256(),
            "shape": list(train.shape),
            "classes": train.classes,
            "versions": versions("torchvision", "numpy", "scikit-learn"),
            "date": today(),
            "machine": machine(train.device),
        }


def understand(args: Sequence[str]) -> Plan:
    """Read the command line. Raises :class:`InputError` for whatever is wrong in it."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0)
    if args[0] == "--list":
        print(known_names())
        raise SystemExit(0)
    if args[0].startswith("-"):
        raise InputError(f"the problem file comes first: python -m {PROG} FILE {' '.join(args[:2])}")
    file, rest = ProblemFile(args[0]), list(args[1:])

    recipe = file.recipe(_peek(rest, "data") or "digits")
    settings = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe) if f.name != "problem"}
    if file.model is not None:
        settings["model"] = "file"
    own = sorted(flags.flags_of(RunOptions, settings), key=lambda flag: flag.name in settings)
    of_problem = flags.flags_of(file.problem, recipe.problem)
    shared = [f.name for f in of_problem]
    of_factory = flags.flags_of(file.solver, skip=["name", *shared]) if file.solver else []
    common = [*of_problem, *of_factory, *own]
    # Which flags a solver has depends on which one it is, and that may depend on flags.
    prog, about = f"python -m {PROG} {args[0]}", (file.module.__doc__ or "").strip().split("\n")[0]
    solver: Any = None
    try:
        known = flags.parse(common, rest, prog, about, lenient=True)
        problem_arguments = {name: known[name] for name in shared}
        problem = file.make(file.problem, BilevelProblem, **problem_arguments)
        solver = _make_solver(file, known)
    except InputError:
        if not {"-h", "--help"} & set(rest):  # help does not wait for what a required flag has to say
            raise
    of_solver = {
        f.name: flags.Flag(_solver_flag(f.name, common), f.type | None, None, f.help, "default: what the solver has")
        for f in (flags.flags_of(type(solver)) if dataclasses.is_dataclass(solver) else [])
    }
    values = flags.parse([*of_problem, *of_factory, *of_solver.values(), *own], rest, prog, about)

    options = RunOptions(**{f.name: values[f.name] for f in own})
    given = {name: values[flag.name] for name, flag in of_solver.items() if values[flag.name] is not None}
    if given:
        solver = dataclasses.replace(solver, **given)
    return Plan(file, options, problem, solver, problem_arguments, [PROG, *args])


def known_names() -> str:
    """The methods, models and data sets known by name, a line on each."""
    groups = {
        "methods": {path.stem: summary for path, summary in packaged_problems()},
        "models": {name: architecture.about for name, architecture in MODELS.items()},
        "data": {**DATA_NAMES, "FILE.npz": "your own: x_train, y_train, x_test, y_test"},
    }
    width = max(len(name) for names in groups.values() for name in names)
    lines = []
    for group, names in groups.items():
        lines += [group, *(f"  {name:<{width}}  {about}" for name, about in names.items())]
    return "\n".join(lines)


def _radius(constraint: Constraint | None) -> float | None:
    """The constraint's radius; None where it has none."""
    radius = Attack("", constraint).epsilon
    return None if constraint is None or math.isnan(radius) else radius


def _solver_flag(name: str, common: Sequence[flags.Flag]) -> str:
    """A solver's field as a flag; prefixed where the problem or the run already has one of that name."""
    return f"solver_{name}" if any(f.name == name for f in common) else name


def _peek(args: Sequence[str], name: str) -> str | None:
    """The value of a flag, before the flags that depend on it are known."""
    for i, argument in enumerate(args):
        if argument.startswith(f"--{name}="):
            return argument.split("=", 1)[1]
        if argument == f"--{name}" and i + 1 < len(args):
            return args[i + 1]
    return None


def _make_solver(file: ProblemFile, values: dict[str, Any]) -> Any:
    """What ``--solver`` names, as the file's ``solver(...)`` makes it; without ``--solver``, whatever that makes."""
    name = values["solver"]
    if file.solver is None:
        return SOLVERS[name or "zero-ig"]()
    parameters = inspect.signature(file.solver).parameters
    arguments = {p: values[p] for p in parameters if p != "name" and p in values}
    if name is not None and "name" in parameters:
        arguments["name"] = name
    solver = file.make(file.solver, Solver, **arguments)
    return solver if name is None or isinstance(solver, SOLVERS[name]) else SOLVERS[name]()


def resolve_device(name: str) -> torch.device:
    """cpu, cuda, cuda:N, mps; auto is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def build(plan: Plan, train: ImageSet) -> nn.Module:
    """The network on the data's device, after a look at what it gives for two images."""
    options = plan.options
    torch.manual_seed(options.seed)
    if options.model != "file":
        model = build_model(options.model, train.shape, train.classes, train, options.activation, options.dropout)
    elif plan.file.model is None:
        raise InputError(f"--model file, but {plan.file.path} defines no model(shape, classes)")
    else:
        model = plan.file.make(plan.file.model, nn.Module, shape=train.shape, classes=train.classes)
    model = model.to(train.device)
    with torch.no_grad(), plan.file.blame(f"the model does not take {train.shape} images: "):
        out = model.eval()(train[slice(0, 2)].pixels())
    shape = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
    if shape != (2, train.classes):
        whose = f"{plan.file.path}'s model" if options.model == "file" else f"the model {options.model}"
        raise InputError(f"{whose} gives {shape} for 2 images; {train.classes} classes need (2, {train.classes})")
    return model


def probe(plan: Plan, model: nn.Module, train: ImageSet) -> None:
    """One hypergradient on copies, so that what cannot work is said before anything is written."""
    few = train[slice(0, min(4, plan.options.batch_size))]
    batch = Batch(few.pixels(), few.y, torch.arange(len(few), device=few.device))
    generator = torch.Generator(few.device).manual_seed(0)
    with plan.file.blame("its problem cannot be solved: "):
        problem, model = copy.deepcopy(plan.problem), copy.deepcopy(model).train()
        plan.solver.hypergradient(problem, model, batch, generator=generator)

"""The flags of ``run`` and ``evaluate`` that do not depend on the problem file or the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_origin

from ..errors import InputError, at_least, positive
from ..evaluate.active import checks_asked
from ..models import ActivationName
from ..runs.networks import Which
from ..runs.recipe import Recipe
from ..solvers import PlainName, SolverName
from .flags import Flag

__all__ = ["EvaluateOptions", "RunOptions", "arranged"]

RUN_GROUPS = {
    "solver": ("solver", "inner"),
    "data": (
        *("data", "data_dir", "download", "extra", "extra_fraction"),
        *("examples", "test_examples", "held_out", "augment"),
    ),
    "output": ("out", "attacks", "resume", "save_every", "logger", "dry_run", "tflops"),
}
"""The groups of ``run --help`` besides ``problem`` and ``training``, which has the rest."""

EVALUATE_GROUPS = {
    "data": ("data", "data_dir", "download", "examples"),
    "network": ("which", "model", "activation", "mean", "std", "problem_file"),
    "output": ("out", "again"),
}
"""The groups of ``evaluate --help`` besides ``attack``, which has the rest."""

UNITS = {
    "epochs": "EPOCHS",
    "epsilon_warmup": "EPOCHS",
    "average_from": "EPOCH",
    "milestones": "EPOCH",
    "batch_size": "IMAGES",
    "accumulate": "BATCHES",
    "replays": "UPDATES",
    "held_out": "IMAGES",
    "examples": "IMAGES",
    "test_examples": "IMAGES",
    "extra_fraction": "SHARE",
    "save_every": "MINUTES",
    "tflops": "TFLOPS",
    "images": "POSITION",
    "attacks": "ATTACK",
    "select": "ATTACK",
    "data_dir": "FOLDER",
    "out": "FOLDER",
    "problem_file": "FILE",
    "extra": "FILE.npz",
    "data": "NAME|FILE.npz",
    "model": "NAME",
    "device": "DEVICE",
}
"""What the values of flags count or name, for the help."""


def arranged(flags: Sequence[Flag], groups: Mapping[str, Sequence[str]], otherwise: str) -> list[Flag]:
    """The flags with their units, and with their groups; ``otherwise`` is that of those in none."""
    of = {name: group for group, names in groups.items() for name in names}
    return [dataclasses.replace(flag, group=of.get(flag.name, otherwise), unit=_unit(flag)) for flag in flags]


def _unit(flag: Flag) -> str:
    unit = UNITS.get(flag.name, "")
    return f"{unit} [{unit} ...]" if unit and get_origin(flag.type) is tuple else unit


@dataclass(frozen=True)
class RunOptions(Recipe):
    """The flags that every problem file has: those of its recipe, and these.

    recipe: published settings of the method; or modern, those of a benchmark of fast methods (docs/methods.md).
    solver: how the players are coupled: zero-ig, hessian-free-kkt, full-kkt, ...; the file's own choice if not given.
    inner: the solver that --solver lazy takes now and then; the file's own choice if not given.
    data: a data set by name, or an .npz with x_train, y_train, x_test, y_test.
    data_dir: where named data sets lie, as NAME.npz or as torchvision keeps them.
    download: fetch a named data set that is not there.
    extra: an .npz of more training images (x_train and y_train, or image and label), such as generated ones.
    activation: of a network by name.
    dropout: in the blocks of a wide residual network; published adversarial training has none.
    examples: train on this many examples only.
    test_examples: evaluate on this many test examples only.
    attacks: what the final table shows, on the test set: clean, fgsm, pgd-STEPS-RESTARTS.
    device: cpu, cuda, or auto for a GPU where there is one.
    precision: float32, or bfloat16 for autocast; auto is float32.
    memory_format: of the network's weights; auto is contiguous on a CPU, and on a GPU the one in which a few
        hypergradients at the start of the run take less time.
    sync_batch_norm: of several processes (torchrun), take batch statistics over the whole batch, instead of over each
        process's rows; on one process it changes nothing.
    compile: compile each step as one graph (torch.compile), which takes a minute or more before the first.
    seed: of the weights, the order of the data, and every draw.
    out: run directory; runs/FILE-DATA-seedN if not given.
    resume: go on with the run that is there; "auto" begins one where there is none.
    save_every: minutes from one checkpoint inside an epoch to the next; 0 for none by time.
    skip_nonfinite: leave out updates whose loss or gradient is not finite, and count them in metrics.jsonl, instead of
        stopping; each is looked at first, which waits for a GPU.
    dry_run: print what would be trained and what a step costs (operations, memory), and train and write nothing.
    logger: also log epochs and final accuracies to tensorboard (RUN/tensorboard) or wandb; metrics.jsonl and
        results.json are always written.
    tflops: of --dry-run, measured operations in 10¹² a second, for the time of an epoch.
    """

    recipe: Literal["published", "modern"] = "published"
    solver: SolverName | None = None
    inner: PlainName | None = None
    data: str = "digits"
    data_dir: str = "data"
    download: bool = True
    extra: str | None = None
    activation: ActivationName = "relu"
    dropout: float = 0.0
    examples: int | None = None
    test_examples: int | None = None
    attacks: tuple[str, ...] = ("clean", "fgsm", "pgd-50-10")
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    sync_batch_norm: bool = False
    compile: bool = False
    seed: int = 0
    out: str | None = None
    resume: Literal["no", "yes", "auto"] = "no"
    save_every: float = 10.0
    skip_nonfinite: bool = False
    dry_run: bool = False
    logger: tuple[Literal["tensorboard", "wandb"], ...] = ()
    tflops: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.attacks:
            raise InputError("--attacks names no attack; clean, fgsm and pgd-50-10 are some")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed is {self.seed}; it must be at least 0 and below 2**32")
        if not 0 <= self.dropout < 1:
            raise InputError(f"--dropout is {self.dropout:g}; it must be at least 0 and below 1")
        at_least("--save-every", self.save_every)
        if self.tflops is not None:
            positive("--tflops", self.tflops)
            if not self.dry_run:
                raise InputError("--tflops is for --dry-run, which says how long an epoch takes at it")
        if self.test_examples is not None and self.test_examples < 1:
            raise InputError(f"--test-examples is {self.test_examples}; it must be at least 1")
        if self.examples is not None and self.examples < 20:
            raise InputError(f"--examples is {self.examples}; it must be at least 20, a tenth of which is held out")

    def training(self) -> Recipe:
        """The recipe alone."""
        return Recipe(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Recipe)})


@dataclass(frozen=True)
class EvaluateOptions:
    """The flags.

    attacks: what to attack with: clean, fgsm, pgd-50-10, beta-30, autoattack, ...; --list has them all.
    epsilon: radius of the ball, or several for a curve; that of the run's threat if not given.
    norm: linf or l2; that of the run's threat if not given.
    which: checkpoints of the run; all that it has if not given.
    examples: attack this many test examples only.
    checks: examples that the checks for masked gradients look at, 0 for none; active, or active:50, tests each
        attack on adversarial examples that are planted.
    data: the run's own if not given.
    data_dir: the run's own if not given.
    download: fetch a named data set that is not there.
    model: the network that the weights belong to.
    problem_file: the problem file of a run (or of transfer:RUN) that defines its network or threat; it is run.
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
    checks: tuple[str, ...] = ("100",)
    data: str | None = None
    data_dir: str | None = None
    download: bool = True
    model: str | None = None
    problem_file: tuple[str, ...] = ()
    activation: ActivationName = "relu"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    batch_size: int = 250
    seed: int = 0
    device: str = "auto"
    out: str | None = None
    again: bool = False

    def __post_init__(self) -> None:
        for name, least in (("examples", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
        checks_asked(self.checks)
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed is {self.seed}; it must be at least 0 and below 2**32")

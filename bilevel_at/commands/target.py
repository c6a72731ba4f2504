"""The networks to evaluate: those of a run, or a named network with weights from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from .. import shares
from ..constraints import Constraint
from ..data import ImageSet, load_data
from ..distributed import broadcast
from ..errors import InputError
from ..evaluate.threat import Threat
from ..models import BEYOND, MODELS, TRAINED
from ..models.activations import ACTIVATIONS
from ..runs.directory import RunDir
from ..runs.named_files import NamedFiles
from ..runs.networks import described, load_weights, untrained
from ..runs.provenance import today, versions
from ..runs.shared import card, file_of, is_shared
from .options import EvaluateOptions
from .processes import agreed
from .weights import network_with_weights

__all__ = ["Target", "find_target"]


@dataclass
class Target:
    """Networks by name, the directory of their results, and their configuration.

    run: the directory of the results.
    names: best, last, last_good, or model, that of weights from elsewhere.
    about: what config.json says, or will say.
    source: the name of the data, their directory, and the usual number of test images.
    threat: the threat model; None if it is unknown.
    network: that of weights from elsewhere.
    files: the problem files that define networks, as far as the user has named them.
    """

    run: RunDir
    names: list[str]
    about: Mapping[str, Any]
    source: tuple[str, str, int | None]
    threat: Threat | None = None
    network: nn.Module | None = None
    files: NamedFiles = field(default_factory=NamedFiles)

    def check(self) -> None:
        """Check that the network's problem file, if it has one, is named.

        Raises:
            InputError: if it is not.
        """
        if self.network is None:
            self.files.network(self.run.path, self.about)

    def space(self) -> Constraint:
        """The threat as a constraint.

        Raises:
            InputError: if it is defined in a problem file that is not named.
        """
        return self.files.threat(self.run.path, self.about)

    def model(self, name: str) -> nn.Module:
        """The network, in eval mode. Of several processes the first reads its weights, and the others get them.

        Raises:
            InputError: if the checkpoint cannot be loaded.
        """
        if self.network is not None:
            return self.network
        model = agreed(self._untrained)
        shares.first(lambda: load_weights(model, self.run, name, described(self.run.path, self.about)[0]))
        if shares.count() > 1:
            broadcast(model, shares.group())
        return model.eval()

    def _untrained(self) -> nn.Module:
        own = self.files.network(self.run.path, self.about)
        return untrained(self.run.path, self.about) if own is None else own


def find_target(path: Path, options: EvaluateOptions, files: NamedFiles) -> tuple[Target, ImageSet]:
    """What is evaluated, and on which images. Of several processes only the first looks at the directory or weights.

    path: what the user has named.
    options: the flags.
    files: the problem files that the user has named.
    """
    found: list[ImageSet] = []

    def find() -> Target:
        if not path.exists() and str(path) not in TRAINED:
            raise InputError(
                f"{path} does not exist; give a run directory, a file of weights, or {' or '.join(TRAINED)}, which "
                "this package has"
            )
        target, images = _run(path, options, files) if path.is_dir() else _weights(path, options)
        found.append(images)
        return target

    target = shares.first(find)
    return target, agreed(lambda: found[0] if found else _images(options, *target.source))


def _transfers(options: EvaluateOptions) -> bool:
    return any(name.startswith("transfer:") for name in options.attacks)


def _images(options: EvaluateOptions, data: str, data_dir: str, usual: int | None) -> ImageSet:
    """The test images; their number is given by flags, or else the usual one."""
    _, test = load_data(data, data_dir, options.download)
    count = options.examples if options.examples is not None else usual
    return test if count is None else test.sample(count)


def _run(path: Path, options: EvaluateOptions, files: NamedFiles) -> tuple[Target, ImageSet]:
    """The networks of a run; :class:`InputError` where it is not one, or has no such checkpoint."""
    for name in ("model", "mean", "std", "out"):
        if getattr(options, name):
            raise InputError(f"--{name} is for weights from elsewhere; {path} is a run, which says so itself")
    run = RunDir(path)
    config = run.config()
    data, data_dir, test_examples, threat = _recorded(path, config)
    if not run.checkpoints:
        raise InputError(f"{path} has no checkpoint yet; bilevel_at.run writes one after its first epoch")
    missing = [which for which in options.which if which not in run.checkpoints]
    if missing:
        present = ", ".join(f"{which}.pt" for which in run.checkpoints)
        raise InputError(f"{path} has no {missing[0]}.pt; it has {present}")
    if options.problem_file and not _transfers(options) and not files.wanted(config):
        raise InputError(
            f"--problem-file is for runs whose problem file defines the network or the threat; {path} is no such run"
        )
    source = (options.data or data, options.data_dir or data_dir, test_examples)
    images = _images(options, *source)
    expected = config.get("shape"), config.get("classes")
    if expected != (list(images.shape), images.classes):
        raise InputError(
            f"{path} was trained on images of {expected[0]} in {expected[1]} classes; {options.data or data} has "
            f"{list(images.shape)} in {images.classes}"
        )
    return Target(run, list(options.which or run.checkpoints), config, source, threat, files=files), images


def _recorded(path: Path, config: Any) -> tuple[str, str, int | None, Threat | None]:
    """(data, data_dir, test_examples, threat) of a run's configuration."""
    try:
        options = config["options"]
        data, data_dir, examples = options["data"], options.get("data_dir", "data"), options.get("test_examples")
        constraint = config.get("constraint") or {"norm": "linf", "epsilon": config["problem"].get("epsilon")}
        norm, epsilon, name = constraint["norm"], constraint["epsilon"], constraint.get("name", "")
    except (AttributeError, KeyError, TypeError):
        raise InputError(f"{path}/config.json is not one of bilevel_at.run") from None
    kinds = [(data, str), (data_dir, str), (examples, int | None), (norm, str | None), (epsilon, float | int | None)]
    kinds.append((name, str))
    if not all(isinstance(value, kind) for value, kind in kinds):
        raise InputError(f"{path}/config.json is not one of bilevel_at.run: data and constraint are not what they were")
    return data, data_dir, examples, Threat.read(constraint)


def _weights(path: Path, options: EvaluateOptions) -> tuple[Target, ImageSet]:
    """The network that a file of weights is for; results go beside the file, or where ``--out`` says.

    A ``.safetensors`` file says itself what it is of, where no flag says otherwise. Results of a network that this
    package has go to ``runs/NAME-evaluation``.
    """
    named = str(path)
    if is_shared(path):
        options, path = _as_described(path, options), file_of(path)
    packaged = str(path) != named
    if options.model is None:
        raise InputError(f"{path} is a file of weights; say whose with --model: {', '.join([*MODELS, *BEYOND])}")
    if options.which:
        raise InputError("--which is for runs; a file of weights has one network")
    if options.problem_file and not _transfers(options):
        raise InputError("--problem-file is for runs; whose weights these are is said with --model")
    if not options.epsilon and set(options.attacks) != {"clean"}:
        raise InputError("--epsilon is missing: weights from elsewhere do not say which radius they were trained for")
    data = options.data or "digits"
    source = (data, options.data_dir or "data", None)
    images = _images(options, *source)
    beside = Path("runs", f"{named}-evaluation") if packaged else path.with_name(f"{path.stem}-evaluation")
    run = RunDir(options.out or beside)
    if run.path.exists() and not run.path.is_dir():
        raise InputError(f"--out {run} is a file; it must be a directory, or not exist")
    network = network_with_weights(path, images, options.model, options.activation, options.mean, options.std)
    epsilon = next((e for e in options.epsilon if e > 0), 0.0) if options.epsilon else None
    about: dict[str, Any] = {
        "data": data,
        "constraint": Threat(options.norm or "linf", epsilon).asdict(),
        "model": options.model,
        "activation": options.activation,
        "checkpoint": named if packaged else str(path.resolve()),
        "shape": list(images.shape),
        "classes": images.classes,
        "evaluated": today(),
        "versions": versions(),
    }
    known = run.config() if run.exists else about
    if not isinstance(known, dict) or known.get("checkpoint") != about["checkpoint"]:
        raise InputError(f"{run} holds something else; choose another --out")
    before = Threat.read(known.get("constraint")) or Threat("linf")
    threat = replace(before, epsilon=epsilon) if before.epsilon is None else before
    return Target(run, ["model"], about, source, threat, network), images


def _as_described(path: Path, options: EvaluateOptions) -> EvaluateOptions:
    """The flags, with what the file says of network, data and threat in place of those that are not given."""
    about = card(path)
    model, data, activation = (about.get(name) for name in ("model", "data", "activation"))
    threat = Threat.read(about.get("constraint"))
    given: dict[str, Any] = {}
    if options.model is None and isinstance(model, str) and model in MODELS:
        given["model"] = model
        if activation in ACTIVATIONS:
            given["activation"] = activation
    if options.data is None and isinstance(data, str):
        given["data"] = data
    if not options.epsilon and options.norm is None and threat is not None and threat.epsilon and threat.is_ball:
        given |= {"epsilon": (threat.epsilon,), "norm": threat.norm}
    return replace(options, **given)

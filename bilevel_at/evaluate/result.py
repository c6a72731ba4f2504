"""Results of evaluations: accuracies with their settings, and the outcome of every example."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .attacks import Attack
from .radius import radius_text
from .robust import Trace
from .threat import Threat

__all__ = ["Evaluation", "Finding", "Progress", "Score", "result_name"]

Progress = Callable[[str, str, int, int, Trace], None]
"""Called with (the result's name, the stage, batches done, batches to do, the trace) after every batch."""


@dataclass(frozen=True)
class Score:
    """An accuracy with its settings, an entry of ``results.json``.

    Args:
        accuracy: the share of images classified correctly.
        n: the number of images.
        epsilon: the radius; NaN for a set without one.
        seconds: the total time, summed over interruptions.
        data: the fingerprint of the images, the first 16 digits of a SHA-256.
        attack: the name of the attack.
        norm: "linf", "l2", or None.
        seed: of the attack.
        batch_size: images in a batch.
        weights: the fingerprint of the network, the first 16 digits of a SHA-256.
        outside: the number of attacked images outside C(x), which are not counted as broken.
        file: the path of the record of each example, if there is one.
        date: of the evaluation.
        device: of the evaluation.
        versions: of the packages.
        threat: the name of the set, if it is not a ball.
    """

    accuracy: float
    n: int
    epsilon: float
    seconds: float
    data: str = ""
    attack: str = ""
    norm: str | None = None
    seed: int = 0
    batch_size: int = 0
    weights: str = ""
    outside: int = 0
    file: str | None = None
    date: str = ""
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    threat: str = ""

    @classmethod
    def of(cls, trace: Trace, attack: Attack, **known: Any) -> Score:
        """The score of a finished trace."""
        accuracy, threat = trace.correct.float().mean().item(), attack.threat
        return cls(
            accuracy,
            len(trace.broken),
            attack.epsilon,
            trace.seconds,
            attack=attack.name,
            norm=None if threat is None else threat.norm,
            threat="" if threat is None or threat.is_ball else threat.name,
            outside=trace.outside,
            **known,
        )

    def asdict(self) -> dict[str, Any]:
        """A dictionary for JSON: None in place of NaN, and ``threat`` only if it is not empty."""
        plain = {**asdict(self), "epsilon": None if math.isnan(self.epsilon) else self.epsilon}
        return {name: value for name, value in plain.items() if name != "threat" or value}


@dataclass(frozen=True)
class Finding:
    """A warning about a robust accuracy: a name, and a sentence with the measurements."""

    name: str
    message: str

    def __str__(self) -> str:
        return self.message


def result_name(attack: Attack, usual: Threat | None) -> str:
    """The attack's name, followed by norm and radius where they differ from the usual threat.

    ``pgd-50-10``, ``pgd-50-10@4/255``, ``pgd-50-10-l2@0.5``, ``pgd-50-10@Diamond(size=0.3)``.
    """
    own = attack.threat
    if own is None or usual is None or own.key == usual.key:
        return attack.name
    if not own.is_ball:
        return f"{attack.name}@{own.name}"
    other = "" if own.norm == (usual.norm or "linf") and usual.is_ball else f"-{own.norm}"
    return f"{attack.name}{other}@{radius_text(attack.epsilon)}"


@dataclass
class Evaluation(Mapping[str, Score]):
    """A mapping from names to scores, with the traces of all examples, and warnings.

    result["pgd-50-10"].accuracy
    result.correct("pgd-50-10")                     # [n] bool
    result.worst_case("pgd-50-10", "beta-30")       # accuracy under the union of both
    for finding in result.warnings: print(finding)
    """

    scores: dict[str, Score] = field(default_factory=dict)
    traces: dict[str, Trace] = field(default_factory=dict)
    warnings: list[Finding] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Score:
        return self.scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    def correct(self, name: str) -> Tensor:
        """``[n]`` bool: the examples classified correctly under an attack.

        Raises:
            InputError: if the attack was not made.
        """
        if name not in self.traces:
            raise InputError(f"no attack {name!r} was made; there are {', '.join(self.traces)}")
        return self.traces[name].correct

    def worst_case(self, *names: str) -> float:
        """Accuracy under the union of the named attacks, or of all attacks if none is named."""
        chosen: Sequence[str] = names or tuple(self.traces)
        return torch.stack([self.correct(name) for name in chosen]).all(0).float().mean().item()

    def __str__(self) -> str:
        width = max((len(name) for name in self), default=0)
        lines = [f"{name:<{width}}  {score.accuracy:6.2%}  (n = {score.n})" for name, score in self.items()]
        return "\n".join([*lines, *(f"warning: {finding}" for finding in self.warnings)])

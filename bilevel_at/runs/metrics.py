"""What an epoch measured, which epoch is best, and when robustness collapsed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Collapse", "Epoch", "catastrophic_overfitting", "last_is_first_to_fall", "rank"]


@dataclass(frozen=True)
class Epoch:
    """What one epoch measured, a line of ``metrics.jsonl``.

    loss: the mean upper loss over the epoch.
    train, perturbation: on the training examples as they were attacked (x + δ*), in one batch of 16: the accuracy, in
        eval mode, of the network in training (not of its average), and the mean of ‖δ*‖_∞.
    clean, robust: accuracies on the held-out examples, under no attack and under ``attack``.
    implicit_ratio: the norm of the implicit term over that of ∇_θ f, the mean over steps; implicit_cosine: of the angle
        between the two, likewise; 0 where there is no such term.
    alignment: the mean cosine of input gradients at x and at x + η, of up to 256 held-out examples (GradAlign; see
        :func:`bilevel_at.diagnose.gradient_alignment`), None where it is not defined.
    lr: at the epoch's last step. seconds: of all of it; train_seconds: without the held-out examples. memory: the peak
        that training took of a GPU's, in GiB; 0 on a CPU.
    """

    epoch: int
    loss: float
    train: float
    clean: float
    robust: float
    attack: str
    implicit_ratio: float
    perturbation: float
    lr: float
    seconds: float
    train_seconds: float
    memory: float = 0.0
    implicit_cosine: float = 0.0
    alignment: float | None = None

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


def rank(metrics: Mapping[str, Any]) -> tuple[float, float, int]:
    """The best epoch has the largest of these: robust, then clean accuracy, then the later one."""
    return metrics["robust"], metrics["clean"], metrics["epoch"]


@dataclass(frozen=True)
class Collapse:
    """Catastrophic overfitting: the epoch it happened in, the best one before it, and the last that was still good."""

    before: Mapping[str, Any]
    after: Mapping[str, Any]
    last_good: int

    def __str__(self) -> str:
        a, b = self.before, self.after
        return (
            f"catastrophic overfitting in epoch {b['epoch']}: held-out {b['attack']} accuracy is {b['robust']:.1%} "
            f"after {a['robust']:.1%} in epoch {a['epoch']}, while accuracy on attacked training examples went from "
            f"{a['train']:.1%} to {b['train']:.1%}"
        )


def catastrophic_overfitting(
    metrics: Iterable[Mapping[str, Any]], fall: float = 0.5, least: float = 0.05
) -> Collapse | None:
    """The first epoch whose held-out robust accuracy has collapsed while training accuracy under attack rose, or None.

    Collapsed: below ``fall`` times the best so far, and by at least ``least``; an epoch is good while it is not.
    Training without an attack, which has no robustness to lose, is not looked at. Source: Wong et al. (2020), section
    5.4; Andriushchenko and Flammarion (2020), section 1.
    """
    good = 0
    for line, best in _with_best(metrics):
        if not _fallen(line, best, fall, least):
            good = line["epoch"]
        elif line["train"] > best["train"]:
            return Collapse(best, line, good)
    return None


def last_is_first_to_fall(metrics: Sequence[Mapping[str, Any]], fall: float = 0.5, least: float = 0.05) -> bool:
    """Whether the last epoch has fallen and the one before it had not, so that its weights are the ones to keep."""
    states = [False, *(_fallen(line, best, fall, least) for line, best in _with_best(metrics))]
    return states[-1] and not states[-2]


Line = Mapping[str, Any]


def _with_best(metrics: Iterable[Line]) -> Iterator[tuple[Line, Line]]:
    """Each epoch with the most robust up to it, the earliest of equals."""
    best: Line | None = None
    for line in metrics:
        if best is None or line["robust"] > best["robust"]:
            best = line
        yield line, best


def _fallen(line: Mapping[str, Any], best: Mapping[str, Any], fall: float, least: float) -> bool:
    lost = best["robust"] - line["robust"]
    return line["perturbation"] > 0 and line["robust"] < fall * best["robust"] and lost >= least

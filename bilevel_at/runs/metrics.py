"""The metrics of an epoch, the choice of the best epoch, and the detection of catastrophic overfitting."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Collapse", "Epoch", "catastrophic_overfitting", "last_is_first_to_fall", "rank"]


@dataclass(frozen=True)
class Epoch:
    """The metrics of one epoch, a line of ``metrics.jsonl``.

    Args:
        epoch: the number of the epoch.
        loss: the mean upper loss over the epoch.
        train: the accuracy on attacked training examples x + δ*, in one batch of 16; of the network in training, in
            eval mode, not of its moving average.
        clean: the accuracy on the held-out examples.
        robust: the accuracy on the held-out examples under ``attack``.
        attack: the name of the attack.
        implicit_ratio: the norm of the implicit term divided by that of ∇_θ f, averaged over steps; 0 without such a
            term.
        perturbation: the mean of ‖δ*‖_∞ over the examples of ``train``.
        lr: the learning rate of the last step.
        seconds: the time of the whole epoch.
        train_seconds: the time without the evaluation of held-out examples.
        memory: the peak GPU memory of training, in GiB; 0 on a CPU.
        implicit_cosine: the cosine of the angle between the implicit term and ∇_θ f, averaged over steps; 0 without
            such a term.
        alignment: the mean cosine of input gradients at x and at x + η, over up to 256 held-out examples (GradAlign,
            :func:`bilevel_at.diagnose.gradient_alignment`); None where it is not defined.
        skipped: updates left out because a loss or a gradient was not finite (``--skip-nonfinite``).
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
    skipped: int = 0

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


def rank(metrics: Mapping[str, Any]) -> tuple[float, float, int]:
    """The sort key of the best epoch: robust accuracy, then clean accuracy, then the later epoch."""
    return metrics["robust"], metrics["clean"], metrics["epoch"]


@dataclass(frozen=True)
class Collapse:
    """An occurrence of catastrophic overfitting.

    Args:
        before: the metrics of the most robust epoch before it.
        after: the metrics of the epoch in which it happened.
        last_good: the number of the last epoch before it.
    """

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
    """Find the first epoch whose held-out robust accuracy collapses while training accuracy under attack rises.

    Epochs trained without an attack are ignored. Source: Wong et al. (2020), section 5.4; Andriushchenko and Flammarion
    (2020), section 1.

    Args:
        metrics: the lines of ``metrics.jsonl``.
        fall: robust accuracy has collapsed if it is below this fraction of the best so far,
        least: and below it by at least this much.

    Returns:
        The collapse, or None.
    """
    good = 0
    for line, best in _with_best(metrics):
        if not _fallen(line, best, fall, least):
            good = line["epoch"]
        elif line["train"] > best["train"]:
            return Collapse(best, line, good)
    return None


def last_is_first_to_fall(metrics: Sequence[Mapping[str, Any]], fall: float = 0.5, least: float = 0.05) -> bool:
    """Whether robust accuracy collapses in the last epoch, so that the weights of the epoch before it are to be saved.

    Args:
        metrics: the lines of ``metrics.jsonl``.
        fall: as in :func:`catastrophic_overfitting`.
        least: as in :func:`catastrophic_overfitting`.
    """
    states = [False, *(_fallen(line, best, fall, least) for line, best in _with_best(metrics))]
    return states[-1] and not states[-2]


Line = Mapping[str, Any]


def _with_best(metrics: Iterable[Line]) -> Iterator[tuple[Line, Line]]:
    """Yield each epoch with the most robust epoch up to it, the earliest of ties."""
    best: Line | None = None
    for line in metrics:
        if best is None or line["robust"] > best["robust"]:
            best = line
        yield line, best


def _fallen(line: Mapping[str, Any], best: Mapping[str, Any], fall: float, least: float) -> bool:
    lost = best["robust"] - line["robust"]
    return line["perturbation"] > 0 and line["robust"] < fall * best["robust"] and lost >= least

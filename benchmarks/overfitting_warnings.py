"""Does a quantity of one epoch warn of a collapse in the next? Areas under ROC curves, and false alarms.

A pair is a run and an epoch before its collapse, or any epoch but the last of a run without one; it is positive where
the next epoch is the first of the collapse. Directions and thresholds are chosen on some seeds, or compositions, and
tested on the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from sklearn.metrics import roc_auc_score, roc_curve

from bilevel_at.train import catastrophic_overfitting

CAUGHT = 0.9  # of the collapses that a threshold is chosen by
Record = Mapping[str, Any]
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """An epoch that has not collapsed.

    run, method, epsilon, seed: whose.
    line, before: measurements of this epoch, and of the one before; None for the first.
    next: whether the next epoch is the first of a collapse.
    collapses: whether the run collapses at all.
    """

    run: str
    method: str
    epsilon: float
    seed: int
    line: Line
    before: Line | None
    next: bool
    collapses: bool


def onset(record: Record) -> int | None:
    """The first epoch of the collapse, or None."""
    collapse = catastrophic_overfitting(record["epochs"])
    return None if collapse is None else collapse.last_good + 1


def pairs_of(records: Sequence[Record]) -> list[Pair]:
    pairs = []
    for record in records:
        lines, first, of = record["epochs"], onset(record), record["settings"]
        for number in range(1, len(lines) if first is None else first):  # the epoch, from 1
            before = lines[number - 2] if number > 1 else None
            about = (record["key"], of["method"], of["epsilon"], of["seed"])
            pairs.append(Pair(*about, lines[number - 1], before, number + 1 == first, first is not None))
    return pairs


@dataclass(frozen=True)
class Predictor:
    """A number of a pair.

    value: None where it is not known.
    scale: of an axis.
    measured: False for what is known without a measurement.
    """

    name: str
    value: Callable[[Pair], float | None]
    scale: Literal["linear", "log"] = "linear"
    measured: bool = True


def difference(a: str, b: str) -> Callable[[Line], float]:
    return lambda line: line[a] - line[b]


QUANTITIES: dict[str, str | Callable[[Line], float]] = {
    "gradient alignment": "alignment",
    "free coordinates": "free",
    "share of the implicit term": "share",
    "cosine of the two gradients": "cosine",
    "norm of the attack's gradient": "gradient",
    "training's attack − PGD-10": difference("attacked", "robust"),
    "training images − PGD-10": difference("train", "robust"),
    "attacked training images": "train",
    "PGD-10": "robust",
    "clean": "clean",
    "loss": "loss",
}
RATIOS = ("share of the implicit term", "norm of the attack's gradient", "loss")
"""Whose change is a ratio: they have no scale of their own."""


def predictors(pairs: Sequence[Pair] = ()) -> Iterator[Predictor]:
    """Each quantity and its change since the epoch before; then what is known without measuring anything.

    Args:
        pairs: from which it is known where other seeds collapse.
    """
    for name, what in QUANTITIES.items():
        scale: Literal["linear", "log"] = "log" if name in RATIOS else "linear"
        yield Predictor(name, _of(what), scale)
        if name in RATIOS:
            yield Predictor(f"ratio of {name} to the epoch before", _change(what, True), scale)
        else:
            yield Predictor(f"change of {name}", _change(what, False))
    yield Predictor("the epoch's number", lambda pair: pair.line["epoch"], measured=False)
    yield Predictor("ε", lambda pair: pair.epsilon, measured=False)
    if pairs:
        yield Predictor("collapses of composition and ε with other seeds", _elsewhere(pairs), measured=False)


def _elsewhere(pairs: Sequence[Pair]) -> Callable[[Pair], float | None]:
    """The share of a run's neighbours, with another seed alone, that collapse; None for a run without neighbours."""
    collapses = {(pair.method, pair.epsilon, pair.seed): pair.collapses for pair in pairs}

    def share(pair: Pair) -> float | None:
        others = [
            collapse
            for (method, epsilon, seed), collapse in collapses.items()
            if (method, epsilon) == (pair.method, pair.epsilon) and seed != pair.seed
        ]
        return sum(others) / len(others) if others else None

    return share


def _read(what: str | Callable[[Line], float], line: Line) -> float | None:
    value = line[what] if isinstance(what, str) else what(line)
    return None if value is None or not math.isfinite(value) else float(value)


def _of(what: str | Callable[[Line], float]) -> Callable[[Pair], float | None]:
    return lambda pair: _read(what, pair.line)


def _change(what: str | Callable[[Line], float], ratio: bool) -> Callable[[Pair], float | None]:
    def change(pair: Pair) -> float | None:
        now, before = _read(what, pair.line), None if pair.before is None else _read(what, pair.before)
        if now is None or before is None or (ratio and before <= 0):
            return None
        return now / before if ratio else now - before

    return change


@dataclass
class Cases:
    """Pairs of which a predictor is known: its values and whether the next epoch collapses."""

    pairs: list[Pair]
    values: np.ndarray
    positive: np.ndarray

    @classmethod
    def of(cls, predictor: Predictor, pairs: Sequence[Pair]) -> Cases:
        known = [(pair, value) for pair in pairs if (value := predictor.value(pair)) is not None]
        values = np.array([value for _, value in known], dtype=float)
        return cls([pair for pair, _ in known], values, np.array([pair.next for pair, _ in known], dtype=bool))

    def where(self, which: Callable[[Pair], bool]) -> Cases:
        rows = np.array([which(pair) for pair in self.pairs], dtype=bool)
        return Cases([pair for pair in self.pairs if which(pair)], self.values[rows], self.positive[rows])

    @property
    def both(self) -> bool:
        """Whether there are some that collapse next and some that do not."""
        return bool(self.positive.any() and not self.positive.all())

    def area(self, sign: int = 1) -> float:
        """Under the ROC curve, where high values warn (sign 1) or low ones (−1); NaN without both kinds."""
        return float(roc_auc_score(self.positive, sign * self.values)) if self.both else math.nan

    def sign(self) -> int:
        return 1 if not self.both or self.area() >= 0.5 else -1

    def threshold(self) -> float:
        """The strictest, of sign · value, that catches 90 %."""
        _, caught, thresholds = roc_curve(self.positive, self.sign() * self.values, drop_intermediate=False)
        return float(thresholds[np.argmax(caught >= CAUGHT - 1e-9)])


@dataclass
class Tested:
    """What a predictor does on what was left out, one group at a time.

    areas: by group, where it has both kinds of pairs.
    caught, positive: collapses with an alarm in the epoch before, and all of them.
    false, negative: alarms in other epochs, and how many those are.
    alarmed, quiet: runs that never collapse: those with an alarm, and all of them.
    """

    areas: dict[Any, float] = field(default_factory=dict)
    caught: int = 0
    positive: int = 0
    false: int = 0
    negative: int = 0
    alarmed: set[str] = field(default_factory=set)
    quiet: set[str] = field(default_factory=set)

    @property
    def area(self) -> float:
        """The mean over the groups; NaN where there is none."""
        return float(np.mean(list(self.areas.values()))) if self.areas else math.nan

    @property
    def false_rate(self) -> float:
        return self.false / self.negative if self.negative else math.nan

    @property
    def caught_rate(self) -> float:
        return self.caught / self.positive if self.positive else math.nan


def left_out(cases: Cases, by: Literal["seed", "method"]) -> Tested:
    """Leave out each group, choose direction and threshold on the others, and test them on the group."""
    tested = Tested()
    for group in sorted({getattr(pair, by) for pair in cases.pairs}):
        known = cases.where(lambda pair, group=group: getattr(pair, by) != group)
        new = cases.where(lambda pair, group=group: getattr(pair, by) == group)
        if not known.both:
            continue
        sign = known.sign()
        alarms = sign * new.values >= known.threshold()
        if new.both:
            tested.areas[group] = new.area(sign)
        tested.caught += int((alarms & new.positive).sum())
        tested.positive += int(new.positive.sum())
        tested.false += int((alarms & ~new.positive).sum())
        tested.negative += int((~new.positive).sum())
        for pair, alarm in zip(new.pairs, alarms, strict=True):
            if not pair.collapses:
                tested.quiet.add(pair.run)
                if alarm:
                    tested.alarmed.add(pair.run)
    return tested

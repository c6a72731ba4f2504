"""What the numbers of ``overfitting_warnings.py`` say: the table of predictors, and words that follow from it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from differences import best_by_luck, paired
from overfitting_runs import LOOKED_AT
from overfitting_warnings import (
    CAUGHT,
    QUANTITIES,
    Cases,
    Pair,
    Predictor,
    Record,
    Tested,
    left_out,
    pairs_of,
    predictors,
)

__all__ = ["Candidate", "candidates_of", "definitions", "rows", "verdict"]

WARNS = (0.8, 0.1)  # at least so many collapses caught, in at most so many other epochs an alarm


class Candidate:
    """A predictor and what it does."""

    def __init__(self, predictor: Predictor, pairs: Sequence[Pair]) -> None:
        self.predictor, self.cases = predictor, Cases.of(predictor, pairs)
        self.seeds, self.methods = left_out(self.cases, "seed"), left_out(self.cases, "method")
        self.within = self.cases.where(lambda pair: pair.collapses).area(self.cases.sign())

    @property
    def rule(self) -> str:
        """Where it warns, by all pairs."""
        sign = self.cases.sign()
        return f"{'above' if sign > 0 else 'below'} {sign * self.cases.threshold():.3g}".replace("-", "−")

    def warns(self, tested: Tested) -> bool:
        return tested.caught_rate >= WARNS[0] and tested.false_rate <= WARNS[1]


def luck(candidates: Sequence[Candidate]) -> float:
    """The largest area that so many measured predictors would have by luck, in half of such searches."""
    measured = [w for w in candidates if w.predictor.measured]
    n, m = int(measured[0].cases.positive.sum()), int((~measured[0].cases.positive).sum())
    return 0.5 + best_by_luck(len(measured), math.sqrt((n + m + 1) / (12 * n * m)))


def verdict(candidates: Sequence[Candidate]) -> list[str]:
    """What the table says, in words that follow from its numbers."""
    measured = [w for w in candidates if w.predictor.measured]
    plain = [w for w in candidates if not w.predictor.measured]
    best, base = measured[0], plain[0]
    gap = paired(best.seeds.areas, base.seeds.areas)
    beside = ""
    if gap is not None:
        sure = "clear by a 95 % interval" if gap.clear else "not clear by a 95 % interval"
        beside = (
            f" ({gap.mean:+.2f} beside {base.predictor.name}, over {gap.n} seeds, {sure}, which does not count that "
            f"it is the largest of {len(measured)})"
        )
    text = f"The largest area of what is measured: {best.predictor.name}, with {best.seeds.area:.2f}{beside}. "
    text += (
        f"If none of the {len(measured)} told anything, and pairs were independent, the largest would be "
        f"{luck(candidates):.2f} in half of such searches."
    )
    lines = [text, ""]
    wanted = (
        f"at least {100 * WARNS[0]:g} % of the collapses caught, alarms in at most {100 * WARNS[1]:g} % of other epochs"
    )
    for what, tested in (("seeds", "seeds"), ("compositions", "methods")):
        good = [w.predictor.name for w in measured if w.warns(getattr(w, tested))]
        names = "; ".join(good) if good else "nothing that is measured"
        lines += [f"With thresholds from other {what}, these warn ({wanted}): **{names}**.", ""]
    return lines[:-1]


def share(part: int, whole: int) -> str:
    """A part of a whole, in numbers and in %; a dash for none of nothing."""
    return f"{part} of {whole} ({100 * part / whole:.0f} %)" if whole else "–"


def rows(candidates: Sequence[Candidate]) -> list[str]:
    header = ["predictor", "warns", "area, other seeds", "area within runs that collapse", "caught", "false: epochs"]
    header += ["false: runs", "other compositions: caught", "false: epochs"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for w in candidates:
        areas = list(w.seeds.areas.values())
        error = f" ± {statistics.stdev(areas):.2f}" if len(areas) > 1 else ""
        name = w.predictor.name if w.predictor.measured else f"*{w.predictor.name}*"
        cells = [name, w.rule, f"{w.seeds.area:.2f}{error}", "–" if math.isnan(w.within) else f"{w.within:.2f}"]
        cells += [share(w.seeds.caught, w.seeds.positive), share(w.seeds.false, w.seeds.negative)]
        cells.append(share(len(w.seeds.alarmed), len(w.seeds.quiet)))
        cells += [share(w.methods.caught, w.methods.positive), share(w.methods.false, w.methods.negative)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def candidates_of(records: Sequence[Record]) -> list[Candidate]:
    """Those that can be tested, the largest area first; none without collapses of two seeds."""
    pairs = pairs_of(records)
    candidates = [Candidate(p, pairs) for p in predictors(pairs)]
    candidates = [w for w in candidates if w.cases.both and w.seeds.areas]
    return sorted(candidates, key=lambda w: -w.seeds.area)


def definitions(pairs: Sequence[Pair]) -> list[str]:
    """What the columns are, and what was measured."""
    positive = sum(pair.next for pair in pairs)
    return [
        f"{len(pairs)} pairs of a run and an epoch before its collapse, {positive} of them with the collapse in the "
        "next epoch; an alarm two epochs ahead counts as a false one. *Area*: under the ROC curve, mean ± standard "
        "deviation over the seeds that were left out, with the direction chosen on the others; 0.5 tells nothing. All "
        "seeds have the same images. *Within runs that collapse*: all epochs of these runs together, with the "
        "direction of all pairs. What only tells which runs collapse is of less use there; but the epoch to be found "
        "is always the last of its run, so that whatever grows or falls with the epochs tells something. *Caught*, "
        f"*false*: an alarm is a value beyond the threshold that catches {100 * CAUGHT:g} % on the other seeds (on the "
        "right: of the other compositions, with all their seeds); *runs* are those that never collapse, with an alarm "
        "in any epoch. *Warns* has the threshold of all pairs. Changes are known from the second epoch on. In italics: "
        "what is known without measuring.",
        "",
        f"{len(QUANTITIES)} quantities, in eval mode, with the same draws after every epoch. On the first "
        f"{LOOKED_AT} held-out images: gradient alignment; the mean norm of the gradient that training's attack takes "
        "at its anchor; and under Fast-BAT's attack (its own step 1/λ), whatever the network was trained with, the "
        "coordinates of δ* not at a bound, and the norm of the exact implicit term (weight 1) over that of ∇_θ f with "
        "the cosine of the two. On all held-out images: clean, PGD-10, and training's attack (a remembered one begins "
        "at a fresh start there). On training images: the loss, and accuracy under the attack in training.",
    ]

"""What attacks and the implicit term measure: lengths of perturbations, groups of examples, directions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.ticker import MaxNLocator

from ..diagnose import (
    Deciles,
    History,
    Perturbations,
    RandomStepNorms,
    average_gradient_norm,
    deciles,
    kkt_angle,
    lemma_1,
)
from ..errors import InputError
from .style import BLUE, GREY, ORANGE, SERIES, plt, save

__all__ = ["coupling", "gradient_norms", "perturbations", "random_step"]

SHOWN = (1, 5, 10)
"""The deciles that ATAS' figure 10 shows."""


def random_step(norms: Sequence[RandomStepNorms], path: Path) -> None:
    """‖δ‖₂ of FGSM-RS by step, measured, beside Lemma 1 and FGSM's √d ε.

    norms: one measurement, or that without and that with the input range; all at the same ε and d. Bars are two
    standard errors. Raises :class:`InputError` where they are not.
    """
    if not norms or len({(norm.epsilon, norm.dimension) for norm in norms}) != 1:
        raise InputError(
            f"there are {len(norms)} measurements; at least one is needed, all at one epsilon and dimension"
        )
    epsilon, dimension = norms[0].epsilon, norms[0].dimension
    figure, axes = plt.subplots(figsize=(6.9, 4.2), layout="constrained")
    fine = [2 * epsilon * k / 200 for k in range(201)]
    # In units of √d ε, so that the figure reads alike for every radius and image size.
    unit = math.sqrt(dimension) * epsilon
    axes.axhline(1, color=GREY, linestyle="--", linewidth=1, label="FGSM, √d ε")
    axes.plot(
        [s / epsilon for s in fine],
        [lemma_1(epsilon, s, dimension) / unit for s in fine],
        color=BLUE,
        label="Lemma 1: signs independent of η",
    )
    for norm, marker, color in zip(norms, ("o", "s"), ("black", ORANGE), strict=False):
        label = "measured, " + ("inside the input range" if norm.bounded else "no input range")
        places, lengths = (norm.steps / epsilon).numpy(), (norm.mean / unit).numpy()
        bars = (2 * norm.error / unit).numpy()
        axes.errorbar(places, lengths, bars, fmt=marker, color=color, label=label, markersize=5)
    axes.axvline(1.25, color=GREY, linestyle=":", linewidth=1.2)
    low = min([1 / math.sqrt(3), *(float((norm.mean / unit).min()) for norm in norms)])
    high = max([1.0, *(float((norm.mean / unit).max()) for norm in norms)])
    axes.set(xlim=(-0.03, 2.03), ylim=(low - 0.05, high + 0.05))
    axes.annotate(
        "1.25 ε, Fast-AT's step",
        (1.25, low - 0.03),
        xytext=(-5, 0),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="bottom",
        fontsize=9,
        color=GREY,
    )
    axes.set(xlabel="step α / ε", ylabel="mean ‖δ‖₂ / (√d ε)")
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0.01, 0.88))
    axes.set_title(f"Length of FGSM-RS perturbations, ε = {epsilon:.3g}, d = {dimension:,}", fontsize=10)
    save(figure, path)


def perturbations(sizes: Perturbations, path: Path, title: str = "") -> None:
    """Histograms of |δ_i| / ε, with the part held by the input range, and of ‖δ‖₂."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    share = 100 / sizes.counts.sum().item()
    width = (sizes.edges[1] - sizes.edges[0]).item()
    places = (sizes.edges[:-1] + width / 2).tolist()
    own, at_range = ((part * share).tolist() for part in (sizes.counts - sizes.held, sizes.held))
    left.bar(places, own, 0.92 * width, color=BLUE, label="free, or at ε")
    if sizes.at_range > 0:
        # Bars of no height would leave a line on the others.
        some = [(p, h, o) for p, h, o in zip(places, at_range, own, strict=True) if h > 0.05]
        at, heights, bottoms = zip(*some, strict=True) if some else ((), (), ())
        style = {"color": "white", "edgecolor": ORANGE, "hatch": "////"}
        left.bar(at, heights, 0.92 * width, bottom=bottoms, **style, label="held by the input range")
        left.legend(frameon=False, fontsize=9, loc="upper center")
    left.set_ylim(0, 1.08 * max(a + b for a, b in zip(own, at_range, strict=True)))
    left.set(xlabel="|δ| / ε of a coordinate", ylabel="coordinates (%)", xlim=(0, 1))
    title_parts = [f"{sizes.at_bound:.1%} at ε", f"{sizes.at_zero:.1%} exactly 0"]
    if sizes.on_sphere is not None:
        title_parts.append(f"{sizes.on_sphere:.1%} of examples on the sphere")
    left.set_title(", ".join(title_parts), fontsize=10)
    low, high = sizes.norms.min().item(), sizes.norms.max().item()
    if high - low < 0.01 * high:  # all on the sphere
        low, high = 0.95 * low, 1.05 * high
    right.hist(sizes.norms.numpy(), bins=21, range=(low, high), color=BLUE, rwidth=0.92)
    right.set(xlabel="‖δ‖₂ of an example", ylabel="examples")
    right.set_title(f"mean {sizes.norms.mean():.3g}, ε = {sizes.epsilon:.3g}", fontsize=10)
    if title:
        figure.suptitle(title, fontsize=10)
    save(figure, path)


def gradient_norms(history: History, path: Path, groups: Deciles | None = None) -> None:
    """Mean gradient norm and mean step by epoch, for deciles of the average gradient norm: 1, 5, 10, the others thin.

    groups: the deciles, those of this history if not given. The steps have a panel where they vary.
    """
    groups = deciles(average_gradient_norm(history)) if groups is None else groups
    panels = [("mean ‖∇ℓ‖₂ where the last step begins", history.gradient_norm)]
    known = history.step[~history.step.isnan()]
    if len(known) and known.min() < known.max():
        panels.append(("mean step 1/λ", history.step))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(7.4 if len(panels) == 1 else 9.5, 3.7), layout="constrained", squeeze=False
    )
    epochs = range(1, len(history.gradient_norm) + 1)
    names = {1: "1st decile (smallest norms)", 5: "5th decile", 10: "10th decile (largest norms)"}
    for panel, (label, values) in zip(axes[0], panels, strict=True):
        for decile in range(1, 11):
            line = values[:, groups.rows(decile, decile)].nanmean(1).tolist()
            if decile not in SHOWN:
                panel.plot(epochs, line, color=GREY, linewidth=0.6, alpha=0.7, zorder=1)
                continue
            style = SERIES[SHOWN.index(decile)]
            every = max(1, len(epochs) // 12)
            panel.plot(epochs, line, **style._asdict(), label=names[decile], markersize=4, markevery=every)
        panel.set(xlabel="epoch", ylabel=label, ylim=(0, None))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle("Training examples by their average gradient norm", fontsize=10)
    save(figure, path)


def coupling(
    metrics: Sequence[Mapping[str, Any]], path: Path, others: Sequence[Sequence[Mapping[str, Any]]] = ()
) -> None:
    """By epoch, ‖implicit term‖ / ‖direct gradient‖, and the angle between ZeroIG's direction and the KKT one.

    metrics: the lines of a run's ``metrics.jsonl``. Both are of the epoch's means of the ratio and of the cosine
    (:func:`bilevel_at.diagnose.kkt_angle`). Raises :class:`InputError` where the run has no implicit term, or its lines
    do not say in which direction it pointed.
    others: those of the same training with other seeds; then each is a thin line, and their mean a thick one.
    """
    runs = [metrics, *others]
    if not any(line["implicit_ratio"] > 0 for lines in runs for line in lines):
        raise InputError(
            "this run has no implicit term: implicit_ratio is 0 in every epoch, so there is nothing to draw"
        )
    if not all("implicit_cosine" in line for lines in runs for line in lines):
        raise InputError("these metrics have no implicit_cosine; runs of this version record it")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.5), layout="constrained")
    for axes, quantity, color, marker in ((left, _ratio, BLUE, "o"), (right, _angle, ORANGE, "s")):
        each = [{line["epoch"]: quantity(line) for line in lines} for lines in runs]
        epochs = sorted(set.intersection(*map(set, each)))
        if others:
            for values in each:
                axes.plot(epochs, [values[epoch] for epoch in epochs], color=color, linewidth=0.7, alpha=0.5)
        mean = [fmean(values[epoch] for values in each) for epoch in epochs]
        axes.plot(epochs, mean, color=color, marker=marker, markersize=4)
    left.set(xlabel="epoch", ylabel="‖implicit term‖ / ‖∇θ f‖", yscale="log")
    right.set(xlabel="epoch", ylabel="angle of KKT to ZeroIG (degrees)", ylim=(0, None))
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(which="both", axis="y", linewidth=0.4, alpha=0.5)
    figure.suptitle("How much the implicit term changes the gradient", fontsize=10)
    save(figure, path)


def _ratio(line: Mapping[str, Any]) -> float:
    return float(line["implicit_ratio"]) if line["implicit_ratio"] > 0 else math.nan  # of a logarithmic scale


def _angle(line: Mapping[str, Any]) -> float:
    return kkt_angle(line["implicit_ratio"], line["implicit_cosine"])

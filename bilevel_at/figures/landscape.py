"""Figures of the loss around images, and of the filters of a network's first layer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import LogLocator, MaxNLocator
from torch import Tensor

from ..diagnose import Landscape, filter_norms, laplace_similarity
from ..errors import InputError
from .style import GREY, SERIES, plt, save

__all__ = ["filters", "landscapes"]

MOST_FILTERS = 8
LEAST = 1e-4
"""The least loss that has a colour of its own, as a part of the largest on the plane."""


def landscapes(landscape: Landscape, path: Path, epsilon: float | None = None, count: int = 4) -> None:
    """The first ``count`` images and their loss on the plane: contours, the decision boundary, and x in the middle.

    epsilon: the radius of the ℓ∞ ball, drawn as the diamond that it is on this plane. Colours are on a log scale,
    each panel's own, since losses differ by orders of magnitude within an image and between images.
    """
    count = min(count, len(landscape.x))
    a, b = (offsets.cpu().numpy() for offsets in (landscape.sign_offsets, landscape.random_offsets))
    figure, axes = plt.subplots(
        2,
        count,
        figsize=(max(2.45 * count + 0.4, 4.4), 4.8),
        layout="constrained",
        squeeze=False,
        height_ratios=(1, 2.6),
    )
    for place in range(count):
        picture, panel, label = axes[0, place], axes[1, place], int(landscape.y[place])
        _image(picture, landscape.x[place])
        middle = len(a) // 2
        predicted = int(landscape.predicted[place, middle, middle])
        picture.set_title(f"label {label}, says {predicted}", fontsize=9)
        loss, margin = landscape.loss[place].cpu().numpy(), landscape.margin[place].cpu().numpy()
        top = max(float(loss.max()), 1e-9)
        low = min(max(float(loss.min()), top * LEAST), top / 1.5)
        levels, below = np.geomspace(low, top * 1.0001, 17), "min" if loss.min() < low else "neither"
        filled = panel.contourf(b, a, loss, levels=levels, norm=LogNorm(low, top), cmap="viridis", extend=below)
        if margin.min() < 0 < margin.max():
            panel.contour(b, a, margin, levels=[0], colors="white", linewidths=2.6)
            panel.contour(b, a, margin, levels=[0], colors="black", linewidths=1.2)
        if epsilon is not None:
            panel.plot([0, epsilon, 0, -epsilon, 0], [epsilon, 0, -epsilon, 0, epsilon], color="white", ls=":", lw=1.3)
        panel.plot(0, 0, "o", color="white", markeredgecolor="black", markersize=6)
        panel.set(xlabel="b, along random signs", aspect="equal", xlim=(b[0], b[-1]), ylim=(a[0], a[-1]))
        panel.locator_params(nbins=5)
        panel.tick_params(labelsize=8)
        bar = figure.colorbar(filled, ax=panel, orientation="horizontal", shrink=0.95)
        decades = top / low > 30
        bar.set_ticks(LogLocator(numticks=4) if decades else [low, math.sqrt(low * top), top])
        if not decades:
            bar.ax.set_xticklabels([f"{value:.2g}" for value in (low, math.sqrt(low * top), top)])
        bar.ax.minorticks_off()
        bar.ax.tick_params(labelsize=8)
        bar.set_label("cross-entropy, log scale", fontsize=9)
    axes[1, 0].set_ylabel("a, along the gradient's signs")
    lines = ["Loss around x (dot); black line: decision boundary"]
    if epsilon is not None:
        lines.append(f"dotted: the ball of ε = {epsilon:.3g}")
    figure.suptitle(("\n" if count < 3 else "; ").join(lines), fontsize=10)
    save(figure, path)


def _image(axes: Any, x: Tensor) -> None:
    pixels = x.cpu().clamp(0, 1).numpy()
    if len(pixels) == 1:
        axes.imshow(pixels[0], cmap="gray", vmin=0, vmax=1)
    else:
        axes.imshow(pixels.transpose(1, 2, 0))
    axes.set(xticks=[], yticks=[])


def filters(history: Tensor, path: Path) -> None:
    """A first convolution before and after training, one scale for all, and its filters' norms by epoch.

    history: ``[epochs + 1, O, I, kh, kw]``. Of more than eight filters the eight of largest norm after training are
    shown, and of several channels the one of largest norm after training; the norms of the other filters are thin
    lines. Where filters are 3×3, L is their likeness to the Laplacian (:func:`laplace_similarity`).
    """
    if history.ndim != 5 or len(history) < 2:
        raise InputError(f"filters have shape {tuple(history.shape)}; before and after is [epochs + 1, O, I, kh, kw]")
    history = history.detach().cpu().float()
    norms = filter_norms(history)
    shown = norms[-1].argsort(descending=True)[:MOST_FILTERS].sort().values.tolist()
    channels = history[-1].flatten(-2).norm(dim=-1).argmax(1)
    limit = max(history[[0, -1]][:, shown].abs().max().item(), 1e-12)
    likeness = laplace_similarity(history) if history.shape[-2:] == (3, 3) else None
    figure = plt.figure(figsize=(9.5, 6.2), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(1.25, 1))
    upper, lower = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    axes = upper.subplots(2, len(shown), squeeze=False)
    drawn: Any = None
    for row, (epoch, name) in enumerate(((0, "before"), (-1, "after"))):
        for column, index in enumerate(shown):
            panel, channel = axes[row, column], int(channels[index])
            drawn = panel.imshow(history[epoch, index, channel].numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
            panel.set(xticks=[], yticks=[])
            title = f"filter {index}" + (f", channel {channel}" if history.shape[2] > 1 else "") if row == 0 else ""
            if likeness is not None:
                title += ("\n" if title else "") + f"L = {likeness[epoch, index, channel]:.2f}"
            panel.set_title(title, fontsize=9)
        axes[row, 0].set_ylabel(f"{name} training")
    upper.colorbar(drawn, ax=axes, label="weight", shrink=0.9)
    panel = lower.subplots()
    epochs = range(len(history))
    for index in range(history.shape[1]):
        if index not in shown:
            panel.plot(epochs, norms[:, index].tolist(), color=GREY, linewidth=0.6, alpha=0.6)
    for index, style in zip(shown, SERIES, strict=False):
        every = max(1, len(epochs) // 12)
        panel.plot(
            epochs, norms[:, index].tolist(), **style._asdict(), markersize=4, markevery=every, label=f"filter {index}"
        )
    panel.set(xlabel="epoch", ylabel="norm of the filter", ylim=(0, None))
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    legend = "" if likeness is None else "; L: likeness to the 3×3 Laplacian, |cos|"
    figure.suptitle(f"Filters of the first convolution before and after training{legend}", fontsize=10)
    save(figure, path)

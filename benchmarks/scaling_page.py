"""The tables and figures of ``scaling.py``."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from scaling_measure import Axis, Line

from bilevel_at.figures.style import GREY, SERIES, plt, save


def number(value: float) -> str:
    """Three significant digits, with separators where there are more before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _divided(axis: Axis, line: Line) -> bool:
    return axis.reference is not None and line.name != axis.reference and line.unit == "s"


def _counted(line: Line, point: int, below: Line, start: int) -> str:
    if line.counts is None or below.counts is None or not below.counts[start]:
        return ""
    return f" ({number(line.counts[point] / below.counts[start])})"


def _columns(axis: Axis, line: Line) -> dict[str, list[str]]:
    """Heading -> cell for each point, and for the exponents."""
    last, columns = len(axis.points) - 1, dict[str, list[str]]()
    spans = _spans(axis)
    if _divided(axis, line):
        below = axis.line(str(axis.reference))
        cells = [f"{number(line.ratio(below, i))}{_counted(line, i, below, i)}" for i in range(last + 1)]
        columns[f"{line.name} / {below.name}"] = cells + [""] * len(spans)
    elif line.unit == "MB":  # times and rates are told as ratios alone: this machine has no name
        columns[f"{line.name}, MB"] = [number(line.median(i)) for i in range(last + 1)] + [""] * len(spans)
    cells = [f"{number(line.growth(i))}{_counted(line, i, line, 0)}" for i in range(last + 1)]
    exponents = [f"{axis.exponent(line, *span):.2f}" for span in spans]
    columns[f"{line.name}, × at {axis.points[0]:,}"] = cells + exponents
    return columns


def _spans(axis: Axis) -> list[tuple[int, int]]:
    """Between which points exponents are told: the first and the last, and the last two."""
    last = len(axis.points) - 1
    return [span for span in dict.fromkeys([(0, last), (last - 1, last)]) if axis.powers and last > 0]


def table(axis: Axis) -> list[str]:
    """A row for each point, and one for each span of exponents."""
    columns = {axis.label: [f"{point:,}" for point in axis.points]}
    columns[axis.label] += [f"exponent, {axis.points[a]:,} … {axis.points[b]:,}" for a, b in _spans(axis)]
    for line in axis.lines:
        columns |= _columns(axis, line)
    rows = zip(*columns.values(), strict=True)
    return [
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def section(axis: Axis, provenance: str) -> list[str]:
    """The part of the page that an axis has, with its figure."""
    brackets = f" In brackets: the same of {axis.counted}." if axis.counted else ""
    return [
        f"## {axis.title}",
        "",
        f"{axis.about} Medians of {axis.clock} time.{brackets}",
        "",
        *table(axis),
        "",
        f"![{axis.title}: growth by {axis.label}]({figure_name(axis)})",
        "",
        provenance,
        "",
    ]


def figure_name(axis: Axis) -> str:
    return f"scaling-{axis.name}.png"


def draw(axis: Axis, folder: Path) -> None:
    """Growth from the first point, and beside it the ratios to the reference where there is one."""
    panels = 2 if axis.reference is not None else 1
    figure, grid = plt.subplots(
        1, panels, figsize=(8.6 if panels == 2 else 5.6, 3.9), layout="constrained", squeeze=False
    )
    styles = dict(zip([line.name for line in axis.lines], SERIES, strict=False))
    marked = {"markersize": 5, "linewidth": 1.6}
    left, points = grid.flat[0], range(len(axis.points))
    for line in axis.lines:
        left.plot(
            axis.points, [line.growth(i) for i in points], **styles[line.name]._asdict(), **marked, label=line.name
        )
    if axis.powers:
        _guides(left, axis)
        _title(left, f"growth, × at {axis.points[0]:,}")
    else:
        _title(left, f"{axis.lines[0].name}, × at {axis.points[0]:,}")
        left.set_ylim(0, None)
    if axis.reference is not None:
        right, below = grid.flat[1], axis.line(axis.reference)
        for line in axis.lines:
            if _divided(axis, line):
                values = [line.ratio(below, i) for i in points]
                right.plot(axis.points, values, **styles[line.name]._asdict(), **marked)
        right.axhline(1, color=GREY, linewidth=0.9, zorder=0)
        _title(right, f"{axis.clock} time / that of {axis.reference}")
    for axes in grid.flat:
        axes.set_xlabel(axis.label)
        if axis.powers:
            axes.set(xscale="log", yscale="log")
            _ticks(axes)
        axes.xaxis.set_major_locator(FixedLocator(axis.points))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e3e3e3", linewidth=0.6)
        axes.set_axisbelow(True)
    if len(axis.lines) > 1:
        figure.legend(loc="outside upper center", ncols=2 * panels, frameon=False, handlelength=3.2)
    save(figure, folder / figure_name(axis))


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10)


def _short(value: float) -> str:
    """60k in place of 60,000, which touches its neighbours."""
    return f"{value / 1000:g}k" if value and value % 1000 == 0 else f"{value:,g}"


def _ticks(axes: Axes) -> None:
    """Numbers in place of powers of ten, and others between them where they fit."""
    low, high = axes.get_ylim()
    between = {10: (1, 1.5, 2, 3, 4, 5, 7), 300: (1, 2, 5)}
    subs = next((subs for most, subs in between.items() if high / low < most), (1,))
    axes.yaxis.set_major_locator(LogLocator(10, subs=subs, numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _guides(axes: Axes, axis: Axis) -> None:
    """Straight lines of exponents 1 and 2 as far as something grows."""
    top = max(line.growth(i) for line in axis.lines for i in range(len(axis.points)))
    first, last = axis.points[0], axis.points[-1]
    for power in (1, 2):
        end = min(last, first * top ** (1 / power))
        if end > 1.05 * first:
            axes.plot([first, end], [1, (end / first) ** power], color=GREY, linewidth=0.8, linestyle=":", zorder=0)
            axes.annotate(
                f"exponent {power}",
                (end, (end / first) ** power),
                (-4, 1 if power > 1 else -7),
                textcoords="offset points",
                ha="right",
                va="bottom" if power > 1 else "top",
                color=GREY,
                fontsize=8,
                zorder=0.5,
            )

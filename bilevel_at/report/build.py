"""The page: what is compared, then one section after another."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import __version__
from ..errors import BilevelError, InputError
from ..runs.named_files import NamedFiles
from ..runs.record import Run, read_all
from .accuracy import accuracy
from .concerns import concerns
from .cost import cost, device
from .diagnosis import FIRST_IMAGES, examples_in_training, filters, implicit_term, loss_around_images, perturbations
from .groups import Group, all_runs, group
from .page import Notes, Section, page
from .pictures import pictures
from .radii import radii
from .repeat import repeat
from .settings import facts as settings_of
from .settings import settings
from .training import training

__all__ = ["SECTIONS", "default_out", "report"]

Maker = Callable[[Sequence[Group], Path], Section | None]

# A section is a function of the groups and the folder for its figures; It returns None if there is nothing to show.
SECTIONS: tuple[Maker, ...] = (
    concerns,
    accuracy,
    settings,
    training,
    radii,
    cost,
    pictures,
    loss_around_images,
    perturbations,
    implicit_term,
    examples_in_training,
    filters,
    repeat,
)
MEASURED = (loss_around_images, perturbations, filters)
"""The sections that run the networks, which takes minutes for large networks on a CPU."""


def default_out(runs: Sequence[str | Path]) -> Path:
    """``RUN/report``, or for several runs a folder ``report`` beside the first."""
    first = Path(runs[0])
    return first / "report" if len(runs) == 1 else first.resolve().parent / "report"


def report(
    runs: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    measure: bool = True,
    images: Sequence[int] = FIRST_IMAGES,
    problem_file: Sequence[str] = (),
    progress: Callable[[str], None] = lambda name: None,
) -> Path:
    """Write ``index.html``, a self-contained page, and ``figures/*.png``.

    Args:
        runs: run directories, or those of evaluated checkpoints. Runs that differ only in their seed share a row.
        out: the folder to write to, created if it does not exist; :func:`default_out` by default.
        measure: also make the sections that need the networks and the test images.
        images: positions of the test images whose loss landscapes are drawn.
        problem_file: problem files that define networks of runs; without them, these networks are not measured.
        progress: called with each section's name before it is made.

    Returns:
        The path of the page.

    Raises:
        InputError: if a run cannot be read, is given twice, or ``out`` cannot be written.
    """
    records = read_all(runs, problem_file)
    NamedFiles(problem_file).check_used(run.config for run in records)
    folder = default_out(runs) if out is None else Path(out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file; it must be a directory, or not exist")
    groups = group(records)
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # names may have characters that the font lacks
            makers = [make for make in SECTIONS if measure or make not in MEASURED]
            chosen = functools.wraps(loss_around_images)(functools.partial(loss_around_images, images=images))
            makers = [chosen if make is loss_around_images else make for make in makers]
            sections = [s for make in makers if (s := _make(make, groups, folder / "figures", progress))]
        partial, file = folder / ".index.html.partial", folder / "index.html"
        partial.unlink(missing_ok=True)  # do not write through a symbolic link
        partial.write_text(page(_title(groups), _lead(groups), _facts(records), sections), encoding="utf-8")
        os.replace(partial, file)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}") from None
    return file


def _make(make: Maker, groups: Sequence[Group], folder: Path, progress: Callable[[str], None]) -> Section | None:
    """Make a section. If its computation fails, the section contains the reason."""
    name = make.__name__.replace("_", " ")
    progress(name)
    try:
        return make(groups, folder)
    except (InputError, BilevelError) as error:
        return Section(name.capitalize(), [Notes([("Not shown:", str(error))])])


def _title(groups: Sequence[Group]) -> str:
    labels = [group.label for group in groups]
    shown = labels if len(labels) < 5 else [*labels[:3], f"{len(labels) - 3} more"]
    return "Adversarial training: " + ", ".join(shown)


def _lead(groups: Sequence[Group]) -> str:
    runs = all_runs(groups)
    if len(runs) == 1:
        return f"One {'run' if runs[0].metrics else 'checkpoint'}, {runs[0].path}."
    if len(groups) == 1:
        return f"{len(runs)} runs of one training that differ in their seed."
    return f"{len(runs)} runs of {len(groups)} trainings; runs that differ in their seed only are one row."


def _facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    facts = {
        "data": [str(run.part("options").get("data") or run.config.get("data") or "") for run in runs],
        "network": [str(run.config.get("model") or "") for run in runs],
        "threat": [str(run.threat) for run in runs if run.epsilon is not None or not run.threat.is_ball],
        "trained in": [run.feasible_set or "" for run in runs],
        **_settings(runs),
        "seeds": [_seeds(runs)],
        "trained": [_dates(runs)],
        "device": [device(run) for run in runs if "device" in run.part("machine")],
        "bilevel-at": [str(run.part("versions").get("bilevel-at") or "") for run in runs],
        "torch": [str(run.part("versions").get("torch") or "") for run in runs],
        "report by": [f"bilevel-at {__version__}"],
    }
    return [(name, text) for name, values in facts.items() if (text := ", ".join(filter(None, dict.fromkeys(values))))]


def _settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The settings that all runs share; a table has those in which trainings differ."""
    each = [settings_of(run) for run in runs]
    names = dict.fromkeys(name for known in each for name in known)
    return {name: [each[0][name]] for name in names if len({known.get(name) for known in each}) == 1}


def _dates(runs: Sequence[Run]) -> str:
    dates = sorted({str(run.config["date"]) for run in runs if run.config.get("date")})
    return dates[0] + (f" to {dates[-1]}" if len(dates) > 1 else "") if dates else ""


def _seeds(runs: Sequence[Run]) -> str:
    seeds = sorted({s for run in runs if isinstance(s := run.part("options").get("seed"), int)})
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]}–{seeds[-1]}"
    return ", ".join(map(str, seeds))

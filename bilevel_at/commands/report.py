"""Write one page about runs: ``python -m bilevel_at.report RUN [RUN ...] [--out FOLDER]``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rich.console import Console

from ..errors import InputError
from . import flags
from .options import arranged

__all__ = ["PROG", "command"]

PROG = "bilevel_at.report"
ABOUT = "One self-contained HTML page about runs, and its figures as PNG files."
EXAMPLES = f"""examples:
  python -m {PROG} runs/fastbat-digits-seed0
  python -m {PROG} runs/fastbat-digits-seed* runs/minmax-digits-seed* --out comparison"""


def _options(
    out: str | None = None,
    measure: bool = True,
    images: tuple[int, ...] = (0, 1, 2, 3),
    problem_file: tuple[str, ...] = (),
) -> None:
    """The flags.

    out: folder for index.html and figures/; RUN/report if not given, for several runs a folder report beside the first.
    images: positions of the test images whose loss landscapes are drawn.
    measure: also what needs the networks: loss landscapes, sizes of perturbations.
    problem_file: the problem file that defines the network of a run; it is run. Without it such networks are left out.
    """


def command(args: Sequence[str]) -> int:
    """Run the command, and return exit status 0.

    Raises:
        InputError: if the arguments are invalid.
    """
    runs = list(itertools.takewhile(lambda word: not word.startswith("-"), args))
    usage = f"python -m {PROG} RUN [RUN ...]"
    known = arranged(flags.flags_of(_options), {}, "")
    options = flags.parse(known, list(args[len(runs) :]), usage, ABOUT, epilogue=lambda: EXAMPLES)
    if not runs:
        raise InputError(f"no run is given: {usage} [--out FOLDER]; runs come before flags")
    from ..report.build import report  # here: --help needs no matplotlib

    console = Console()
    with console.status("reading") as status:
        page = report(runs, **options, progress=lambda name: status.update(f"report: {name}"))
    console.print(
        f"{page}; its figures as PNG files in {page.parent / 'figures'}", highlight=False, markup=False, soft_wrap=True
    )
    return 0

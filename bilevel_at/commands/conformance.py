"""Compare hypergradients with closed forms: ``python -m bilevel_at.conformance [--json FILE] [--markdown FILE]``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..errors import BilevelError, one_of
from . import flags

__all__ = ["PROG", "command"]

PROG = "bilevel_at.conformance"
ABOUT = (
    "Hypergradients of small problems with closed forms, by this library's solvers and by hypertorch's, JAXopt's, "
    "Betty's and BOAT's where they are installed: relative error against products with second derivatives."
)


def _options(json: str | None = None, markdown: str | None = None, libraries: tuple[str, ...] = ()) -> None:
    """The flags.

    json: write everything that was measured to this file.
    markdown: write a page to this file, and its figure beside it as a PNG.
    libraries: only these, of bilevel-at, hypertorch, JAXopt, Betty and BOAT; all if not given.
    """


def command(args: Sequence[str]) -> int:
    """Run the command, and return exit status 0.

    Raises:
        InputError: if the arguments are invalid.
        BilevelError: where an exact solver of this library's is not exact.
    """
    options = flags.parse(flags.flags_of(_options), args, f"python -m {PROG}", ABOUT)
    from ..conformance.measure import EXACT, LIBRARIES, measure  # here: they import torch, which --help does without

    names = options["libraries"] or tuple(LIBRARIES)
    for name in names:
        one_of("--libraries", name, tuple(LIBRARIES))
    console = Console()
    with console.status("measuring") as status:
        found = measure(names, lambda text: status.update(text))
    from . import conformance_page as page

    for problem, formula in found.problems.items():
        title = f"{problem}: g = {formula}"
        table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1))
        table.add_column("error within n products")
        for heading in page.HEADINGS[2:]:
            table.add_column(
                heading.replace("products to", "to").replace(" products", ""), justify="right", no_wrap=True
            )
        for row in found.rows:
            if row.problem == problem:
                library, method, *numbers = page.cells(row)
                table.add_row(f"{library}: {method}", *numbers)
        console.print(table, highlight=False)
        console.print()
    for line in page.remarks(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if options["json"]:
        path = Path(options["json"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**page.provenance(), **found.as_json()}) + "\n", encoding="utf-8")
    if options["markdown"]:
        page.write(found, Path(options["markdown"]), args)
    wrong = [row for row in found.rows if row.library == "bilevel-at" and row.exact and not row.last.error <= EXACT]
    if wrong:
        which = ", ".join(f"{row.method} on {row.problem} ({row.last.error:.0e})" for row in wrong)
        raise BilevelError(f"not exact: {which}")
    return 0

"""A progress bar on a terminal, for what takes minutes; nothing where there is no terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

__all__ = ["bar"]


@contextlib.contextmanager
def bar(label: str, total: int | None, to_stderr: bool = False) -> Iterator[Callable[[int], None]]:
    """Yields ``advance(n)``. ``total`` is None where it is not known."""
    from rich.console import Console  # here, because recipes import this package and must stay light
    from rich.progress import Progress

    console = Console(stderr=to_stderr)
    # No thread refreshes the bar: processes may be about to be forked.
    with Progress(console=console, disable=not console.is_terminal, auto_refresh=False) as progress:
        task = progress.add_task(label, total=total)
        yield lambda n: progress.update(task, advance=n, refresh=True)

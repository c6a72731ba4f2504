"""Files of JSON lines, one for each run, and runs side by side that add to them."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bilevel_at.errors import BilevelError

__all__ = ["Record", "Task", "read", "side_by_side", "write"]

Record = dict[str, Any]
Task = tuple[str, tuple[Any, ...]]
"""The key of a line, and the arguments of what makes it."""


def read(path: Path) -> dict[str, Record]:
    """The lines of a file by key; none where there is no file."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["key"]: line for line in lines}


def write(path: Path, records: Mapping[str, Record]) -> None:
    text = "".join(json.dumps(records[key], ensure_ascii=False) + "\n" for key in sorted(records))
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def side_by_side(
    perform: Callable[..., Record],
    groups: Iterable[Sequence[Task]],
    path: Path,
    total: int,
    jobs: int | None = None,
) -> None:
    """Add the line ``perform(*arguments)`` of each task to the file, in processes side by side.

    Args:
        perform: makes a line; a function of a module, since it is called in another process.
        groups: a group begins when the one before it has ended.
        path: the file of lines, rewritten after each.
        total: runs there are to be at the end, for the bar.
        jobs: processes; one for each core if not given.

    Raises:
        BilevelError: after all others are done, where one could not be; at once where a process was killed.
    """
    groups = [list(group) for group in groups]
    todo = sum(map(len, groups))
    if not todo:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    # A killed parent would leave its processes training; leaving the block below ends them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console()) as progress, _processes(jobs) as pool:
        bar = progress.add_task("runs", total=total, completed=total - todo)
        for group in groups:
            for future in as_completed([pool.submit(_attempt, perform, key, arguments) for key, arguments in group]):
                key, record, failure = future.result()
                if record is None:
                    failures.append(failure)
                    continue
                write(path, read(path) | {key: record})  # another command may have written meanwhile
                progress.update(bar, advance=1, description=f"done: {key}")
    if failures:
        raise BilevelError("; ".join(failures))


@contextlib.contextmanager
def _processes(jobs: int | None) -> Iterator[ProcessPoolExecutor]:
    """Processes to work in, which end with the block, however it is left."""
    pool = ProcessPoolExecutor(jobs or os.cpu_count(), multiprocessing.get_context("spawn"))
    try:
        yield pool
    except BrokenProcessPool:
        raise BilevelError(
            "a process was killed, perhaps for want of memory; what is done has its line, so give the same command "
            "again, with fewer --jobs"
        ) from None
    finally:
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(cancel_futures=True)


def _attempt(perform: Callable[..., Record], key: str, arguments: tuple[Any, ...]) -> tuple[str, Record | None, str]:
    try:
        return key, perform(*arguments), ""
    except Exception as error:  # of any kind: the other runs go on, and its text is raised after them
        return key, None, f"{key}: {type(error).__name__}: {error}"

"""The progress of attacks: a bar with images done and time left, or a line now and then where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from torch import nn

from .. import shares
from ..evaluate.attacks import Attack
from ..evaluate.result import Score
from ..evaluate.robust import Trace
from ..evaluate.stages import OnSurrogate, passes
from ..runs.evaluations import Store

__all__ = ["AttackBars", "Pace", "remaining"]

LINE_EVERY = 60.0  # seconds between lines where there is no terminal
DRAW_EVERY = 0.2


def remaining(seconds: float) -> str:
    """``0:41:05 left``, or nothing where it is not known."""
    if not 0 <= seconds < 1e7:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} left"


class Pace:
    """How far an attack has come, and when it may end.

    Work is counted in gradients of images. Of the images whose fate in the stage is not known, the share that stands so
    far is taken to reach the next stage.

    Args:
        attack: the attack.
        trace: its state; it changes as the attack goes on.
        classes: of the network.
        batch_size: images in a batch.
        clock: the time in seconds.
    """

    def __init__(
        self,
        attack: Attack,
        trace: Trace,
        classes: int,
        batch_size: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.trace, self.clock = trace, clock
        self.names = ["clean", *(stage.name for stage in attack.stages)]
        self._work = [1, *(passes(stage, classes) for stage in attack.stages)]
        self._batches = [batch_size, *(max(1, batch_size // stage.rows(classes)) for stage in attack.stages)]
        self._began, self._before = clock(), 0.0  # of the current stage, and what it had done by then
        self.rate = 0.0  # gradients of images in a second
        self.stage = self.done = self.images = self.standing = 0
        self._inside = 0.0
        self.see()
        self._before = self.done * self._work[self.stage]

    def see(self) -> None:
        """Look at the trace, after a batch."""
        if self.trace.stage != self.stage:
            self._began, self._before = self.clock(), 0.0
        self.stage = min(self.trace.stage, len(self._work) - 1)
        self.images = len(self.trace.rows())
        self.done = min(self.images, self.trace.batch * self._batches[self.stage])
        self.standing = int(self.trace.correct.sum())
        self._inside = 0.0
        self._measure()

    def tick(self, gradients: float) -> None:
        """Count gradients of images that the batch at hand has taken."""
        if self.trace.stage != self.stage:
            self.see()
        self._inside += gradients * shares.count()  # the others are as far as this process
        self._measure()

    def _measure(self) -> None:
        work = self._done() - self._before
        elapsed = self.clock() - self._began
        if work > 0 and elapsed > 0:
            self.rate = work / elapsed

    def _done(self) -> float:
        """The work done in this stage; what the batch at hand has had counts up to its end."""
        batch = min(self._batches[self.stage] * shares.count(), self.images - self.done) * self._work[self.stage]
        return self.done * self._work[self.stage] + min(self._inside, batch)

    @property
    def left(self) -> float:
        """The work that is left."""
        lost = self.images - (self.standing if self.stage else self.images)  # by this stage
        share = 1 - lost / self.done if self.done and self.stage else 1.0
        later = self.images * share * sum(self._work[self.stage + 1 :])
        return self.images * self._work[self.stage] - self._done() + later

    @property
    def share(self) -> float:
        """The share of the attack that is done, by images: of this stage, and of all stages."""
        done = sum(self._work[: self.stage]) + (self._done() / self.images if self.images else 0.0)
        return done / sum(self._work)

    @property
    def seconds_left(self) -> float:
        """NaN while it is not known."""
        return self.left / self.rate if self.rate and self.stage else float("nan")

    def __str__(self) -> str:
        stage = self.names[self.stage]
        of = len(self.names) - 1
        stage = f"{stage} of {of}" if stage == f"start {self.stage}" and of > 1 else stage
        standing = f"{self.standing / len(self.trace.broken):.1%} standing" if self.stage else ""
        parts = [f"{self.done:,}/{self.images:,} images", stage, standing, remaining(self.seconds_left)]
        return "  ".join(part for part in parts if part)


class AttackBars:
    """Shows each attack while it is made. As a context, it draws on the console.

    Args:
        console: a terminal, or not.
        line_every: seconds between lines where the console is not one.
    """

    def __init__(self, console: Console, line_every: float = LINE_EVERY) -> None:
        self.console, self.line_every = console, line_every
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=12), TextColumn("{task.fields[shown]}"))
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._next = 0.0

    def __enter__(self) -> AttackBars:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    @contextmanager
    def bar(self, description: str) -> Iterator[Callable[..., None]]:
        """A bar while the block runs; what it gives is called with ``shown=`` text and, if it is known, ``share=``."""
        task = self.progress.add_task(escape(description), total=None, shown="")

        def update(shown: str, share: float | None = None) -> None:
            if share is None:
                self.progress.update(task, shown=escape(shown))
            else:
                self.progress.update(task, total=1.0, completed=share, shown=escape(shown))

        try:
            yield update
        finally:
            self.progress.remove_task(TaskID(task))

    def score(self, store: Store, attack: Attack, again: bool = False) -> tuple[str, Score]:
        """:meth:`Store.score`, shown."""
        label = f"{store.which.replace('_', ' ')}: {attack.name}"
        with self.bar(label) as update:
            view = _View(self, label, update)

            def begun(name: str, trace: Trace) -> None:
                view.pace = Pace(attack, trace, store.images.classes, store.batch_size)
                view.show()

            def after_a_batch(*_: Any) -> None:
                if view.pace is not None:
                    view.pace.see()
                    view.show()

            surrogates = [stage.surrogate for stage in attack.stages[:1] if isinstance(stage, OnSurrogate)]
            with _counted([store.model, *surrogates], view.tick):
                return store.score(attack, after_a_batch, again, begun)


class _View:
    """What is shown of one attack."""

    def __init__(self, bars: AttackBars, label: str, update: Callable[..., None]) -> None:
        self.bars, self.label, self.update = bars, label, update
        self.pace: Pace | None = None
        self._drawn = -DRAW_EVERY
        self._line = time.monotonic()

    def tick(self, gradients: float) -> None:
        if self.pace is not None:
            self.pace.tick(gradients)
            if time.monotonic() - self._drawn >= DRAW_EVERY:
                self.show()

    def show(self) -> None:
        assert self.pace is not None
        self._drawn = time.monotonic()
        if self.bars.console.is_terminal:
            self.update(str(self.pace), self.pace.share)
        elif self._drawn - self._line >= self.bars.line_every:
            self._line = self._drawn
            self.bars.console.print(f"{self.label}  {self.pace}", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _counted(networks: list[nn.Module], tick: Callable[[float], None]) -> Iterator[None]:
    """Call ``tick`` with the work of each forward pass: a gradient is a forward pass and a backward pass of twice it.

    A batch of an attack may take a quarter of an hour on a CPU, so that batches alone would not show that it lives.
    """

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], torch.Tensor):
            tick(len(inputs[0]) * (1.0 if torch.is_grad_enabled() else 1 / 3))

    handles = [network.register_forward_pre_hook(hook) for network in networks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""Image sets too large for memory: files, decoded when they are needed."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import BilevelError, InputError, printable
from .decoding import decoded
from .sets import ImageSet

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Files", "Streamed", "default_workers", "evaluation_view"]

SIZE = 224

View = Callable[["Image", int], Tensor]
"""(an RGB image, its position in the set) ↦ uint8 ``[3, H, W]``."""


def default_workers() -> int:
    """As many as this process has CPUs, at most 8."""
    has = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, has or 1)


@functools.cache
def _transform(kind: str) -> Callable[[Image], Tensor]:
    from torchvision import transforms as t  # here: importing torchvision takes a second

    crop = {
        "evaluation": [t.Resize(256), t.CenterCrop(SIZE)],
        "training": [t.RandomResizedCrop(SIZE), t.RandomHorizontalFlip()],
    }
    transform: Callable[[Image], Tensor] = t.Compose([*crop[kind], t.PILToTensor()])
    return transform


def evaluation_view(image: Image, position: int = 0) -> Tensor:
    """The shorter side resized to 256, then the 224×224 in the middle; the same wherever the image stands."""
    return _transform("evaluation")(image)


@dataclass(frozen=True)
class ResizedCropFlip:
    """torchvision's RandomResizedCrop(224) and a fair flip, drawn from (seed, epoch, position) alone."""

    seed: int
    epoch: int

    def __call__(self, image: Image, position: int) -> Tensor:
        words = np.random.SeedSequence((self.seed % 2**64, self.epoch, position)).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(int(words[0]))
            return _transform("training")(image)


class Files(Dataset[Any]):
    """The files ``root / name``, decoded to RGB and seen through ``view``.

    names: ``[N]`` bytes with forward slashes, one array: a million strings would be copied into every worker as it
    looks at them.
    """

    def __init__(self, root: Path, names: np.ndarray, view: View) -> None:
        self.root, self.names, self.view = root, names, view

    def path(self, position: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[position]))

    def image(self, position: int) -> np.ndarray:
        """uint8 ``[3, H, W]``. Raises :class:`InputError`, naming the file, where there is no image."""
        x = self.image_of_size(position)
        assert x is not None
        return x

    def image_of_size(self, position: int, large: bool = True) -> np.ndarray | None:
        """The same; without ``large``, None where the file has a large image."""
        path = self.path(position)
        try:
            x = decoded(path, lambda image: self.view(image, position), large)
            return None if x is None else x.numpy()
        except Exception as error:  # Pillow has many, for what is not an image or not a whole one
            message = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{printable(path)} cannot be read as an image: {printable(message[:200])}") from None

    def __getitem__(self, positions: Sequence[int]) -> Tensor | InputError:
        """uint8 ``[B, 3, H, W]``; a mistake is returned, as one raised in a worker would come with its traceback."""
        try:
            return torch.from_numpy(np.stack([self.image(i) for i in positions]))
        except InputError as error:
            return error

    def batches(self, positions: Sequence[list[int]], workers: int, pin: bool = False) -> Iterator[Tensor]:
        """The batches at ``positions``, in order, decoded by ``workers`` processes (0: by this one).

        Raises :class:`InputError` as :meth:`image` does, and :class:`BilevelError` where one of them is killed.
        """
        batches = self._batches(positions, workers, pin)
        _unfinished.add(batches)
        return batches

    def _batches(self, positions: Sequence[list[int]], workers: int, pin: bool) -> Generator[Tensor, None, None]:
        loader = DataLoader(
            self,
            batch_size=None,  # a sample is a whole batch
            sampler=positions,
            num_workers=min(workers, len(positions)),
            pin_memory=pin,
            worker_init_fn=_settle,
            generator=torch.Generator(),  # or it would draw from the global one
        )
        with _interrupts_wait():
            batches = iter(loader)
        try:
            while True:
                try:
                    with _interrupts_wait():
                        x = next(batches, None)
                except (RuntimeError, OSError, EOFError):
                    # Of a process that is killed torch says one or another, by what it was sending. It has closed its
                    # files a moment before it has ended.
                    ends = [worker.sentinel for worker in getattr(batches, "_workers", ())]
                    if not ends or not wait(ends, timeout=5):
                        raise
                    raise BilevelError(
                        "a process that decodes images was killed, perhaps for want of memory; fewer workers need less"
                    ) from None
                if x is None:
                    return
                if isinstance(x, InputError):
                    raise x
                yield x
        finally:
            # Ends the workers. A mistake refers to this frame and this frame to the mistake: without this, they would
            # be left over until the end of the process, which would then wait for them for ever. Where a worker was
            # killed, torch's error refers to the others, which heed the second SIGTERM and would get one.
            getattr(batches, "_shutdown_workers", lambda: None)()
            for worker in getattr(batches, "_workers", ()):
                worker.kill()
            del batches


_unfinished: weakref.WeakSet[Generator[Tensor, None, None]] = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """Before Python's own end of processes, which asks workers once, and then waits for them: they heed the second."""
    for batches in list(_unfinished):
        batches.close()


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C is acted on when the block is over, and a second one at once.

    As a process forks, Python would lose it or end the new process. As a batch is fetched, it could leave a lock of the
    queue to the workers taken, on which the process would then wait for ever instead of ending.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def wait(number: int, frame: FrameType | None) -> None:
        came.append(number)
        for _ in came if len(came) > 1 else ():  # a handler may note the first and act on the second
            handler(number, frame)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if len(came) == 1:
            signal.raise_signal(signal.SIGINT)


def _settle(worker: int) -> None:
    # What reaches every process of a terminal or a job is for the parent to act on, which may need a batch to save.
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) > 1:  # torch and multiprocessing end a worker that is left over by one SIGTERM each
            os._exit(0)

    signal.signal(signal.SIGTERM, ask)
    sys.excepthook = lambda *error: None  # of the thread that was handing over a batch when the parent was interrupted
    warnings.filterwarnings("ignore", module="PIL")  # of a few ImageNet files' odd EXIF, once in every worker


@dataclass(frozen=True, eq=False)
class Streamed(ImageSet):
    """An image set that stays in its files.

    root, names: file i is ``root / names[i]``; names are bytes, ``[N]``, with forward slashes.
    y: labels ``[N]``, int64. workers: how many files are decoded at a time; 0 is none beside this process.

    :meth:`pixels` is the view for evaluation (shorter side to 256, 224×224 in the middle), decoded by threads;
    :class:`~bilevel_at.data.Loader` has the one for training. Both raise :class:`InputError` for a file that is no
    image. What is not RGB becomes so.
    """

    root: Path
    names: np.ndarray
    y: Tensor
    classes: int
    workers: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, SIZE, SIZE

    def files(self, view: View = evaluation_view) -> Files:
        """The files as ``view`` sees them."""
        return Files(self.root, self.names, view)

    def __getitem__(self, rows: Tensor | slice) -> Streamed:
        names = self.names[rows.cpu().numpy() if isinstance(rows, Tensor) else rows]
        return Streamed(self.root, names, self.y[rows], self.classes, self.workers)

    def pixels(self) -> Tensor:
        files, x = self.files(), np.empty((len(self), *self.shape), dtype=np.uint8)
        # Pillow lets other threads run as it decodes. Arrays: torch would copy each image with threads of its own.
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            for i, image in enumerate(pool.map(partial(files.image_of_size, large=False), range(len(self)))):
                x[i] = files.image(i) if image is None else image  # a large one, of up to 700 MB, by this thread
        return torch.from_numpy(x).to(self.device).float() / 255

    def to(self, device: torch.device | str) -> Streamed:
        return Streamed(self.root, self.names, self.y.to(device), self.classes, self.workers)

    def sha256(self) -> str:
        """Of the files' names, sizes and labels: to read them all would take hours."""
        digest, files = hashlib.sha256(), self.files()
        for i, (name, label) in enumerate(zip(self.names.tolist(), self.y.tolist(), strict=True)):
            digest.update(b"%s\0%d\0%d\n" % (name, os.stat(files.path(i)).st_size, label))
        return digest.hexdigest()

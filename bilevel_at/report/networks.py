"""The networks and test images of the runs, for sections that measure something of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import nn

from ..constraints import L2Ball, LinfBall
from ..data import ImageSet, load_data
from ..errors import InputError
from ..evaluate import ball
from ..runs.named_files import NamedFiles
from ..runs.networks import Which
from ..runs.record import Run
from .groups import Group

__all__ = ["MOST", "Subject", "Subjects", "subjects"]

MOST = 3  # the largest number of measured groups


@dataclass(frozen=True)
class Subject:
    """The first run of a group: its network, a checkpoint's name, test images, and the ball of its threat model."""

    group: Group
    run: Run
    which: str
    model: nn.Module
    images: ImageSet
    space: LinfBall | L2Ball

    @property
    def said(self) -> str:
        return f"{self.group.of_first}, {self.which.replace('_', ' ')} epoch"

    @property
    def threat(self) -> str:
        """The ball in words, ``ℓ∞, ε = 8/255``."""
        return str(self.group.threat)

    def checkpoints(self) -> Iterator[tuple[str, Iterator[nn.Module]]]:
        """Yield the name of every saved checkpoint of the first run, and the networks of all seeds that have it."""
        for which in get_args(Which):
            if which in self.run.checkpoints:
                yield which, self._of_all_seeds(which)

    def _of_all_seeds(self, which: Which) -> Iterator[nn.Module]:
        for run in self.group.runs:
            if run is self.run and which == self.which:
                yield self.model
            elif which in run.checkpoints:
                yield NamedFiles(run.problem_files).load(run.path, which).to(self.images.device)


class Subjects(NamedTuple):
    """The measured networks, a sentence on each omission, and whether a network could not be loaded or measured."""

    measured: list[Subject]
    left_out: list[str]
    unusable: bool


def subjects(groups: Sequence[Group]) -> Subjects:
    """The first groups with a checkpoint, a ball and test images. Of several seeds, the first is measured."""
    measured, missing = _looked_at(groups)
    beyond = [g.label for g in groups if any(r.metrics for r in g.runs)]
    beyond = [label for label in beyond if label not in {s.group.label for s in measured} | set(missing)]
    left_out = [f"Not measured: {label}: {why}." for label, why in missing.items()]
    if beyond:
        left_out.append(f"Not measured: {', '.join(beyond)}; the first {MOST} trainings with a ball are.")
    return Subjects(measured, left_out, bool(missing))


def _looked_at(groups: Sequence[Group]) -> tuple[list[Subject], dict[str, str]]:
    measured: list[Subject] = []
    missing: dict[str, str] = {}
    for group in groups:
        run, which = group.runs[0], group.main if group.main in ("best", "last", "last_good") else "best"
        if run.metrics and not run.threat.is_ball:
            missing[group.label] = f"these measurements are of balls, and the threat is {run.threat.name}"
        if len(measured) == MOST or not run.metrics or run.norm is None or not run.epsilon:
            continue
        if which in run.checkpoints:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            options = run.part("options")
            try:
                model = NamedFiles(run.problem_files).load(run.path, which).to(device)  # type: ignore[arg-type]  # one of three
                images = _images(str(options.get("data")), str(options.get("data_dir") or "data")).to(device)
                measured.append(Subject(group, run, which, model, images, ball(run.norm, run.epsilon)))
            except InputError as error:
                missing[group.label] = str(error)
    return measured, missing


@functools.lru_cache(maxsize=4)
def _images(data: str, data_dir: str) -> ImageSet:
    return load_data(data, data_dir, download=False)[1]

"""The networks and test images of the runs, for sections that measure something of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..constraints import L2Ball, LinfBall
from ..data import ImageSet, load_data
from ..evaluate import ball
from ..train import load
from .groups import Group
from .runs import Run

__all__ = ["MOST", "Subject", "subjects"]

MOST = 3  # groups that are measured: figures of each


@dataclass(frozen=True)
class Subject:
    """The first run of a group: its network, a checkpoint's name, test images, and the ball it was trained in."""

    group: Group
    run: Run
    which: str
    model: nn.Module
    images: ImageSet
    space: LinfBall | L2Ball

    @property
    def said(self) -> str:
        return f"{self.group.label}, {self.which.replace('_', ' ')} epoch"


def subjects(groups: Sequence[Group]) -> list[Subject]:
    """Of the first groups that have a checkpoint and a ball; :class:`InputError` where their images are not there."""
    found: list[Subject] = []
    for group in groups:
        run, which = group.runs[0], group.main if group.main in ("best", "last", "last_good") else "best"
        if len(found) == MOST or not run.metrics or run.norm is None or not run.epsilon:
            continue
        if (run.path / f"{which}.pt").is_file():
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            model = load(run.path, which).to(device)  # type: ignore[arg-type]  # one of the three names
            options = run.part("options")
            images = _images(str(options.get("data")), str(options.get("data_dir") or "data")).to(device)
            found.append(Subject(group, run, which, model, images, ball(run.norm, run.epsilon)))
    return found


@functools.lru_cache(maxsize=4)
def _images(data: str, data_dir: str) -> ImageSet:
    return load_data(data, data_dir, download=False)[1]

"""docs/beyond_images.md, run: six problems that are no images with classes, each against central differences."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "beyond_images.md"
SECTIONS = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)
BLOCKS = {
    section.split("\n")[0]: re.findall(r"^```python\n(.*?)^```", section, flags=re.M | re.S) for section in SECTIONS
}
PREAMBLE = BLOCKS.pop(SECTIONS[0].split("\n")[0])[0]


def run(title):
    """The names that a section's code defines."""
    names = {}
    exec(compile(PREAMBLE + "\n" + BLOCKS[title][0], str(PAGE), "exec"), names)
    return names


@pytest.mark.parametrize("title", BLOCKS)
def test_the_hypergradient_is_right(title):
    assert run(title)["problem"]


@pytest.mark.parametrize("title", BLOCKS)
def test_it_takes_at_most_thirty_lines(title):
    (code,) = BLOCKS[title]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30


def test_there_are_six_problems_and_a_loop():
    assert len(BLOCKS) == 7 and "Train, and attack" in BLOCKS


@pytest.mark.parametrize("title", [title for title in BLOCKS if "N-FGSM" not in title and "Train" not in title])
def test_the_implicit_term_counts(title):
    """Otherwise the check would pass without it."""
    names = run(title)
    solver = names["HessianFreeKKT"]() if "embeddings" in title else names["FullKKT"]()
    sizes = {
        "Tabular": (5, 8, 1),
        "One pert": (5, 8, 3),
        "A patch": (16, 8, 3),
        "A lower": (5, 8, 4),
    }
    model = names.get("model") or names["network"](*next(s for start, s in sizes.items() if title.startswith(start)))
    step = solver.hypergradient(names["problem"], model, names["batch"], generator=torch.Generator().manual_seed(0))
    assert step.implicit_norm > 1e-3 * step.direct_norm


def test_the_perturbations_of_n_fgsm_leave_the_ball_and_not_the_range():
    names = run(next(title for title in BLOCKS if "N-FGSM" in title))
    problem, batch = names["problem"], names["batch"]
    solution = problem.lower.solve(names["network"](5, 8, 3), batch, generator=torch.Generator().manual_seed(0))
    attacked = batch.x + solution.delta
    assert solution.delta.abs().max() > problem.threat.radius * 1.5
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert problem.threat.radius == 8 / 255

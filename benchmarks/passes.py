"""What a training step costs here and in the authors' own code: docs/results/passes.md.

    python benchmarks/passes.py [--repeats 5] [--write docs/results/passes.md]

Operations of a step on PreActResNet-18, counted by torch, and processor time on the catalogue's small residual network,
both as multiples of a step of standard training. The authors' side makes the passes that their published training loop
makes, in its order, and nothing between them; their look at the training accuracy is left out. Two minutes on one core.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from pages import at_least_one, show
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

import bilevel_at as ba
from bilevel_at.commands import flags
from bilevel_at.diagnose.counting import operations
from bilevel_at.models import build_model
from bilevel_at.problems import atas, fastat, fastbat, gradalign, minmax, remembered_fastbat, standard, trades
from bilevel_at.solvers import HessianFreeKKT, ZeroIG


class Passes:
    """The kinds of passes that loops are made of; forward 1, backward to the input 1, to the parameters too 2."""

    def __init__(self, model: nn.Module, batch: ba.Batch) -> None:
        self.model, self.batch = model, batch

    def forward(self) -> Tensor:
        """One pass with a graph to the parameters, as one that is not in ``no_grad`` has: 1."""
        out: Tensor = self.model(self.batch.x)
        return out

    def to_input(self, graph: bool = False) -> Tensor:
        """∇_δ of the loss by ``autograd.grad``: 2."""
        delta = torch.zeros_like(self.batch.x, requires_grad=True)
        loss = F.cross_entropy(self.model(self.batch.x + delta), self.batch.y)
        return torch.autograd.grad(loss, delta, create_graph=graph)[0]

    def to_all(self, passes: int = 1) -> None:
        """``passes`` forward passes and one ``backward`` through them, to the parameters: 3 each."""
        torch.stack([F.cross_entropy(self.forward(), self.batch.y) for _ in range(passes)]).sum().backward()

    def to_input_by_backward(self) -> None:
        """∇_δ by ``backward``, which computes the parameters' gradients too: 3."""
        delta = torch.zeros_like(self.batch.x, requires_grad=True)
        F.cross_entropy(self.model(self.batch.x + delta), self.batch.y).backward()

    def again(self, gradient: Tensor) -> None:
        """The backward pass of an input gradient, to the parameters: 4."""
        gradient.sum().backward()


def fast_at(p: Passes) -> None:
    p.to_input_by_backward()
    p.to_all()


def pgd(p: Passes) -> None:
    for _ in range(10):
        p.to_input_by_backward()
    p.to_all()


def adaptive(p: Passes) -> None:
    p.to_input()
    p.to_all()


def fast_bat(p: Passes) -> None:
    p.to_input(graph=True)  # the start is differentiated with a graph too, which is never used
    slope = p.to_input(graph=True)
    for parameter in p.model.parameters():
        parameter.requires_grad_(False)
    p.to_input_by_backward()  # v at δ*, to the input alone
    for parameter in p.model.parameters():
        parameter.requires_grad_(True)
    p.again(slope)
    p.to_all()  # δ* for the second time


def grad_align(p: Passes) -> None:
    p.to_input(graph=True)
    slope = p.to_input(graph=True)
    p.to_all()
    p.again(slope)


def grad_align_of_fast_bat(p: Passes) -> None:
    p.to_input(graph=True)
    p.to_input(graph=True)  # the clean gradient for the second time
    slope = p.to_input(graph=True)
    p.to_all()
    p.again(slope)


def trades_by_authors(p: Passes) -> None:
    for _ in range(10):
        p.forward()  # the clean prediction in every step
        p.to_input()
    p.to_all(3)  # clean, attacked, clean


class Row(NamedTuple):
    """A method: its problem and solver here, the passes of its authors' step, and where they were read."""

    problem: ba.BilevelProblem
    solver: ba.Solver
    theirs: Callable[[Passes], None] | None = None
    source: str = ""


def rows() -> dict[str, Row]:
    """The table, by the method's name."""
    return {
        "standard": Row(standard.problem(), ZeroIG(), Passes.to_all, "any"),
        "Fast-AT": Row(fastat.problem(), ZeroIG(), fast_at, "locuslab/fast_adversarial 1d94c4e, train_fgsm.py"),
        "PGD-10": Row(minmax.problem(), ZeroIG(), pgd, "locuslab/fast_adversarial 1d94c4e, train_pgd.py"),
        "ATAS": Row(atas.problem(), ZeroIG(), adaptive, "HuangZhiChao95/ATAS 11b1e52, ATAS.py"),
        "Fast-BAT": Row(fastbat.problem(), HessianFreeKKT(), fast_bat, "OPTML-Group/Fast-BAT 0124201, trainer.py"),
        "Fast-BAT, merged": Row(fastbat.problem(), HessianFreeKKT(0.1, cross_at="merged")),
        "Fast-BAT from remembered anchors": Row(remembered_fastbat.problem(), HessianFreeKKT()),
        "Fast-BAT without its term": Row(fastbat.problem(), ZeroIG()),
        "GradAlign": Row(
            gradalign.problem(), ZeroIG(), grad_align, "tml-epfl/understanding-fast-adv-training 250265e, train.py"
        ),
        "GradAlign in Fast-BAT's repository": Row(
            gradalign.problem(), ZeroIG(), grad_align_of_fast_bat, "OPTML-Group/Fast-BAT 0124201, trainer.py"
        ),
        "TRADES": Row(trades.problem(), ZeroIG(), trades_by_authors, "yaodongyu/TRADES 0195ed4, trades.py"),
    }


Step = Callable[[nn.Module, ba.Batch], object]


def steps(row: Row) -> tuple[Step, Step | None]:
    """(our step, theirs)."""
    theirs = row.theirs

    def their_step(model: nn.Module, batch: ba.Batch) -> None:
        assert theirs is not None
        theirs(Passes(model, batch))

    def our_step(model: nn.Module, batch: ba.Batch) -> object:
        return row.solver.backward(row.problem, model, batch)

    return our_step, None if theirs is None else their_step


def scene(model: str, size: int) -> tuple[nn.Module, ba.Batch]:
    torch.manual_seed(0)
    x, y = torch.rand(size, 3, 32, 32), torch.randint(0, 10, (size,))
    return build_model(model, (3, 32, 32), 10).train(), ba.Batch(x, y, torch.arange(size))


def fresh(model: nn.Module) -> nn.Module:
    model.zero_grad()
    return model


def seconds(step: Step, model: nn.Module, batch: ba.Batch) -> float:
    start = time.process_time()
    step(fresh(model), batch)
    return time.process_time() - start


def benchmark(repeats: int = 5, batch_size: int = 64, write: str | None = None) -> None:
    """Count and time steps here and in the authors' code.

    Args:
        repeats: how often each step is timed, in turn.
        batch_size: of the timed steps.
        write: a markdown file for the table.
    """
    at_least_one(repeats=repeats, batch_size=batch_size)
    torch.set_num_threads(1)
    table = {name: steps(row) for name, row in rows().items()}
    counted, few = scene("preact_resnet18", 2)
    timed, batch = scene("small_resnet", batch_size)
    sides = [(name, side, step) for name, pair in table.items() for side, step in enumerate(pair) if step is not None]
    costs = {(n, side): operations(lambda s=step: s(fresh(counted), few)) for n, side, step in sides}  # type: ignore[misc]
    times: dict[tuple[str, int], list[float]] = {(name, side): [] for name, side, _ in sides}
    with Progress() as progress:
        for repeat in progress.track(range(repeats + 1), description="steps"):
            for name, side, step in sides:
                spent = seconds(step, timed, batch)
                if repeat:  # the first warms up
                    times[name, side].append(spent)

    def cells(name: str, side: int) -> str:
        if (name, side) not in costs:
            return "– | –"
        pairs = zip(times[name, side], times["standard", 1], strict=True)
        return f"{costs[name, side] / costs['standard', 1]:.2f} | {statistics.median(a / b for a, b in pairs):.2f}"

    lines = [
        "# A step here and in the authors' code",
        "",
        f"`python benchmarks/passes.py --repeats {repeats} --batch-size {batch_size}`; {datetime.date.today()}, "
        f"{platform.machine()} CPU, 1 thread, torch {torch.__version__}, Python {platform.python_version()}.",
        "",
        "Operations on PreActResNet-18 and processor time on small_resnet, as multiples of a bare step of standard "
        "training (forward, backward). The authors' columns are their loop's passes alone, without what it computes "
        "between them and without their look at the training accuracy; ours are the whole step.",
        "",
        "| method | operations here | theirs | time here | theirs | read in |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows().items():
        (our_cost, our_time), (cost, spent) = (cells(name, side).split(" | ") for side in (0, 1))
        lines.append(f"| {name} | {our_cost} | {cost} | {our_time} | {spent} | {row.source} |")
    show(lines, write)


def command(args: Sequence[str]) -> int:
    about = "What a step costs here and in the authors' code."
    benchmark(**flags.parse(flags.flags_of(benchmark), args, "python benchmarks/passes.py", about))
    return 0


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/passes.py"))

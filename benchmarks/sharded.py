"""Parameters that no process has whole, and hypergradients through them: docs/results/sharded.md.

    python benchmarks/sharded.py [--processes 2] [--steps 10] [--write docs/results/sharded.md]

What torch.autograd.grad makes of a network under FSDP2 (torch.distributed.fsdp.fully_shard), and a route that works:
parameters are DTensors, and a parametrisation of each module gathers them within the graph, so that no hook is needed.
Processes of gloo on this CPU, float64, beside one process. Half a minute.
"""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pages import at_least_one, show
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.utils import parametrize

import bilevel_at as ba
from bilevel_at import shares
from bilevel_at.commands import flags
from bilevel_at.solvers import FullKKT, HessianFreeKKT, ZeroIG

LONGEST = 200  # seconds for each process
ATTACK, BALL = ba.minus(ba.cross_entropy), ba.LinfBall(0.3)
PROBLEMS: dict[str, tuple[Callable[[], ba.LowerProblem], ba.Solver]] = {
    "Fast-AT, eval": (lambda: ba.Linearized(ATTACK, BALL, "zero", "sign", 0.3), ZeroIG()),
    "Fast-BAT, train": (
        lambda: ba.Linearized(ATTACK, BALL, ba.Steps("zero", "taylor"), "taylor", 0.5, mode="train"),
        HessianFreeKKT(),
    ),
    "Hessian-aware, train": (
        lambda: ba.Linearized(ATTACK, BALL, "zero", "taylor", 0.3, mode="train"),
        FullKKT(curvature="attack", damping=30.0),
    ),
}


class Whole(nn.Module):
    """The whole parameter, from the parts: an all-gather, whose backward pass is a reduce-scatter."""

    def forward(self, part: DTensor) -> Tensor:
        return part.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Leave each process a part of each parameter; modules see them whole, within the graph."""
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
            parametrize.register_parametrization(module, name, Whole())


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Softplus(), nn.Flatten(), nn.Linear(288, 6)]
    return nn.Sequential(*layers).double()


def trained(name: str, steps: int, mesh: DeviceMesh) -> tuple[float, int, int]:
    """(largest difference to one process, bytes of parameters and momentum here, and of one process)."""
    lower, solver = PROBLEMS[name]
    batch = ba.Batch(torch.rand(13, 1, 8, 8, dtype=torch.float64), torch.arange(13) % 6)
    one, several = network(), network()
    ba.distributed.synchronise(several)
    shard(several, mesh)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=1e-3) for m in (one, several)]
    problems = [ba.BilevelProblem(ba.UpperProblem(), lower()) for _ in optimizers]
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        solver.backward(problems[0], one, batch)
        with shares.together():
            (share,) = shares.deal([torch.arange(len(batch))], by_index=False)
            with shares.sharing(share), parametrize.cached():  # gathered once a step
                solver.backward(problems[1], several, batch if share is None else batch[share.rows])
        for optimizer in optimizers:
            optimizer.step()
    whole = [_whole(p) for p in several.parameters()]
    gap = max((a - b).abs().max().item() for a, b in zip(whole, one.parameters(), strict=True))
    kept = [
        [_here(t).nbytes for p, state in optimizer.state.items() for t in (p, state["momentum_buffer"])]
        for optimizer in optimizers
    ]
    return gap, sum(kept[1]), sum(kept[0])


def _here(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def under_fsdp(mesh: DeviceMesh) -> dict[str, str]:
    """Call -> what comes of it, for a network under ``fully_shard``, beside the same of one process."""
    rank, count = mesh.get_rank(), mesh.size()
    torch.manual_seed(1)
    x, w = torch.rand(8, 1, 8, 8, dtype=torch.float64), torch.randn(8, 1, 8, 8, dtype=torch.float64)
    y = torch.arange(8) % 6

    def made(**settings: Any) -> nn.Module:
        model = network().eval()
        if settings:
            for module in (model[0], model[4], model):
                fully_shard(module, mesh=mesh, **settings)
        return model

    def differentiated(
        model: nn.Module, rows: slice, cross: bool, unshard: bool = False, backward: bool = False, keep: bool = False
    ) -> list[Tensor | None]:
        """∇_θ ℓ, or ∇_θ ⟨∇_x ℓ, w⟩; by ``backward()`` or by ``torch.autograd.grad``."""
        if unshard:
            for module in model.modules():
                if hasattr(module, "unshard"):
                    module.unshard()
                    module.set_reshard_after_backward(not keep)
        parameters, at = list(model.parameters()), x[rows].clone().requires_grad_()
        value = nn.functional.cross_entropy(model(at), y[rows], reduction="sum")
        if cross:
            (gradient,) = torch.autograd.grad(value, at, create_graph=True)
            value = (gradient * w[rows]).sum()
        if not backward:
            return list(torch.autograd.grad(value, parameters, allow_unused=True))
        value.backward()
        return [p.grad for p in parameters]

    def outcome(
        cross: bool, unshard: bool = False, backward: bool = False, keep: bool = False, reshard: bool = True
    ) -> str:
        own = slice(rank, None, count)
        try:
            got = differentiated(made(reshard_after_forward=reshard), own, cross, unshard, backward, keep)
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
        everything = differentiated(made(), slice(None), cross)
        mine = differentiated(made(), own, cross)
        pairs = [(g, e, m) for g, e, m in zip(got, everything, mine, strict=True) if e is not None and m is not None]
        if all(g is None for g, *_ in pairs):
            return "None for every parameter, in silence"
        if any(g is None for g, *_ in pairs):
            return "None for some parameters, in silence"
        # FSDP takes the mean over processes of what each differentiates.
        reduced = max((_whole(g) * count - e).abs().max().item() for g, e, _ in pairs)
        local = max((_whole(g) - m).abs().max().item() for g, _, m in pairs)
        if reduced < 1e-12:
            return f"right, reduced and sharded (to {reduced:.0e})"
        return f"this process's part, whole (to {local:.0e})" if local < 1e-12 else f"wrong by {reduced:.0e}"

    grad, twice = "grad(loss, parameters)", "grad(loss, x, create_graph=True), then"
    whole = "reshard_after_forward=False, unshard()"
    kept = f"{whole}, set_reshard_after_backward(False)"
    return {
        "loss.backward()": outcome(False, backward=True),
        "grad(loss, parameters, allow_unused=True)": outcome(False),
        f"{twice} backward()": outcome(True, backward=True),
        f"reshard_after_forward=False; {twice} backward()": outcome(True, backward=True, reshard=False),
        f"{twice} grad(…, parameters)": outcome(True),
        f"{whole}; {grad}": outcome(False, unshard=True, reshard=False),
        f"{whole}; {twice} grad(…, parameters)": outcome(True, unshard=True, reshard=False),
        f"{kept}; {twice} grad(…, parameters)": outcome(True, unshard=True, keep=True, reshard=False),
    }


def work(rank: int, processes: int, folder: str, steps: int) -> None:
    """What each process does; the first writes [FSDP's outcomes, rows of the route] into ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))
    outcomes = under_fsdp(mesh)
    rows = {name: trained(name, steps, mesh) for name in PROBLEMS}
    if rank == 0:
        Path(folder, "answers.json").write_text(json.dumps([outcomes, rows]))
    dist.barrier()
    dist.destroy_process_group()


def answers(processes: int, steps: int) -> Any:
    """What :func:`work` writes, on as many processes."""
    here = str(Path(__file__).resolve().parent)
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for rank in range(processes):
            code = f"import sys; sys.path.insert(0, {here!r}); import sharded; "
            code += f"sharded.work({rank}, {processes}, {folder!r}, {steps})"
            jobs.append(subprocess.Popen([sys.executable, "-c", code]))
        try:
            for job in jobs:
                job.wait(LONGEST)
        finally:
            for job in jobs:
                job.kill()
        return json.loads(Path(folder, "answers.json").read_text())


def benchmark(processes: int = 2, steps: int = 10, write: str | None = None) -> None:
    """Print the page.

    Args:
        processes: how many share the parameters.
        steps: of training, beside one process.
        write: a markdown file to write it to.
    """
    at_least_one(processes=processes, steps=steps)
    outcomes, rows = answers(processes, steps)
    lines = [
        "# Hypergradients through parameters that no process has whole",
        "",
        f"`python benchmarks/sharded.py --processes {processes} --steps {steps}`; {datetime.date.today()}, "
        f"{platform.machine()} CPU, {processes} processes of gloo, torch {torch.__version__}, Python "
        f"{platform.python_version()}, float64.",
        "",
        "## Under FSDP2",
        "",
        "A convolution, a batch normalisation in eval mode and a linear layer under `fully_shard`; `grad` is "
        "`torch.autograd.grad`.",
        "",
        "| call | what comes of it |",
        "|---|---|",
        *(f"| `{call}` | {what} |" for call, what in outcomes.items()),
        "",
        "## Parameters as DTensors, gathered within the graph",
        "",
        f"{steps} steps of SGD with momentum, 13 examples dealt over the processes, batch statistics synchronised; "
        "beside one process.",
        "",
        "| problem | largest difference of a parameter | bytes of parameters and momentum here | of one process |",
        "|---|---|---|---|",
        *(f"| {name} | {gap:.0e} | {here:,} | {whole:,} |" for name, (gap, here, whole) in rows.items()),
    ]
    show(lines, write)


def command(args: Sequence[str]) -> int:
    text = "Hypergradients through sharded parameters."
    benchmark(**flags.parse(flags.flags_of(benchmark), args, "python benchmarks/sharded.py", text))
    return 0


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/sharded.py"))

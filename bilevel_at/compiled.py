"""A hypergradient as one compiled graph: torch.compile, with the random draws of the uncompiled one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .batch import Batch, on_host
from .draws import is_global
from .errors import InputError
from .problem import check_base
from .solution import Hypergradient

__all__ = ["one_graph"]

VARIANTS = 4096  # graphs: of each batch size, before and after a memory is filled, of each number that an epoch sets


_numbers = itertools.count()


def one_graph(hypergradient: Callable[..., Hypergradient], backend: str) -> Callable[..., Hypergradient]:
    """``solver.hypergradient``, compiled with ``fullgraph=True``; for :meth:`bilevel_at.Solver.compile`.

    Raises:
        InputError: where this torch does not trace ``torch.autograd.grad``, or does not know the backend.
    """
    # Two seconds to import, which only this needs.
    from torch._dynamo import config, exc, list_backends, mark_static
    from torch._inductor import config as inductor
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    if not hasattr(config, "trace_autograd_ops"):
        raise InputError(f"torch {torch.__version__} cannot compile torch.autograd.grad; a newer one is needed")
    if backend not in list_backends(exclude_tags=None):
        raise InputError(f"backend {backend!r} is not known; torch has {', '.join(list_backends(exclude_tags=None))}")

    # Numbers that change are symbols of one graph, or, where something does not take a symbol, of a graph each.
    graphs = [_graph(hypergradient, backend, dynamic) for dynamic in (None, False)]

    def call(*arguments: Any) -> Hypergradient:
        try:
            return graphs[0](*arguments)
        except exc.Unsupported:
            step = graphs[-1](*arguments)
            del graphs[:-1]
            return step

    def compiled(
        problem: Any,
        model: nn.Module,
        batch: Batch,
        anchor: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        scale: float = 1.0,
    ) -> Hypergradient:
        with (
            config.patch(trace_autograd_ops=True, recompile_limit=VARIANTS, accumulated_recompile_limit=2 * VARIANTS),
            inductor.patch(fallback_random=True),  # the numbers that torch draws, not another stream of them
        ):
            try:
                with _global_draws_from(generator, batch.x.device), _no_shared_casts():
                    for tensor in (batch.x, batch.y, batch.index, anchor, *batch.more.values()):
                        if tensor is not None:
                            mark_static(tensor)  # random draws have no symbolic shapes
                    step = call(problem, model, batch, anchor, scale)
            except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit, GuardOnDataDependentSymNode) as error:
                # What the library has to say itself comes out of a trace as something else.
                hypergradient(problem, model, batch, anchor, generator, scale=scale)
                raise InputError(
                    f"no single graph of this can be compiled, so leave out --compile (or compile()): {_reason(error)}"
                ) from error
            except (RuntimeError, IndexError):  # of compiled code: a label out of range, on a CPU
                if on_host(batch.x):
                    hypergradient(problem, model, batch, anchor, generator, scale=scale)
                raise
        # What a solve looks at where that is free, and a graph cannot.
        if on_host(step.solution.delta):
            with torch.no_grad():
                check_base(problem.lower, problem.lower.base(model, step.solution.batch))
        return step

    return compiled


def _graph(
    hypergradient: Callable[..., Hypergradient], backend: str, dynamic: bool | None
) -> Callable[..., Hypergradient]:
    """``hypergradient`` of (problem, model, batch, anchor, scale) as torch.compile makes it."""
    from torch._dynamo import exc, reset_code  # type: ignore[attr-defined]  # not among its exports

    def traced(problem: Any, model: nn.Module, batch: Batch, anchor: Any, scale: float) -> Hypergradient:
        return hypergradient(problem, model, batch, anchor, None, scale=scale)

    # Dynamo knows functions by their code: what one solver's calls have shown of a number is not to guide another's.
    traced.__code__ = traced.__code__.replace(co_name=f"hypergradient_{next(_numbers)}")
    graph = torch.compile(traced, fullgraph=True, dynamic=dynamic, backend=backend)

    def call(*arguments: Any) -> Hypergradient:
        try:
            return graph(*arguments)
        except exc.FailOnRecompileLimitHit:  # before anything has run; old numbers rarely come back
            reset_code(traced.__code__)
            return graph(*arguments)

    return call


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    explanation = next((line for line in lines if line.startswith("Explanation:")), "")
    return f"{first}. {explanation.removeprefix('Explanation:').strip()}"[:280].strip()


@contextmanager
def _no_shared_casts() -> Iterator[None]:
    """Autocast casts a weight for every pass: one cast for all of them is a graph that two gradients would consume."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def _global_draws_from(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Torch's global generator in the state of ``generator``, and the other way round: graphs take no generators."""
    if generator is None or is_global(generator, device):
        yield
        return
    on_gpu = device.type == "cuda"

    def put(state: torch.Tensor) -> None:
        if on_gpu:
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)

    def get() -> torch.Tensor:
        return torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state()

    before = get()
    put(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(get())
        put(before)

"""Input gradients that are differentiated again, and what is to be done where a network does not let them be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from .errors import InputError

__all__ = ["explained", "first_order", "gradient_with_graph"]

_with_graph: ContextVar[bool] = ContextVar("with_graph", default=True)


@contextmanager
def first_order() -> Iterator[None]:
    """Within it :func:`gradient_with_graph` keeps no graph, for solvers that make first-order passes alone.

    Some networks refuse to keep one: compiled modules do, whether or not it is used.
    """
    token = _with_graph.set(False)
    try:
        yield
    finally:
        _with_graph.reset(token)


def gradient_with_graph(total: Tensor, point: Tensor, retain_graph: bool = True) -> Tensor | None:
    """∇ ``total`` in ``point`` with its graph; within :func:`first_order` its value, as a leaf that requires gradients.

    Args:
        total: one number.
        point: where its gradient is taken; it requires a gradient.
        retain_graph: whether more is to be differentiated that shares the pass, where this gradient keeps no graph.

    Returns:
        The gradient, shaped like ``point``, or None where ``total`` does not depend on it.
    """
    if _with_graph.get():
        (gradient,) = torch.autograd.grad(total, point, create_graph=True, allow_unused=True)
        return gradient
    (gradient,) = torch.autograd.grad(total, point, retain_graph=retain_graph, allow_unused=True)
    return None if gradient is None else gradient.detach().requires_grad_()


@contextmanager
def explained(solver: str) -> Iterator[None]:
    """Say in one line what to do where a network cannot be differentiated as ``solver``, a name, does.

    Raises:
        InputError: for a compiled module, an operation without a second derivative, reentrant checkpointing.
    """
    try:
        yield
    except RuntimeError as error:
        remedy = _remedy(str(error), solver)
        if remedy is None:
            raise
        raise InputError(remedy) from error


def _remedy(message: str, solver: str) -> str | None:
    if "use_reentrant=True" in message:
        return "the network's checkpointing is reentrant, which torch.autograd.grad refuses; pass use_reentrant=False"
    if "donated buffer" in message or "support double backward" in message:
        return (
            f"the network is a compiled module, which cannot be differentiated twice, as {solver} does; compile the "
            "solver instead (solver.compile(), --compile), or use ValueFunction() or ZeroIG()"
        )
    operation = re.search(r"derivative for aten::(\w+) is not implemented", message)
    if operation:
        attention = "scaled_dot_product" in operation[1]
        remedy = "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), " if attention else ""
        return (
            f"{operation[1]} of the network has no derivative, and {solver} differentiates it again; use {remedy}"
            "ValueFunction() or ZeroIG()"
        )
    return None

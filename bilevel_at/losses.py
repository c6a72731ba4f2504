"""Losses, and the input gradient that every attack is made of.

A loss is called as ``loss(model, batch, delta) -> [B]``: one value per sample, never a mean, so that input gradients do
not depend on the batch size and a step means the same everywhere. Attackers minimise: ``minus(cross_entropy)`` is the
usual attack loss. A plain function of that signature is a loss too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batch import Batch, on_host
from .errors import InputError, one_of
from .modes import full_precision
from .policy import Number, Policy, Schedule, checked, number
from .twice import gradient_with_graph

__all__ = [
    "AnyLoss",
    "CrossEntropy",
    "Loss",
    "as_loss",
    "cross_entropy",
    "input_gradient",
    "kl_divergence",
    "logits",
    "margins",
    "minus",
    "negative_margin",
]


class Loss(Policy):
    """Base class: a pass of the network, then a value of its output. Override :meth:`value`, and what else differs."""

    def prepare(self, model: nn.Module, batch: Batch, generator: torch.Generator | None) -> Batch:
        """Compute what every pass of one solve shares: a reference prediction, random targets.

        Args:
            model: the network, in the mode in which the passes see it.
            batch: the batch as the caller passed it.
            generator: for whatever is drawn at random.

        Returns:
            The batch with that in ``more`` (``batch.replace(name=tensor)``).
        """
        return batch

    def forward(self, model: nn.Module, batch: Batch, delta: Tensor) -> Any:
        """The network's output under δ; override it to say what δ is added to."""
        return model(batch.x + delta)

    def value(self, output: Any, batch: Batch) -> Tensor:
        """The loss of an output: ``[B]``, or one number where the samples of a batch are coupled."""
        raise NotImplementedError(f"{type(self).__name__} does not define value(output, batch)")

    def __call__(self, model: nn.Module, batch: Batch, delta: Tensor) -> Tensor:
        return self.value(self.forward(model, batch, delta), batch)


AnyLoss = Loss | Callable[[nn.Module, Batch, Tensor], Tensor]


class _Function(Loss):
    """A plain function of (model, batch, delta) as a loss."""

    def __init__(self, function: Callable[[nn.Module, Batch, Tensor], Tensor]) -> None:
        self.function = function

    def forward(self, model: nn.Module, batch: Batch, delta: Tensor) -> Any:
        raise InputError(
            "the output at the anchor can be kept only of a ba.Loss, which has forward and value apart; "
            f"{getattr(self.function, '__name__', self.function)} is a function"
        )

    def __call__(self, model: nn.Module, batch: Batch, delta: Tensor) -> Tensor:
        return self.function(model, batch, delta)

    def __repr__(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def as_loss(loss: AnyLoss) -> Loss:
    """The loss itself, or a plain function as one."""
    return loss if isinstance(loss, Loss) else _Function(loss)


def input_gradient(
    loss: AnyLoss,
    model: nn.Module,
    batch: Batch,
    delta: Tensor,
    create_graph: bool = False,
    keep_output: bool = False,
) -> tuple[Tensor, Any]:
    """∇_δ Σ_i ℓ_i(θ, δ), shaped like ``delta``, and the output.

    Args:
        loss: ℓ, per sample or one number.
        model: seen in whatever mode it is in.
        batch: the examples.
        delta: where the gradient is taken; detached.
        create_graph: keep the gradient's graph, so that it can be differentiated again. The pass is then in full
            precision under autocast too: of the second derivative half precision would leave noise (in bfloat16 the
            implicit term of a PreActResNet-18 is off by half and more).
        keep_output: return the network's output with its graph too, rather than None.

    Raises:
        InputError: where the loss is neither one value per sample nor one number, or has no gradient in δ.
    """
    delta = delta.detach().requires_grad_()
    with torch.enable_grad(), full_precision(delta.device) if create_graph else nullcontext():
        if keep_output:
            output = as_loss(loss).forward(model, batch, delta)
            values = as_loss(loss).value(output, batch)
        else:
            output, values = None, loss(model, batch, delta)
        check_values("the attack loss", values, batch)
        if not values.requires_grad:
            raise InputError("the model's output has no gradient in its input; only square attacks need none")
        if create_graph:
            gradient = gradient_with_graph(values.sum(), delta, retain_graph=keep_output)
        else:
            (gradient,) = torch.autograd.grad(values.sum(), delta, retain_graph=keep_output, allow_unused=True)
    if gradient is None:
        raise InputError("the attack loss does not depend on δ, so that it has no gradient to step along")
    return gradient, output


def check_values(name: str, values: Tensor, batch: Batch) -> None:
    """Raise :class:`InputError` unless ``values`` is one value per sample, or one number."""
    if values.shape not in ((len(batch),), ()):
        raise InputError(
            f"{name} has shape {tuple(values.shape)}; it must be one value per sample, [{len(batch)}], or one number"
        )


def check_prepared(problem: Policy, batch: Any) -> Batch:
    """What ``problem.prepare`` returned, or :class:`InputError` where that is no batch."""
    if not isinstance(batch, Batch):
        raise InputError(
            f"{type(problem).__name__}: prepare returns {type(batch).__name__}; it must return the Batch, as "
            "batch.replace(name=tensor) does"
        )
    return batch


def check_classes(output: Tensor, batch: Batch) -> Tensor:
    """The class labels ``[B]``, where ``output`` is one row of logits per sample that they fit.

    Raises:
        InputError: where the output is no tensor ``[B, K]``, where there are no labels, or where a label is not one of
            0 … K − 1 (on a GPU labels are not looked at, which would wait for it).
    """
    y = batch.y
    if not isinstance(output, Tensor):
        raise InputError(
            f"the model's output is a {type(output).__name__}; losses take logits, a tensor: wrap the network in one "
            "whose forward(x) returns them (of a Hugging Face network, network(x).logits; docs/neighbours.md)"
        )
    if output.ndim != 2 or len(output) != len(batch):
        raise InputError(f"the model's output has shape {tuple(output.shape)}; logits are [{len(batch)}, classes]")
    if y is None:
        raise InputError("this loss needs class labels: pass Batch(x, y)")
    if y.dtype != torch.int64 or y.ndim != 1:
        raise InputError(f"y is {y.dtype} of shape {tuple(y.shape)}; class labels are int64 [{len(batch)}] (y.long())")
    if not on_host(y) or len(batch) == 0:
        return y
    try:
        low, high = int(y.min()), int(y.max())
    except RuntimeError:  # under vmap labels cannot be looked at; the pass before it has done so
        return y
    if low < 0 or high >= output.shape[1]:
        bad = low if low < 0 else high
        raise InputError(
            f"label {bad} is out of range: the model has {output.shape[1]} outputs, 0 … {output.shape[1] - 1}"
        )
    return y


def logits(model: nn.Module, batch: Batch, delta: Tensor) -> Tensor:
    """f_θ(x + δ), ``[B, K]``, checked as :func:`check_classes` does."""
    output: Tensor = model(batch.x + delta)
    check_classes(output, batch)
    return output


class CrossEntropy(Loss):
    """−Σ_k t_k log softmax(f_θ(x + δ))_k, ``[B]``, with t the label, smoothed by a share s.

    over="all": t_y = 1 − s + s/K and s/K elsewhere, as in ``torch.nn.CrossEntropyLoss``.
    over="others": t_y = 1 − s and s/(K − 1) elsewhere.

    Args:
        label_smoothing: s, from 0 to 1, a number or a :class:`~bilevel_at.Schedule`.
        over: the classes that share s evenly.

    Raises:
        InputError: for values outside these ranges.
    """

    def __init__(self, label_smoothing: Number = 0.0, over: Literal["all", "others"] = "all") -> None:
        self.label_smoothing = checked(_check_share, "label_smoothing", label_smoothing)
        self.over = one_of("over", over, ("all", "others"))

    def value(self, output: Tensor, batch: Batch) -> Tensor:
        y = check_classes(output, batch)
        share = _check_share("label_smoothing", number(self.label_smoothing))
        if share == 0 or self.over == "all":
            return F.cross_entropy(output, y, reduction="none", label_smoothing=share)
        # F.cross_entropy would want K s/(K − 1) as its share, which may be above 1.
        log_p = F.log_softmax(output, 1)
        own = log_p.gather(1, y[:, None]).squeeze(1)
        return -(1 - share) * own - share / (output.shape[1] - 1) * (log_p.sum(1) - own)

    def __repr__(self) -> str:
        if isinstance(self.label_smoothing, Schedule) or self.label_smoothing:
            return f"CrossEntropy({self.label_smoothing}{'' if self.over == 'all' else ', over=' + repr(self.over)})"
        return "cross_entropy"


def _check_share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise InputError(f"{name} is {value!r}; it must be from 0 to 1")
    return float(value)


cross_entropy = CrossEntropy()


def margins(model: nn.Module, batch: Batch, delta: Tensor) -> Tensor:
    """M_j = f_j − f_y for every class j, ``[B, K]``, with −∞ at j = y (BETA paper, equation 12).

    Positive for some j exactly where the prediction is wrong.
    """
    return _margins(model(batch.x + delta), batch)


def _margins(output: Tensor, batch: Batch) -> Tensor:
    label = check_classes(output, batch)[:, None]
    own = torch.arange(output.shape[1], device=output.device) == label
    return (output - output.gather(1, label)).masked_fill(own, -torch.inf)


class NegativeMargin(Loss):
    """max_{j≠y} M_j, ``[B]``; M_t where the batch has targets t (``batch.more["target"]``). BETA paper, equation 12."""

    def value(self, output: Tensor, batch: Batch) -> Tensor:
        m = _margins(output, batch)
        target = batch.more.get("target")
        return m.amax(1) if target is None else m.gather(1, target[:, None]).squeeze(1)

    def __repr__(self) -> str:
        return "negative_margin"


negative_margin = NegativeMargin()


class KLDivergence(Loss):
    """KL(f_θ(x) ‖ f_θ(x + δ)), ``[B]`` (TRADES, Zhang et al., 2019, equation 5).

    log f_θ(x) is computed once per solve.
    """

    def prepare(self, model: nn.Module, batch: Batch, generator: torch.Generator | None) -> Batch:
        """The batch with ``clean_log_probabilities`` ``[B, K]``."""
        clean = self.forward(model, batch, torch.zeros_like(batch.x))
        check_classes(clean, batch)
        return batch.replace(clean_log_probabilities=F.log_softmax(clean, 1))

    def value(self, output: Tensor, batch: Batch) -> Tensor:
        clean, moved = batch.more["clean_log_probabilities"], F.log_softmax(output, 1)
        return F.kl_div(moved, clean, reduction="none", log_target=True).sum(1)

    def __call__(self, model: nn.Module, batch: Batch, delta: Tensor) -> Tensor:
        if "clean_log_probabilities" not in batch.more:
            batch = self.prepare(model, batch, None)
        return super().__call__(model, batch, delta)

    def __repr__(self) -> str:
        return "kl_divergence"


kl_divergence = KLDivergence()


class minus(Loss):
    """``minus(loss)(model, batch, delta)`` is ``-loss(model, batch, delta)``: what the attacker minimises."""

    def __init__(self, loss: AnyLoss) -> None:
        self.loss = as_loss(loss)

    def prepare(self, model: nn.Module, batch: Batch, generator: torch.Generator | None) -> Batch:
        return self.loss.prepare(model, batch, generator)

    def forward(self, model: nn.Module, batch: Batch, delta: Tensor) -> Any:
        return self.loss.forward(model, batch, delta)

    def value(self, output: Any, batch: Batch) -> Tensor:
        return -self.loss.value(output, batch)

    def __call__(self, model: nn.Module, batch: Batch, delta: Tensor) -> Tensor:
        return -self.loss(model, batch, delta)

    def __repr__(self) -> str:
        return f"minus({self.loss!r})"

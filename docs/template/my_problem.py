"""Readings of five sensors, which an attacker may shift within an l2 ball: a problem of one's own, in one file.

The run command trains on images; train this with ``solver.backward`` in a loop (docs/beyond_images.md).
"""

from torch import Tensor, nn

import bilevel_at as ba


def confusion(model: nn.Module, batch: ba.Batch, delta: Tensor) -> Tensor:
    """Minus log(1 + Σ_k exp(f_k − f_y)): what the attacker minimises, one value per sample."""
    logits = model(batch.x + delta)
    return logits.gather(1, batch.y[:, None])[:, 0] - logits.logsumexp(1)


def problem(epsilon: float = 0.3) -> ba.BilevelProblem:
    """Training against one step along the gradient, from a random start.

    Args:
        epsilon: radius of the l2 ball.
    """
    ball = ba.L2Ball(epsilon, bounds=None)
    return ba.BilevelProblem(ba.UpperProblem(), ba.Linearized(confusion, ball, "uniform", "taylor", step=1.0))

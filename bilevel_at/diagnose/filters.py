"""The filters of a network of one convolution: which of them makes it non-linear."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..constraints import Constraint
from ..data import ImageSet
from ..errors import InputError
from .alignment import gradient_alignment

__all__ = ["alignment_by_filter", "filter_norms", "laplace_similarity", "without_filter"]

LAPLACE = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))
"""The five-point Laplacian ∂²/∂h² + ∂²/∂w² on a grid."""


def filter_norms(filters: Tensor) -> Tensor:
    """‖w_o‖₂ of each filter over its channels: ``[..., O, I, kh, kw] -> [..., O]``.

    Source: Andriushchenko and Flammarion (2020), figure 6.
    """
    if filters.ndim < 4:
        raise InputError(f"filters have shape {tuple(filters.shape)}; they are [..., O, I, kh, kw]")
    return filters.flatten(-3).norm(dim=-1)


def laplace_similarity(filters: Tensor) -> Tensor:
    """|cos(w, L)| of each 3×3 channel w and L = [[0, 1, 0], [1, −4, 1], [0, 1, 0]]: ``[..., 3, 3] -> [...]`` in [0, 1].

    1 for a Laplace filter of either sign, 0 for a constant one; NaN for a channel that is all zero. The cosine is that
    of the nine weights as they are: nothing is subtracted from them first. For scale: a random direction has 0.27 on
    average (the mean of |cos| in nine dimensions). Raises :class:`InputError` where the filters are not 3×3.
    Source: Andriushchenko and Flammarion (2020), section 4.2, find a variant of this filter after catastrophic
    overfitting; the measure is this library's.
    """
    if filters.shape[-2:] != (3, 3):
        raise InputError(f"filters have shape {tuple(filters.shape)}; the Laplacian compared with is [..., 3, 3]")
    flat = filters.double().flatten(-2)
    laplace = torch.tensor(LAPLACE, dtype=flat.dtype, device=flat.device).flatten()
    cosine = F.normalize(flat, dim=-1, eps=1e-300) @ (laplace / laplace.norm())
    return cosine.abs().masked_fill((flat == 0).all(-1), torch.nan).to(filters.dtype)


def without_filter(model: nn.Module, index: int) -> nn.Module:
    """A copy of a ``one_layer_cnn`` in which feature map ``index`` is zero for every input, whatever the activation.

    The filter and its bias are set to zero, and so are the weights that lead from its feature map to the logits.
    Raises :class:`InputError` where the model is not a convolution, an activation, a flattening and a linear layer (on
    normalised inputs or not), or has no such filter.
    Source: Andriushchenko and Flammarion (2020), section 4.2.
    """
    convolution, _ = _layers(model)
    filters = convolution.out_channels
    if not (isinstance(index, int) and 0 <= index < filters):
        raise InputError(f"filter {index!r} does not exist; this model has filters 0 … {filters - 1}")
    changed = copy.deepcopy(model)
    convolution, linear = _layers(changed)
    size = linear.in_features // filters
    with torch.no_grad():
        convolution.weight[index] = 0
        if convolution.bias is not None:
            convolution.bias[index] = 0
        linear.weight[:, index * size : (index + 1) * size] = 0
    return changed


def alignment_by_filter(
    model: nn.Module, images: ImageSet, constraint: Constraint, *, seed: int = 0, samples: int = 1
) -> tuple[float, list[float]]:
    """Mean gradient alignment of a ``one_layer_cnn`` as it is, and without each of its filters in turn.

    The mean is over the examples that have one (:func:`gradient_alignment`), at the same draws for every network.
    Raises what :func:`without_filter` raises. Source: Andriushchenko and Flammarion (2020), section 4.2.
    """

    def mean(network: nn.Module) -> float:
        return gradient_alignment(network, images, constraint, seed=seed, samples=samples).nanmean().item()

    filters = _layers(model)[0].out_channels
    return mean(model), [mean(without_filter(model, index)) for index in range(filters)]


def _layers(model: nn.Module) -> tuple[nn.Conv2d, nn.Linear]:
    """The convolution and the linear layer."""
    leaves = [module for module in model.modules() if not list(module.children())]
    if len(leaves) == 4 and isinstance(leaves[2], nn.Flatten):
        convolution, linear = leaves[0], leaves[3]
        if isinstance(convolution, nn.Conv2d) and isinstance(linear, nn.Linear):
            return convolution, linear
    names = ", ".join(type(leaf).__name__ for leaf in leaves[:6]) or "nothing"
    raise InputError(f"the model is {names}; filters are removed from a one_layer_cnn only")

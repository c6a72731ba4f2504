"""Batch normalisation with the statistics of a batch that several processes share.

torch.nn.SyncBatchNorm takes CUDA tensors only, and its backward pass cannot be differentiated again, as hypergradients
are. Here both can be done, on any device and any number of times.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import shares
from .errors import InputError

__all__ = ["SyncBatchNorm", "SyncBatchNorm1d", "SyncBatchNorm2d", "SyncBatchNorm3d", "couples"]


class SyncBatchNorm(_BatchNorm):
    """nn.BatchNorm, but that statistics of a shared batch are those of the whole batch.

    In eval mode, in one process, and on what is no share of a batch (``shares.alike()``) it is nn.BatchNorm bit
    for bit. ``ba.distributed.synchronise`` makes these of a network's own.

    Raises:
        InputError: where a pass has not the same number of rows for each example of a shared batch: other processes
            would make another number of passes, and wait. In a compiled graph.
    """

    @property
    def uses_batch(self) -> bool:
        """Whether statistics are those of the batch."""
        return self.training or self.running_mean is None

    def forward(self, input: Tensor) -> Tensor:
        """The normalised input, of its shape and dtype."""
        share = shares.current()
        if share is None or not self.uses_batch:
            return super().forward(input)
        self._check_input_dim(input)
        if torch.compiler.is_compiling():  # a graph would lose the update of running statistics
            raise InputError(
                "statistics of the whole batch of several processes are no part of a compiled graph; leave out "
                "--compile (or compile()), or --sync-batch-norm (or synchronise())"
            )
        if len(input) % len(share.rows):
            raise InputError(
                f"a pass in train mode has {len(input)} rows of a batch of which this process has {len(share.rows)}; "
                "with statistics of the batch over several processes, each pass needs the same rows for every example"
            )
        over = [axis for axis in range(input.ndim) if axis != 1]
        each = len(input) // len(share.rows) * input[0, 0].numel()  # values of one example in a channel
        count = share.whole * each
        if count == 1:
            raise InputError(
                "the whole batch has 1 value per channel, which has no variance; give it 2 examples or more"
            )

        def shaped(of_channel: Tensor) -> Tensor:
            return of_channel.reshape(-1, *[1] * (input.ndim - 2))

        x = input if input.dtype == torch.float64 else input.float()
        centre = x.detach().mean(over)  # this process's own: a constant, that no digits are lost in squares
        moved = x - shaped(centre)
        # What is summed over processes is put back around 0, in double precision: it has two numbers a channel.
        first, second = moved.sum(over).double(), moved.square().sum(over).double()
        c, own = centre.double(), len(share.rows) * each
        sums = shares.summed_with_graph(torch.stack([first + own * c, second + 2 * c * first + own * c.square()]))
        mean = sums[0] / count
        var = sums[1] / count - mean.square()  # below 0 by a rounding at most, which eps covers
        if self.training and self.track_running_stats:
            self._follow(mean.detach(), var.detach().clamp(min=0) * (count / (count - 1)))
        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shift = (c - mean) * scale
        if self.bias is not None:
            shift = shift + self.bias
        return torch.addcmul(shaped(shift.to(x)), moved, shaped(scale.to(x))).to(input)

    def _follow(self, mean: Tensor, var: Tensor) -> None:
        """The running statistics, as nn.BatchNorm updates them."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if self.running_mean is None or self.running_var is None:
            return
        if self.momentum is None:
            assert self.num_batches_tracked is not None  # it has one where it has running statistics
            weight: Tensor | float = 1 / self.num_batches_tracked.double()
        else:
            weight = self.momentum
        for running, value in ((self.running_mean, mean), (self.running_var, var)):
            # Through .data, as nn.BatchNorm's own kernels: graphs of earlier passes in eval mode have saved the buffer.
            running.data.copy_(running.data * (1 - weight) + weight * value)


class SyncBatchNorm1d(SyncBatchNorm, nn.BatchNorm1d):
    """:class:`SyncBatchNorm` for nn.BatchNorm1d."""


class SyncBatchNorm2d(SyncBatchNorm, nn.BatchNorm2d):
    """:class:`SyncBatchNorm` for nn.BatchNorm2d."""


class SyncBatchNorm3d(SyncBatchNorm, nn.BatchNorm3d):
    """:class:`SyncBatchNorm` for nn.BatchNorm3d."""


def couples(model: nn.Module) -> bool:
    """Whether a pass of the network, as it is now, has statistics over the processes that share the batch."""
    if shares.current() is None:
        return False
    return any(isinstance(module, SyncBatchNorm) and module.uses_batch for module in model.modules())

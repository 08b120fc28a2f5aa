"""Layers of network in network, as products of matrices wherever they can be.

GPUs multiply matrices fast. Their kernels for convolutions of one to three channels are slow, and so are
those for the gradients of biases and of average pooling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Most entries of a patch that are copied side by side for a product.
_LARGEST_PATCH = 128
# Rows of matrices begin at multiples of this many entries, which fast kernels ask for.
_ALIGNED = 8


class _BiasedReLU(torch.autograd.Function):
    """ReLU of outputs to which a bias has been added, with the gradient of that bias as a product."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, bias: Tensor) -> Tensor:
        """Map outputs, (n, channels, height, width), to a tensor of their shape."""
        rectified = torch.relu(outputs)
        ctx.save_for_backward(rectified)
        return rectified

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of outputs and bias."""
        (rectified,) = ctx.saved_tensors
        gradient = torch.ops.aten.threshold_backward(gradient, rectified, 0)
        rows = gradient.permute(0, 2, 3, 1).flatten(0, 2)
        return gradient, (rows.new_ones(1, len(rows)) @ rows)[0]


class RectifiedConv2d(nn.Conv2d):
    """Convolution that keeps height and width, and a ReLU.

    Parameters
    ----------
    in_channels, out_channels : int
        Channels before and after.
    kernel_size : int
        Odd.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, in_channels, height, width), floats, to (n, out_channels, height, width)."""
        assert self.bias is not None
        bias = self.bias.detach()
        patch = self.weight[0].numel()
        if self.kernel_size == (1, 1):
            outputs = _products(x.permute(0, 2, 3, 1), self.weight.flatten(1), bias)
        elif patch <= _LARGEST_PATCH:
            aligned = (0, -patch % _ALIGNED)
            patches = nn.functional.pad(self._patches(x), aligned)
            outputs = _products(patches, nn.functional.pad(self.weight.flatten(1), aligned), bias)
        else:
            outputs = nn.functional.conv2d(x, self.weight, bias, padding=self.padding)
        return _BiasedReLU.apply(outputs, self.bias)

    def _patches(self, x: Tensor) -> Tensor:
        """List what the kernel covers around each pixel: (n, height, width, entries)."""
        size = self.kernel_size[0]
        around = size // 2
        padded = nn.functional.pad(x, (around, around, around, around))
        return padded.unfold(2, size, 1).unfold(3, size, 1).permute(0, 2, 3, 1, 4, 5).flatten(3)


def _products(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Linear layer of each pixel's row, (n, height, width, entries), as (n, out_channels, height, width)."""
    return nn.functional.linear(rows, weight, bias).permute(0, 3, 1, 2)


class HalvingAvgPool2d(nn.Module):
    """Means of windows of 3 x 3 pixels, two pixels apart, with zeros around the image."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, channels, height, width) to (n, channels, ceil(height / 2), ceil(width / 2)), its dtype."""
        down, across = (_windows(size, x) for size in x.shape[2:])
        rows = across @ x.permute(0, 2, 3, 1)
        columns = down @ rows.flatten(2)
        # Not in the products: a third is a third of a per cent more in bfloat16.
        return columns.unflatten(2, rows.shape[2:]).permute(0, 3, 1, 2) / 9


def _windows(size: int, like: Tensor) -> Tensor:
    """Say what each window covers along one axis, as 0 and 1: (n_windows, size)."""
    distance = torch.arange(size, device=like.device) - torch.arange(0, size, 2, device=like.device)[:, None]
    return (distance.abs() <= 1).to(like.dtype)

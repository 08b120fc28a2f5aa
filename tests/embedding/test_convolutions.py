"""Layers of network in network: what torch's own convolutions, ReLUs and pooling compute, as products."""

import pytest
import torch
from torch import nn

from hqsearch.embedding.convolutions import HalvingAvgPool2d, RectifiedConv2d
from hqsearch.embedding.networks import build_trunk

SIZES = [(8, 8), (9, 12), (5, 2), (1, 1)]


def gradients(layer, x, *, autocast=False):
    """Output of a layer, and the gradients of its input and parameters of a loss that weighs all outputs."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = layer(x)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    layer.zero_grad()
    (output * weights).sum().backward()
    return [output.detach(), x.grad, *(parameter.grad.clone() for parameter in layer.parameters())]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("in_channels", "kernel_size"),
    [(1, 5), (3, 5), (3, 3), (7, 1), (20, 3)],  # patches, pixels, and what is left to torch
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_rectified_convolution_is_a_convolution_and_a_relu(in_channels, kernel_size, size, channels_last):
    torch.manual_seed(0)
    layer = RectifiedConv2d(in_channels, 6, kernel_size).double()
    plain = nn.Conv2d(in_channels, 6, kernel_size, padding=kernel_size // 2).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(4, in_channels, *size, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    expected = gradients(nn.Sequential(plain, nn.ReLU()), x)
    for found, wanted in zip(gradients(layer, x), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert 0 < (expected[0] == 0).double().mean() < 1


@pytest.mark.parametrize(("in_channels", "kernel_size"), [(3, 5), (7, 1), (20, 3)])
def test_in_bfloat16_products_are_rounded_and_gradients_of_parameters_are_float32(in_channels, kernel_size):
    torch.manual_seed(0)
    layer = RectifiedConv2d(in_channels, 6, kernel_size)
    x = torch.randn(4, in_channels, 16, 16)
    exact, rounded = gradients(layer, x), gradients(layer, x, autocast=True)
    assert [value.dtype for value in rounded] == [torch.bfloat16, *[torch.float32] * 3]
    for found, wanted in zip(rounded, exact, strict=True):
        # A rounded output may fall on the other side of zero.
        assert 0 < (found - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("size", SIZES)
def test_halving_means_are_those_of_torch(size):
    x = torch.randn(3, 5, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = gradients(nn.AvgPool2d(3, 2, padding=1), x)
    for found, wanted in zip(gradients(HalvingAvgPool2d(), x), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_halving_means_in_bfloat16_are_none_too_large():
    x = torch.rand(8, 32, 16, 16, generator=torch.Generator().manual_seed(0))
    pooled = HalvingAvgPool2d()(x.bfloat16())
    assert pooled.dtype == torch.bfloat16
    # Of 16,384 outputs each rounded by chance.
    expected = nn.AvgPool2d(3, 2, padding=1)(x).mean().item()
    assert pooled.float().mean().item() == pytest.approx(expected, rel=1e-3)


def test_the_names_and_shapes_of_a_trunks_weights_are_those_of_saved_networks():
    state = build_trunk("nin", (3, 32, 32), torch.Generator()).state_dict()
    shapes = {
        "0": (192, 3, 5, 5),
        "2": (160, 192, 1, 1),
        "4": (96, 160, 1, 1),
        "8": (192, 96, 5, 5),
        "10": (192, 192, 1, 1),
        "12": (192, 192, 1, 1),
        "16": (192, 192, 3, 3),
        "18": (192, 192, 1, 1),
        "20": (192, 192, 1, 1),
    }
    expected = {}
    for name, shape in shapes.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected

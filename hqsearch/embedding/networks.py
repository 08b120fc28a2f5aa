"""Trunks, and the network that a stage trains: standardise, trunk, ReLU, one linear layer."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from hqsearch.embedding.convolutions import HalvingAvgPool2d, RectifiedConv2d
from hqsearch.embedding.randomness import randomness_of

TRUNKS = ("auto", "mlp", "conv", "nin")
_CONVOLUTIONAL = ("auto", "conv", "nin")
# Of items whose statistics are taken at once: 32 MiB in float64.
_VALUES_PER_BLOCK = 2**22


class Standardize(nn.Module):
    """Centre and scale the input by the training items' statistics, then cast to float32.

    Constant inputs are centred only. float64 input is centred in float64, so that a large common offset does
    not swallow the variation.

    Parameters
    ----------
    mean, scale : ndarray, dtype float64
        Broadcastable to one item.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: np.ndarray, scale: np.ndarray):
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float64))
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float64))

    @classmethod
    def from_items(cls, X: np.ndarray, rows: np.ndarray) -> Standardize:
        """Statistics of some rows of X: of each feature (2-D X), or of each channel (images)."""
        axes = (0,) if X.ndim == 2 else (0, 2, 3)
        n_values = len(rows) * int(np.prod(X.shape[2:]))
        # Block by block: deviations of all items at once would take eight times the memory of bytes.
        per_block = max(1, _VALUES_PER_BLOCK // int(np.prod(X.shape[1:])))
        blocks = [rows[start : start + per_block] for start in range(0, len(rows), per_block)]

        def total(of_block: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
            sums = (of_block(X[block]).sum(axis=axes, dtype=np.float64, keepdims=True)[0] for block in blocks)
            return np.sum(list(sums), axis=0)

        mean = total(lambda block: block) / n_values
        with np.errstate(over="ignore", invalid="ignore"):
            scale = np.sqrt(total(lambda block: np.square(block - mean)) / n_values)
        # The deviation of a constant column is the rounding of its mean, not exactly zero.
        if not np.isfinite(scale).all():
            raise ValueError(
                "Expected X whose standard deviation float64 can hold, but it overflows; scale X."
            )
        # Which features have more than one value.
        first = X[rows[0]] if X.ndim == 2 else X[rows[0]][:, :1, :1]
        varies = total(lambda block: block != first) > 0
        return cls(mean, np.where(varies & (scale > 0), scale, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Standardised float32 copy of x."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return ((x.to(wide) - self.mean.to(wide)) / self.scale.to(wide)).float()


class Dropout(nn.Module):
    """Dropout that draws from a generator of its own and so leaves the global random state alone.

    Parameters
    ----------
    p : float
        Share of entries that are zeroed in training.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Zero a share p of x and scale up the rest; the identity outside training."""
        if not self.training:
            return x
        kept = torch.empty_like(x).bernoulli_(1 - self.p, generator=self.generator)
        return x * kept / (1 - self.p)


def mlp_trunk(input_shape: Sequence[int]) -> nn.Module:
    """Two hidden layers with batch normalisation, for feature vectors."""
    width = 512
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(input_shape), width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.BatchNorm1d(width),
    )


def conv_trunk(input_shape: Sequence[int]) -> nn.Module:
    """Compact convolutional network: three stages of doubling width, each halving a side of 8 or more."""
    channels, height, width = input_shape
    layers: list[nn.Module] = []
    side = min(height, width)
    for filters in (32, 64, 128):
        layers += [nn.Conv2d(channels, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters)]
        if side >= 4:
            # Before the ReLU, which then has a quarter of the work for the same result.
            layers.append(nn.MaxPool2d(2))
            side //= 2
        layers.append(nn.ReLU())
        channels = filters
    layers += [nn.Conv2d(channels, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(2 if side >= 2 else 1), nn.Flatten()]
    flat = 256 * (4 if side >= 2 else 1)
    return nn.Sequential(*layers, nn.Linear(flat, 256), nn.BatchNorm1d(256))


def nin_trunk(input_shape: Sequence[int]) -> nn.Module:
    """Network in network (Lin, Chen & Yan, 2014) as the papers use it, for 32 x 32 images."""
    channels, height, width = input_shape
    if min(height, width) < 8:
        raise ValueError(f"network='nin' expects images of at least 8 x 8 pixels, got {height} x {width}.")

    # The names are those of saved networks, in which each ReLU was a layer of its own.
    layers: dict[str, nn.Module] = {
        "0": RectifiedConv2d(channels, 192, 5),
        "2": RectifiedConv2d(192, 160, 1),
        "4": RectifiedConv2d(160, 96, 1),
        "6": nn.MaxPool2d(3, 2, padding=1),
        "7": Dropout(0.5),
        "8": RectifiedConv2d(96, 192, 5),
        "10": RectifiedConv2d(192, 192, 1),
        "12": RectifiedConv2d(192, 192, 1),
        "14": HalvingAvgPool2d(),
        "15": Dropout(0.5),
        "16": RectifiedConv2d(192, 192, 3),
        "18": RectifiedConv2d(192, 192, 1),
        "20": RectifiedConv2d(192, 192, 1),
        "22": nn.AdaptiveAvgPool2d(1),
        "23": nn.Flatten(),
    }
    return nn.Sequential(OrderedDict(layers))


class StageNetwork(nn.Module):
    """What one stage trains: standardise, trunk, ReLU, linear layer.

    Parameters
    ----------
    standardize : Standardize
        Input statistics.
    trunk : nn.Module
        Maps (n_samples, *input_shape) to (n_samples, n_hidden).
    head : nn.Linear
        The new layer of the stage.
    """

    def __init__(self, standardize: Standardize, trunk: nn.Module, head: nn.Linear):
        super().__init__()
        self.standardize = standardize
        self.trunk = trunk
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Output of the linear layer, float32 of shape (n_samples, head.out_features)."""
        return self.output(self.hidden(x))

    def output(self, hidden: Tensor) -> Tensor:
        """Return what `forward` makes of the hidden layer."""
        return self.head(hidden)

    def hidden(self, x: Tensor) -> Tensor:
        """Input of the linear layer, float32 of shape (n_samples, head.in_features)."""
        return torch.relu(self.trunk(self.standardize(x)))


class EmbeddingNetwork(StageNetwork):
    """Stage network whose output is a projection of the linear layer's and of the hidden layer, side by side.

    Parameters
    ----------
    standardize, trunk, head
        As in `StageNetwork`.
    axes : Tensor of shape (head.out_features + head.in_features, head.out_features), dtype float32
        The projection.
    unit : bool
        Whether the linear layer's output is scaled to unit length before; the hidden layer always is.
    """

    axes: Tensor

    def __init__(
        self, standardize: Standardize, trunk: nn.Module, head: nn.Linear, axes: Tensor, *, unit: bool
    ):
        super().__init__(standardize, trunk, head)
        self.register_buffer("axes", axes)
        self.unit = unit

    def output(self, hidden: Tensor) -> Tensor:
        """Output of the projection, float32 of shape (n_samples, head.out_features)."""
        return side_by_side(self.head(hidden), hidden, unit=self.unit) @ self.axes


def side_by_side(outputs: Tensor, hidden: Tensor, *, unit: bool) -> Tensor:
    """Linear layer's outputs, of unit length if `unit`, and the hidden layer, which always is."""
    if unit:
        outputs = nn.functional.normalize(outputs, dim=-1)
    return torch.cat([outputs, nn.functional.normalize(hidden, dim=-1)], dim=-1)


def build_trunk(
    network: str | nn.Module | Callable, input_shape: Sequence[int], generator: torch.Generator
) -> nn.Module:
    """Make the trunk that `network` names, freshly initialised from `generator`.

    Parameters
    ----------
    network : {"auto", "mlp", "conv", "nin"}, nn.Module or callable
        A module is copied, weights included; a callable gets `input_shape` and returns a module, which is
        copied too: it may return the same one every time.
    input_shape : sequence of int
        Shape of one item: (n_features,) or (channels, height, width).
    generator : torch.Generator
        Source of the initial weights of the built-in trunks.

    Returns
    -------
    nn.Module

    Raises
    ------
    ValueError
        If the name is unknown or does not fit the input, or a callable returns no module.
    """
    if isinstance(network, nn.Module):
        return copy.deepcopy(network)
    if callable(network):
        trunk = network(tuple(input_shape))
        if not isinstance(trunk, nn.Module):
            raise ValueError(f"Expected network to return a torch.nn.Module, got {type(trunk).__name__}.")
        return copy.deepcopy(trunk)
    if network not in TRUNKS:
        raise ValueError(
            f"Expected network to be one of {', '.join(map(repr, TRUNKS))}, a torch.nn.Module or a callable, "
            f"got {network!r}."
        )
    if network == "auto":
        network = "mlp" if len(input_shape) == 1 else "conv"
    if network != "mlp" and len(input_shape) != 3:
        raise ValueError(
            f"network={network!r} expects X of shape (n_samples, channels, height, width), "
            f"got items of shape {tuple(input_shape)}."
        )
    # Made on the meta device and filled in from the generator: torch's own initialisation would draw from
    # the global random state.
    with torch.device("meta"):
        trunk = {"mlp": mlp_trunk, "conv": conv_trunk, "nin": nin_trunk}[network](input_shape)
    trunk.to_empty(device="cpu")
    # The order in memory of a convolution's weights is that of its output; this one is up to twice as fast.
    trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's overloads
    for module in trunk.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            # A linear layer at torch's own, smaller scale: it keeps the first npairs logits small.
            # Convolutions without normalisation after them need the full gain.
            slope = math.sqrt(5) if isinstance(module, nn.Linear) else 0.0
            nn.init.kaiming_uniform_(module.weight, a=slope, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_parameters()
    return trunk


def is_convolutional(network: str | nn.Module | Callable, input_shape: Sequence[int]) -> bool:
    """Tell whether `network` names one of the built-in convolutional trunks, for items of this shape."""
    return isinstance(network, str) and network in _CONVOLUTIONAL and len(input_shape) == 3


def n_trunk_outputs(trunk: nn.Module, standardize: Standardize, sample: Tensor) -> int:
    """Width of the trunk's output, from a forward pass over a few items.

    Raises
    ------
    ValueError
        If the output is not a tensor of shape (n_samples, n_hidden).
    """
    trunk.eval()
    shapes = f"{tuple(sample.shape)} to a float32 tensor of shape ({len(sample)}, n_hidden)"
    expected = f"Expected network to map {shapes}"
    try:
        with torch.no_grad():
            output = trunk(standardize(sample))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{expected}, but it fails: {error}") from error
    if not isinstance(output, Tensor):
        raise ValueError(f"{expected}, got {type(output).__name__}.")
    if output.ndim != 2 or len(output) != len(sample) or not output.shape[1] or output.dtype != torch.float32:
        raise ValueError(f"{expected}, got {tuple(output.shape)} of {output.dtype}.")
    return output.shape[1]


def new_head(n_in: int, n_out: int, generator: torch.Generator, std: float | None = None) -> nn.Linear:
    """Make a linear layer: from a truncated normal of deviation `std`, or uniform at the usual scale."""
    head = nn.utils.skip_init(nn.Linear, n_in, n_out)
    with torch.no_grad():
        if std is None:
            nn.init.kaiming_uniform_(head.weight, a=math.sqrt(5), generator=generator)
        else:
            nn.init.trunc_normal_(head.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
        nn.init.zeros_(head.bias)
    return head


def joined_heads(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """Make one linear layer whose outputs are those of both."""
    head = nn.utils.skip_init(nn.Linear, first.in_features, first.out_features + second.out_features)
    with torch.no_grad():
        head.weight.copy_(torch.cat([first.weight.cpu(), second.weight.cpu()]))
        head.bias.copy_(torch.cat([first.bias.cpu(), second.bias.cpu()]))
    return head


def parted_heads(head: nn.Linear, n_first: int) -> tuple[nn.Linear, nn.Linear]:
    """Undo `joined_heads`: the first `n_first` outputs, and the others."""
    parts = []
    for rows in (slice(None, n_first), slice(n_first, None)):
        weight, bias = head.weight[rows], head.bias[rows]
        part = nn.utils.skip_init(nn.Linear, head.in_features, len(weight), device=weight.device)
        with torch.no_grad():
            part.weight.copy_(weight)
            part.bias.copy_(bias)
        parts.append(part)
    return parts[0], parts[1]


def initial_network(
    X: np.ndarray, train: np.ndarray, network: str | nn.Module | Callable, n_outputs: int, seed: int
) -> StageNetwork:
    """Make the network that a first stage starts from: trunk and head drawn from `seed`, on the CPU.

    Parameters
    ----------
    X : ndarray of shape (n_samples, *input_shape)
        All items; those at `train` give the input statistics.
    train : ndarray of int64
        Positions.
    network : str, nn.Module or callable
        The trunk, see `build_trunk`.
    n_outputs : int
        Width of the linear layer.
    seed : int
        Of the initial weights.

    Returns
    -------
    StageNetwork
    """
    standardize = Standardize.from_items(X, train)
    generator = torch.Generator().manual_seed(seed)
    trunk, width = initial_trunk(X, standardize, network, seed, generator)
    return StageNetwork(standardize, trunk, new_head(width, n_outputs, generator))


def initial_trunk(
    X: np.ndarray,
    standardize: Standardize,
    network: str | nn.Module | Callable,
    seed: int,
    generator: torch.Generator,
) -> tuple[nn.Module, int]:
    """Make a trunk as it is before any training, on the CPU.

    Parameters
    ----------
    X : ndarray of shape (n_samples, *input_shape)
        Items.
    standardize : Standardize
        What they go through before the trunk.
    network : str, nn.Module or callable
        The trunk, see `build_trunk`.
    seed : int
        Of the weights that a callable draws from torch's global random state.
    generator : torch.Generator
        Of those of the built-in trunks.

    Returns
    -------
    trunk : nn.Module
    n_hidden : int
        Numbers that it gives for an item.
    """
    with randomness_of(network, seed):
        trunk = build_trunk(network, X.shape[1:], generator)
        return trunk, n_trunk_outputs(trunk, standardize, torch.tensor(X[:2]))

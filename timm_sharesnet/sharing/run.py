"""A run: blocks of a stage that get one kernel in place of their own."""

import itertools
import math
from typing import Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from ..conv_bn import as_float64
from ..stage import SharedStage, SharingBlock
from .align import align, mean_cosine, norm
from .calibration import RIDGE_KERNEL, InputMoments, ridge, solve

INITS = 'align', 'mean', 'first', 'random'

_SMALLEST = 0.1  # RMS of a channel / mean of all, below which it is not brought to 1: it is off, and would come on
_OFF = 1e-6  # mean RMS of all channels below which none is: batch norm gives values near 1


class Merge(NamedTuple):
    """What became of a run.

    Args:
        stage: Name of the stage.
        blocks: Indices of the blocks of the run.
        saved: Parameters that it has less.
        before: Mean cosine of two kernels of the run.
        after: The same after alignment.
    """

    stage: str
    blocks: Tuple[int, ...]
    saved: int
    before: float
    after: float

    def __str__(self) -> str:
        return (
            f'{self.stage} blocks {self.blocks[0]} to {self.blocks[-1]}: {len(self.blocks)} kernels to 1, '
            f'{self.saved:,} parameters saved, cosine of two kernels {self.before:.2f}, aligned {self.after:.2f}'
        )


class Run:
    """Blocks that already share a convolution, and the kernels that they had.

    Attributes:
        stage: Name of the stage.
        indices: Indices of the blocks.
        blocks: The blocks, which are adapted to what becomes of the kernels.
        conv: The convolution that they share.
        kernels: The kernel (C, C / groups, 3, 3) that each has for itself, in float64, until they are merged.
        scales, orders: What became of the inputs (C) of each kernel: what they were multiplied by, their order.
        before, after: Mean cosine of two kernels, and the same after alignment.
    """

    def __init__(self, name: str, stage: SharedStage, indices: Sequence[int], kernels: Sequence[torch.Tensor]) -> None:
        self.stage, self.indices = name, tuple(indices)
        self.blocks: List[SharingBlock] = [stage[i] for i in indices]
        self.conv: nn.Conv2d = stage.conv_of(indices[0])
        self.kernels = [as_float64(kernel) for kernel in kernels]
        chs = self.conv.in_channels
        self.scales = [torch.ones(chs, dtype=torch.float64) for _ in kernels]
        self.orders = [torch.arange(chs) for _ in kernels]
        self.before = self.after = math.nan

    def merge(self, init: str, inputs: Optional[Iterable[InputMoments]] = None) -> None:
        """Make the kernel that the blocks share.

        Args:
            init: See `timm_sharesnet.share`.
            inputs: Of each block's 3x3 in the plain net, to fit the kernel to if it is a mean.
        """
        self.normalize()
        grouped = self.conv.groups > 1
        if init == 'align' and not grouped:
            self.align()
        self.install(self.choose(init))
        if inputs is not None and init in ('align', 'mean') and not grouped:
            self.fit(inputs)
        self.kernels = []  # they are large

    def normalize(self) -> None:
        """Bring the kernels to units in which inputs have an RMS of 1 and outputs a variance of 1."""
        for i, block in enumerate(self.blocks):
            rms, std = input_rms(block, self.conv), output_std(block, self.conv)
            self.kernels[i] = self.kernels[i] / std[:, None, None, None]
            if self.conv.groups == 1:
                self.kernels[i] = self.kernels[i] * rms[:, None, None]
                self.scale_inputs(i, 1 / rms)
            layer = norm_after(block)
            if layer is not None:
                layer.running_mean.div_(std.to(layer.running_mean))
                layer.running_var.fill_(1 - layer.eps)
        self.before = self.after = mean_cosine(self.kernels)

    def scale_inputs(self, i: int, scale: torch.Tensor) -> None:
        """Multiply the inputs of a block's 3x3, one factor a channel, where a batch norm can do it."""
        layer = norm_before(self.blocks[i])
        if layer is not None:
            layer.weight.mul_(scale.to(layer.weight))
            layer.bias.mul_(scale.to(layer.bias))
            self.scales[i] = self.scales[i] * scale

    def align(self) -> None:
        """Reorder the blocks' inner channels, which leaves what they compute, so that the kernels are near."""
        outputs = self.blocks[0].layers().last != 'conv2'  # else they are added to the stream, which has its order
        for i, (ins, outs) in enumerate(align(self.kernels, outputs)):
            self.kernels[i] = self.kernels[i][outs][:, ins]
            self.orders[i] = ins
            permute_channels(self.blocks[i], ins, outs)
        self.after = mean_cosine(self.kernels)

    def choose(self, init: str) -> torch.Tensor:
        """The kernel that the blocks will share."""
        if init == 'first':
            return self.kernels[0]
        if init == 'random':
            return torch.randn_like(self.kernels[0]) / math.sqrt(self.kernels[0][0].numel())
        kernel: torch.Tensor = sum(self.kernels) / len(self.kernels)
        return kernel * (sum(map(norm, self.kernels)) / len(self.kernels) / norm(kernel))  # a mean is smaller

    def install(self, kernel: torch.Tensor) -> None:
        """Set the shared convolution's kernel. Where the scale of a block's own would be lost, the inputs get it."""
        for i, block in enumerate(self.blocks):
            if norm_after(block) is None and kernel.any():
                own = norm(self.kernels[i])
                self.scale_inputs(i, (self.kernels[i].norm() / norm(kernel)).expand(self.conv.in_channels))
                self.kernels[i] = self.kernels[i] * (norm(kernel) / own)
        self.conv.weight.copy_(kernel)

    def fit(self, inputs: Iterable[InputMoments]) -> None:
        """Set the kernel whose outputs are nearest to those of the blocks' own, each on its inputs in the plain net.

        It is their mean, weighted by the inputs' second moments (RegMean of `Dataless Knowledge Fusion by Merging
        Weights of Language Models` - https://arxiv.org/abs/2212.09849).
        """
        total, products = torch.zeros(1, 1, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for kernel, scale, order, seen in zip(self.kernels, self.scales, self.orders, inputs, strict=True):
            moments = ridge(seen.second(scale, order)[0], RIDGE_KERNEL)
            products = products + kernel.flatten(1) @ moments
            total = moments.add_(total)
        kernel = solve(total, products).reshape(self.conv.weight.shape)
        if norm_after(self.blocks[0]) is not None and kernel.any():  # as large as it was, as its learning rate is
            kernel = kernel * (as_float64(self.conv.weight).norm() / kernel.norm())
        self.conv.weight.copy_(kernel)

    def report(self) -> Merge:
        """What became of the run."""
        saved = (len(self.blocks) - 1) * self.conv.weight.numel()
        return Merge(self.stage, self.indices, saved, self.before, self.after)


def norm_before(block: SharingBlock) -> Optional[nn.BatchNorm2d]:
    """The batch norm that scales the inputs of the 3x3, if what lies between passes a scale on."""
    layers = [getattr(block, name) for name in block.layers().before]
    norms = [layer for layer in layers if type(layer) is nn.BatchNorm2d and layer.affine]
    acts = [layer for layer in layers if isinstance(layer, (nn.ReLU, nn.LeakyReLU))]
    return norms[0] if len(norms) == 1 and len(acts) == 1 else None


def norm_after(block: SharingBlock) -> Optional[nn.BatchNorm2d]:
    """The batch norm that takes the scale of the outputs of the 3x3 away."""
    names = block.layers().after
    layer = getattr(block, names[0]) if names else None
    return layer if type(layer) is nn.BatchNorm2d and layer.track_running_stats else None


def input_rms(block: SharingBlock, conv: nn.Conv2d) -> torch.Tensor:
    """RMS (C) of each input of a block's 3x3, by the batch norm before it. One where none tells."""
    layer = norm_before(block)
    if layer is not None and layer.num_features == conv.in_channels:
        rms = _rms_after_relu(as_float64(layer.weight), as_float64(layer.bias))
        if rms.mean() > _OFF:
            return rms.clamp(min=_SMALLEST * rms.mean().item())
    return torch.ones(conv.in_channels, dtype=torch.float64)


def output_std(block: SharingBlock, conv: nn.Conv2d) -> torch.Tensor:
    """Standard deviation (C) of each output of a block's 3x3, by the batch norm after it. One where none tells."""
    layer = norm_after(block)
    if layer is None:
        return torch.ones(conv.out_channels, dtype=torch.float64)
    return (as_float64(layer.running_var) + layer.eps).sqrt()


def _rms_after_relu(scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """RMS of relu(z) for z normally distributed with the mean and standard deviation that batch norm gives."""
    scale = scale.abs().clamp(min=1e-12)
    ratio = shift / scale
    density = torch.exp(-0.5 * ratio**2) / math.sqrt(2 * math.pi)
    moment = (shift**2 + scale**2) * torch.special.ndtr(ratio) + shift * scale * density
    return moment.clamp(min=0).sqrt()


def permute_channels(block: SharingBlock, ins: torch.Tensor, outs: torch.Tensor) -> None:
    """Reorder the channels into and out of the block's 3x3, but not its kernel. With that the block is the same."""
    layers = block.layers()
    for name in ['conv1', *layers.before]:
        _reorder(getattr(block, name), ins)
    if layers.last != 'conv2':
        for name in layers.after[: layers.after.index(layers.last)]:
            _reorder(getattr(block, name), outs)
        conv = getattr(block, layers.last)
        conv.weight.copy_(conv.weight[:, outs])


def _reorder(layer: nn.Module, order: torch.Tensor) -> None:
    """Reorder the outputs of a layer: what it has one of for each channel."""
    for tensor in itertools.chain(layer.parameters(), layer.buffers()):
        if tensor.ndim and len(tensor) == len(order):
            tensor.copy_(tensor[order])

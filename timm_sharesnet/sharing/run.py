"""A run: blocks of a stage that get one kernel in place of their own."""

import itertools
import math
from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from ..conv_bn import as_float64
from ..stage import SharedStage, SharingBlock
from .align import align, mean_cosine, norm

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
        kernels: The kernel (C, C / groups, 3, 3) that each has for itself, in float64.
        fits: Whether the shared kernel may be fitted to those, given images.
        before, after: Mean cosine of two kernels, and the same after alignment.
    """

    def __init__(self, name: str, stage: SharedStage, indices: Sequence[int], kernels: Sequence[torch.Tensor]) -> None:
        self.stage, self.indices = name, tuple(indices)
        self.blocks: List[SharingBlock] = [stage[i] for i in indices]
        self.conv: nn.Conv2d = stage.conv_of(indices[0])
        self.kernels = [as_float64(kernel) for kernel in kernels]
        self.fits = False
        self.before = self.after = math.nan

    @property
    def has_free_scale(self) -> bool:
        """Whether a batch norm after the kernel makes its scale free."""
        return norm_after(self.blocks[0]) is not None

    def merge(self, init: str) -> None:
        """Make the kernel that the blocks share, see `timm_sharesnet.share` for `init`."""
        self.normalize()
        grouped = self.conv.groups > 1
        if init == 'align' and not grouped:
            self.align()
        self.install(self.choose(init))
        self.fits = init in ('align', 'mean') and not grouped

    def normalize(self) -> None:
        """Bring the kernels to units in which inputs have an RMS of 1 and outputs a variance of 1."""
        for i, block in enumerate(self.blocks):
            self.kernels[i] = normalize_kernel(block, self.kernels[i])
        self.before = self.after = mean_cosine(self.kernels)

    def align(self) -> None:
        """Reorder the blocks' inner channels, which leaves what they compute, so that the kernels are near."""
        outputs = self.blocks[0].layers().last != 'conv2'  # else they are added to the stream, which has its order
        for i, (ins, outs) in enumerate(align(self.kernels, outputs)):
            self.kernels[i] = self.kernels[i][outs][:, ins]
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
                _scale_input(block, (self.kernels[i].norm() / norm(kernel)).expand(kernel.shape[1]))
                self.kernels[i] = self.kernels[i] * (norm(kernel) / own)
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


def _scale_input(block: SharingBlock, scale: torch.Tensor) -> None:
    """Multiply the inputs of the 3x3, one factor a channel, where a batch norm can do it."""
    layer = norm_before(block)
    if layer is not None:
        layer.weight.mul_(scale.to(layer.weight))
        layer.bias.mul_(scale.to(layer.bias))


def normalize_kernel(block: SharingBlock, kernel: torch.Tensor) -> torch.Tensor:
    """The kernel in units of its inputs and outputs. The block's batch norms are adapted: it computes the same."""
    layer = norm_before(block)
    if layer is not None and kernel.shape[1] == layer.num_features:
        rms = _rms_after_relu(as_float64(layer.weight), as_float64(layer.bias))
        if rms.mean() > _OFF:
            rms = rms.clamp(min=_SMALLEST * rms.mean().item())
            kernel = kernel * rms[None, :, None, None]
            _scale_input(block, 1 / rms)
    layer = norm_after(block)
    if layer is not None:
        std = (as_float64(layer.running_var) + layer.eps).sqrt()
        kernel = kernel / std[:, None, None, None]
        layer.running_mean.div_(std.to(layer.running_mean))
        layer.running_var.fill_(1 - layer.eps)
    return kernel


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

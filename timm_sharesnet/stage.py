"""The idea of ShaResNet: a stage of residual blocks that owns one 3x3 convolution and lends it to its blocks.

A ResNet computes, in stage `s` and block `k`, `x[s,k+1] = x[s,k] + F(x[s,k], W[s,k])`. ShaResNet splits the weights of
the residual branch in two (eq. 2 of the paper):

    x[s,k+1] = x[s,k] + F(x[s,k], W[s,k], W[s])

`W[s,k]` (1x1 or first 3x3 convolutions, batch norms) belongs to the block, `W[s]`, one 3x3 convolution, to the stage.
Its gradient is the sum over its uses (eq. 3), which is what autograd computes.

Paper: A. Boulch, `ShaResNet: reducing residual network parameter number by sharing weights`, Pattern Recognition
Letters 2018 - https://doi.org/10.1016/j.patrec.2018.01.006

Why the convolution is a module of the stage that the blocks get as an argument, and not a module registered in every
block: each tensor then has exactly one name. Registered in every block it has one name per use, and safetensors refuses
the file, `ModelEmaV3` decays the weight once per use, and `functional_call` and FSDP2 see several parameters. Passing
the module rather than its weight keeps hooks, FLOP counters and replacement by name (LoRA, quantization) working.
"""

from typing import Iterable, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

__all__ = ['SharedStage', 'SharingBlock']


class SharingBlock(nn.Module):
    """Base of the residual blocks whose `conv2`, a stride-1 3x3, may be the stage's instead of their own.

    A block is built complete, with a `conv2`. Its forward takes the stage's convolution as a second argument and calls
    `forward_conv2` in place of `conv2`.
    """

    def give_up_conv2(self) -> nn.Conv2d:
        """Remove the block's own 3x3 and return it. From then on the block needs that of its stage."""
        conv: nn.Conv2d = self.conv2  # type: ignore[has-type]
        self.conv2 = None
        self.conv2_args = (conv.stride, conv.padding, conv.dilation, conv.groups)  # what a weight alone does not tell
        return conv

    def forward_conv2(self, x: torch.Tensor, conv: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Apply the block's own 3x3 where it has one, else the stage's: (B, C, H, W) -> (B, C, H, W).

        Args:
            x: Input of the convolution.
            conv: The stage's convolution, a module. In TorchScript, which cannot pass modules, its weight of shape
                (C, C / groups, 3, 3), hence the annotation.
        """
        if self.conv2 is not None:
            return self.conv2(x)
        else:
            assert conv is not None, "the 3x3 of this block is its stage's: call it with that convolution"
            if torch.jit.is_scripting():
                stride, padding, dilation, groups = self.conv2_args
                return F.conv2d(x, conv, None, stride, padding, dilation, groups)
            else:
                return conv(x)


class SharedStage(nn.Module):
    """A stage: `conv`, the 3x3 convolution shared by its blocks, and `blocks`.

    The module is no `nn.Sequential`: its blocks cannot be called without the convolution. Gradient checkpointing, block
    by block, is therefore done here, as in timm's ResNetV2 (`stage.grad_checkpointing`).
    """

    def __init__(self, blocks: Iterable[SharingBlock], first_shared: Optional[int] = 0) -> None:
        """
        Args:
            blocks: The stage's blocks in order, each with a `conv2` of its own. Those from `first_shared` on give it
                up, and the first of these becomes the stage's `conv`.
            first_shared: Index of the first block that uses the shared convolution (a block whose 3x3 has a stride of
                its own cannot). `None` shares nothing: the stage of a plain ResNet.

        Raises:
            ValueError: If the convolutions to be shared differ in channels, stride, dilation or groups.
        """
        super().__init__()
        blocks = list(blocks)
        convs = [] if first_shared is None else [block.give_up_conv2() for block in blocks[first_shared:]]
        if len(set(map(str, convs))) > 1:  # TorchScript cannot parse a set comprehension
            raise ValueError(f'The 3x3 convolutions of these blocks differ and cannot be shared: {convs}.')
        self.conv = convs[0] if convs else None
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the blocks in order: (B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""
        for block in self.blocks:
            if torch.jit.is_scripting():
                if self.conv is not None:
                    x = block(x, self.conv.weight)
                else:
                    x = block(x)
            elif self.grad_checkpointing:
                x = checkpoint(block, x, self.conv, use_reentrant=False)
            else:
                x = block(x, self.conv)
        return x

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
the module rather than its weight keeps hooks, FLOP counters and replacement by name (LoRA, parametrization) working.
"""

from typing import Dict, Final, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .conv_bn import Branch, conv_args, fold_branch, fold_sequentials, is_plain, require_plain
from .share_rate import Rate, split_runs
from .tracing import ScriptableStage, is_tracing, traced_conv

__all__ = ['SharedStage', 'SharingBlock']


class SharingBlock(nn.Module):
    """Base of the residual blocks whose `conv2`, a stride-1 3x3, may be the stage's instead of their own.

    A block is built complete, with a `conv2`. Its forward takes the stage's convolution as a second argument and calls
    `forward_conv2` in place of `conv2`.
    """

    branch: Tuple[str, ...] = ()
    """Names of the layers of the residual branch in the order in which forward calls them. Some may be None."""

    after: Tuple[str, ...] = ()
    """Names of the layers after the addition of the shortcut."""

    folded = False

    @staticmethod
    def first_shared(stage: int) -> int:
        """Index of the first block that can share, in the stage of this index: none before has a 3x3 with a stride."""
        return 1

    def layers(self) -> Branch:
        """What of the residual branch does something in evaluation, before and after the 3x3."""
        return Branch(self, self.branch)

    def give_up_conv2(self) -> nn.Conv2d:
        """Remove the block's own 3x3 and return it. From then on the block needs that of its stage."""
        conv: nn.Conv2d = self.conv2  # type: ignore[has-type]
        self.conv2 = None
        self.conv2_args = conv_args(conv)  # what a weight alone does not tell
        self.register_parameter('conv2_bias', None)  # only a folded block has one
        return conv

    def take_conv2(self, conv: nn.Module) -> None:
        """Give a block that gave up its 3x3 one of its own again."""
        self.conv2 = conv
        del self.conv2_args, self.conv2_bias

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
            if conv is None:  # as timm's `checkpoint_seq` calls it, which iterates over blocks
                raise RuntimeError("The 3x3 of this block is its stage's: call the stage, or the block with that 3x3.")
            if torch.jit.is_scripting():
                stride, padding, dilation, groups = self.conv2_args
                return F.conv2d(x, conv, self.conv2_bias, stride, padding, dilation, groups)
            elif is_tracing(x):
                return traced_conv(x, conv, self.conv2_bias, barrier=not self.folded)
            elif self.conv2_bias is None:
                return conv(x)
            elif is_plain(conv):
                return F.conv2d(x, conv.weight, self.conv2_bias, *conv_args(conv))
            else:
                return conv(x) + self.conv2_bias[:, None, None]


class SharedStage(ScriptableStage):
    """A stage: `conv`, the 3x3 convolution shared by its blocks, and `blocks`.

    Where the blocks share several convolutions, `conv` has them by the index of the first block that uses each
    (`conv['4']`), and a block that shares with no other keeps its own.

    The module is no `nn.Sequential`: its blocks cannot be called without the convolution. Gradient checkpointing, block
    by block, is therefore done here, as in timm's ResNetV2 (`stage.grad_checkpointing`). As in a `Sequential`,
    `stage[-1]`, `len(stage)` and `for block in stage` are about its blocks.
    """

    several: Final[bool]  # a constant, so that TorchScript compiles one of two branches

    def __init__(self, blocks: Iterable[SharingBlock], first_shared: int = 0, rate: Rate = 1.0) -> None:
        """
        Args:
            blocks: The stage's blocks in order, each with a `conv2` of its own. Those of a run give it up, and the
                first of these becomes the stage's.
            first_shared: Index of the first block that can share (a block whose 3x3 has a stride of its own cannot).
            rate: See `split_runs`. 0 gives the stage of a plain ResNet.

        Raises:
            ValueError: If the convolutions to be shared differ in channels, stride, dilation or groups.
        """
        super().__init__()
        blocks = list(blocks)
        runs = split_runs(first_shared, len(blocks), rate)
        if len(runs) == 1 and (len(runs[0]) > 1 or rate == 1):  # of a stage of the paper, for one block, too
            self.conv = _share([blocks[i] for i in runs[0]])
        else:
            convs = {str(run[0]): _share([blocks[i] for i in run]) for run in runs if len(run) > 1}
            self.conv = nn.ModuleDict(convs) if convs else None
        self.several = isinstance(self.conv, nn.ModuleDict)
        self.keys = [next((str(run[0]) for run in runs if i in run), '') for i in range(len(blocks))]
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    @torch.jit.unused
    def conv_name(self, index: int) -> str:
        """Where the convolution is that a block uses: 'conv', 'conv.4' or 'blocks.0.conv2'."""
        if self.blocks[index].conv2 is not None:
            return f'blocks.{index}.conv2'
        return f'conv.{self.keys[index]}' if self.several else 'conv'

    @torch.jit.unused
    def conv_of(self, index: int) -> Optional[nn.Module]:
        """The stage's convolution that a block uses, None if it has its own."""
        if self.blocks[index].conv2 is not None:
            return None
        return self.conv[self.keys[index]] if self.several else self.conv

    @torch.jit.unused
    def runs(self) -> Dict[str, List[int]]:
        """The blocks that use each of the stage's convolutions, by the convolution's name."""
        runs: Dict[str, List[int]] = {}
        for i, block in enumerate(self.blocks):
            if block.conv2 is None:
                runs.setdefault(self.conv_name(i), []).append(i)
        return runs

    def extra_repr(self) -> str:
        """The names of a stage's tensors do not tell which blocks use them."""
        return ', '.join(f'{name}: blocks {blocks}' for name, blocks in self.runs().items())

    def __getitem__(self, index: Union[int, slice]) -> nn.Module:
        return self.blocks[index]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the blocks in order: (B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""
        if torch.jit.is_scripting():
            x = self.forward_scripted(x)
        else:
            for i, block in enumerate(self.blocks):
                if self.grad_checkpointing:
                    x = checkpoint(block, x, self.conv_of(i), use_reentrant=False)
                else:
                    x = block(x, self.conv_of(i))
        return x

    @torch.jit.unused
    def reparameterize(self) -> None:
        """Fold the stage's batch norms, in place (`timm_sharesnet.fold`): timm's name, which `--reparam` calls.

        Raises:
            ValueError: If something was added to a shared convolution (LoRA, pruning, a bias, a hook).
        """
        require_plain(map(self.conv_of, range(len(self))))
        for i, block in enumerate(self.blocks):
            fold_branch(block, block.branch, self.conv_of(i))
        fold_sequentials(self)


def _share(blocks: Sequence[SharingBlock]) -> nn.Conv2d:
    """Take the 3x3 of blocks from them and return the first one."""
    convs = [block.give_up_conv2() for block in blocks]
    if len(set(map(str, convs))) > 1:
        raise ValueError(f'The 3x3 convolutions of these blocks differ and cannot be shared: {convs}.')
    return convs[0]

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

Tools that rewrite a graph fold the batch norm after a convolution into it. Done once per use of one kernel, that
computes garbage, so what they trace differs from what runs (`_traced`). What they do to a shared net is then right, but
the batch norms after the shared convolutions stay: `timm_sharesnet.fold` moves them out of the way, and `unshare` gives
the plain net to a tool that cannot handle a convolution used several times.
"""

import itertools
from typing import Any, Dict, Final, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils.checkpoint import checkpoint

__all__ = ['SharedStage', 'SharingBlock', 'split_runs', 'stage_rates']

# torch 2.6 does not tell torch.export from torch.compile, whose result is the same either way
_is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)


class SharingBlock(nn.Module):
    """Base of the residual blocks whose `conv2`, a stride-1 3x3, may be the stage's instead of their own.

    A block is built complete, with a `conv2`. Its forward takes the stage's convolution as a second argument and calls
    `forward_conv2` in place of `conv2`.
    """

    branch: Tuple[str, ...] = ()
    """Names of the layers of the residual branch in the order in which forward calls them. Some may be None."""

    after: Tuple[str, ...] = ()
    """Names of the layers after the addition of the shortcut."""

    plain: Optional[type] = None
    """The block without sharing that it is made of, if it adds nothing to its layers."""

    folded = False

    @staticmethod
    def first_shared(stage: int) -> int:
        """Index of the first block that can share, in the stage of this index: none before has a 3x3 with a stride."""
        return 1

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
            if (
                conv is None
            ):  # what iterates over blocks and calls them, such as timm's `checkpoint_seq`, would be wrong
                raise RuntimeError("The 3x3 of this block is its stage's: call the stage, or the block with that 3x3.")
            if torch.jit.is_scripting():
                stride, padding, dilation, groups = self.conv2_args
                return F.conv2d(x, conv, self.conv2_bias, stride, padding, dilation, groups)
            elif isinstance(x, torch.fx.Proxy) or _is_exporting():
                return self._traced(x, conv)
            elif self.conv2_bias is None:
                return conv(x)
            elif is_plain(conv):
                return F.conv2d(x, conv.weight, self.conv2_bias, *conv_args(conv))
            else:
                return conv(x) + self.conv2_bias[:, None, None]

    def _traced(self, x: torch.Tensor, conv: nn.Module) -> torch.Tensor:
        """Apply the stage's convolution in a graph that other tools will rewrite.

        FX: a function call with the stage's weight, which the FX tools fold nothing into, and which the quantizers give
        a scale per use. Where the module must be called, as one node, which they leave alone.

        torch.export: an operation without effect keeps batch norm and convolution apart for the quantizers (PT2E) and
        delegates (XNNPACK), which see no modules. ONNX files do not have it.
        """
        fx = isinstance(x, torch.fx.Proxy)
        bias = self.conv2_bias
        if is_plain(conv):
            x = F.conv2d(x, conv.weight, bias, *conv_args(conv))
            bias = None
        elif not fx:
            x = conv(x)
        elif type_before_parametrizations(conv) is nn.Conv2d:
            raise RuntimeError(
                f'The shared convolution {conv} has a hook, pruning, a parametrization or a bias, and tools that trace '
                f'with FX would fold and quantize it wrongly. Make it plain first (torch.nn.utils.prune.remove, '
                f'torch.nn.utils.parametrize.remove_parametrizations), or trace timm_sharesnet.unshare(model).'
            )
        else:
            x = x.tracer.create_proxy('call_module', x.tracer.path_of_module(conv), (x,), {})
        if bias is not None:
            x = x + bias[:, None, None]
        return x if fx or self.folded else torch.ops.aten.alias(x)


def conv_args(conv: nn.Conv2d) -> Tuple[Any, ...]:
    """What `F.conv2d` takes beside input, weight and bias."""
    return conv.stride, conv.padding, conv.dilation, conv.groups


def is_plain(conv: Optional[nn.Module], bias: bool = False) -> bool:
    """Whether calling a module is nothing but `F.conv2d` with its weight, and with its bias where it may have one."""
    return (
        type(conv) is nn.Conv2d
        and (bias or conv.bias is None)
        and conv.padding_mode == 'zeros'
        and 'weight' in conv._parameters  # not computed from other tensors, as pruning and old weight norm do
        and not has_hooks(conv)
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether something else happens when a module is called than its class says."""
    names = '_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks'
    return 'forward' in module.__dict__ or any(getattr(module, name) for name in names)


Run = Sequence[int]
Rate = Union[float, Sequence[Run]]
"""How much of a stage is shared: 0 to 1, or its runs of blocks, by index."""


ShareRate = Union[float, Sequence[Rate]]
"""The same of all stages, or of each."""


def split_runs(first: int, end: int, rate: Rate) -> List[Tuple[int, ...]]:
    """Split the blocks first to end - 1 of a stage into runs, each of which uses one convolution.

    Of the m blocks that can share, `m - round(rate * (m - 1))` distinct convolutions remain. The runs are consecutive
    and as equal as possible, the longer ones last. At rate 1 there is one run, which is the paper.

        >>> split_runs(1, 7, 0.5)
        [(1,), (2,), (3, 4), (5, 6)]
        >>> split_runs(1, 7, [[3, 1], [2, 5]])
        [(1, 3), (2, 5), (4,), (6,)]

    Args:
        first: Index of the first block that can share.
        end: Number of blocks.
        rate: From 0, where no two blocks share, to 1, or the runs of blocks that share, in any order.

    Returns:
        The runs, each in the order of its blocks, in the order of their first blocks.

    Raises:
        ValueError: If the rate is no number from 0 to 1, or a run has a block that cannot share, or that is in two.
    """
    rate = as_python(rate)
    if _is_number(rate):
        if not 0 <= rate <= 1:
            raise ValueError(f'share_rate must be from 0 to 1, or the runs of blocks that share, got {rate}.')
        m = end - first
        if not m:
            return []
        number = m - round(rate * (m - 1))
        length, longer = divmod(m, number)
        starts = [first]
        for i in range(number):
            starts.append(starts[-1] + length + (i >= number - longer))
        return [tuple(range(*pair)) for pair in itertools.pairwise(starts)]
    if not (isinstance(rate, list) and all(isinstance(run, list) and all(map(_is_index, run)) for run in rate)):
        raise ValueError(
            f'share_rate must be a number from 0 to 1, or lists of blocks that share, such as [[1, 2], [3, 4]], got '
            f'{rate!r}.'
        )
    indices = [i for run in rate for i in run]
    if not all(rate) or len(set(indices)) < len(indices) or not set(indices) <= set(range(first, end)):
        raise ValueError(
            f'share_rate: runs must be lists of blocks from {first} to {end - 1}, none of them twice, got {rate}.'
        )
    return sorted([*(tuple(sorted(run)) for run in rate), *((i,) for i in range(first, end) if i not in indices)])


def stage_rates(share_rate: ShareRate, stages: int) -> List[Rate]:
    """The rate of each stage, given one for all or one for each.

    Raises:
        ValueError: If it is no number, and no list with as many as there are stages.
    """
    rates = as_python(share_rate)
    if _is_number(rates):
        return [rates] * stages
    if not (isinstance(rates, list) and len(rates) == stages):
        raise ValueError(f'share_rate must be one number, or one for each of the {stages} stages, got {rates!r}.')
    return rates


def as_python(value: Any) -> Any:
    """A rate of numbers and lists, if it was given as tuples, ranges, or scalars and arrays of numpy or torch."""
    if hasattr(value, 'tolist'):
        value = value.tolist()
    return [as_python(v) for v in value] if isinstance(value, (list, tuple, range)) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class SharedStage(nn.Module):
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
            if self.several:
                weights: Dict[str, torch.Tensor] = {}
                for key, conv in self.conv.items():
                    weights[key] = conv.weight
                for i, block in enumerate(self.blocks):
                    x = block(x, weights.get(self.keys[i]))
            else:
                for block in self.blocks:
                    if self.conv is not None:
                        x = block(x, self.conv.weight)
                    else:
                        x = block(x)
        else:
            for i, block in enumerate(self.blocks):
                if self.grad_checkpointing:
                    x = checkpoint(block, x, self.conv_of(i), use_reentrant=False)
                else:
                    x = block(x, self.conv_of(i))
        return x

    @torch.jit.unused
    def reparameterize(self) -> None:
        """Fold the stage's batch norms, in place: timm's name for it, called by `timm.utils.reparameterize_model` and
        so by `--reparam` of timm's scripts. See `timm_sharesnet.fold`."""
        from .folding import fold_stage

        fold_stage(self)

    def __prepare_scriptable__(self) -> 'SharedStage':
        """Called by `torch.jit.script`, which hands the blocks the shared weight and no module.

        Raises:
            RuntimeError: If the weight alone would not compute what the module does.
        """
        for i, block in enumerate(self.blocks):
            conv = self.conv_of(i)
            if conv is not None and not (is_plain(conv) and block.conv2_args == conv_args(conv)):
                raise RuntimeError(
                    f"TorchScript gets of a stage's shared convolution only the weight, and {conv} is not the "
                    f'convolution without bias, hooks and parametrization that the stage was built with. Merge what '
                    f'was added to it, or script timm_sharesnet.unshare(model).'
                )
        return self


def _share(blocks: Sequence[SharingBlock]) -> nn.Conv2d:
    """Take the 3x3 of blocks from them and return the first one."""
    convs = [block.give_up_conv2() for block in blocks]
    if len(set(map(str, convs))) > 1:
        raise ValueError(f'The 3x3 convolutions of these blocks differ and cannot be shared: {convs}.')
    return convs[0]

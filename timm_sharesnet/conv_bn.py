"""Convolutions and batch norms: what is a plain one, and how the batch norm goes into what stands around it."""

import itertools
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torchvision.ops.misc import FrozenBatchNorm2d

MAX_SHIFT = 1e3
"""Largest `|c / s|` of a use whose scale moves. In fp16, which ends at 65,504, and in the int32 biases of int8 files it
leaves room for what the convolution adds, and a scale that moves is at least a thousandth of its shift."""

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)


# ---- What a layer is


def is_plain(conv: Optional[nn.Module], bias: bool = False) -> bool:
    """Whether calling a module is nothing but `F.conv2d` with its weight, and with its bias where it may have one."""
    return (
        type(conv) is nn.Conv2d
        and (bias or conv.bias is None)
        and conv.padding_mode == 'zeros'
        and 'weight' in conv._parameters  # not computed from other tensors, as pruning and old weight norm do
        and not has_hooks(conv)
    )


def require_plain(convs: Iterable[Optional[nn.Module]]) -> None:
    """Raise a ValueError if something was added to one of the shared convolutions that are to be folded around."""
    for conv in convs:
        if conv is not None and not is_plain(conv):
            raise ValueError(
                f'The shared convolution {conv} has a hook, pruning, a parametrization, a bias or something else that '
                f'a plain convolution has not, and cannot be folded: merge or remove it first.'
            )


def has_hooks(module: nn.Module) -> bool:
    """Whether something else happens when a module is called than its class says."""
    names = '_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks'
    return 'forward' in module.__dict__ or any(getattr(module, name) for name in names)


def does_nothing(layer: Optional[nn.Module]) -> bool:
    """Whether a layer returns its input in evaluation."""
    from timm.layers import DropBlock2d, DropPath  # late: timm imports the models, which import this file

    nothing = nn.Identity, nn.Dropout, DropPath, DropBlock2d
    return layer is None or isinstance(layer, nothing) and not has_hooks(layer)


def conv_args(conv: nn.Conv2d) -> Tuple[Any, ...]:
    """What `F.conv2d` takes beside input, weight and bias."""
    return conv.stride, conv.padding, conv.dilation, conv.groups


class Branch:
    """The layers of a residual branch that do something in evaluation, around its 3x3 `conv2`.

    Attributes:
        names: All of them in the order of the block's forward. `conv2` is among them, even if it is not the block's.
        before: Those between `conv1` and `conv2`.
        after: Those after `conv2`.
        last: The last convolution, `conv3` (a 1x1) or `conv2`.
        after_last: Those after that.
    """

    def __init__(self, block: nn.Module, order: Sequence[str]) -> None:
        self.names = [name for name in order if name == 'conv2' or not does_nothing(getattr(block, name))]
        i = self.names.index('conv2')
        self.before, self.after = self.names[self.names.index('conv1') + 1 : i], self.names[i + 1 :]
        self.last = 'conv3' if 'conv3' in self.after else 'conv2'
        self.after_last = self.names[self.names.index(self.last) + 1 :]


# ---- Folding


def fold_branch(block: nn.Module, order: Sequence[str], shared: Optional[nn.Conv2d]) -> None:
    """Fold the batch norms of a residual branch, in place, see `timm_sharesnet.fold`.

    Args:
        block: A residual block in evaluation mode.
        order: Names of the layers of its branch.
        shared: The plain convolution that is used for its `conv2`, None if it has its own.
    """
    branch = Branch(block, order)
    for conv_name, norm_name in itertools.pairwise(branch.names):
        if shared is None or conv_name != 'conv2':
            fold_pair(block, conv_name, block, norm_name)
    if shared is not None:
        affine = _scale_and_shift(getattr(block, branch.after[0])) if branch.after else None
        if affine is not None:
            _fold_use(block, shared, branch.after, *affine)
        if not block.folded:
            block.folded = True
            block.register_load_state_dict_pre_hook(_match_folded_form)


def _fold_use(block: nn.Module, shared: nn.Conv2d, after: List[str], scale: torch.Tensor, shift: torch.Tensor) -> None:
    """Fold the batch norm after a use of a shared convolution, the first of the layers after it."""
    norm, movable = after[0], False
    if len(after) > 2 and _is_relu(getattr(block, after[1])) and _is_pointwise(getattr(block, after[2])):
        movable = bool(((scale > 0) & (shift.abs() <= MAX_SHIFT * scale) | (scale == 0)).all())
        moved = scale if movable else torch.ones_like(scale)
        constant = torch.where(moved == 0, shift, 0).relu()
        conv = getattr(block, after[2])
        kernel = as_float64(conv.weight)
        bias = kernel[:, :, 0, 0] @ constant + (0 if conv.bias is None else as_float64(conv.bias))  # in both forms
        setattr(block, after[2], _conv_like(conv, kernel * moved[None, :, None, None], bias))
        shift = torch.where(moved == 0, 0, shift / moved)
    if movable:
        block.conv2_bias = nn.Parameter(shift.to(shared.weight))
        _remove(block, norm)
    else:
        setattr(block, norm, _depthwise(scale.to(shared.weight), shift.to(shared.weight)))


def _match_folded_form(block: Any, state_dict: Dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """Give a folded block the form of the state dict that it is about to load: a bias, or a depthwise convolution."""
    norm = block.branch[block.branch.index('conv2') + 1]
    bias, weight = state_dict.get(f'{prefix}conv2_bias'), state_dict.get(f'{prefix}{norm}.weight')
    parameter = next(block.parameters())
    if bias is not None:
        block.conv2_bias = nn.Parameter(parameter.new_empty(len(bias)))
        _remove(block, norm)
    elif weight is not None and weight.ndim == 4:
        block.conv2_bias = None
        setattr(block, norm, _depthwise(parameter.new_empty(len(weight)), parameter.new_empty(len(weight))))


def fold_pair(conv_parent: nn.Module, conv_name: str, norm_parent: nn.Module, norm_name: str) -> None:
    """Fold a batch norm into the convolution before it, in place, if they are that and nothing else."""
    conv, affine = getattr(conv_parent, conv_name), _scale_and_shift(getattr(norm_parent, norm_name))
    if affine is not None and is_plain(conv, bias=True):
        scale, shift = affine
        bias = shift if conv.bias is None else shift + scale * as_float64(conv.bias)
        setattr(conv_parent, conv_name, _conv_like(conv, as_float64(conv.weight) * scale[:, None, None, None], bias))
        _remove(norm_parent, norm_name)


def fold_sequentials(model: nn.Module) -> None:
    """Fold what is in order in each `nn.Sequential`, in place: deep stems, shortcuts."""
    for m in model.modules():
        if type(m) is nn.Sequential:
            for conv_name, norm_name in itertools.pairwise(m._modules):
                fold_pair(m, conv_name, m, norm_name)


def _scale_and_shift(norm: nn.Module) -> Optional[Tuple[torch.Tensor, torch.Tensor]]:
    """What a batch norm multiplies by and adds per channel, in float64. None if the module is no such norm."""
    if type(norm) not in _NORMS or norm.running_mean is None or has_hooks(norm):
        return None
    scale = (as_float64(norm.running_var) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * as_float64(norm.weight)
    shift = -scale * as_float64(norm.running_mean)
    return scale, shift if norm.bias is None else shift + as_float64(norm.bias)


def _is_relu(act: nn.Module) -> bool:
    return type(act) is nn.ReLU and not has_hooks(act)


def _is_pointwise(conv: nn.Module) -> bool:
    return is_plain(conv, bias=True) and (conv.kernel_size, conv.padding, conv.groups) == ((1, 1), (0, 0), 1)


def _conv_like(conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor) -> nn.Conv2d:
    """A convolution of the same kind with other values."""
    new = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, *conv_args(conv), device='meta')
    new.weight, new.bias = nn.Parameter(weight.to(conv.weight)), nn.Parameter(bias.to(conv.weight))
    return new.train(conv.training)


def _depthwise(weight: torch.Tensor, bias: torch.Tensor) -> nn.Conv2d:
    """A 1x1 convolution that multiplies each channel and adds to it."""
    chs = len(weight)
    conv = nn.Conv2d(chs, chs, 1, groups=chs, device='meta')
    conv.weight, conv.bias = nn.Parameter(weight.reshape(chs, 1, 1, 1)), nn.Parameter(bias)
    return conv.eval()


def _remove(parent: nn.Module, norm: str) -> None:
    setattr(parent, norm, nn.Identity().train(getattr(parent, norm).training))


def as_float64(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor in double precision, on the CPU: not every device has it."""
    return tensor.detach().cpu().double()

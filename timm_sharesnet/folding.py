"""The net as it is deployed: without batch norms where they can go, and with each shared kernel once."""

import itertools
from collections import OrderedDict
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from timm.layers import DropBlock2d, DropPath
from timm.models import FeatureDictNet, FeatureHookNet, FeatureListNet
from timm.models.resnet import ResNet
from timm.utils import reparameterize_model
from torchvision.ops.misc import FrozenBatchNorm2d

from .stage import SharedStage, SharingBlock, conv_args, has_hooks, is_plain

__all__ = ['fold']

MAX_SHIFT = 1e3
"""Largest `|c / s|` of a use whose scale moves. In fp16, which ends at 65,504, and in the int32 biases of int8 files it
leaves room for what the convolution adds, and a scale that moves is at least a thousandth of its shift."""

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
_TAKEN_APART = (FeatureDictNet, FeatureHookNet, FeatureListNet)  # by timm for features: their layers run in order
_NOTHING = (nn.Identity, nn.Dropout, DropPath, DropBlock2d)  # in evaluation


def fold(model: nn.Module) -> nn.Module:
    """Make the net as it is deployed: the same function, batch norms folded, each shared kernel once.

        >>> import timm, timm_sharesnet
        >>> model = timm.create_model('sharesnet50').eval()
        >>> folded = timm_sharesnet.fold(model)
        >>> folded.layer3.blocks[4].bn1, folded.layer3.blocks[4].conv2_bias.shape
        (Identity(), torch.Size([256]))

    Every runtime folds a batch norm into the convolution before it. Where blocks share a convolution, that takes a copy
    of the kernel for each of its uses, and what sharing saved is lost. Here nothing is left that could be folded into a
    shared kernel. In evaluation a batch norm computes `s z + c`, where `z = W * h` is what the layer before it gives,
    `s = weight / sqrt(running_var + eps)` and `c = bias - s * running_mean`. It becomes, by that layer,

      * a convolution of the block's own (`conv1`, `conv3`, a strided `conv2`, a shortcut's, the stem's): part of it,
        with the kernel `s W` and the bias `c`, as usual.
      * a shared convolution, followed by ReLU and a 1x1 convolution `V` (the bottlenecks `ShaBottleneck` and
        `PreActBottleneck`): for `s > 0`

            V relu(s z + c) = (V s) relu(z + c / s)

        so that the kernel stays as it is, its use gets the bias `c / s`, and the 1x1 convolution the scale. For `s = 0`
        the channel is the constant `relu(c)`, which goes into the bias of the 1x1 convolution.
      * a shared convolution, anything else: a depthwise 1x1 convolution with the weight `s` and the bias `c`, exact for
        all of them; no runtime merges two convolutions. So it is in `ShaBasicBlock`, which adds the shortcut next, with
        another activation than ReLU, and in a bottleneck of which one channel has `s < 0` or `|c / s| > MAX_SHIFT`.
      * no convolution (the first norm of a pre-activation block, the final norm): it stays, as does a norm of another
        kind. No batch norm follows the shared convolution of `PreActWideBasic`, which is used as it is.

    `timm.utils.reparameterize_model` (`--reparam` of timm's scripts) does the same but for the stem of the ImageNet
    nets, which runtimes fold themselves. The result has the class and the methods of the model. It is saved by its
    state dict, and loaded into any folded net of the same architecture:
    `fold(timm.create_model(...).eval()).load_state_dict(...)`.

    Args:
        model: Net of this package or timm's plain ResNet (BasicBlock, Bottleneck), which is folded the ordinary way, or
            a model that contains one (`features_only`, a detector), in evaluation mode. It is not changed.

    Returns:
        The folded net. In float64 it agrees with the model to a relative error of 1e-12.

    Raises:
        TypeError: If there is none of these nets in the model.
        ValueError: If the model is in training mode, or something was added to a shared convolution.
    """
    training = next((name or 'the model' for name, m in model.named_modules() if m.training), None)
    if training:
        raise ValueError(f'{training} is in training mode, where batch norm cannot be folded: call model.eval() first.')
    if not any(isinstance(m, SharedStage) or _is_plain_block(m) for m in model.modules()):
        raise TypeError(f'{type(model).__name__} has no stage of timm_sharesnet and no block of timm.models.ResNet.')
    if any(p.is_meta for p in model.parameters()):
        raise ValueError('The model is on the meta device and has no values to fold: load its weights first.')
    for m in model.modules():
        if isinstance(m, SharedStage):
            _check(m)
    model = reparameterize_model(model)
    if isinstance(model, SharedStage):  # it calls children only
        model.reparameterize()
    for m in model.modules():
        if isinstance(m, ResNet):
            _fold_stem(m, 'conv1', 'bn1')
        elif type(m) in _TAKEN_APART:
            for conv_name, norm_name in itertools.pairwise(m._modules):
                if conv_name not in getattr(m, 'return_layers', ()):  # there a feature is taken before the norm
                    _fold_stem(m, conv_name, norm_name)
        elif _is_plain_block(m):  # the stages did theirs
            _fold_block(m, None)
    _fold_sequentials(model)
    return model


def branch_of(block: nn.Module) -> Tuple[str, ...]:
    """The residual branch of a block, or of timm's plain one that a sharing block is made of. Empty for the rest."""
    if isinstance(block, SharingBlock):
        return block.branch
    return next((kind.branch for kind in SharingBlock.__subclasses__() if kind.plain is type(block)), ())


def _is_plain_block(m: nn.Module) -> bool:
    return bool(branch_of(m)) and not isinstance(m, SharingBlock)


def fold_stage(stage: SharedStage) -> None:
    """Fold the batch norms of a stage, in place.

    Raises:
        ValueError: If something was added to the shared convolution (LoRA, pruning, a bias, a hook).
    """
    _check(stage)
    for i, block in enumerate(stage.blocks):
        _fold_block(block, stage.conv_of(i))
    _fold_sequentials(stage)


def _check(stage: SharedStage) -> None:
    for i in range(len(stage)):
        conv = stage.conv_of(i)
        if conv is not None and not is_plain(conv):
            raise ValueError(
                f'The shared convolution {conv} has a hook, pruning, a parametrization, a bias or something else that '
                f'a plain convolution has not, and cannot be folded: merge or remove it first.'
            )


def _fold_block(block: nn.Module, shared: Optional[nn.Conv2d]) -> None:
    uses_shared = block.conv2 is None
    names = [name for name in branch_of(block) if name == 'conv2' or not _does_nothing(getattr(block, name))]
    for conv_name, norm_name in itertools.pairwise(names):
        if not (uses_shared and conv_name == 'conv2'):
            _fold_pair(block, conv_name, block, norm_name)
    if uses_shared:
        names = names[names.index('conv2') + 1 :]
        affine = _scale_and_shift(getattr(block, names[0])) if names else None
        if affine is not None:
            _fold_use(block, shared, names, *affine)
        if not block.folded:
            block.folded = True
            block.register_load_state_dict_pre_hook(_take_form)


def _does_nothing(layer: Optional[nn.Module]) -> bool:
    return layer is None or isinstance(layer, _NOTHING) and not has_hooks(layer)


def _fold_use(block: nn.Module, shared: nn.Conv2d, names: List[str], scale: torch.Tensor, shift: torch.Tensor) -> None:
    """Fold the batch norm after a use of the shared convolution: names[0], of the layers after that."""
    norm = names[0]
    movable = False
    if len(names) > 2 and _is_relu(getattr(block, names[1])) and _is_pointwise(getattr(block, names[2])):
        movable = bool(((scale > 0) & (shift.abs() <= MAX_SHIFT * scale) | (scale == 0)).all())
        conv = getattr(block, names[2])
        scale, moved = (torch.ones_like(scale), scale) if movable else (scale, torch.ones_like(scale))
        constant = torch.where(moved == 0, shift, 0).relu()
        kernel = double(conv.weight)
        bias = kernel[:, :, 0, 0] @ constant + (0 if conv.bias is None else double(conv.bias))
        setattr(block, names[2], _conv_like(conv, kernel * moved[None, :, None, None], bias))
        shift = torch.where(moved == 0, 0, shift / moved)
    if movable:
        block.conv2_bias = nn.Parameter(shift.to(shared.weight))
        _remove(block, norm)
    else:
        setattr(block, norm, _depthwise(scale.to(shared.weight), shift.to(shared.weight)))


def _is_relu(act: nn.Module) -> bool:
    return type(act) is nn.ReLU and not has_hooks(act)


def _is_pointwise(conv: nn.Module) -> bool:
    return is_plain(conv, bias=True) and (conv.kernel_size, conv.padding, conv.groups) == ((1, 1), (0, 0), 1)


def _depthwise(weight: torch.Tensor, bias: torch.Tensor) -> nn.Conv2d:
    chs = len(weight)
    conv = nn.Conv2d(chs, chs, 1, groups=chs, device='meta')
    conv.weight, conv.bias = nn.Parameter(weight.reshape(chs, 1, 1, 1)), nn.Parameter(bias)
    return conv.eval()


def _take_form(block: SharingBlock, state_dict: Dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
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


def _fold_pair(conv_parent: nn.Module, conv_name: str, norm_parent: nn.Module, norm_name: str) -> None:
    """Fold a batch norm into the convolution before it."""
    conv, affine = getattr(conv_parent, conv_name), _scale_and_shift(getattr(norm_parent, norm_name))
    if affine is not None and is_plain(conv, bias=True):
        scale, shift = affine
        bias = shift if conv.bias is None else shift + scale * double(conv.bias)
        setattr(conv_parent, conv_name, _conv_like(conv, double(conv.weight) * scale[:, None, None, None], bias))
        _remove(norm_parent, norm_name)


def _fold_sequentials(model: nn.Module) -> None:
    """Fold what is in order in an `nn.Sequential`: deep stems, shortcuts."""
    for m in model.modules():
        if type(m) is nn.Sequential:
            for conv_name, norm_name in itertools.pairwise(m._modules):
                _fold_pair(m, conv_name, m, norm_name)


def _fold_stem(net: nn.Module, conv_name: str, norm_name: str) -> None:
    """Fold a batch norm into the layer before it, of a deep stem into the last convolution."""
    stem = getattr(net, conv_name)
    if type(stem) is nn.Sequential and len(stem) and not has_hooks(stem):
        stem = nn.Sequential(OrderedDict(stem._modules)).eval()  # the old one may be another net's, too
        _fold_pair(stem, list(stem._modules)[-1], net, norm_name)
        setattr(net, conv_name, stem)
    else:
        _fold_pair(net, conv_name, net, norm_name)


def _scale_and_shift(norm: nn.Module) -> Optional[Tuple[torch.Tensor, torch.Tensor]]:
    """What a batch norm multiplies by and adds per channel, in float64. None if the module is no such norm."""
    if type(norm) not in _NORMS or norm.running_mean is None or has_hooks(norm):
        return None
    scale = (double(norm.running_var) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * double(norm.weight)
    shift = -scale * double(norm.running_mean)
    return scale, shift if norm.bias is None else shift + double(norm.bias)


def _conv_like(conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor) -> nn.Conv2d:
    """A convolution of the same kind with other values."""
    new = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, *conv_args(conv), device='meta')
    new.weight, new.bias = nn.Parameter(weight.to(conv.weight)), nn.Parameter(bias.to(conv.weight))
    return new.train(conv.training)


def _remove(parent: nn.Module, norm: str) -> None:
    setattr(parent, norm, nn.Identity().train(getattr(parent, norm).training))


def double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().double()  # not every device has float64

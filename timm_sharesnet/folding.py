"""The net as it is deployed: without batch norms where they can go, and with each shared kernel once."""

import itertools
from collections import OrderedDict

import torch.nn as nn
from timm.models import FeatureDictNet, FeatureHookNet, FeatureListNet
from timm.models.resnet import ResNet
from timm.utils import reparameterize_model

from .conv_bn import fold_branch, fold_pair, fold_sequentials, has_hooks, require_plain
from .resnet import SHARING_BLOCKS
from .stage import SharedStage

__all__ = ['fold']

_TAKEN_APART = (FeatureDictNet, FeatureHookNet, FeatureListNet)  # by timm for features: their layers run in order


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
    if not any(isinstance(m, SharedStage) or type(m) in SHARING_BLOCKS for m in model.modules()):
        raise TypeError(f'{type(model).__name__} has no stage of timm_sharesnet and no block of timm.models.ResNet.')
    if any(p.is_meta for p in model.parameters()):
        raise ValueError('The model is on the meta device and has no values to fold: load its weights first.')
    for m in model.modules():
        if isinstance(m, SharedStage):
            require_plain(map(m.conv_of, range(len(m))))
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
        elif type(m) in SHARING_BLOCKS:  # the stages did theirs
            fold_branch(m, SHARING_BLOCKS[type(m)].branch, None)
    fold_sequentials(model)
    return model


def _fold_stem(net: nn.Module, conv_name: str, norm_name: str) -> None:
    """Fold a batch norm into the layer before it, of a deep stem into the last convolution."""
    stem = getattr(net, conv_name)
    if type(stem) is nn.Sequential and len(stem) and not has_hooks(stem):
        stem = nn.Sequential(OrderedDict(stem._modules)).eval()  # the old one may be another net's, too
        fold_pair(stem, list(stem._modules)[-1], net, norm_name)
        setattr(net, conv_name, stem)
    else:
        fold_pair(net, conv_name, net, norm_name)

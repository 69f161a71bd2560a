"""ShaResNet for CIFAR: pre-activation ResNet-164 and Wide ResNet on stages that share one 3x3 convolution.

Papers:
  * A. Boulch, `ShaResNet: reducing residual network parameter number by sharing weights`, Pattern Recognition Letters
    2018 - https://doi.org/10.1016/j.patrec.2018.01.006
  * `Identity Mappings in Deep Residual Networks` - https://arxiv.org/abs/1603.05027
  * `Wide Residual Networks` - https://arxiv.org/abs/1605.07146

What is shared follows the author's code: the 3x3 (bottleneck) or second 3x3 (wide) of blocks 2 to n of each stage. The
first block of a stage has its own, and a 1x1 projection shortcut without batch norm, stage 1's too. The stem has no
batch norm. The same classes with `share_rate=0.0` are the unshared twins.
"""

import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Type, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, LayerType, calculate_drop_path_rates, create_classifier, get_act_layer, get_norm_layer
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices

from .net import SharingNet
from .share_rate import ShareRate, stage_rates
from .stage import SharedStage, SharingBlock
from .weights import create, with_sources

__all__ = ['PreActBottleneck', 'PreActWideBasic', 'CifarResNetV2']  # register_model adds each entrypoint fn to this


class _PreActBlock(SharingBlock):
    """Pre-activation block: batch norm and activation come before each convolution."""

    kernel: int
    """Size of the kernel of `conv1`, which has the block's stride."""
    expansion: int
    """The block's output has so many times the channels of `conv2`. If it is not 1, a 1x1 convolution follows."""

    def __init__(
        self,
        in_chs: int,
        chs: int,
        stride: int = 1,
        projection: bool = False,
        act_layer: Type[nn.Module] = nn.ReLU,
        norm_layer: Type[nn.Module] = nn.BatchNorm2d,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            in_chs: Input channels.
            chs: Channels of `conv2`.
            stride: Stride of the block.
            projection: Use a 1x1 convolution as shortcut, needed where channels or stride change.
            act_layer: Activation layer class.
            norm_layer: Normalization layer class.
            drop_rate: Dropout rate before `conv2` (0.3 for the paper's WRN-28-10).
            drop_path_rate: Stochastic depth rate.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        out_chs = chs * self.expansion
        self.bn1 = norm_layer(in_chs, **dd)
        self.act1 = act_layer(inplace=False)  # with a norm that returns its input, that would be the shortcut
        self.conv1 = nn.Conv2d(in_chs, chs, self.kernel, stride, padding=self.kernel // 2, bias=False, **dd)
        self.bn2 = norm_layer(chs, **dd)
        self.act2 = act_layer(inplace=True)
        self.drop = nn.Dropout(drop_rate) if drop_rate else nn.Identity()
        self.conv2 = nn.Conv2d(chs, chs, 3, padding=1, bias=False, **dd)
        self.conv3 = None
        if self.expansion != 1:
            self.bn3 = norm_layer(chs, **dd)
            self.act3 = act_layer(inplace=True)
            self.conv3 = nn.Conv2d(chs, out_chs, 1, bias=False, **dd)
        self.downsample = nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=False, **dd) if projection else None
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()

    def forward(self, x: torch.Tensor, conv: Optional[torch.Tensor] = None) -> torch.Tensor:
        """(B, in_chs, H, W) -> (B, chs * expansion, H / stride, W / stride). For `conv` see `forward_conv2`."""
        preact = self.act1(self.bn1(x))
        shortcut = self.downsample(preact) if self.downsample is not None else x
        x = self.conv1(preact)
        x = self.drop(self.act2(self.bn2(x)))
        x = self.forward_conv2(x, conv)
        if self.conv3 is not None:
            x = self.conv3(self.act3(self.bn3(x)))
        return self.drop_path(x) + shortcut


class PreActBottleneck(_PreActBlock):
    """Pre-activation bottleneck block: 1x1, 3x3, 1x1. The stride is the first 1x1's, as in the author's code."""

    branch = ('bn1', 'act1', 'conv1', 'bn2', 'act2', 'drop', 'conv2', 'bn3', 'act3', 'conv3', 'drop_path')
    kernel = 1
    expansion = 4


class PreActWideBasic(_PreActBlock):
    """Pre-activation basic block of Wide ResNet: two 3x3, dropout between them. Only the second may be shared."""

    branch = ('bn1', 'act1', 'conv1', 'bn2', 'act2', 'drop', 'conv2', 'drop_path')
    kernel = 3
    expansion = 1


class CifarResNetV2(SharingNet):
    """Pre-activation ResNet for 32 x 32 images: a 3x3 stem, three stages with strides 1, 2, 2, and a final norm."""

    def __init__(
        self,
        block: Type[Union[PreActBottleneck, PreActWideBasic]],
        layers: Tuple[int, ...],
        num_classes: int = 10,
        in_chans: int = 3,
        output_stride: int = 4,
        global_pool: str = 'avg',
        widen_factor: int = 1,
        share_rate: ShareRate = 1.0,
        act_layer: LayerType = nn.ReLU,
        norm_layer: LayerType = nn.BatchNorm2d,
        drop_rate: float = 0.0,
        block_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            block: Block class, `PreActBottleneck` (depth 9n + 2) or `PreActWideBasic` (depth 6n + 4).
            layers: Number n of blocks in each of the three stages.
            num_classes: Number of classification classes.
            in_chans: Number of input channels.
            output_stride: Output stride of the network, always 4.
            global_pool: Global pooling type.
            widen_factor: Multiplies the stages' channels (16, 32, 64), k of Wide ResNet.
            share_rate: How much blocks 2 to n of a stage share, for all stages or for each. 1 is the paper, where they
                have one 3x3, 0 the unshared twin; see `timm_sharesnet.share_rate.split_runs`.
            act_layer: Activation layer.
            norm_layer: Normalization layer.
            drop_rate: Dropout rate before the classifier.
            block_drop_rate: Dropout rate before the second convolution of each residual branch (0.3 in the paper's
                WRN-28-10).
            drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0 at the first.

        Raises:
            ValueError: If `output_stride` is not 4, or `layers` does not give the three stages at least a block each.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if output_stride != 4:
            raise ValueError(f'output_stride of a CIFAR ResNet is always 4, got {output_stride}.')
        if len(layers) != 3 or min(layers) < 1:
            raise ValueError(f'layers must be three positive numbers of blocks, got {layers}.')
        rates = stage_rates(share_rate, len(layers))
        act_layer = get_act_layer(act_layer)
        norm_layer = get_norm_layer(norm_layer)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate

        chs = 16
        self.conv1 = nn.Conv2d(in_chans, chs, 3, padding=1, bias=False, **dd)
        self.feature_info = [dict(num_chs=chs, reduction=1, module='conv1')]
        drop_path_rates = iter(calculate_drop_path_rates(drop_path_rate, sum(layers)))
        block_args = dict(act_layer=act_layer, norm_layer=norm_layer, drop_rate=block_drop_rate, **dd)
        reduction = 1
        for i, num_blocks in enumerate(layers):
            stride = 1 if i == 0 else 2
            stage_chs = 16 * 2**i * widen_factor
            blocks = []
            for j in range(num_blocks):
                first = dict(stride=stride, projection=True) if j == 0 else {}
                blocks.append(block(chs, stage_chs, **first, drop_path_rate=next(drop_path_rates), **block_args))
                chs = stage_chs * block.expansion
            reduction *= stride
            name = f'layer{i + 1}'
            self.add_module(name, SharedStage(blocks, block.first_shared(i), rates[i]))
            self.feature_info.append(dict(num_chs=chs, reduction=reduction, module=name))
        self.norm = norm_layer(chs, **dd)
        self.act = act_layer(inplace=False)  # its input may be one of the intermediates

        self.num_features = chs
        self.global_pool, self.fc = create_classifier(self.num_features, self.num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialize as the author: convolutions N(0, sqrt(2 / (k * k * n_in))), Linear U(+-1 / sqrt(n_in)), bias 0."""
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode='fan_in', nonlinearity='relu')
        if isinstance(self.fc, nn.Linear):
            nn.init.zeros_(self.fc.bias)  # the weight has PyTorch's default, the author's

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Get the classifier module."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Reset the classifier head, to none if there are 0 classes. The pooling is kept if None is given."""
        weight = self.conv1.weight
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, device=weight.device, dtype=weight.dtype
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features that returns intermediates: the stem's output and that of each stage.

        The arguments are those of timm's ResNet. `norm` applies the final norm and activation to the last stage's.
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        intermediates = []
        take_indices, max_index = feature_take_indices(4, indices)

        x = self.conv1(x)
        if 0 in take_indices:
            intermediates.append(x)
        for i, layer in enumerate((self.layer1, self.layer2, self.layer3), start=1):
            if stop_early and i > max_index:
                break
            x = layer(x)
            if i in take_indices:
                intermediates.append(self.act(self.norm(x)) if norm and i == 3 else x)

        if intermediates_only:
            return intermediates

        if not stop_early or max_index == 3:
            x = self.act(self.norm(x))
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: Union[int, List[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> List[int]:
        """Prune layers not required for specified intermediates, as timm's ResNet, and return the indices kept."""
        take_indices, max_index = feature_take_indices(4, indices)
        prune_end = max_index < 3
        for i in range(max_index + 1, 4):
            setattr(self, f'layer{i}', nn.Identity())
        if prune_norm or prune_end:
            self.norm, self.act = nn.Identity(), nn.Identity()  # sized for, and only applied to, the last stage
        if prune_end:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Forward pass through feature extraction layers: (B, in_chans, H, W) -> (B, num_features, H / 4, W / 4)."""
        x = self.conv1(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.norm(x)
        x = self.act(x)
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Forward pass through classifier head.

        Args:
            x: Features of shape (B, num_features, H, W).
            pre_logits: Return pooled features of shape (B, head_hidden_size) instead of logits.
        """
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Forward pass: (B, in_chans, H, W) -> logits of shape (B, num_classes)."""
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x


def _create_resnetv2_cifar(variant: str, pretrained: bool = False, **kwargs: Any) -> CifarResNetV2:
    return create(CifarResNetV2, variant, pretrained, feature_cfg=dict(out_indices=(0, 1, 2, 3)), **kwargs)


_LABEL_NAMES: Dict[str, List[str]] = json.loads((Path(__file__).parent / 'label_names.json').read_text())


def _cfg(dataset: str = 'cifar10') -> Dict[str, Any]:
    return {
        'num_classes': len(_LABEL_NAMES[dataset]),
        'label_names': tuple(_LABEL_NAMES[dataset]),
        'input_size': (3, 32, 32),
        'pool_size': (8, 8),
        'crop_pct': 1.0,
        'interpolation': 'bicubic',
        'mean': (0.4914, 0.4822, 0.4465),
        'std': (0.2470, 0.2435, 0.2616),
        'first_conv': 'conv1',
        'classifier': 'fc',
        'paper_name': 'ShaResNet: reducing residual network parameter number by sharing weights',
    }


default_cfgs = generate_default_cfgs(
    with_sources(
        {
            # `modern` is the recipe of train_configs/ aimed above the paper's accuracy.
            'sharesnet164_cifar.cpu_c10': _cfg(),
            'sharesnet164_cifar.modern_c10': _cfg(),
            'shawrn40_4.modern_c10': _cfg(),
            'shawrn28_10.modern_c100': _cfg('cifar100'),
            'resnet164_cifar.modern_c10': _cfg(),
            'resnet92_cifar.modern_c10': _cfg(),
            'wrn40_4.modern_c10': _cfg(),
            'wrn28_10.modern_c100': _cfg('cifar100'),
            'wrn28_4.modern_c10': _cfg(),
            'wrn22_10.modern_c100': _cfg('cifar100'),
        }
    )
)


@register_model
def sharesnet164_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNetV2:
    """ResNet-164 with shared convolutions for CIFAR, 0.93 M parameters (Table 1)."""
    model_args = dict(block=PreActBottleneck, layers=(18, 18, 18))
    return _create_resnetv2_cifar('sharesnet164_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet164_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNetV2:
    """Pre-activation ResNet-164 for CIFAR, 1.70 M parameters, unshared twin of sharesnet164_cifar (Table 1)."""
    model_args = dict(block=PreActBottleneck, layers=(18, 18, 18), share_rate=0.0)
    return _create_resnetv2_cifar('resnet164_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet92_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNetV2:
    """Pre-activation ResNet-92 for CIFAR, 0.96 M parameters, unshared peer of sharesnet164_cifar in size (Table 3)."""
    model_args = dict(block=PreActBottleneck, layers=(10, 10, 10), share_rate=0.0)
    return _create_resnetv2_cifar('resnet92_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def shawrn40_4(pretrained: bool = False, **kwargs: Any) -> CifarResNetV2:
    """WRN-40-4 with shared convolutions, 5.85 M parameters (Table 1)."""
    model_args = dict(block=PreActWideBasic, layers=(6, 6, 6), widen_factor=4)
    return _create_resnetv2_cifar('shawrn40_4', pretrained, **dict(model_args, **kwargs))


@register_model
def wrn40_4(pretrained: bool = False, **kwargs: Any) -> CifarResNetV2:
    """WRN-40-4, 8.95 M parameters, unshared twin of shawrn40_4 (Table 1)."""
    model_args = dict(block=PreActWideBasic, layers=(6, 6, 6), widen_factor=4, share_rate=0.0)
    return _create_resnetv2_cifar('wrn40_4', pretrained, **dict(model_args, **kwargs))


@register_model
def wrn28_4(pretrained: bool = False, **kwargs: Any) -> CifarResNetV2:
    """WRN-28-4, 5.85 M parameters, unshared peer of shawrn40_4 in size (Table 3)."""
    model_args = dict(block=PreActWideBasic, layers=(4, 4, 4), widen_factor=4, share_rate=0.0)
    return _create_resnetv2_cifar('wrn28_4', pretrained, **dict(model_args, **kwargs))


@register_model
def shawrn28_10(pretrained: bool = False, **kwargs: Any) -> CifarResNetV2:
    """WRN-28-10 with shared convolutions for CIFAR-100, 26.9 M parameters (Table 1; there with block_drop_rate=0.3)."""
    model_args = dict(block=PreActWideBasic, layers=(4, 4, 4), widen_factor=10)
    return _create_resnetv2_cifar('shawrn28_10', pretrained, **dict(model_args, **kwargs))


@register_model
def wrn28_10(pretrained: bool = False, **kwargs: Any) -> CifarResNetV2:
    """WRN-28-10 for CIFAR-100, 36.5 M parameters, unshared twin of shawrn28_10 (Table 1)."""
    model_args = dict(block=PreActWideBasic, layers=(4, 4, 4), widen_factor=10, share_rate=0.0)
    return _create_resnetv2_cifar('wrn28_10', pretrained, **dict(model_args, **kwargs))


@register_model
def wrn22_10(pretrained: bool = False, **kwargs: Any) -> CifarResNetV2:
    """WRN-22-10 for CIFAR-100, 26.9 M parameters, unshared peer of shawrn28_10 in size (Table 3)."""
    model_args = dict(block=PreActWideBasic, layers=(3, 3, 3), widen_factor=10, share_rate=0.0)
    return _create_resnetv2_cifar('wrn22_10', pretrained, **dict(model_args, **kwargs))

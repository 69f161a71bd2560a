"""ShaResNet for ImageNet: timm's ResNet on stages that share one 3x3 convolution.

Paper: A. Boulch, `ShaResNet: reducing residual network parameter number by sharing weights`, Pattern Recognition
Letters 2018 - https://doi.org/10.1016/j.patrec.2018.01.006

What is shared follows the author's code:
  * basic block (34): the second 3x3 of every block of a stage. The first 3x3 is never shared.
  * bottleneck (50, 101, 152): every stride-1 3x3. In stages 2 to 4 the 3x3 of the first block has the stride, as in
    timm, and stays its own.

The unshared twins are timm's `resnet34`, `resnet50`, `resnet101`, `resnet152`.
"""

from typing import Any, Dict, Optional, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from .net import SharingNet
from .share_rate import ShareRate, stage_rates
from .stage import SharedStage, SharingBlock
from .weights import create, with_sources

__all__ = ['ShaBasicBlock', 'ShaBottleneck', 'ShaResNet']  # register_model adds each entrypoint fn to this


class ShaBasicBlock(BasicBlock, SharingBlock):
    """timm's BasicBlock, whose second 3x3 may be the stage's."""

    branch = ('conv1', 'bn1', 'drop_block', 'act1', 'aa', 'conv2', 'bn2', 'se', 'drop_path')
    after = ('act2',)

    @staticmethod
    def first_shared(stage: int) -> int:
        """0: the stride is on the first 3x3."""
        return 0

    def forward(self, x: torch.Tensor, conv: Optional[torch.Tensor] = None) -> torch.Tensor:
        """timm's forward with `conv2` replaced by `forward_conv2`, see there for `conv`."""
        shortcut = x

        x = self.conv1(x)
        x = self.bn1(x)
        x = self.drop_block(x)
        x = self.act1(x)
        x = self.aa(x)

        x = self.forward_conv2(x, conv)
        x = self.bn2(x)

        if self.se is not None:
            x = self.se(x)

        if self.drop_path is not None:
            x = self.drop_path(x)

        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        x = self.act2(x)

        return x


class ShaBottleneck(Bottleneck, SharingBlock):
    """timm's Bottleneck, whose 3x3 may be the stage's."""

    branch = ('conv1', 'bn1', 'act1', 'conv2', 'bn2', 'drop_block', 'act2', 'aa', 'conv3', 'bn3', 'se', 'drop_path')
    after = ('act3',)

    @staticmethod
    def first_shared(stage: int) -> int:
        """1, as the first block's 3x3 has the stage's stride, but for stage 1, which has none."""
        return int(stage > 0)

    def forward(self, x: torch.Tensor, conv: Optional[torch.Tensor] = None) -> torch.Tensor:
        """timm's forward with `conv2` replaced by `forward_conv2`, see there for `conv`."""
        shortcut = x

        x = self.conv1(x)
        x = self.bn1(x)
        x = self.act1(x)

        x = self.forward_conv2(x, conv)
        x = self.bn2(x)
        x = self.drop_block(x)
        x = self.act2(x)
        x = self.aa(x)

        x = self.conv3(x)
        x = self.bn3(x)

        if self.se is not None:
            x = self.se(x)

        if self.drop_path is not None:
            x = self.drop_path(x)

        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        x = self.act3(x)

        return x


SHARING_BLOCKS: Dict[Type[nn.Module], Type[SharingBlock]] = {BasicBlock: ShaBasicBlock, Bottleneck: ShaBottleneck}
"""timm's plain blocks, and those that are made of them by changing the class."""


class ShaResNet(SharingNet, ResNet):
    """timm's ResNet whose stages share their stride-1 3x3 convolutions.

    Takes the arguments of `timm.models.ResNet`; `block` is `ShaBasicBlock` or `ShaBottleneck`. `share_rate` is how much
    the blocks of a stage share, for all stages or for each: 1 is the paper, 0 the unshared twin, see
    `timm_sharesnet.share_rate.split_runs`. Parameter names are timm's, but that a stage owns `conv` and `blocks`:
    `layer3.conv.weight`, `layer3.blocks.4.bn1.weight`.

    Each block's last batch norm starts at zero (timm's default, `zero_init_last`); the author starts it at one.
    """

    def __init__(
        self,
        block: Type[Union[ShaBasicBlock, ShaBottleneck]],
        layers: Tuple[int, ...],
        *args: Any,
        share_rate: ShareRate = 1.0,
        **kwargs: Any,
    ) -> None:
        if not (isinstance(block, type) and issubclass(block, (ShaBasicBlock, ShaBottleneck))):
            raise TypeError(f'block must be ShaBasicBlock or ShaBottleneck, got {block}.')
        if len(layers) != 4 or min(layers) < 1:
            raise ValueError(f'layers must be four positive numbers of blocks, got {layers}.')
        rates = stage_rates(share_rate, len(layers))
        super().__init__(block, layers, *args, **kwargs)
        for i in range(4):
            name = f'layer{i + 1}'
            # Nominal stride, not the one left by output_stride: a dilated net has the parameters of the strided one.
            setattr(self, name, SharedStage(getattr(self, name), block.first_shared(i), rates[i]))

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Initialize as the author: convolutions N(0, sqrt(2 / (k * k * n_out))), Linear U(+-1 / sqrt(n_in)), bias 0.

        Args:
            zero_init_last: Zero-initialize the last BN in each residual branch (timm's default, not the author's).
        """
        super().init_weights(zero_init_last=zero_init_last)
        if isinstance(self.fc, nn.Linear):
            nn.init.zeros_(self.fc.bias)  # the weight has PyTorch's default, the author's


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1',
        'classifier': 'fc',
        'paper_name': 'ShaResNet: reducing residual network parameter number by sharing weights',
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    with_sources(
        {
            # The author's weights, once imported (hub/import_torch7.py), and those of procedures A2 and A3 of
            # `ResNet strikes back` (train_configs/), which evaluates at 224 px with crop 0.95 - arXiv:2110.00476
            'sharesnet34.torch7_in1k': _cfg(),
            'sharesnet34.a2_in1k': _cfg(crop_pct=0.95),
            'sharesnet34.a3_in1k': _cfg(crop_pct=0.95),
            'sharesnet50.torch7_in1k': _cfg(),
            'sharesnet50.a2_in1k': _cfg(crop_pct=0.95),
            'sharesnet50.a3_in1k': _cfg(crop_pct=0.95),
            'sharesnet101.torch7_in1k': _cfg(),
            'sharesnet101.a2_in1k': _cfg(crop_pct=0.95),
            'sharesnet101.a3_in1k': _cfg(crop_pct=0.95),
            'sharesnet152.torch7_in1k': _cfg(),
            'sharesnet152.a2_in1k': _cfg(crop_pct=0.95),
            'sharesnet152.a3_in1k': _cfg(crop_pct=0.95),
        }
    )
)


@register_model
def sharesnet34(pretrained: bool = False, **kwargs: Any) -> ShaResNet:
    """ResNet-34 with shared convolutions, 13.6 M parameters (Table 1)."""
    model_args = dict(block=ShaBasicBlock, layers=(3, 4, 6, 3))
    return create(ShaResNet, 'sharesnet34', pretrained, **dict(model_args, **kwargs))


@register_model
def sharesnet50(pretrained: bool = False, **kwargs: Any) -> ShaResNet:
    """ResNet-50 with shared convolutions, 20.5 M parameters (Table 1)."""
    model_args = dict(block=ShaBottleneck, layers=(3, 4, 6, 3))
    return create(ShaResNet, 'sharesnet50', pretrained, **dict(model_args, **kwargs))


@register_model
def sharesnet101(pretrained: bool = False, **kwargs: Any) -> ShaResNet:
    """ResNet-101 with shared convolutions, 29.4 M parameters (Table 1)."""
    model_args = dict(block=ShaBottleneck, layers=(3, 4, 23, 3))
    return create(ShaResNet, 'sharesnet101', pretrained, **dict(model_args, **kwargs))


@register_model
def sharesnet152(pretrained: bool = False, **kwargs: Any) -> ShaResNet:
    """ResNet-152 with shared convolutions, 36.8 M parameters (Table 1)."""
    model_args = dict(block=ShaBottleneck, layers=(3, 8, 36, 3))
    return create(ShaResNet, 'sharesnet152', pretrained, **dict(model_args, **kwargs))

"""Plain nets to be shared, and the parts of a net."""

from typing import Any, Dict, Iterable, List, Tuple

import pytest
import torch
import torch.nn as nn

from timm_sharesnet import CifarResNetV2, SharedStage
from timm_sharesnet.sharing.calibration import collecting_statistics

NARROW = dict(layers=(2, 3, 4, 1), channels=(16, 24, 32, 40), num_classes=10)
# timm's ResNets of all kinds, and our unshared ones
PLAIN: List[Tuple[str, Dict[str, Any]]] = [
    ('resnet18', {}),
    ('resnet34', NARROW),
    ('resnet50', NARROW),
    ('resnet50d', NARROW),
    ('resnet50t', NARROW),
    ('resnet50s', NARROW),
    ('wide_resnet50_2', NARROW),
    ('resnext50_32x4d', dict(layers=(2, 3, 4, 1), num_classes=10)),
    ('seresnet50', NARROW),
    ('ecaresnet50t', NARROW),
    ('resnetblur50', NARROW),
    ('resnetaa50d', NARROW),
    ('resnet50', dict(NARROW, in_chans=1, output_stride=8)),
    ('resnet164_cifar', dict(layers=(3, 4, 5))),
    ('wrn40_4', dict(layers=(3, 4, 5), widen_factor=1)),
]
plain_nets = pytest.mark.parametrize('name, kwargs', PLAIN, ids=[f'{n}-{i}' for i, (n, _) in enumerate(PLAIN)])
kinds = pytest.mark.parametrize(
    'name, kwargs', [PLAIN[i] for i in (1, 2, 13, 14)], ids=['basic', 'bottleneck', 'preact', 'wide']
)


def stages(model: nn.Module) -> List[SharedStage]:
    return [m for m in model.modules() if isinstance(m, SharedStage)]


def batch_norms(model: nn.Module) -> List[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def noise(model: nn.Module, count: int, n: int) -> Tuple[torch.Tensor, ...]:
    """Batches (n, C, H, W)."""
    size = 32 if isinstance(model, CifarResNetV2) else 64
    return torch.randn(count, n, model.in_chans, size, size, generator=torch.Generator().manual_seed(0)).unbind()


def take_statistics(model: nn.Module, batches: Iterable[torch.Tensor]) -> nn.Module:
    """Give a model the statistics of images."""
    with torch.no_grad(), collecting_statistics(model) as forward:
        for batch in batches:
            forward(batch)
    return model

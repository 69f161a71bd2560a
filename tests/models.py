"""Nets for the tests: small ones of each kind, and what makes a test of sharing prove something.

A fresh ImageNet net computes without its shared convolutions, because timm starts the last batch norm of each block at
zero. `create` therefore gives every batch norm weights and statistics that are not trivial.
"""

from typing import Any, Dict, List

import timm
import torch
import torch.nn as nn

from timm_sharesnet import SharingBlock

# A net of each kind with three blocks in a stage that has more than one, so that a convolution is used more than once.
SMALL = {
    'basic': ('sharesnet34', dict(layers=(3, 2, 1, 1), channels=(16, 24, 32, 40), num_classes=10)),
    'bottleneck': ('sharesnet50', dict(layers=(3, 3, 1, 1), channels=(16, 24, 32, 40), num_classes=10)),
    'preact': ('sharesnet164_cifar', dict(layers=(3, 3, 1))),
    'wide': ('shawrn40_4', dict(layers=(3, 3, 1), widen_factor=1)),
}
TWINS = {
    'sharesnet34': 'resnet34',
    'sharesnet50': 'resnet50',
    'sharesnet101': 'resnet101',
    'sharesnet152': 'resnet152',
    'sharesnet164_cifar': 'resnet164_cifar',
    'shawrn40_4': 'wrn40_4',
    'shawrn28_10': 'wrn28_10',
}
SHARED, CIFAR_TWINS = list(TWINS), ['resnet164_cifar', 'wrn40_4', 'wrn28_10', 'resnet92_cifar', 'wrn28_4', 'wrn22_10']


def create(name: str, **kwargs: Any) -> nn.Module:
    """Net in evaluation mode whose batch norms have random weights and statistics, the same in each call."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 1.5)
    model.made_by = (name, kwargs)
    return model


def small(kind: str, **kwargs: Any) -> nn.Module:
    """A small net of a kind in `SMALL`."""
    name, small_kwargs = SMALL[kind]
    return create(name, **{**small_kwargs, **kwargs})


def images(model: nn.Module, n: int = 2) -> torch.Tensor:
    """Random images of the model's type, (n, C, 32, 32): enough for each net's last stage to have a pixel."""
    weight = next(model.parameters())
    chans = model.pretrained_cfg['input_size'][0]
    return torch.randn(n, chans, 32, 32, generator=torch.Generator().manual_seed(1)).to(weight.dtype)


def uses(model: nn.Module) -> List[SharingBlock]:
    """The blocks that use the convolution of their stage."""
    return [m for m in model.modules() if isinstance(m, SharingBlock) and m.conv2 is None]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value. NaN compares as too large."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def unshared(model: nn.Module) -> nn.Module:
    """The plain twin that computes the same: each block has a copy of the convolution that it shares in `model`."""
    name, kwargs = model.made_by
    twin = timm.create_model(TWINS[name], **kwargs)
    state_dict = model.state_dict()
    twin.load_state_dict({k: state_dict[shared_name(k, state_dict)] for k in twin.state_dict()})
    return twin.to(next(model.parameters()).dtype).train(model.training)


def shared_name(twin_name: str, shared: Dict[str, Any]) -> str:
    """Name of a twin's tensor in the net that shares: `layer1.0.conv2.weight` -> `layer1.conv.weight`."""
    stage, _, rest = twin_name.partition('.')
    if not stage.startswith('layer'):
        return twin_name
    own = f'{stage}.blocks.{rest.removeprefix("blocks.")}'
    if own not in shared and own.endswith('.conv2.weight'):
        return f'{stage}.conv.weight'
    return own

"""Nets for the tests: small ones of each kind, and what makes a test of sharing prove something.

A fresh ImageNet net computes without its shared convolutions, because timm starts the last batch norm of each block at
zero. `create` therefore gives every batch norm weights and statistics that are not trivial.
"""

import re
from pathlib import Path
from typing import Any, Dict, List, Tuple, Union

import pytest
import timm
import torch
import torch.nn as nn
from plain_nets import batch_norms
from timm.layers import BlurPool2d
from timm.models import save_for_hf

from timm_sharesnet import SharingBlock

# A net of each kind with three blocks in a stage that has more than one, so that a convolution is used more than once.
SMALL = {
    'basic': ('sharesnet34', dict(layers=(3, 2, 1, 1), channels=(16, 24, 32, 40), num_classes=10)),
    'bottleneck': ('sharesnet50', dict(layers=(3, 3, 1, 1), channels=(16, 24, 32, 40), num_classes=10)),
    'preact': ('sharesnet164_cifar', dict(layers=(3, 3, 1))),
    'wide': ('shawrn40_4', dict(layers=(3, 3, 1), widen_factor=1)),
}
# Of which a stage has several shared convolutions, each of a run of blocks
RUNS = {
    'bottleneck-half': (
        'sharesnet50',
        dict(layers=(5, 4, 1, 1), channels=(16, 24, 32, 40), num_classes=10, share_rate=0.5),
    ),
    'preact-half': ('sharesnet164_cifar', dict(layers=(5, 4, 1), share_rate=0.5)),
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
# What the architecture arguments can vary, on nets of few layers.
SHALLOW = dict(layers=(2, 2, 2, 2), channels=(16, 24, 32, 40), num_classes=10)
VARIANTS: List[Tuple[str, Dict[str, Any]]] = [
    ('sharesnet50', dict(stem_type='deep', stem_width=16)),
    ('sharesnet50', dict(stem_type='deep_tiered', replace_stem_pool=True)),
    ('sharesnet34', dict(replace_stem_pool=True)),
    ('sharesnet50', dict(avg_down=True)),
    ('sharesnet34', dict(down_kernel_size=3)),
    ('sharesnet50', dict(aa_layer=BlurPool2d)),
    ('sharesnet34', dict(aa_layer=nn.AvgPool2d)),
    ('sharesnet50', dict(cardinality=8, base_width=4)),
    ('sharesnet50', dict(block_reduce_first=2)),
    ('sharesnet50', dict(block_args=dict(attn_layer='se'))),
    ('sharesnet34', dict(block_args=dict(attn_layer='se'))),
    ('sharesnet50', dict(block_args=dict(attn_layer='cbam'))),  # has batch norms of its own
    ('sharesnet34', dict(block_args=dict(attn_layer='eca'))),
    ('sharesnet50', dict(act_layer='silu', global_pool='catavgmax')),
    ('sharesnet34', dict(act_layer='leaky_relu')),
    ('sharesnet50', dict(output_stride=8)),
    ('sharesnet34', dict(output_stride=16)),
    ('sharesnet50', dict(in_chans=1, num_classes=0)),
    ('sharesnet50', dict(layers=(3, 1, 2, 1))),
    ('sharesnet50', dict(drop_rate=0.1, drop_path_rate=0.1, drop_block_rate=0.1)),
    ('sharesnet34', dict(drop_rate=0.1, drop_path_rate=0.1, drop_block_rate=0.1)),
    ('sharesnet164_cifar', dict(layers=(2, 1, 3), act_layer='silu', in_chans=1)),
    ('sharesnet164_cifar', dict(layers=(2, 2, 2), drop_rate=0.1, block_drop_rate=0.1, drop_path_rate=0.1)),
    ('shawrn40_4', dict(layers=(2, 2, 2), widen_factor=2, num_classes=0)),
    ('shawrn40_4', dict(layers=(2, 2, 2), widen_factor=1, block_drop_rate=0.1, drop_path_rate=0.1)),
    ('shawrn40_4', dict(layers=(2, 2, 2), widen_factor=2, block_drop_rate=0.1)),
    ('sharesnet50', dict(layers=(4, 5, 2, 1), share_rate=0.5)),
    ('sharesnet34', dict(layers=(4, 3, 2, 1), share_rate=(0.5, 1.0, 0.0, 1.0))),
    ('sharesnet164_cifar', dict(layers=(6, 4, 5), share_rate=(0.5, 0.25, ((1, 3), (2, 4))))),
    ('shawrn40_4', dict(layers=(5, 4, 3), widen_factor=1, share_rate=0.5)),
]
SHARED, CIFAR_TWINS = list(TWINS), ['resnet164_cifar', 'wrn40_4', 'wrn28_10', 'resnet92_cifar', 'wrn28_4', 'wrn22_10']

kinds = pytest.mark.parametrize('kind', SMALL)


def slow_but_for(*default: str, name: str = 'kind', of: Any = SMALL) -> pytest.MarkDecorator:
    """Run the test on all kinds, of which only some are in the default run."""
    values = [value if value in default else pytest.param(value, marks=pytest.mark.slow) for value in of]
    return pytest.mark.parametrize(name, values)


def create(name: str, **kwargs: Any) -> nn.Module:
    """Net in evaluation mode whose batch norms have random weights and statistics, the same in each call."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    for norm in batch_norms(model):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 1.5)
    model.made_by = (name, kwargs)
    return model


def small(kind: str, **kwargs: Any) -> nn.Module:
    """A small net of a kind in `SMALL` or `RUNS`."""
    name, small_kwargs = {**SMALL, **RUNS}[kind]
    kwargs = {**small_kwargs, **kwargs}
    if kwargs.get('features_only'):
        kwargs.pop('num_classes', None)
    return create(name, **kwargs)


def save_folder(model: nn.Module, folder: Union[str, Path], **model_args: Any) -> None:
    """Write a folder in the Hub's format, whose net is built with these arguments."""
    save_for_hf(model, str(folder), model_args=model_args, safe_serialization=True)


def through_folder(model: nn.Module, folder: Union[str, Path], **model_args: Any) -> nn.Module:
    """What timm loads from such a folder."""
    save_folder(model, folder, **model_args)
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def images(model: nn.Module, n: int = 2) -> torch.Tensor:
    """Random images of the model's type, (n, C, 32, 32): enough for each net's last stage to have a pixel."""
    weight = next(model.parameters())
    chans = model.pretrained_cfg['input_size'][0]
    return torch.randn(n, chans, 32, 32, generator=torch.Generator().manual_seed(1)).to(weight.dtype)


def uses(model: nn.Module) -> List[SharingBlock]:
    """The blocks that use the convolution of their stage."""
    return [m for m in model.modules() if isinstance(m, SharingBlock) and m.conv2 is None]


def kernels(model: nn.Module) -> int:
    """Number of 3x3 kernels with weights of their own."""
    return sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules())


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value. NaN compares as too large."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def assert_equal_outputs(found: nn.Module, expected: nn.Module, x: torch.Tensor) -> None:
    """Two nets of double precision compute the same: a tensor, several, or several with names."""
    assert x.dtype == torch.double
    with torch.no_grad():
        outputs, others = found(x), expected(x)
    if isinstance(others, torch.Tensor):
        outputs, others = [outputs], [others]
    if isinstance(others, dict):
        assert outputs.keys() == others.keys()
        outputs, others = outputs.values(), others.values()
    assert len(outputs) == len(others) and max(map(error, outputs, others)) <= 1e-12


def unshared(model: nn.Module) -> nn.Module:
    """The plain twin that computes the same: each block has a copy of the convolution that it shares in `model`."""
    name, kwargs = model.made_by
    twin = timm.create_model(TWINS[name], **{k: v for k, v in kwargs.items() if k != 'share_rate'})
    state_dict = model.state_dict()
    twin.load_state_dict({k: state_dict[shared_name(k, state_dict)] for k in twin.state_dict()})
    return twin.to(next(model.parameters()).dtype).train(model.training)


def shared_name(twin_name: str, shared: Dict[str, Any]) -> str:
    """Name of a twin's tensor in the net that shares: `layer1.0.conv2.weight` -> `layer1.conv.weight` or `.conv.0.`."""
    stage, _, rest = twin_name.partition('.')
    if not stage.startswith('layer'):
        return twin_name
    own = f'{stage}.blocks.{rest.removeprefix("blocks.")}'
    if own not in shared and own.endswith('.conv2.weight'):
        runs = [int(k.split('.')[2]) for k in shared if re.fullmatch(rf'{stage}\.conv\.\d+\.weight', k)]
        first = [run for run in runs if run <= int(own.split('.')[2])]
        return f'{stage}.conv.{max(first)}.weight' if first else f'{stage}.conv.weight'
    return own

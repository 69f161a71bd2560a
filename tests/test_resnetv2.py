"""The CIFAR nets: what the paper and the author's code say of them, and timm's contract."""

import math
from typing import Any, Dict, List

import pytest
import timm
import torch
import torch.nn as nn
from models import CIFAR_TWINS, SHARED, create

CIFAR_SHARED = [name for name in SHARED if name.endswith('cifar') or 'wrn' in name]
# Tables 1 and 3, counted on the author's running code: parameters, distinct convolutions of the nets that share
COUNTS = {
    'sharesnet164_cifar': (929_114, 118),
    'shawrn40_4': (5_852_634, 28),
    'shawrn28_10': (26_860_084, 22),
    'resnet164_cifar': (1_703_258, None),
    'wrn40_4': (8_949_210, None),
    'wrn28_10': (36_536_884, None),
    'resnet92_cifar': (961_370, None),
    'wrn28_4': (5_849_050, None),
    'wrn22_10': (26_855_604, None),
}


@pytest.mark.parametrize('name', COUNTS)
def test_parameters_and_convolutions_are_as_many_as_the_author_s(name):
    parameters, convolutions = COUNTS[name]
    model = timm.create_model(name, device='meta')
    assert sum(p.numel() for p in model.parameters()) == parameters
    if convolutions:
        assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == convolutions


@pytest.mark.parametrize('name', CIFAR_SHARED)
def test_first_block_of_each_stage_has_a_3x3_and_a_shortcut_of_its_own(name):
    model = timm.create_model(name, device='meta')
    for stage in model.layer1, model.layer2, model.layer3:
        assert [i for i, block in enumerate(stage.blocks) if block.conv2 is not None] == [0]
        assert [i for i, block in enumerate(stage.blocks) if block.downsample is not None] == [0]
        assert isinstance(stage.blocks[0].downsample, nn.Conv2d)  # without batch norm
        assert stage.conv.kernel_size == (3, 3)


@pytest.mark.parametrize('name', CIFAR_TWINS)
def test_twin_shares_nothing(name):
    model = timm.create_model(name, device='meta')
    assert all(stage.conv is None for stage in (model.layer1, model.layer2, model.layer3))
    assert not [k for k in model.state_dict() if '.conv.' in k]


@pytest.mark.parametrize(
    'name,kwargs,parameters',
    [
        ('sharesnet164_cifar', dict(layers=(3, 3, 3)), 263_834),  # depth 29
        ('shawrn40_4', dict(layers=(3, 3, 3), widen_factor=2), 886_106),  # WRN-22-2
        ('shawrn28_10', dict(share_rate=0.0), 36_536_884),
        ('wrn28_10', dict(share_rate=1.0), 26_860_084),
    ],
)
def test_architecture_is_overridden_by_keyword(name, kwargs, parameters):
    model = timm.create_model(name, device='meta', **kwargs)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_names_are_timm_s():
    names = set(timm.create_model('sharesnet164_cifar', device='meta').state_dict())
    assert {'conv1.weight', 'layer3.conv.weight', 'layer3.blocks.4.bn1.weight', 'norm.bias', 'fc.bias'} <= names
    assert {'layer1.blocks.0.conv2.weight', 'layer1.blocks.0.downsample.weight'} <= names
    assert 'layer1.blocks.1.conv2.weight' not in names


def test_stride_is_on_the_first_convolution_of_a_stage():
    for name in CIFAR_SHARED:
        model = timm.create_model(name, device='meta')
        strides = [(n, m.stride) for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)]
        expected = [f'layer{i}.blocks.0.{conv}' for i in (2, 3) for conv in ('conv1', 'downsample')]
        assert strides == [(n, (2, 2)) for n in expected]


@pytest.mark.parametrize('name', [*CIFAR_SHARED, *CIFAR_TWINS])
def test_default_cfg_is_cifar_s(name):
    cfg = timm.get_pretrained_cfg(name)
    assert (cfg.input_size, cfg.pool_size, cfg.crop_pct) == ((3, 32, 32), (8, 8), 1.0)
    assert (cfg.mean, cfg.std) == ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    assert cfg.num_classes == (100 if name in ('shawrn28_10', 'wrn28_10', 'wrn22_10') else 10)
    assert timm.create_model(name, device='meta').num_classes == cfg.num_classes


def stage_input(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the 3x3 of a block that drops gets, in training."""
    block = model.layer1.blocks[0]
    seen: List[torch.Tensor] = []
    handle = block.conv2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize('name', ['sharesnet164_cifar', 'shawrn28_10'])
def test_block_dropout_is_before_the_second_convolution_and_in_training_only(name):
    small: Dict[str, Any] = dict(layers=(1, 1, 1), widen_factor=1)
    model, plain = create(name, block_drop_rate=0.3, **small), create(name, **small)
    x = torch.randn(8, 3, 32, 32)
    assert torch.equal(model(x), plain(x))
    assert torch.equal(stage_input(model, x), stage_input(plain, x))
    dropped, before = stage_input(model.train(), x), stage_input(plain.train(), x)
    survivors = dropped != 0
    torch.testing.assert_close(dropped[survivors], before[survivors] / 0.7)
    assert survivors.sum().item() / (before != 0).sum().item() == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize('rate', ['drop_rate', 'drop_path_rate'])
def test_timm_s_drop_rates_act_in_training_only(rate):
    small: Dict[str, Any] = dict(layers=(2, 2, 2))
    model, plain = create('sharesnet164_cifar', **{rate: 0.5}, **small), create('sharesnet164_cifar', **small)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), plain(x))
    for m in model.modules():
        m.training = not isinstance(m, nn.BatchNorm2d)
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize('kind', ['sharesnet164_cifar', 'shawrn40_4'])
def test_layers_are_initialized_as_by_the_author(kind):
    torch.manual_seed(0)
    model = timm.create_model(kind)
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d) and m.weight.numel() > 1000:
            fan_in = m.in_channels * math.prod(m.kernel_size)
            assert m.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.1), name
        if isinstance(m, nn.BatchNorm2d):
            assert (m.weight == 1).all() and (m.bias == 0).all(), name
    bound = 1 / math.sqrt(model.num_features)
    assert model.fc.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert (model.fc.bias == 0).all()


@pytest.mark.parametrize('pool', ['avg', 'max', 'avgmax', 'catavgmax', 'fast', ''])
def test_head_follows_the_pooling(pool):
    model = timm.create_model('sharesnet164_cifar', layers=(1, 1, 1), global_pool=pool, num_classes=5 if pool else 0)
    x = torch.randn(2, 3, 32, 32)
    factor = 2 if pool == 'catavgmax' else 1
    assert model.head_hidden_size == 256 * factor
    assert model(x).shape == ((2, 5) if pool else (2, 256, 8, 8))
    if pool:
        assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 256 * factor)
        model.reset_classifier(0)
        assert model(x).shape == (2, 256 * factor)
        model.reset_classifier(0, '')
        assert model(x).shape == (2, 256, 8, 8)


@pytest.mark.parametrize('name', ['sharesnet164_cifar', 'shawrn40_4', 'wrn40_4'])
def test_norms_that_return_their_input_leave_shortcuts_and_intermediates_alone(name):
    class Keep(nn.Module):
        def __init__(self, chs: int, **_: Any) -> None:
            super().__init__()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

    small: Dict[str, Any] = dict(layers=(2, 2, 2), widen_factor=1)
    x = torch.randn(2, 3, 32, 32)
    expected = timm.create_model(name, norm_layer=Keep, **small).eval()
    model = timm.create_model(name, norm_layer=nn.Identity, **small).eval()
    model.load_state_dict(expected.state_dict())
    torch.testing.assert_close(model(x), expected(x))
    for a, b in zip(model.forward_intermediates(x)[1], expected.forward_intermediates(x)[1], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('size,features', [((32, 32), (8, 8)), ((64, 64), (16, 16)), ((40, 24), (10, 6))])
def test_image_size_is_free(size, features):
    model = timm.create_model('shawrn40_4', layers=(1, 1, 1), widen_factor=1)
    x = torch.randn(1, 3, *size)
    assert model.forward_features(x).shape == (1, 64, *features)
    assert model(x).shape == (1, 10)


def test_device_and_dtype_reach_every_tensor():
    for name in 'sharesnet164_cifar', 'shawrn28_10':
        model = timm.create_model(name, device='meta', dtype=torch.bfloat16)
        floats = [t for t in model.state_dict().values() if t.is_floating_point()]
        assert {(t.device.type, t.dtype) for t in floats} == {('meta', torch.bfloat16)}


@pytest.mark.parametrize('output_stride', [1, 2, 8, 16, 32])
def test_output_stride_other_than_its_own_is_refused(output_stride):
    timm.create_model('sharesnet164_cifar', device='meta', output_stride=4)
    with pytest.raises(ValueError, match=f'always 4, got {output_stride}'):
        timm.create_model('sharesnet164_cifar', output_stride=output_stride)


@pytest.mark.parametrize('layers', [(), (1, 1), (1, 1, 1, 1), (0, 1, 1)])
def test_layers_that_are_not_three_stages_are_refused(layers):
    with pytest.raises(ValueError, match='layers must be three positive numbers of blocks'):
        timm.create_model('sharesnet164_cifar', layers=layers)


def test_unknown_argument_is_a_type_error():
    with pytest.raises(TypeError, match='no_such_argument'):
        timm.create_model('shawrn40_4', no_such_argument=1)

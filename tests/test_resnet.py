"""The ImageNet nets: what the paper and the author's code say of them, and equality with timm's ResNet."""

import math

import pytest
import timm
import torch
import torch.nn as nn
from models import SHALLOW, TWINS, VARIANTS, create, images, unshared
from timm.models.resnet import Bottleneck

from timm_sharesnet import ShaBasicBlock, ShaBottleneck, ShaResNet

# Table 1, counted on the author's running code: parameters of the net and of its twin, distinct convolutions of the net
COUNTS = {
    'sharesnet34': (13_613_864, 21_797_672, 24),
    'sharesnet50': (20_469_800, 25_557_032, 44),
    'sharesnet101': (29_434_920, 44_549_160, 78),
    'sharesnet152': (36_821_032, 60_192_808, 112),
}


@pytest.mark.parametrize('name', COUNTS)
def test_parameters_and_convolutions_are_as_many_as_the_author_s(name):
    parameters, twin_parameters, convolutions = COUNTS[name]
    model, twin = (timm.create_model(n, device='meta') for n in (name, TWINS[name]))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in twin.parameters()) == twin_parameters
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == convolutions


@pytest.mark.parametrize('name', COUNTS)
def test_blocks_that_have_a_3x3_of_their_own_are_the_author_s(name):
    model = timm.create_model(name, device='meta')
    for stage in 'layer1', 'layer2', 'layer3', 'layer4':
        blocks = model.get_submodule(stage).blocks
        own = [i for i, block in enumerate(blocks) if block.conv2 is not None]
        # The second 3x3 of a basic block never has the stage's stride, that of a bottleneck does.
        assert own == ([0] if name != 'sharesnet34' and stage != 'layer1' else [])
        assert model.get_submodule(stage).conv.stride == (1, 1)


def test_parameter_names_are_timm_s_but_for_the_stages():
    names = set(timm.create_model('sharesnet50', device='meta').state_dict())
    assert {'conv1.weight', 'bn1.bias', 'layer3.conv.weight', 'layer3.blocks.4.bn1.weight', 'fc.bias'} <= names
    assert {'layer3.blocks.0.downsample.0.weight', 'layer3.blocks.0.conv2.weight'} <= names
    assert 'layer3.blocks.1.conv2.weight' not in names
    assert 'layer1.conv.weight' in names and 'layer1.blocks.0.conv2.weight' not in names


@pytest.mark.parametrize('output_stride', [8, 16, 32])
@pytest.mark.parametrize('name', ['sharesnet34', 'sharesnet50'])
def test_output_stride_dilates_as_in_timm(name, output_stride):
    model = create(name, output_stride=output_stride, **SHALLOW).double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.double)
    assert model.forward_features(x).shape[-1] == 64 // output_stride
    torch.testing.assert_close(model(x), unshared(model)(x), rtol=1e-12, atol=0)
    strided = create(name, **SHALLOW)
    assert model.state_dict().keys() == strided.state_dict().keys()


OTHER_DEPTHS_AND_RATES = {'layers', 'share_rate', 'drop_rate', 'num_classes'}
IN_TIMM = [(name, kwargs) for name, kwargs in VARIANTS if name in COUNTS and not OTHER_DEPTHS_AND_RATES & {*kwargs}]


@pytest.mark.parametrize('name,kwargs', IN_TIMM)
def test_what_timm_s_resnet_can_vary_works_with_sharing(name, kwargs):
    model = create(name, **SHALLOW, **kwargs).double()
    assert all(model.get_submodule(f'layer{i}').conv is not None for i in (1, 2, 3, 4))
    x = images(model)
    torch.testing.assert_close(model(x), unshared(model)(x), rtol=1e-11, atol=1e-12)
    model.train()(images(model, 4)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_cardinality_of_basic_blocks_is_refused_as_in_timm():
    with pytest.raises(AssertionError, match='cardinality'):
        timm.create_model('sharesnet34', cardinality=8)


@pytest.mark.parametrize('rate', ['drop_path_rate', 'drop_block_rate', 'drop_rate'])
@pytest.mark.parametrize('name', ['sharesnet34', 'sharesnet50'])
def test_dropping_acts_in_training_only(name, rate):
    model, plain = create(name, **SHALLOW, **{rate: 0.5}), create(name, **SHALLOW)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), plain(x))
    for net in model, plain:
        for m in net.modules():
            m.training = not isinstance(m, nn.BatchNorm2d)
    assert torch.equal(plain(x), plain(x))
    assert not torch.equal(model(x), model(x))


def test_first_layers_are_initialized_as_by_the_author_and_the_last_norms_as_by_timm():
    torch.manual_seed(0)
    model = timm.create_model('sharesnet50')
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.out_channels * math.prod(m.kernel_size)
            assert m.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05), name
            assert m.weight.mean().abs() < 0.1 * m.weight.std(), name
        if isinstance(m, nn.BatchNorm2d):
            assert (m.weight == (0 if name.endswith('bn3') else 1)).all() and (m.bias == 0).all(), name
    bound = 1 / math.sqrt(2048)
    assert model.fc.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert model.fc.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert (model.fc.bias == 0).all()
    ones = timm.create_model('sharesnet50', zero_init_last=False)
    assert all((m.weight == 1).all() for m in ones.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize('name', COUNTS)
def test_default_cfg_is_timm_s_for_imagenet(name):
    cfg = timm.get_pretrained_cfg(name)
    assert (cfg.input_size, cfg.pool_size, cfg.crop_pct) == ((3, 224, 224), (7, 7), 0.875)
    assert (cfg.interpolation, cfg.mean, cfg.std) == ('bicubic', (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (cfg.num_classes, cfg.first_conv, cfg.classifier) == (1000, 'conv1', 'fc')


def test_device_and_dtype_reach_every_tensor():
    model = timm.create_model('sharesnet50', device='meta', dtype=torch.bfloat16)
    floats = [t for t in model.state_dict().values() if t.is_floating_point()]
    assert {(t.device.type, t.dtype) for t in floats} == {('meta', torch.bfloat16)}


@pytest.mark.parametrize('name', ['sharesnet34', 'sharesnet50'])
@pytest.mark.parametrize('layers', [(), (3, 3, 3), (1, 1, 1, 1, 1), (0, 1, 1, 1)])
def test_layers_that_are_not_four_stages_are_refused(name, layers):
    with pytest.raises(ValueError, match='layers must be four positive numbers of blocks'):
        timm.create_model(name, layers=layers)


def test_unknown_argument_is_a_type_error():
    with pytest.raises(TypeError, match='no_such_argument'):
        timm.create_model('sharesnet50', no_such_argument=1)


def test_block_that_cannot_share_is_refused():
    with pytest.raises(TypeError, match='block must be ShaBasicBlock or ShaBottleneck'):
        ShaResNet(Bottleneck, (1, 1, 1, 1))
    for block in ShaBasicBlock, ShaBottleneck:
        assert ShaResNet(block, (1, 1, 1, 1), num_classes=3)(torch.randn(1, 3, 64, 64)).shape == (1, 3)

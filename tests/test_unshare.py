"""From a shared net to the plain twin."""

import copy
from typing import List

import pytest
import timm
import torch
import torch.nn as nn
from additions import add
from models import SHALLOW, SMALL, TWINS, VARIANTS, assert_equal_outputs, create, error, images, kinds, small, unshared
from plain_nets import batch_norms, stages
from timm.models import save_for_hf
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from timm_sharesnet import CifarResNetV2, PreActBottleneck, PreActWideBasic, fold, unshare

CLASSES = {
    'basic': (ResNet, BasicBlock),
    'bottleneck': (ResNet, Bottleneck),
    'preact': (CifarResNetV2, PreActBottleneck),
    'wide': (CifarResNetV2, PreActWideBasic),
}


def blocks(model: nn.Module) -> List[nn.Module]:
    return [m for m in model.modules() if hasattr(m, 'conv2') and not isinstance(m, (ResNet, CifarResNetV2))]


# ---- The plain twin


@kinds
@pytest.mark.parametrize('deploy', [lambda plain: plain, fold], ids=['plain', 'folded'])
def test_plain_net_computes_the_same(kind, deploy):
    model = small(kind).double()
    assert_equal_outputs(deploy(unshare(model)), model, images(model))


@kinds
def test_plain_net_has_the_twin_s_classes_and_shares_nothing(kind):
    plain = unshare(small(kind))
    net, block = CLASSES[kind]
    assert type(plain) is net
    assert {type(m) for m in blocks(plain)} == {block}
    assert [type(m) for m in plain.modules()] == [type(m) for m in unshared(small(kind)).modules()]
    assert all(stage.conv is None for stage in stages(plain))


@kinds
def test_plain_net_has_the_twin_s_names_and_tensors_in_its_order(kind):
    model = small(kind)
    expected = unshared(model).state_dict()
    found = unshare(model).state_dict()
    assert list(found) == list(expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@kinds
def test_each_block_has_a_kernel_of_its_own(kind):
    plain = unshare(small(kind))
    storages = [p.untyped_storage().data_ptr() for p in plain.parameters()]
    assert len(set(storages)) == len(storages)
    weights = [block.conv2.weight for block in blocks(plain.layer1)]
    assert len(weights) == 3 and torch.equal(weights[1], weights[2])
    nn.init.zeros_(weights[1])
    assert weights[2].any()


@kinds
def test_model_is_not_changed_and_shares_no_memory_with_the_plain_net(kind):
    model = small(kind)
    before, names = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    cfg = copy.deepcopy(model.pretrained_cfg)
    for p in unshare(model).parameters():
        nn.init.zeros_(p)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [type(m) for m in model.modules()] == names
    assert model.pretrained_cfg == cfg


@kinds
def test_gradients_of_the_copies_sum_to_that_of_the_shared_convolution(kind):
    model = small(kind).double().train()
    plain, x = unshare(model), images(model, 4)
    for net in model, plain:
        net(x).square().sum().backward()
    users = [i for i, block in enumerate(model.layer1.blocks) if block.conv2 is None]
    expected = sum(blocks(plain.layer1)[i].conv2.weight.grad for i in users)
    torch.testing.assert_close(model.layer1.conv.weight.grad, expected, rtol=1e-9, atol=1e-12)


# ---- The name of the twin


def with_sources(model: nn.Module) -> nn.Module:
    """The model with a source of weights, as a published net has it."""
    sources = dict(hf_hub_id='someone/some-net', url='https://example.org/x', file='x', state_dict={}, source='hf-hub')
    cfg = {**model.pretrained_cfg, **sources, 'tag': 'in1k', 'mean': (0.1, 0.2, 0.3)}
    model.pretrained_cfg = model.default_cfg = cfg
    return model


@kinds
def test_config_names_the_twin_and_keeps_the_rest_but_the_weights(kind):
    model = with_sources(small(kind))
    plain = unshare(model)
    for cfg in plain.pretrained_cfg, plain.default_cfg:
        assert cfg['architecture'] == TWINS[SMALL[kind][0]]
        assert (cfg['tag'], cfg['mean']) == ('in1k', (0.1, 0.2, 0.3))
        assert not {'hf_hub_id', 'url', 'file', 'state_dict', 'source'} & {k for k, v in cfg.items() if v is not None}


@kinds
def test_saved_plain_net_is_loaded_by_timm_as_the_twin(kind, tmp_path):
    model = with_sources(small(kind))
    plain = unshare(model)
    save_for_hf(plain, str(tmp_path), model_args=model.made_by[1], safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert type(loaded) is CLASSES[kind][0]
    assert loaded.pretrained_cfg['architecture'] == TWINS[SMALL[kind][0]]
    assert torch.equal(loaded(images(model)), plain(images(model)))


# ---- What it keeps


@kinds
@pytest.mark.parametrize('training', [False, True])
def test_mode_is_kept(kind, training):
    model = small(kind).train(training)
    assert {m.training for m in unshare(model).modules()} == {training}


@kinds
def test_batch_norms_frozen_in_training_stay_so(kind):
    model = small(kind).train()
    for norm in batch_norms(model):
        norm.eval()
    plain = unshare(model)
    assert {norm.training for norm in batch_norms(plain)} == {False}
    assert {m.training for m in plain.modules() if isinstance(m, nn.Conv2d)} == {True}


@kinds
def test_frozen_parameters_stay_frozen(kind):
    model = small(kind)
    model.layer1.conv.requires_grad_(False)
    model.layer2.blocks[0].conv1.requires_grad_(False)
    frozen = {name for name, p in unshare(model).named_parameters() if not p.requires_grad}
    prefix = '' if CLASSES[kind][0] is ResNet else 'blocks.'
    users = [i for i, block in enumerate(model.layer1.blocks) if block.conv2 is None]
    assert frozen == {f'layer2.{prefix}0.conv1.weight', *(f'layer1.{prefix}{i}.conv2.weight' for i in users)}


@kinds
@pytest.mark.parametrize('enable', [False, True])
def test_gradient_checkpointing_is_kept(kind, enable):
    model = small(kind).double().train()
    model.set_grad_checkpointing(enable)
    plain = unshare(model)
    if isinstance(plain, ResNet):
        assert plain.grad_checkpointing is enable
    else:
        assert {stage.grad_checkpointing for stage in stages(plain)} == {enable}
    x = images(model, 4)
    assert error(plain(x), model(x)) <= 1e-12


@kinds
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_and_memory_format_are_kept(kind, dtype):
    plain = unshare(small(kind).to(dtype=dtype, memory_format=torch.channels_last))
    assert {t.dtype for t in plain.state_dict().values() if t.is_floating_point()} == {dtype}
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in plain.parameters() if p.ndim == 4)


@kinds
def test_net_without_values_can_be_unshared(kind):
    plain = unshare(small(kind).to('meta'))
    assert plain.state_dict().keys() == unshared(small(kind)).state_dict().keys()
    assert {t.device.type for t in plain.state_dict().values()} == {'meta'}


@kinds
@pytest.mark.parametrize('addition', ['LoRA', 'pruning', 'parametrization', 'forward hook', 'bias'])
def test_addition_to_a_shared_convolution_is_copied_to_every_block(kind, addition):
    model = small(kind).double()
    x = images(model)
    with torch.no_grad():  # else torch cannot copy a pruned weight
        before = model(x)
        add(addition, model, 'layer1.conv')
        assert error(model(x), before) > 1e-3
        plain = unshare(model)
    assert_equal_outputs(plain, model, x)
    convs = [block.conv2 for block in blocks(plain.layer1)][-2:]
    assert convs[0] is not convs[1] and type(convs[0]) is type(model.layer1.conv)


# ---- Which nets


@pytest.mark.parametrize('name', TWINS)
def test_each_model_becomes_its_twin(name):
    plain = unshare(timm.create_model(name, device='meta'))
    expected = timm.create_model(TWINS[name], device='meta')
    assert type(plain) is type(expected)
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}


@pytest.mark.parametrize('name,kwargs', VARIANTS)
def test_what_the_nets_can_vary_is_unshared(name, kwargs):
    kwargs = {**(SHALLOW if name in ('sharesnet34', 'sharesnet50') else {}), **kwargs}
    model = create(name, **kwargs).double()
    plain = unshare(model)
    assert plain.state_dict().keys() == unshared(model).state_dict().keys()
    assert_equal_outputs(plain, model, torch.randn(2, kwargs.get('in_chans', 3), 64, 64, dtype=torch.double))


@kinds
@pytest.mark.parametrize('feature_cls', ['list', 'getter'])
def test_features_only_net_becomes_that_of_the_twin(kind, feature_cls):
    model = small(kind, features_only=True, feature_cls=feature_cls).double()
    plain = unshare(model)
    name, kwargs = model.made_by
    twin = timm.create_model(TWINS[name], **kwargs).double().eval()
    twin.load_state_dict(plain.state_dict(), strict=True)
    for net in plain, twin:
        assert_equal_outputs(net, model, torch.randn(2, 3, 64, 64, dtype=torch.double))


class Tripled(ResNet):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


@kinds
def test_net_within_a_model_is_unshared_and_its_neighbours_stay(kind):
    model = small(kind).double()
    other = create('resnet18', layers=(1, 1, 1, 1)).double()
    other.set_grad_checkpointing()
    other.pretrained_cfg = {**other.pretrained_cfg, 'hf_hub_id': 'timm/resnet18'}
    subclass = Tripled(BasicBlock, (1, 1, 1, 1)).double().eval()
    plain = unshare(nn.ModuleList([model, other, subclass]).eval())
    assert_equal_outputs(plain[0], model, images(model))
    assert plain[1].grad_checkpointing and plain[1].pretrained_cfg == other.pretrained_cfg
    assert_equal_outputs(plain[2], subclass, torch.randn(1, 3, 32, 32, dtype=torch.double))


# ---- Errors


@kinds
def test_folded_net_is_refused_with_the_way_to_a_folded_twin(kind):
    with pytest.raises(ValueError, match='unshare the net that it was folded from, and fold the result'):
        unshare(fold(small(kind)))


@pytest.mark.parametrize('name', [None, 'resnet18', 'resnetv2_50'], ids=['layer', 'plain', 'other family'])
def test_model_that_shares_nothing_is_refused(name):
    with pytest.raises(TypeError, match='nothing to unshare'):
        unshare(timm.create_model(name, layers=(1, 1, 1, 1)) if name else nn.Linear(2, 2))

"""Sharing one convolution among the blocks of a stage, on a net of each kind."""

import copy
import pickle
from collections import Counter
from typing import Any, Dict

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from additions import add
from models import RUNS, SMALL, images, shared_name, small, through_folder, unshared
from plain_nets import batch_norms, stages
from safetensors.torch import load_file, save_file
from timm.models import checkpoint_seq
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV2, ModelEmaV3
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from timm_sharesnet import PreActBottleneck, PreActWideBasic, SharedStage

pytestmark = pytest.mark.parametrize('kind', [*SMALL, *RUNS])


@pytest.fixture
def model(kind):
    return small(kind)


@pytest.fixture
def x(model):
    return images(model)


def uses_by_name(model: nn.Module) -> Counter:
    """How often each stage's convolution is used: name -> number of blocks without a 3x3 of their own."""
    stages = {n: m for n, m in model.named_modules() if isinstance(m, SharedStage)}
    names = [(n, m, m.conv_name(i)) for n, m in stages.items() for i in range(len(m)) if m.conv_of(i) is not None]
    return Counter(f'{n}.{conv}' for n, m, conv in names)


def calls(model: nn.Module, x: torch.Tensor) -> Counter:
    """How often each convolution is called in one forward pass."""
    count: Counter = Counter()
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(lambda *_, name=name: count.update([name]))
    model(x)
    return count


def loss_and_gradients(model: nn.Module, x: torch.Tensor) -> Any:
    model.zero_grad()
    loss = F.cross_entropy(model(x), torch.arange(len(x)))
    loss.backward()
    return loss.detach(), {k: p.grad for k, p in model.named_parameters()}


# ---- What it computes


def test_output_equals_the_twin_whose_blocks_have_copies_of_the_shared_convolution(kind):
    model = small(kind).double()
    assert max(uses_by_name(model).values()) > 1
    x = images(model)
    torch.testing.assert_close(model(x), unshared(model)(x), rtol=1e-12, atol=0)


def test_gradient_of_the_shared_convolution_is_the_sum_over_its_uses(kind):
    model = small(kind).double().train()
    twin = unshared(model)
    x = images(model, 4)
    loss, grads = loss_and_gradients(model, x)
    twin_loss, twin_grads = loss_and_gradients(twin, x)
    torch.testing.assert_close(loss, twin_loss, rtol=1e-12, atol=0)
    sums = {k: torch.zeros_like(g) for k, g in grads.items()}
    for k, g in twin_grads.items():
        sums[shared_name(k, grads)] += g
    torch.testing.assert_close(grads, sums, rtol=1e-9, atol=1e-12)


def test_every_use_matters_to_the_output(model, x):
    """Guards the tests above: with timm's initial batch norms a shared convolution would change nothing."""
    before = model(x)
    for name in uses_by_name(model):
        weight = model.get_submodule(name).weight
        saved = weight.detach().clone()
        nn.init.zeros_(weight)
        assert not torch.allclose(model(x), before), name
        weight.data.copy_(saved)


def test_gradient_checkpointing_gives_the_same_gradients(kind):
    model = small(kind).double().train()
    x = images(model, 4)
    plain = loss_and_gradients(model, x)
    model.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in stages(model))
    torch.testing.assert_close(loss_and_gradients(model, x), plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_runs_in_half_precision_and_channels_last(model, x, dtype):
    expected = model(x)
    half = copy.deepcopy(model).to(dtype=dtype, memory_format=torch.channels_last)
    outputs = [half(x.to(dtype=dtype, memory_format=torch.channels_last))]
    with torch.autocast('cpu', dtype):
        outputs.append(model(x))
    for output in outputs:
        assert output.dtype == dtype
        assert F.cosine_similarity(output.float(), expected).min() > 0.99


# ---- One tensor, one name


def test_each_tensor_has_one_name_and_one_storage(kind):
    state_dict = small(kind).state_dict()
    storages = [v.untyped_storage().data_ptr() for v in state_dict.values()]
    assert len(set(storages)) == len(storages)


def test_safetensors_and_hub_format_take_the_state_dict_as_it_is(model, x, tmp_path):
    save_file(model.state_dict(), tmp_path / 'plain.safetensors')
    assert load_file(tmp_path / 'plain.safetensors').keys() == model.state_dict().keys()
    assert torch.equal(through_folder(model, tmp_path / 'hub', **model.made_by[1])(x), model(x))


@pytest.mark.parametrize('ema_class', [ModelEmaV2, ModelEmaV3])
def test_ema_decays_a_shared_weight_once_a_step(model, ema_class):
    ema = ema_class(model, decay=0.9)
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        nn.init.zeros_(p)
    ema.update(model)
    for k, v in ema.module.named_parameters():
        torch.testing.assert_close(v, 0.9 * before[k], msg=k)


def test_deepcopy_and_pickle_keep_the_sharing(model, x):
    for twin in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        assert torch.equal(twin(x), model(x))
        assert uses_by_name(twin) == uses_by_name(model)
        for name in uses_by_name(twin):
            nn.init.zeros_(twin.get_submodule(name).weight)
        assert not torch.equal(twin(x), model(x))


def test_to_empty_and_assign_keep_the_sharing(model, x):
    name, kwargs = model.made_by
    for assign in True, False:
        other = timm.create_model(name, device='meta', **kwargs).eval()
        if not assign:
            other.to_empty(device='cpu')
        other.load_state_dict(model.state_dict(), assign=assign)
        assert torch.equal(other(x), model(x))
        assert calls(other, x) == calls(model, x)


def test_functional_call_replaces_every_use(kind):
    model, other = small(kind), small(kind)
    for name in uses_by_name(other):
        nn.init.normal_(other.get_submodule(name).weight)
    x = images(model)
    assert torch.equal(functional_call(model, dict(other.named_parameters()), x), other(x))
    assert not torch.equal(model(x), other(x))


# ---- What others see of it


def test_forward_hooks_see_every_use(model):
    expected = uses_by_name(model)
    count = calls(model, images(model))
    assert {name: count[name] for name in expected} == dict(expected)
    assert set(count.values()) == {1, *expected.values()}


def test_flop_counter_counts_every_use(model):
    flops = []
    for net in model, unshared(model):
        with FlopCounterMode(display=False) as counter:
            net(images(net))
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


def test_convolution_replaced_by_name_reaches_every_use(model, x):
    before = model(x)
    number = uses_by_name(model)
    for name in number:
        add('LoRA', model, name)
    assert not torch.allclose(model(x), before)
    assert {name: calls(model, x)[f'{name}.up'] for name in number} == dict(number)
    model.train()(images(model, 4)).sum().backward()
    assert all(model.get_submodule(name).up.weight.grad.abs().sum() > 0 for name in number)


def test_layer_decay_puts_the_shared_convolution_with_the_first_block_of_its_stage(model):
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group['lr_scale'] for group in groups for p in group['params']}
    assert sum(len(group['params']) for group in groups) == len(scale) == len(list(model.parameters()))
    for name in uses_by_name(model):
        stage, _, run = name.partition('.conv')
        first = model.get_submodule(f'{stage}.blocks.{run.removeprefix(".") or 0}').conv1.weight
        assert scale[id(model.get_submodule(name).weight)] == scale[id(first)] < 1
    assert scale[id(model.fc.weight)] == 1


def test_frozen_blocks_leave_the_shared_convolution_trainable(kind):
    model = small(kind).train()
    for stage in stages(model):
        stage.blocks.requires_grad_(False)
    model(images(model, 4)).sum().backward()
    assert all(model.get_submodule(name).weight.grad is not None for name in uses_by_name(model))


def test_sync_batch_norm_replaces_every_batch_norm(model, x):
    sync = timm.layers.convert_sync_batchnorm(copy.deepcopy(model))
    assert not batch_norms(sync)
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in sync.modules()) == len(batch_norms(model))
    assert sync.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(sync(x), model(x))


def test_features_only_gives_the_intermediates(model, kind):
    x, backbone = images(model), small(kind, features_only=True)
    backbone.load_state_dict(model.state_dict(), strict=False)
    features = backbone(x)
    final, intermediates = model.forward_intermediates(x)
    assert [f.shape[1] for f in features] == backbone.feature_info.channels()
    assert [32 // f.shape[-1] for f in features] == backbone.feature_info.reduction()
    assert len(features) == len(intermediates) > 3
    for a, b in zip(features, intermediates, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(model.forward_head(final), model(x))


def test_stage_is_indexed_iterated_and_measured_over_its_blocks(model):
    stage = model.layer3
    assert list(stage) == list(stage.blocks) and len(stage) == len(stage.blocks)
    assert stage[0] is stage.blocks[0] and stage[-1] is stage.blocks[-1]
    assert list(stage[1:]) == list(stage.blocks)[1:]
    with pytest.raises(IndexError):
        stage[len(stage)]


def test_last_block_of_a_stage_is_a_target_for_grad_cam(model, x):
    seen: Dict[str, torch.Tensor] = {}
    model.layer3[-1].register_forward_hook(lambda _module, _args, output: seen.update(activations=output))
    model.layer3[-1].register_full_backward_hook(lambda _module, _inputs, outputs: seen.update(gradients=outputs[0]))
    model(x)[:, 0].sum().backward()
    assert torch.equal(seen['activations'], model.layer3(model.layer2(model.forward_intermediates(x)[1][1])))
    assert seen['gradients'].shape == seen['activations'].shape and seen['gradients'].any()


# ---- Errors


def test_a_block_without_a_convolution_says_whose_it_needs(model):
    block = model.layer1.blocks[1]
    with pytest.raises(RuntimeError, match="The 3x3 of this block is its stage's: call the stage"):
        block(torch.randn(1, block.conv1.in_channels, 8, 8))


def test_timm_s_checkpointing_of_flattened_stages_cannot_run_blocks_without_the_shared_convolution(model):
    x = model.layer1(model.forward_intermediates(images(model), intermediates_only=True)[0])
    for sequence in [model.layer2], [model.layer2, model.layer3]:
        with pytest.raises(RuntimeError, match="The 3x3 of this block is its stage's"):
            checkpoint_seq(sequence, x, flatten=True)
    twin = unshared(model)  # each block has its own, as in a stage that shares nothing
    if isinstance(twin.layer2, SharedStage):
        torch.testing.assert_close(checkpoint_seq([twin.layer2], x, flatten=True), twin.layer2(x))


def test_convolutions_that_differ_are_not_shared(kind):
    block = PreActWideBasic if kind in ('wide', 'basic') else PreActBottleneck
    with pytest.raises(ValueError, match='differ and cannot be shared'):
        SharedStage([block(16, 16, projection=True), block(16, 8, projection=True)])

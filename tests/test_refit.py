"""What images give a shared net: kernels, last layers, statistics."""

import copy
import gc
from typing import List

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from models import create, error
from plain_nets import NARROW, PLAIN, batch_norms, noise, stages, take_statistics
from timm.utils.model import freeze_batch_norm_2d

from timm_sharesnet import share, unshare
from timm_sharesnet.sharing import calibration, refit, run
from timm_sharesnet.sharing.run import Run


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS difference of maps (B, C, H, W), relative to that of the expected, the mean of each channel aside."""
    found, expected = (x - x.mean((0, 2, 3), keepdim=True) for x in (found, expected))
    return ((found - expected).square().mean() / expected.square().mean()).sqrt().item()


@pytest.mark.parametrize(
    'name, kwargs',
    [pytest.param(*PLAIN[i], marks=[pytest.mark.slow] * (i not in (1, 2, 8, 14))) for i in range(1, len(PLAIN))],
)
def test_refitted_it_is_nearer_to_the_model_in_every_stage(name, kwargs):
    model = create(name, **kwargs)
    batches = noise(model, 4, 16)
    take_statistics(model, batches)
    state = copy.deepcopy(model.state_dict())
    shared = [share(model, 1.0, 'mean', batches, refit=refit) for refit in (True, False)]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    expected, refitted, other = (m.forward_intermediates(batches[0])[1][1:] for m in (model, *shared))
    errors = [(difference(a, y), difference(b, y)) for a, b, y in zip(refitted, other, expected, strict=True)]
    assert all(a < 0.95 * b for a, b in errors[1:]), errors


@pytest.mark.parametrize('name, kwargs', [PLAIN[i] for i in (1, 2, 8, 10, 13)])
def test_last_layer_is_found_again(name, kwargs):
    model = create(name, **kwargs)
    batches = noise(model, 2, 32)
    shared = share(model, 1.0, 'mean', batches, refit=False)
    plain = unshare(shared)
    runs = []
    for i, stage in enumerate(stages(shared)):
        blocks = tuple(j for j in range(len(stage)) if stage.conv_of(j) is not None)
        if blocks:
            runs.append(Run(f'layer{i + 1}', stage, blocks, [stage.conv_of(j).weight for j in blocks]))
        for j in blocks:
            nn.init.normal_(stage[j].conv3.weight if 'conv3' in stage[j].branch else stage[j].bn2.weight)
    features = [shared.forward_intermediates(batches[0])[1][1:]]
    plain = share(plain, 0.0)
    names = [f'layer{i + 1}' for i in range(len(stages(shared)))]
    refit.calibrate(shared, plain, names, runs, calibration.Batches(shared, batches), progress=False)
    features += [m.forward_intermediates(batches[0])[1][1:] for m in (shared, plain)]
    for damaged, found, expected in zip(*features, strict=True):
        assert difference(found, expected) < 0.2 < difference(damaged, expected)


def test_blocks_that_add_nothing_still_do():
    batches = [torch.randn(8, 3, 64, 64)]
    model = take_statistics(timm.create_model('resnet50', **NARROW), batches)  # its last norms scale by zero
    for stage in stages(share(model, 1.0, 'mean', batches)):
        for block in stage:
            assert block.bn3.weight.abs().max() < 1e-3 and all(p.isfinite().all() for p in block.parameters())


def test_last_1x1_before_another_norm_stays_and_the_report_says_so():
    model = create('resnet50', norm_layer='groupnorm', **dict(NARROW, channels=(32, 32, 64, 64)))
    shared = share(model, 1.0, 'mean', [torch.randn(8, 3, 64, 64)])
    assert torch.equal(shared.layer2[2].conv3.weight, model.layer2[2].conv3.weight)
    assert 'layer2: the last 1x1 is not refitted' in str(shared.share_report)
    frozen = freeze_batch_norm_2d(create('resnet34', **NARROW))
    report = str(share(frozen, 1.0, 'mean', [torch.randn(8, 3, 64, 64)]).share_report)
    assert 'layer2: the last batch norm is not refitted' in report
    wide = share(create('wrn40_4', layers=(3, 3, 3), widen_factor=1), 1.0, 'mean', [torch.randn(8, 3, 32, 32)])
    assert 'not refitted' not in str(wide.share_report)  # after its 3x3 there is nothing to fit


def test_controls_keep_the_kernel_and_groups_its_mean():
    batches = [torch.randn(8, 3, 64, 64)]
    for init in 'first', 'random':
        torch.manual_seed(0)
        one = share(create('resnet50', **NARROW), init=init)
        torch.manual_seed(0)
        two = share(create('resnet50', **NARROW), init=init, images=batches)
        assert torch.equal(one.layer3.conv.weight, two.layer3.conv.weight)
        assert not torch.equal(one.layer3[1].conv3.weight, two.layer3[1].conv3.weight)
    model = create('resnext50_32x4d', layers=(1, 2, 1, 1))
    one, two = share(model), share(model, images=batches)
    assert torch.equal(one.layer2.conv.weight, two.layer2.conv.weight)


@pytest.mark.parametrize('name, kwargs', [PLAIN[i] for i in (1, 2, 8, 13)])
def test_refitted_each_norm_has_the_statistics_of_what_it_gets(name, kwargs):
    model = create(name, **kwargs)
    batches = noise(model, 3, 8)
    shared = share(model, images=batches)
    seen = {}
    for norm in batch_norms(shared):
        norm.register_forward_hook(lambda norm, x, _: seen.update({norm: x[0]}))
    shared(torch.cat(batches))
    assert len(seen) == len(batch_norms(shared))
    for norm, x in seen.items():
        tolerance = dict(rtol=1e-2, atol=1e-2 * x.std().item())
        torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)), **tolerance)
        torch.testing.assert_close(norm.running_var, x.var((0, 2, 3)), rtol=5e-2, atol=1e-2 * x.var().item())


def test_refitted_it_is_the_same_for_batches_of_any_size():
    model = create('resnet164_cifar', layers=(3, 3, 3))
    x = noise(model, 1, 33)[0]
    whole, *others = (share(model, images=b) for b in ([x], x.split(1), [x[:1], x[1:]], [x[:16], x[:0], x[16:]]))
    for other in others:
        assert error(other(x), whole(x)) < 0.01


def test_only_so_many_images_are_kept_as_there_is_room_for(monkeypatch):
    model = create('resnet50', **NARROW)
    batches = noise(model, 4, 10)
    whole = share(model, images=batches)
    counts, fit = [], refit._fit_block

    def count(pair, parts):
        counts.append(sorted(torch.cat([part.indices for part in parts]).tolist()))
        fit(pair, parts)
        kept = sum(t.numel() * t.element_size() for part in parts for t in (part.plain, part.shared))
        assert kept <= refit._ROOM

    monkeypatch.setattr(refit, '_fit_block', count)
    maps = model.forward_intermediates(batches[0])[1]
    monkeypatch.setattr(refit, '_ROOM', 2 * 4 * 40 * maps[-2][0].numel())  # for all of them before the last stage
    shared = share(model, images=batches)
    assert counts[0] != counts[-1] == list(range(40))
    for indices in counts:
        every = indices[1]
        assert indices == list(range(0, 40, every)) and every in (1, 2, 4, 8)
    assert error(shared(batches[0]), model(batches[0])) < 1.5 * error(whole(batches[0]), model(batches[0]))


def test_statistics_alone_are_those_of_the_images():
    model = create('resnet164_cifar', layers=(3, 3, 3))
    batches = torch.randn(3, 8, 3, 32, 32).unbind()
    shared = share(model, images=[(batch, torch.zeros(8)) for batch in batches], refit=False)
    expected = copy.deepcopy(shared)
    for norm in batch_norms(expected):
        norm.reset_running_stats()
        norm.momentum = None
    expected.train()
    with torch.no_grad():
        for batch in batches:
            expected(batch)
    torch.testing.assert_close(shared.state_dict(), expected.state_dict())
    assert all(norm.momentum == 0.1 and not norm.training for norm in batch_norms(shared))


@pytest.mark.parametrize('refit', [True, False])
def test_images_may_come_from_a_generator_and_none_are_an_error(refit):
    model = create('resnet164_cifar', layers=(3, 3, 3)).train()
    shared = share(model, images=iter(torch.randn(2, 4, 3, 32, 32)), refit=refit)
    assert all(m.training for m in (*model.modules(), *shared.modules()))
    assert shared.norm.num_batches_tracked and not model.norm.num_batches_tracked
    with pytest.raises(ValueError, match='images is empty'):
        share(model, images=[], refit=refit)


def test_images_count_the_same_in_batches_of_any_size():
    model = create('resnet164_cifar', layers=(3, 3, 3))
    x = noise(model, 1, 33)[0] * torch.linspace(0.5, 3, 33)[:, None, None, None]
    for batches in [x[:32], x[32:]], [x[:1], x[1:]], [x[:16], x[:0], x[16:]]:
        norm = share(model, images=batches, refit=False).layer1[0].bn1
        expected = torch.zeros(16)
        for batch in batches:
            if len(batch):
                expected += model.conv1(batch).detach().var((0, 2, 3)) * len(batch) / 33
        torch.testing.assert_close(norm.running_var, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('refit', [True, False])
@pytest.mark.parametrize(
    'images, message',
    [
        (torch.randn(8, 3, 32, 32), r'one of shape \(8, 3, 32, 32\): put a single batch into a list'),
        ({'image': torch.randn(8, 3, 32, 32)}, 'got dict'),
        (5, 'got int'),
        ([{'image': torch.randn(8, 3, 32, 32)}], 'number 0 is of dict'),
        ([np.zeros((8, 3, 32, 32), 'float32')], 'number 0 is of ndarray'),
        (np.zeros((8, 3, 32, 32), 'float32'), 'number 0 is of ndarray'),
        ('images', 'number 0 is of str'),
        ([torch.randn(8, 3, 32, 32), ()], 'number 1 is of tuple'),
        ([torch.zeros(8, 3, 32, 32, dtype=torch.uint8)], r'number 0 is of torch\.uint8'),
        ([torch.randn(3, 32, 32)], r'shape \(3, 32, 32\)'),
        ([torch.randn(8, 1, 32, 32)], r'shape \(8, 1, 32, 32\)'),
        ([torch.full((8, 3, 32, 32), float('nan'))], 'batch 0 has values that are not finite'),
        ([torch.randn(4, 3, 32, 32), torch.full((1, 3, 32, 32), torch.inf)], 'batch 1 has values that are not finite'),
        ([torch.randn(0, 3, 32, 32)], 'images is empty'),
        (iter([torch.randn(0, 3, 32, 32)] * 2), 'images is empty'),
    ],
)
def test_images_that_are_none_are_refused(images, message, refit):
    with pytest.raises((TypeError, ValueError), match=message):
        share(create('resnet164_cifar', layers=(3, 3, 3)), images=images, refit=refit)


def test_images_are_taken_in_any_precision():
    model = create('resnet164_cifar', layers=(3, 3, 3)).double()
    x = torch.randn(8, 3, 32, 32)
    assert error(share(model, images=[x])(x.double()), share(model, images=[x.double()])(x.double())) == 0


@pytest.mark.parametrize(
    'init', ['align', *(pytest.param(init, marks=pytest.mark.slow) for init in ('mean', 'first', 'random'))]
)
@pytest.mark.parametrize('fault', ['inputs of zero', 'kernels of zero', 'one kernel of zero', 'all of zero'])
@pytest.mark.parametrize('name, kwargs', [PLAIN[i] for i in (1, 2, 13, 14)])
def test_channels_that_are_dead_stay_finite(name, kwargs, fault, init):
    model = create(name, **kwargs)
    for i, block in enumerate(block for stage in (model.layer1, model.layer2) for block in stage):
        if fault in ('inputs of zero', 'all of zero'):
            norm = block.bn2 if name in ('resnet164_cifar', 'wrn40_4') else block.bn1
            nn.init.constant_(norm.weight, 0.1)
            nn.init.constant_(norm.bias, -50)
        if fault in ('kernels of zero', 'all of zero') or fault == 'one kernel of zero' and i == 1:
            nn.init.zeros_(block.conv2.weight)
    for batches in None, noise(model, 2, 8):
        shared = share(model, init=init, images=batches)
        assert all(v.isfinite().all() for v in shared.state_dict().values())
        assert shared(noise(model, 1, 2)[0]).isfinite().all()


def test_a_stage_that_is_off_keeps_its_kernels_mean():
    model = create('resnet164_cifar', layers=(4, 3, 3))
    for block in model.layer1:
        nn.init.zeros_(block.bn2.weight)
        nn.init.constant_(block.bn2.bias, -1)
    shared = share(model, init='mean', images=noise(model, 2, 8))
    assert error(shared.layer1.conv.weight, share(model, init='mean').layer1.conv.weight) < 1e-6


def test_kernels_are_fitted_run_by_run(monkeypatch):
    held: List[int] = []
    model = create('resnet164_cifar', layers=(13, 3, 3))

    def count(moments: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
        tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.dtype == torch.float64]
        held.append(sum(o.shape[-2:] == moments.shape for o in tensors))
        return calibration.solve(moments, products)

    monkeypatch.setattr(run, 'solve', count)
    share(model, (0.5, 0, 0), 'mean', noise(model, 1, 4))
    assert len(held) == 6 and max(held) <= 3


def test_only_blocks_that_share_are_refitted():
    model = create('resnet50', **dict(NARROW, layers=(2, 2, 2, 1)))  # in stages 2 to 4 one block alone can share
    shared = share(model, 1.0, 'mean', noise(model, 2, 8))
    assert torch.equal(shared.layer2[1].conv3.weight, model.layer2[1].conv3.weight)
    assert not torch.equal(shared.layer1[1].conv3.weight, model.layer1[1].conv3.weight)
    assert [merge.stage for merge in shared.share_report.merges] == ['layer1']


def test_synchronised_batch_norms_are_refitted_and_frozen_ones_noted():
    model = create('resnet50', **NARROW)
    batches = noise(model, 2, 8)
    expected = share(model, 1.0, 'mean', batches)
    synchronised = share(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)), 1.0, 'mean', batches)
    assert type(synchronised.layer1[0].bn3) is nn.SyncBatchNorm
    torch.testing.assert_close(synchronised.state_dict(), expected.state_dict())
    assert 'SyncBatchNorm' not in str(synchronised.share_report)  # it is built again as the same net
    frozen = freeze_batch_norm_2d(copy.deepcopy(model))
    report = str(share(frozen, 1.0, 'mean', batches).share_report)
    assert 'batch norms are frozen and keep their statistics' in report
    assert 'frozen' not in str(expected.share_report)


def test_one_value_a_channel_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match='batches of at least two images, or larger ones'):
        share(create('resnet50', **NARROW), images=[torch.randn(1, 3, 32, 32)], refit=False)

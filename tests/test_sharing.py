"""`share`: a shared net of any plain one, at any rate."""

import ast
import copy
import gc
import json
import shlex
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import yaml
from demo import load_images
from models import SHARED, TWINS, create, error, images
from timm.models import save_for_hf
from timm.models.resnet import Bottleneck, ResNet
from timm.utils.model import freeze_batch_norm_2d
from torch.nn.utils import prune

from timm_sharesnet import CifarResNetV2, PreActWideBasic, SharedStage, ShaResNet, fold, share, unshare
from timm_sharesnet.model_args import train_options, unlike_its_name
from timm_sharesnet.preflight import build_model, train_parser
from timm_sharesnet.share_rate import as_python, split_runs
from timm_sharesnet.sharing.__main__ import main
from timm_sharesnet.sharing.refit import calibrate
from timm_sharesnet.sharing.run import Run, permute_channels
from timm_sharesnet.weights import drop_repeated_args

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


# ---- The rate


@pytest.mark.parametrize('rate', [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize('name', SHARED)
def test_a_stage_saves_a_kernel_for_each_block_beyond_one_a_run(name: str, rate: float) -> None:
    model = timm.create_model(name, share_rate=rate, device='meta')
    twin = timm.create_model(TWINS[name], device='meta')
    saved = 0
    for i, stage in enumerate(stages(model)):
        m = len(stage) - stage[0].first_shared(i)  # blocks that can share
        g = m - round(rate * (m - 1))
        kernels = {stage.conv_name(j) for j in range(stage[0].first_shared(i), len(stage))}
        assert len(kernels) == g
        saved += 9 * stage[-1].conv1.out_channels ** 2 * (m - g)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in twin.parameters()) - saved


@pytest.mark.parametrize('name', SHARED)
def test_names_of_the_shared_net_and_of_its_twin_are_as_they_were(name: str) -> None:
    names = timm.create_model(name, share_rate=1.0, device='meta').state_dict().keys()
    assert names == timm.create_model(name, device='meta').state_dict().keys()
    assert {f'layer{i}.conv.weight' for i in (1, 2, 3)} <= names
    assert not [k for k in timm.create_model(name, share_rate=0, device='meta').state_dict() if '.conv.' in k]


@pytest.mark.parametrize(
    'first, end, rate, runs',
    [
        (0, 3, 1.0, [(0, 1, 2)]),
        (1, 7, 0.0, [(1,), (2,), (3,), (4,), (5,), (6,)]),
        (1, 7, 0.5, [(1,), (2,), (3, 4), (5, 6)]),  # as equal as possible, the longer ones last
        (1, 7, 0.75, [(1, 2, 3), (4, 5, 6)]),
        (1, 1, 1.0, []),
        (1, 2, 1.0, [(1,)]),
        (1, 6, [[1, 5], [2, 3]], [(1, 5), (2, 3), (4,)]),
        (1, 6, [[4, 2], [3, 1]], [(1, 3), (2, 4), (5,)]),  # a kernel is named by the first block that uses it
        (0, 4, (range(1, 3), (3, 0)), [(0, 3), (1, 2)]),
        (0, 4, np.array([[3, 2], [1, 0]]), [(0, 1), (2, 3)]),
        (1, 7, np.float32(0.5), [(1,), (2,), (3, 4), (5, 6)]),
        (1, 7, torch.tensor(0.5), [(1,), (2,), (3, 4), (5, 6)]),
        (0, 3, np.int64(1), [(0, 1, 2)]),
    ],
)
def test_runs(first: int, end: int, rate: Any, runs: List[Tuple[int, ...]]) -> None:
    assert split_runs(first, end, rate) == runs


@pytest.mark.parametrize(
    'rate',
    [
        1.5,
        -0.1,
        float('nan'),
        (1.0,),
        (1, 1, 1, 1, 1),
        [[0, 1], 1, 1, 1],
        [1, [[0, 1]], 1, 1],
        [[[True, 2]], 1, 1, 1],
        [[[0.0, 1.0]], 1, 1, 1],
        [[[0, 1], [1, 2]], 1, 1, 1],
        [[[]], 1, 1, 1],
        [1, None, 1, 1],
        [1, '0.5', 1, 1],
        True,
        '0.5',
        'half',
        {'layer1': 1},
        np.ones(3),
        np.ones((4, 2)),
    ],
)
def test_rates_that_are_none_are_refused(rate: Any) -> None:
    with pytest.raises(ValueError, match='share_rate'):
        timm.create_model('sharesnet50', share_rate=rate, device='meta')
    with pytest.raises(ValueError, match='share_rate'):
        share(create('resnet50', **NARROW), rate)


def test_a_rate_for_each_stage_may_be_an_array() -> None:
    model = timm.create_model('sharesnet50', share_rate=np.array([1.0, 0.0, 0.5, 1.0]), device='meta')
    expected = timm.create_model('sharesnet50', share_rate=(1.0, 0.0, 0.5, 1.0), device='meta')
    assert str(model) == str(expected)


def test_runs_with_the_same_first_blocks_have_the_same_names_and_print_what_tells_them_apart() -> None:
    rates = [(1, 1, [[1, 3], [5, 4, 2]], 1), (1, 1, [[1, 4, 5], [2, 3]], 1)]
    models = [timm.create_model('sharesnet50', share_rate=rate, device='meta') for rate in rates]
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    assert 'conv.1: blocks [1, 3], conv.2: blocks [2, 4, 5]' in str(models[0].layer3)
    assert 'conv.1: blocks [1, 4, 5], conv.2: blocks [2, 3]' in str(models[1].layer3)


def test_a_block_that_alone_can_share_keeps_its_kernel_but_in_a_stage_of_the_paper() -> None:
    rates = {0.0: 'blocks.1.conv2', 0.5: 'blocks.1.conv2', 1.0: 'conv'}
    for rate, name in rates.items():
        model = timm.create_model('sharesnet50', layers=(1, 2, 1, 1), share_rate=rate, device='meta')
        assert model.layer2.conv_name(1) == name
    model = timm.create_model('sharesnet50', layers=(1, 2, 1, 1), share_rate=(1, [[1]], 1, 1), device='meta')
    assert model.layer2.conv_name(1) == 'blocks.1.conv2'


def test_a_rate_for_each_stage_and_explicit_runs_build_what_they_say() -> None:
    model = timm.create_model('sharesnet50', share_rate=(1.0, 0.0, [[1, 3], [2, 5]], 1.0), device='meta')
    names = [k for k in model.state_dict() if '.conv.' in k]
    assert names == [f'layer{i}.weight' for i in ('1.conv', '3.conv.1', '3.conv.2', '4.conv')]
    stage = model.layer3
    assert stage.conv_of(3) is stage.conv_of(1) is not stage.conv_of(5) and stage.conv_of(4) is None


# ---- What it computes


@plain_nets
def test_at_rate_0_it_computes_what_the_model_does(name: str, kwargs: Dict[str, Any]) -> None:
    model = create(name, **kwargs).double()
    shared = share(model, 0.0)
    assert isinstance(shared, (ShaResNet, CifarResNetV2)) and not shared.share_report.merges
    x = images(model)[:, : model.in_chans]
    assert error(shared(x), model(x)) <= 1e-12


@plain_nets
def test_result_is_a_shared_net_that_folds_and_unshares_and_the_model_stays(name: str, kwargs: Dict[str, Any]) -> None:
    model = create(name, **kwargs).double()
    before = copy.deepcopy(model.state_dict())
    shared = share(model, 1.0, init='mean')
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in after.items())
    saved = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in shared.parameters())
    assert saved == sum(merge.saved for merge in shared.share_report.merges) > 0
    x = images(model)[:, : model.in_chans]
    y = shared(x)
    assert error(fold(shared)(x), y) <= 1e-9
    plain = unshare(shared)
    assert error(plain(x), y) <= 1e-12
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert plain.pretrained_cfg['architecture'] == name and type(plain) is type(model)


@kinds
@pytest.mark.parametrize('rate', [1.0, 0.5])
def test_alignment_finds_the_order_of_channels_in_which_the_kernels_are_equal(
    name: str, kwargs: Dict[str, Any], rate: float
) -> None:
    source = timm.create_model(name, **kwargs)
    for norm in (m for m in source.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.ones_(norm.weight)
    model = unshare(share(source, rate, init='first')).double().eval()  # the blocks of a run have equal kernels
    shared = share(model, rate, init='first').double().eval()
    generator = torch.Generator().manual_seed(0)
    for stage in stages(shared):
        for i, block in enumerate(stage):
            if stage.conv_of(i) is not None:
                conv = stage.conv_of(i)
                block.take_conv2(copy.deepcopy(conv))
    for block in (block for stage in stages(shared) for block in stage):
        ins, outs = (torch.randperm(n, generator=generator) for n in block.conv2.weight.shape[1::-1])
        if 'conv3' not in block.branch:
            outs = torch.arange(len(outs))
        with torch.no_grad():
            permute_channels(block, ins, outs)
            block.conv2.weight.copy_(block.conv2.weight[outs][:, ins])
    for stage in stages(shared):
        stage.conv, stage.several = None, False
    permuted = unshare(shared)
    x = images(model)
    assert error(permuted(x), model(x)) <= 1e-9  # so far, permutations change nothing
    aligned = share(permuted, rate)
    assert all(merge.after > 0.999 for merge in aligned.share_report.merges)
    assert min(merge.before for merge in aligned.share_report.merges) < 0.5
    assert error(aligned(x), model(x)) <= 1e-6
    assert error(share(permuted, rate, init='mean')(x), model(x)) > 0.1


@kinds
def test_alignment_brings_independent_kernels_nearer(name: str, kwargs: Dict[str, Any]) -> None:
    for merge in share(create(name, **kwargs)).share_report.merges:
        nearer = merge.after - merge.before
        assert nearer > 0.03 if name in ('resnet50', 'resnet164_cifar') else nearer > -0.01


def test_grouped_convolutions_are_not_aligned_and_the_report_says_so() -> None:
    report = str(share(create('resnext50_32x4d', layers=(2, 2, 2, 2))).share_report)
    assert 'layer1: grouped convolutions are not aligned' in report and 'no images were given' in report
    assert report.splitlines()[0].startswith('layer1 blocks 0 to 1: 2 kernels to 1, 4,608 parameters saved, cosine')


# ---- Images


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS difference of maps (B, C, H, W), relative to that of the expected, the mean of each channel aside."""
    found, expected = (x - x.mean((0, 2, 3), keepdim=True) for x in (found, expected))
    return ((found - expected).square().mean() / expected.square().mean()).sqrt().item()


def noise(model: nn.Module, count: int, n: int) -> Tuple[torch.Tensor, ...]:
    """Batches (n, C, H, W)."""
    size = 32 if isinstance(model, CifarResNetV2) else 64
    return torch.randn(count, n, model.in_chans, size, size, generator=torch.Generator().manual_seed(0)).unbind()


@pytest.mark.parametrize(
    'name, kwargs',
    [pytest.param(*PLAIN[i], marks=[pytest.mark.slow] * (i not in (1, 2, 8, 14))) for i in range(1, len(PLAIN))],
)
def test_refitted_it_is_nearer_to_the_model_in_every_stage(name: str, kwargs: Dict[str, Any]) -> None:
    model = create(name, **kwargs)
    batches = noise(model, 4, 16)
    model = unshare(share(model, 0.0, images=batches))  # so that its statistics are theirs
    state = copy.deepcopy(model.state_dict())
    shared = [share(model, 1.0, 'mean', batches, refit=refit) for refit in (True, False)]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    expected, refitted, other = (m.forward_intermediates(batches[0])[1][1:] for m in (model, *shared))
    errors = [(difference(a, y), difference(b, y)) for a, b, y in zip(refitted, other, expected, strict=True)]
    assert all(a < 0.95 * b for a, b in errors[1:]), errors


@pytest.mark.parametrize('name, kwargs', [PLAIN[i] for i in (1, 2, 8, 10, 13)])
def test_last_layer_is_found_again(name: str, kwargs: Dict[str, Any]) -> None:
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
    calibrate(shared, plain, [f'layer{i + 1}' for i in range(len(stages(shared)))], runs, batches, progress=False)
    features += [m.forward_intermediates(batches[0])[1][1:] for m in (shared, plain)]
    for damaged, found, expected in zip(*features, strict=True):
        assert difference(found, expected) < 0.2 < difference(damaged, expected)


def test_blocks_that_add_nothing_still_do() -> None:
    batches = [torch.randn(8, 3, 64, 64)]
    model = unshare(share(timm.create_model('resnet50', **NARROW), 0.0, images=batches))  # its last norms scale by zero
    for stage in stages(share(model, 1.0, 'mean', batches)):
        for block in stage:
            assert block.bn3.weight.abs().max() < 1e-3 and all(p.isfinite().all() for p in block.parameters())


def test_last_1x1_before_another_norm_stays_and_the_report_says_so() -> None:
    model = create('resnet50', norm_layer='groupnorm', **dict(NARROW, channels=(32, 32, 64, 64)))
    shared = share(model, 1.0, 'mean', [torch.randn(8, 3, 64, 64)])
    assert torch.equal(shared.layer2[2].conv3.weight, model.layer2[2].conv3.weight)
    assert 'layer2: the last 1x1 is not refitted' in str(shared.share_report)
    frozen = freeze_batch_norm_2d(create('resnet34', **NARROW))
    report = str(share(frozen, 1.0, 'mean', [torch.randn(8, 3, 64, 64)]).share_report)
    assert 'layer2: the last batch norm is not refitted' in report
    wide = share(create('wrn40_4', layers=(3, 3, 3), widen_factor=1), 1.0, 'mean', [torch.randn(8, 3, 32, 32)])
    assert 'not refitted' not in str(wide.share_report)  # after its 3x3 there is nothing to fit


def test_controls_keep_the_kernel_and_groups_its_mean() -> None:
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


def test_statistics_are_those_of_the_images() -> None:
    model = create('resnet164_cifar', layers=(3, 3, 3))
    batches = torch.randn(3, 8, 3, 32, 32).unbind()
    shared = share(model, images=[(batch, torch.zeros(8)) for batch in batches])
    expected = copy.deepcopy(shared)
    for norm in (m for m in expected.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = None
    expected.train()
    with torch.no_grad():
        for batch in batches:
            expected(batch)
    for name, value in shared.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], msg=name)
    norms = [m for m in shared.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.momentum == 0.1 and not norm.training for norm in norms)


@pytest.mark.parametrize('refit', [True, False])
def test_images_may_come_from_a_generator_and_none_are_an_error(refit: bool) -> None:
    model = create('resnet164_cifar', layers=(3, 3, 3)).train()
    shared = share(model, images=iter(torch.randn(2, 4, 3, 32, 32)), refit=refit)
    assert all(m.training for m in (*model.modules(), *shared.modules()))
    assert shared.norm.num_batches_tracked == 2 and not model.norm.num_batches_tracked
    with pytest.raises(ValueError, match='images is empty'):
        share(model, images=[], refit=refit)


def test_images_count_the_same_in_batches_of_any_size() -> None:
    model = create('resnet164_cifar', layers=(3, 3, 3))
    x = noise(model, 1, 33)[0] * torch.linspace(0.5, 3, 33)[:, None, None, None]
    for batches in [x[:32], x[32:]], [x[:1], x[1:]], [x[:16], x[:0], x[16:]]:
        norm = share(model, images=batches).layer1[0].bn1
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
        (
            [torch.randn(4, 3, 32, 32), torch.full((1, 3, 32, 32), float('inf'))],
            'batch 1 has values that are not finite',
        ),
        ([torch.randn(0, 3, 32, 32)], 'images is empty'),
        (iter([torch.randn(0, 3, 32, 32)] * 2), 'images is empty'),
    ],
    ids=str,
)
def test_images_that_are_none_are_refused(images: Any, message: str, refit: bool) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        share(create('resnet164_cifar', layers=(3, 3, 3)), images=images, refit=refit)


def test_images_are_taken_in_any_precision() -> None:
    model = create('resnet164_cifar', layers=(3, 3, 3)).double()
    x = torch.randn(8, 3, 32, 32)
    assert error(share(model, images=[x])(x.double()), share(model, images=[x.double()])(x.double())) == 0


@pytest.mark.parametrize(
    'init', ['align', *(pytest.param(init, marks=pytest.mark.slow) for init in ('mean', 'first', 'random'))]
)
@pytest.mark.parametrize('fault', ['inputs of zero', 'kernels of zero', 'one kernel of zero', 'all of zero'])
@pytest.mark.parametrize('name, kwargs', [PLAIN[i] for i in (1, 2, 13, 14)])
def test_channels_that_are_dead_stay_finite(name: str, kwargs: Dict[str, Any], fault: str, init: str) -> None:
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


def test_a_stage_that_is_off_keeps_its_kernels_mean() -> None:
    model = create('resnet164_cifar', layers=(4, 3, 3))
    for block in model.layer1:
        nn.init.zeros_(block.bn2.weight)
        nn.init.constant_(block.bn2.bias, -1)
    shared = share(model, init='mean', images=noise(model, 2, 8))
    assert error(shared.layer1.conv.weight, share(model, init='mean').layer1.conv.weight) < 1e-6


def test_kernels_are_fitted_run_by_run(monkeypatch: Any) -> None:
    held: List[int] = []
    model = create('resnet164_cifar', layers=(13, 3, 3))
    solve = torch.linalg.solve

    def count(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        held.append(sum(isinstance(o, torch.Tensor) and o.shape == (144, 144) for o in gc.get_objects()))
        return solve(a, b)

    monkeypatch.setattr(torch.linalg, 'solve', count)
    share(model, (0.5, 0, 0), 'mean', noise(model, 1, 4))
    assert len(held) >= 6 and max(held) <= 3


def test_only_blocks_that_share_are_refitted() -> None:
    model = create('resnet50', **dict(NARROW, layers=(2, 2, 2, 1)))  # in stages 2 to 4 one block alone can share
    shared = share(model, 1.0, 'mean', noise(model, 2, 8))
    assert torch.equal(shared.layer2[1].conv3.weight, model.layer2[1].conv3.weight)
    assert not torch.equal(shared.layer1[1].conv3.weight, model.layer1[1].conv3.weight)
    assert [merge.stage for merge in shared.share_report.merges] == ['layer1']


def test_synchronised_batch_norms_are_refitted_and_frozen_ones_noted() -> None:
    model = create('resnet50', **NARROW)
    batches = noise(model, 2, 8)
    expected = share(model, 1.0, 'mean', batches)
    synchronised = share(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)), 1.0, 'mean', batches)
    assert type(synchronised.layer1[0].bn3) is nn.SyncBatchNorm
    for name, value in synchronised.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], msg=name)
    assert 'SyncBatchNorm' not in str(synchronised.share_report)  # it is built again as the same net
    frozen = freeze_batch_norm_2d(copy.deepcopy(model))
    report = str(share(frozen, 1.0, 'mean', batches).share_report)
    assert 'batch norms are frozen and keep their statistics' in report
    assert 'frozen' not in str(expected.share_report)


def test_one_value_a_channel_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match='batches of at least two images, or larger ones'):
        share(create('resnet50', **NARROW), images=[torch.randn(1, 3, 32, 32)], refit=False)


# ---- A registered model


@plain_nets
def test_saved_it_loads_by_its_config(name: str, kwargs: Dict[str, Any], tmp_path: Path) -> None:
    model = timm.create_model(name, **kwargs).eval()
    shared = share(model, 0.5, init='first')
    model_args = {} if hasattr(model, '_model_args') else {**kwargs, **shared._model_args}  # timm 1.0.28 records none
    save_for_hf(shared, str(tmp_path), model_args=model_args, safe_serialization=True)
    drop_repeated_args(tmp_path / 'config.json')
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = images(model)[:, : model.in_chans]
    assert torch.equal(loaded(x), shared(x))
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['architecture'] == {v: k for k, v in TWINS.items()}.get(name, 'sharesnet')
    assert config['model_args']['share_rate'] == 0.5


@pytest.mark.parametrize('name', SHARED)
def test_entry_point_builds_the_seven_nets_as_their_own_names_do(name: str) -> None:
    for rate in (1.0, 0.5):
        model = timm.create_model('sharesnet', base=TWINS[name], share_rate=rate, device='meta')
        own = timm.create_model(name, share_rate=rate, device='meta')
        assert type(model) is type(own) and str(model) == str(own)
        assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in own.state_dict().items()}


def test_entry_point_takes_what_the_base_takes_and_has_its_preprocessing() -> None:
    model = timm.create_model('sharesnet', base='seresnext26d_32x4d', share_rate=1.0, num_classes=7, in_chans=1)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 7)
    base = timm.get_pretrained_cfg('seresnext26d_32x4d')
    for key in ('mean', 'std', 'crop_pct', 'interpolation', 'first_conv'):
        assert model.pretrained_cfg[key] == getattr(base, key)
    assert not {'url', 'hf_hub_id', 'file'} & model.pretrained_cfg.keys()
    features = timm.create_model('sharesnet', base='resnet18', features_only=True)(torch.randn(1, 3, 64, 64))
    assert [f.shape[1] for f in features] == [64, 64, 128, 256, 512]
    features = timm.create_model('sharesnet', base='resnet164_cifar', features_only=True)(torch.randn(1, 3, 32, 32))
    assert [f.shape[1] for f in features] == [16, 64, 128, 256]


@pytest.mark.parametrize('base', ['resnet51', 'vit_tiny_patch16_224', 'resnetv2_50', 'resnest14d', 'res2net50_26w_4s'])
def test_entry_point_refuses_what_cannot_be_shared(base: str) -> None:
    with pytest.raises((TypeError, ValueError), match='cannot be shared|can share|knows no model resnet51'):
        timm.create_model('sharesnet', base=base, device='meta')


@pytest.mark.parametrize(
    'base, message',
    [
        ('sharesnet50', 'base must be a plain model, and sharesnet50 shares'),
        ('shawrn40_4', 'base must be a plain model, and shawrn40_4 shares'),
        ('sharesnet', 'base must be a plain model, and sharesnet shares'),
        ('sharesnet50.torch7_in1k', 'base must be a plain model'),
        (5, "base must be the name of a model such as 'resnet50', got 5"),
        (nn.Identity(), 'base must be the name of a model'),
        ('resnet50.a1_in2k', 'knows no model resnet50.a1_in2k, did you mean'),
        ('', 'knows no model'),
    ],
    ids=str,
)
def test_entry_point_refuses_what_is_no_base(base: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        timm.create_model('sharesnet', base=base, device='meta')


def test_entry_point_refuses_a_tag_as_timm_does() -> None:
    for name in 'sharesnet', 'sharesnet50':
        with pytest.raises(RuntimeError, match=rf'Invalid pretrained tag \(foo\) for {name}'):
            timm.create_model(f'{name}.foo', device='meta')
    assert timm.create_model('sharesnet.untrained', device='meta').pretrained_cfg['tag'] == 'untrained'


RUNS = [[1, 3], [5, 4, 2]], [[1, 4, 5], [2, 3]]  # tensors of the same names


@pytest.mark.skipif(not hasattr(timm.models, 'get_model_args'), reason='timm 1.0.28 does not pass on what is saved')
def test_saved_runs_are_not_replaced_by_others_of_the_same_names(tmp_path: Path) -> None:
    model = create('resnet164_cifar', layers=(1, 1, 6))
    shared = share(model, (0, 0, RUNS[0]), init='mean')
    save_for_hf(shared, str(tmp_path), safe_serialization=True)
    name = f'local-dir:{tmp_path}'
    loaded = timm.create_model(name, pretrained=True, share_rate=(0, 1, [[3, 1], [2, 4, 5]])).eval()
    assert torch.equal(loaded(images(model)), shared(images(model)))
    with pytest.raises(RuntimeError, match='other blocks share than with the share_rate that was given'):
        timm.create_model(name, pretrained=True, share_rate=(0, 0, RUNS[1]))
    kwargs: Dict[str, Any] = dict(pretrained=True, layers=(1, 1, 6))
    kwargs['pretrained_cfg_overlay'] = dict(file=f'{tmp_path}/model.safetensors')
    loaded = timm.create_model('sharesnet164_cifar', share_rate=(0, 0, RUNS[0]), **kwargs).eval()
    assert torch.equal(loaded(images(model)), shared(images(model)))
    with pytest.raises(RuntimeError, match=r"conv.2': \[2, 4, 5\].* given .*'conv.2': \[2, 3\]"):
        timm.create_model('sharesnet164_cifar', share_rate=(0, 0, RUNS[1]), **kwargs)
    assert timm.create_model(name, share_rate=(0, 0, RUNS[1])).layer3.runs()['conv.1'] == [1, 4, 5]


@pytest.mark.parametrize('indices', [(0, 1), (1, 2), (0, 1, 2, 3)])
def test_a_saved_net_of_several_kernels_loads_as_a_backbone_of_some_stages(
    tmp_path: Path, indices: Tuple[int, ...]
) -> None:
    model = create('sharesnet164_cifar', layers=(5, 5, 5), share_rate=0.5)
    args = dict(layers=(5, 5, 5), share_rate=0.5)
    save_for_hf(model, str(tmp_path), model_args=args, safe_serialization=True)
    kwargs: Dict[str, Any] = dict(pretrained=True, features_only=True, out_indices=indices)
    backbone = timm.create_model(f'local-dir:{tmp_path}', **kwargs).eval()
    expected = model.forward_intermediates(images(model), indices=list(indices), intermediates_only=True)
    assert all(map(torch.equal, backbone(images(model)), expected))


# ---- What it was built with


def built_by_train_py(line: str) -> nn.Module:
    """The net that train.py builds by options, given as text to a shell."""
    args = train_parser().parse_args(shlex.split(line))
    model = build_model(args)
    timm.models.load_checkpoint(model, args.initial_checkpoint)
    return model.eval()


@pytest.mark.parametrize(
    'name, kwargs, rate, options',
    [
        (
            'resnet164_cifar',
            dict(layers=(2, 3, 3), act_layer='silu'),
            '0.5,1,[[1,2]]',
            "act_layer=silu 'share_rate=[0.5, 1, [[1, 2]]]'",
        ),
        ('resnet164_cifar', dict(layers=(2, 2, 2), global_pool='max', num_classes=7), '1', '--gp max'),
        ('wrn40_4', dict(layers=(2, 2, 2), widen_factor=1, in_chans=1), '0', '--input-size 1 32 32'),
        (
            'resnet50',
            dict(NARROW, output_stride=16, stem_type='deep', stem_width=16, act_layer='leaky_relu'),
            '0.5',
            "'channels=[16, 24, 32, 40]' output_stride=16 stem_type=deep stem_width=16 act_layer=leaky_relu",
        ),
        ('seresnet50', dict(NARROW, global_pool='catavgmax'), '1,0,1,0', '--model sharesnet --num-classes 10 --gp'),
        ('resnet34', dict(NARROW, block_args=dict(attn_layer='eca')), '1', 'attn_layer'),
    ],
)
def test_options_that_the_command_prints_build_what_it_wrote(
    tmp_path: Path, monkeypatch: Any, capsys: Any, name: str, kwargs: Dict[str, Any], rate: str, options: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = create(name, **kwargs)
    save_for_hf(model, 'a net', model_args=kwargs, safe_serialization=True)
    assert main(['local-dir:a net', '--rate', rate, '--init', 'mean', '--output', 'a shared net']) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert options in line and line.endswith("--initial-checkpoint 'a shared net/model.safetensors'")
    shared = timm.create_model('local-dir:a shared net', pretrained=True).eval()
    x = images(model)[:, : model.in_chans]
    assert torch.equal(built_by_train_py(line)(x), shared(x))
    assert error(shared(x), share(model, as_python(ast.literal_eval(rate)), init='mean')(x)) < 1e-6


def test_printed_options_have_the_rates_of_training_and_the_preprocessing() -> None:
    model = timm.create_model(
        'resnet164_cifar',
        layers=(2, 2, 2),
        drop_rate=0.2,
        drop_path_rate=0.1,
        block_drop_rate=0.3,
        pretrained_cfg_overlay=dict(mean=(0.5, 0.5, 0.5), input_size=(3, 64, 64)),
    )
    shared = share(model)
    if not hasattr(timm.models, 'get_model_args'):  # timm 1.0.28 records none
        shared._model_args.update(layers=(2, 2, 2), drop_rate=0.2, drop_path_rate=0.1, block_drop_rate=0.3)
    line = shlex.join(train_options(shared))
    for option in '--drop 0.2', '--drop-path 0.1', 'block_drop_rate=0.3', '--input-size 3 64 64', '--mean 0.5 0.5 0.5':
        assert option in line
    assert '--std' not in line and '--num-classes' not in line
    args = train_parser().parse_args(shlex.split(line))
    assert str(build_model(args)) == str(shared)
    data = timm.data.resolve_data_config(vars(args), model=build_model(args))
    assert data == timm.data.resolve_data_config({}, model=shared)


def test_checkpoint_is_shared_with_the_arguments_that_it_was_trained_with(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    model = create('resnet164_cifar', layers=(2, 2, 2), in_chans=1, act_layer='silu', num_classes=4)
    torch.save(model.state_dict(), 'plain.pth')
    argv = ['resnet164_cifar', '--checkpoint', 'plain.pth', '--num-classes', '4', '--in-chans', '1', '--init', 'mean']
    argv += ['--output', 'out', '--model-kwargs', 'layers=(2,2,2)', 'act_layer=silu']
    assert main(argv) == 0
    x = images(model)[:, :1]
    line = capsys.readouterr().out.splitlines()[-1]
    assert error(built_by_train_py(line)(x), share(model, init='mean')(x)) < 1e-6
    with pytest.raises(SystemExit):
        main([*argv, '--model-kwargs', 'silu'])
    assert capsys.readouterr().err == 'share: --model-kwargs must be KEY=VALUE\n'


@pytest.mark.parametrize(
    'kwargs, args, options',
    [
        (dict(act_layer='silu'), dict(model_kwargs=dict(act_layer='silu')), '--model-kwargs act_layer=silu'),
        (dict(global_pool='max', drop_rate=0.1), dict(gp='max', drop=0.1, input_size=[3, 32, 32]), '--gp max'),
    ],
)
def test_checkpoint_of_train_py_is_compared_with_its_args(
    tmp_path: Path, monkeypatch: Any, capsys: Any, kwargs: Dict[str, Any], args: Dict[str, Any], options: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path('run').mkdir()
    torch.save({'state_dict': create('resnet92_cifar', **kwargs).state_dict(), 'epoch': 1}, 'run/last.pth.tar')
    Path('run/args.yaml').write_text(yaml.safe_dump({'model': 'resnet92_cifar', 'num_classes': None, **args}))
    argv = ['resnet92_cifar', '--checkpoint', 'run/last.pth.tar', '--init', 'mean', '--output', 'out']
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert 'computes something else, by args.yaml beside it: ' in err and options in err
    assert main([*argv, '--model-kwargs', *(f'{k}={v}' for k, v in kwargs.items())]) == 0


def test_checkpoint_of_other_runs_than_its_config_says_is_refused(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    kwargs: Dict[str, Any] = dict(layers=(2, 2, 2), act_layer='silu')
    save_for_hf(create('resnet164_cifar', **kwargs), 'plain', model_args=kwargs, safe_serialization=True)
    argv = ['resnet164_cifar', '--checkpoint', 'plain/model.safetensors', '--init', 'mean', '--output', 'out']
    assert main([*argv, '--model-kwargs', 'layers=(2,2,2)']) == 2
    err = capsys.readouterr().err
    assert 'plain/model.safetensors has the weights of a net that computes something else' in err
    assert 'layer1.blocks.0.act1 is ReLU() in place of SiLU()' in err and 'act_layer=silu' in err
    assert not Path('out').exists()
    assert main([*argv, '--model-kwargs', 'layers=(2,2,2)', 'act_layer=silu']) == 0


@pytest.mark.parametrize('net', ['resnet50', 'resnet164_cifar', 'seresnet50'])
def test_a_shared_net_at_rate_0_is_shared_under_its_own_name(tmp_path: Path, net: str) -> None:
    name = {'seresnet50': 'sharesnet'}.get(net, f'sha{net}')
    base = dict(base=net) if name == 'sharesnet' else {}
    kwargs: Dict[str, Any] = dict(layers=(2, 3, 2) if 'cifar' in net else (2, 3, 2, 1), num_classes=10)
    model = create(name, **base, **kwargs, share_rate=0.0)
    shared = share(model, 0.5, init='first')
    assert shared.pretrained_cfg['architecture'] == name
    if not hasattr(timm.models, 'get_model_args'):  # timm 1.0.28 records none
        shared._model_args.update(kwargs)
    assert not unlike_its_name(shared)
    save_for_hf(shared, str(tmp_path), model_args=shared._model_args, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(loaded(images(model)), shared(images(model)))


@pytest.mark.parametrize('base', ['seresnet50', 'resnet50.a1_in1k', 'wrn28_10'])
def test_unshared_a_net_of_any_base_is_that_base(tmp_path: Path, base: str) -> None:
    layers = (1, 2, 1) if base == 'wrn28_10' else (2, 1, 1, 1)
    model = create('sharesnet', base=base, layers=layers)
    plain = unshare(model)
    assert plain.pretrained_cfg['architecture'] == base.partition('.')[0]
    save_for_hf(plain, str(tmp_path), model_args=dict(layers=layers), safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert not stages(loaded) or all(stage.conv is None for stage in stages(loaded))
    assert torch.equal(loaded(images(model)), plain(images(model)))


def test_a_new_classifier_is_saved_with_the_net(tmp_path: Path) -> None:
    model = create('resnet164_cifar')
    model.reset_classifier(7)
    shared = share(model, 0.5, init='mean')
    assert 'does not build it again' not in str(shared.share_report)
    save_for_hf(shared, str(tmp_path), model_args=shared._model_args, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(loaded(images(model)), shared(images(model)))
    assert '--num-classes 7' in shlex.join(train_options(shared))


def test_a_base_with_a_tag_makes_a_net_that_is_shared_again_and_loads(tmp_path: Path) -> None:
    model = create('sharesnet', base='seresnet50.ra2_in1k', layers=(2, 1, 1, 1), share_rate=0.0)
    shared = share(model)
    assert shared._model_args['base'] == 'seresnet50'
    args = {**shared._model_args, 'layers': (2, 1, 1, 1)}
    save_for_hf(shared, str(tmp_path), model_args=args, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(loaded(images(model)), shared(images(model)))
    assert loaded.pretrained_cfg['crop_pct'] == shared.pretrained_cfg['crop_pct']


def test_a_net_made_from_its_class_is_shared_and_the_report_says_that_it_has_no_name() -> None:
    model = ResNet(Bottleneck, (2, 2, 1, 1)).eval()
    shared = share(model, 0.0)
    assert error(shared(torch.ones(1, 3, 64, 64)), model(torch.ones(1, 3, 64, 64))) < 1e-6
    assert 'made from its class' in str(shared.share_report)
    wide = CifarResNetV2(PreActWideBasic, (3, 3, 3), share_rate=0.0)
    assert 'made from its class' in str(share(wide, images=[torch.randn(4, 3, 32, 32)]).share_report)


@pytest.mark.parametrize('name, left', [('resnet50', 2), ('resnet164_cifar', 2), ('resnet34', 1)])
def test_a_pruned_net_shares_the_stages_that_are_left(name: str, left: int) -> None:
    model = create(name)
    model.prune_intermediate_layers([left])
    x = images(model)
    for rate in 0.5, (1.0, 1.0, 0.5, 0.0)[: 3 if 'cifar' in name else 4]:
        shared = share(model, rate, init='first', images=[x])
        assert len(stages(shared)) == left and shared.forward_features(x).isfinite().all()
    assert 'does not build it again by name' in str(shared.share_report)
    assert error(share(model, 0.0).forward_features(x), model.forward_features(x)) < 1e-6
    model.prune_intermediate_layers([0])
    with pytest.raises(TypeError, match='no stage left'):
        share(model)


# ---- Errors


def test_what_is_no_plain_net_is_refused() -> None:
    model = create('resnet50', **NARROW)
    with pytest.raises(ValueError, match='layer1 is shared or folded already'):
        share(share(model, init='mean'))
    with pytest.raises(TypeError, match='Sequential cannot be shared'):
        share(nn.Sequential(model))
    with pytest.raises(ValueError, match="init must be one of align, mean, first, random, got 'last'"):
        share(model, init='last')
    with pytest.raises(ValueError, match='layer1.0.conv2 is no plain convolution, or is folded'):
        share(fold(model))
    with pytest.raises(ValueError, match='layer1 is shared or folded already'):
        share(fold(create('resnet164_cifar', layers=(3, 3, 3), share_rate=1.0)))
    with pytest.raises(ValueError, match='on the meta device and has no values to share: load its weights first'):
        share(timm.create_model('resnet50', **NARROW, device='meta'))
    broken = copy.deepcopy(model)
    broken.layer3[1].bn2.bias.data[3] = float('nan')
    with pytest.raises(ValueError, match='layer3.1.bn2.bias has values that are not finite'):
        share(broken)
    nn.init.constant_(broken.layer3[1].bn2.bias, 1e30)
    with pytest.raises(ValueError, match='got values that are not finite: those of the model or the images are too'):
        share(broken, images=[torch.randn(8, 3, 64, 64)])
    prune.random_unstructured(model.layer2[1].conv2, 'weight', 0.5)
    with pytest.raises(ValueError, match='layer2.1.conv2 is no plain convolution'):
        share(model)


# ---- The command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with some images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'images').mkdir()
    for i, image in enumerate(load_images()[0][:20]):
        image.save(f'images/{i}.png')
    return tmp_path


def test_command_writes_a_folder_that_loads_and_says_how_to_train_it(folder: Path, capsys: Any) -> None:
    argv = ['sharesnet164_cifar', '--rate', '0.5', '--output', 'half', '--init', 'mean']
    torch.save(timm.create_model('resnet164_cifar').state_dict(), 'plain.pth')
    argv = ['resnet164_cifar', '--checkpoint', 'plain.pth', *argv[1:]]
    assert main([*argv, '--calibration-dir', 'images', '--calibration-images', '10']) == 0
    out = capsys.readouterr().out
    assert 'half: 1,316,186 parameters' in out
    line = '--model sharesnet164_cifar --model-kwargs share_rate=0.5 --initial-checkpoint half/model.safetensors'
    assert line in out
    model = timm.create_model('local-dir:half', pretrained=True)
    assert model.norm.num_batches_tracked == 1
    assert sorted(path.name for path in folder.iterdir()) == ['half', 'images', 'plain.pth']
    assert main(argv) == 2 and 'half exists already' in capsys.readouterr().err


@pytest.mark.parametrize(
    'argv, message',
    [
        (['resnt50'], 'timm knows no model resnt50, did you mean resnet50'),
        (['vgg11', '--checkpoint', 'vgg.pth'], 'there is no file vgg.pth'),
        (['resnet164_cifar', '--checkpoint', 'plain.pth', '--rate', '2'], 'share_rate must be from 0 to 1'),
        (['resnet164_cifar', '--checkpoint', 'plain.pth', '--calibration-dir', 'no'], 'there are no images in no'),
        (['sharesnet164_cifar'], 'layer1 is shared or folded already'),
    ],
)
def test_command_refuses_in_one_line_and_leaves_nothing(
    folder: Path, capsys: Any, argv: List[str], message: str
) -> None:
    torch.save(timm.create_model('resnet164_cifar').state_dict(), 'plain.pth')
    assert main([*argv, '--output', 'out']) == 2
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1 and err.startswith('share: ')
    assert not Path('out').exists() and not list(folder.glob('.share*'))

"""Which blocks of a stage share, by rate and by runs."""

from typing import Any, List, Tuple

import numpy as np
import pytest
import timm
import torch
from models import SHARED, TWINS, create
from plain_nets import NARROW, stages

from timm_sharesnet import share
from timm_sharesnet.share_rate import split_runs


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

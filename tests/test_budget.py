"""A budget in place of a rate: blocks share where it costs least."""

import copy
import json
import math

import pytest
import timm
import torch
from models import create, error, images
from plain_nets import NARROW, noise, stages, take_statistics

from timm_sharesnet import share
from timm_sharesnet.sharing.__main__ import main

NETS = [
    ('resnet164_cifar', dict(layers=(5, 4, 3))),
    ('wrn40_4', dict(layers=(4, 4, 3), widen_factor=1)),
    ('resnet50', NARROW),
    ('resnet34', NARROW),
    ('resnext50_32x4d', dict(layers=(2, 3, 3, 1), num_classes=10)),
]
nets = pytest.mark.parametrize('name, kwargs', NETS, ids=[name for name, _ in NETS])


def size(model):
    return sum(p.numel() for p in model.parameters())


def most(model):
    return 1 - size(share(model, 1.0, 'mean')) / size(model)


def steps(model):
    return model.share_report.budget.steps


def test_kernels_that_are_copies_are_merged_first_and_cost_nothing():
    model = create('resnet164_cifar', layers=(4, 4, 4))
    for block in list(model.layer2)[2:]:
        for layer in 'bn2', 'conv2', 'bn3':
            getattr(block, layer).load_state_dict(getattr(model.layer2[1], layer).state_dict())
    shared = share(model, save=0.05, images=noise(model, 2, 8))
    first = steps(shared)[:2]
    assert [step.stage for step in first] == ['layer2', 'layer2']
    assert all(step.harm < 1e-9 for step in first)
    assert all(step.harm > 1e-3 for step in steps(shared)[2:])
    assert first[-1].blocks == (1, 2, 3)


@nets
@pytest.mark.parametrize('with_images', [False, True])
def test_budget_is_met_to_one_merge(name, kwargs, with_images):
    model = create(name, **kwargs)
    batches = noise(model, 1, 4) if with_images else None
    for part in 0.3, 0.7:
        save = part * most(model)
        shared = share(model, init='mean', images=batches, refit=False, save=save)
        budget = shared.share_report.budget
        saved = sum(step.saved for step in budget.steps[: budget.taken])
        assert size(shared) == size(model) - saved
        assert saved >= save * size(model) > saved - budget.steps[budget.taken - 1].saved


@nets
def test_more_never_saves_less_and_is_made_of_the_same_merges(name, kwargs):
    model = create(name, **kwargs)
    batches, most_ = noise(model, 1, 4), most(model)
    found = [share(model, init='mean', images=batches, refit=False, save=part * most_) for part in (0.2, 0.5, 0.8)]
    assert steps(found[0]) == steps(found[1]) == steps(found[2])
    sizes = [size(shared) for shared in found]
    assert sizes == sorted(sizes, reverse=True)


def test_it_is_deterministic():
    model = create('resnet164_cifar', layers=(4, 4, 3))
    one, two = (share(model, save=0.1, images=noise(model, 2, 4)) for _ in range(2))
    assert str(one.share_report) == str(two.share_report)
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))


def test_it_does_not_depend_on_the_layout():
    model = create('resnet164_cifar', layers=(4, 4, 3))
    batches = noise(model, 2, 4)
    expected = share(model, save=0.1, images=batches)
    found = share(copy.deepcopy(model).to(memory_format=torch.channels_last), save=0.1, images=batches)
    assert found._model_args == expected._model_args and error(found(batches[0]), expected(batches[0])) < 1e-4


@nets
def test_all_of_it_is_rate_1(name, kwargs):
    model = create(name, **kwargs)
    whole, rate = share(model, init='mean', save=math.floor(1e4 * most(model)) / 1e4), share(model, 1.0, 'mean')
    assert size(whole) == size(rate) and steps(whole)[-1].harm is None
    x = images(model)
    assert error(whole(x), rate(x)) < 1e-6


@nets
def test_where_nothing_is_shared_the_result_is_the_net_itself(name, kwargs):
    model = create(name, **kwargs)
    x = images(model)
    assert torch.equal(share(model, save=0, images=noise(model, 1, 4))(x), model(x))
    assert torch.equal(share(model, save=0.0)(x), model(x))
    assert torch.equal(share(model, 0.0, images=noise(model, 1, 4))(x), model(x))
    assert torch.equal(share(model, 0.0, images=noise(model, 1, 4), refit=False)(x), model(x))


def test_without_images_the_last_stages_share_first():
    shared = share(create('resnet50', **dict(NARROW, layers=(2, 3, 4, 3))), init='mean', save=0.1)
    assert [step.stage for step in steps(shared)] == ['layer4', 'layer3', 'layer3', 'layer2', 'layer1']
    assert shared.layer4.runs() == {'conv': [1, 2]} and not shared.layer1.runs()


def test_harm_tells_what_logits_change():
    """Of two ways to save the same, the one with less harm changes them less, with all refitted."""
    model = create('resnet164_cifar', layers=(2, 2, 7))
    for block in list(model.layer3)[1:4]:  # these differ less
        block.conv2.weight.data = model.layer3[1].conv2.weight + 0.1 * block.conv2.weight
        for layer in 'bn2', 'bn3':
            getattr(block, layer).load_state_dict(getattr(model.layer3[1], layer).state_dict())
    batches = noise(model, 4, 16)
    take_statistics(model, batches)
    chosen = share(model, save=0.05, images=batches)
    assert steps(chosen)[0].blocks in ((1, 2), (2, 3)) and steps(chosen)[0].harm < 0.5 * steps(chosen)[2].harm
    other = share(model, (0, 0, [[5, 6]]), images=batches)
    assert size(other) == size(chosen)
    expected, *found = (m(torch.cat(batches)) for m in (model, chosen, other))
    changed = [(logits - expected).square().mean() / expected.var(0).mean() for logits in found]
    assert changed[0] < 0.5 * changed[1]


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(save=0.9), r'save must be a part of all parameters, from 0 to the 0\.\d+ that rate 1 saves, got 0.9'),
        (dict(save=-0.1), 'save must be a part'),
        (dict(save=float('nan')), 'save must be a part'),
        (dict(save=True), 'save must be a number'),
        (dict(save='0.1'), 'save must be a number'),
        (dict(save=0.1, rate=0.5), 'give one of them'),
        (dict(save=0.1, images=[]), 'images is empty'),
    ],
)
def test_what_is_no_budget_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        share(create('resnet164_cifar', layers=(3, 3, 3)), **kwargs)


def test_command_writes_a_net_that_its_config_builds_and_prints_the_frontier(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = create('resnet164_cifar', layers=(3, 3, 3))
    torch.save(model.state_dict(), 'plain.pth')
    args = ['resnet164_cifar', '--checkpoint', 'plain.pth', '--model-kwargs', 'layers=(3,3,3)', '--init', 'mean']
    assert main([*args, '--save', '0.08', '--output', 'out']) == 0
    out = capsys.readouterr().out
    assert 'merged' in out and 'next' in out and 'share_rate=[0.0, 0.0, [[1, 2]]]' in out
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['model_args']['share_rate'] == [
        0.0,
        0.0,
        [[1, 2]],
    ]
    loaded = timm.create_model('local-dir:out', pretrained=True)
    assert [stage.runs() for stage in stages(loaded)] == [{}, {}, {'conv': [1, 2]}]
    assert main([*args, '--save', '0.08', '--rate', '1', '--output', 'other']) == 2
    assert 'give one of them' in capsys.readouterr().err

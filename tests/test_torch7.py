"""The importer of the author's Torch7 checkpoints: against his own outputs, and against files written for the tests.

`data/torch7` holds copies of his small nets; of the larger files in SHARESNET_SHARED/oracle the tests that need them
are skipped where that folder is missing.
"""

import gzip
import hashlib
import importlib.util
import inspect
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any, Callable, Dict

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from models import create
from torch7_writer import Module, Raw, Storage, Tensor, serialize, tree, write

from timm_sharesnet import load_torch7, torch7

DATA = Path(__file__).parent / 'data' / 'torch7'
ORACLE = Path(os.environ.get('SHARESNET_SHARED', 'not-set')) / 'oracle'
SCRIPT = Path(__file__).parents[1] / 'hub' / 'import_torch7.py'

PREACT = dict(layers=(3, 3, 3))
WIDE = dict(layers=(3, 3, 3), widen_factor=2)
ORACLES = [
    ('preact-29-c10', 'sharesnet164_cifar', PREACT),
    ('wrn-22-2-c10', 'shawrn40_4', WIDE),
    ('imagenet-34', 'sharesnet34', {}),
    ('imagenet-50', 'sharesnet50', {}),
]

# The depth of each model, with small widths where the full ones make large files.
SMALL = [
    ('sharesnet34', dict(num_classes=10)),
    ('sharesnet50', dict(base_width=4, num_classes=10)),
    ('sharesnet101', dict(base_width=4, num_classes=10)),
    ('sharesnet152', dict(base_width=4, num_classes=10)),
    ('sharesnet164_cifar', {}),
    ('shawrn40_4', dict(widen_factor=1)),
    ('shawrn28_10', dict(widen_factor=1, num_classes=100)),
]
FULL = ['sharesnet34', 'sharesnet50', 'sharesnet101', 'sharesnet152', 'sharesnet164_cifar', 'shawrn40_4', 'shawrn28_10']


def small_preact() -> nn.Module:
    return create('sharesnet164_cifar', layers=(3, 1, 1))


def small_wide() -> nn.Module:
    return create('shawrn28_10', layers=(3, 1, 1), widen_factor=1)


def small_basic() -> nn.Module:
    return create('sharesnet34', layers=(3, 2, 1, 1), num_classes=10)


def small_bottleneck() -> nn.Module:
    return create('sharesnet50', layers=(3, 3, 1, 1), base_width=4, num_classes=10)


def load_like(path: Path, model: nn.Module) -> Dict[str, torch.Tensor]:
    name, kwargs = model.made_by
    return load_torch7(path, name, **kwargs)


def assert_same(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> None:
    expected = model.state_dict()
    assert list(state_dict) == list(expected)
    different = [k for k, v in expected.items() if not torch.equal(v, state_dict[k]) or v.dtype != state_dict[k].dtype]
    assert not different


def assert_close(actual: Any, expected: np.ndarray, tol: float = 1e-10, what: str = '') -> None:
    error = np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()
    assert error <= tol, f'{what}: relative error {error:.1e}'


# ---- The author's files


@pytest.mark.parametrize('file,name,kwargs', ORACLES, ids=[o[0] for o in ORACLES])
def test_author_checkpoint_gives_author_outputs(file, name, kwargs):
    folder = DATA if (DATA / f'{file}.t7.gz').exists() else ORACLE
    if not (folder / f'{file}.t7.gz').exists():
        pytest.skip('needs SHARESNET_SHARED')
    model = timm.create_model(name, **kwargs)
    model.load_state_dict(load_torch7(folder / f'{file}.t7.gz', name, **kwargs), strict=True)
    io = np.load(folder / f'{file}.io.npz')
    with torch.no_grad():
        output = model.double().eval()(torch.from_numpy(io['input']).double())
    assert_close(output, io['output'])


def sample(x: Any) -> np.ndarray:
    """What the package's small copy of the training data keeps of a large array, of all its channels and positions."""
    x = np.ravel(x)
    return x[:: max(1, x.size // 64) | 1] if x.size > 64 else x


@pytest.mark.parametrize('folder', [DATA, ORACLE], ids=['sampled', 'complete'])
def test_training_step_equals_the_author_s(folder):
    """Loss, gradients (of a shared convolution the sum over its uses), running statistics, three steps of SGD."""
    if not (folder / 'preact-29-c10.train.npz').exists():
        pytest.skip('needs SHARESNET_SHARED')
    data = dict(np.load(folder / 'preact-29-c10.train.npz'))

    def name(author: str) -> str:
        author = re.sub(r'^(layer\d)\.(\d)', r'\1.blocks.\2', author)
        for old, new in (('shared', 'conv'), ('downsample.conv', 'downsample'), ('bn_final', 'norm')):
            author = author.replace(old, new)
        return author

    def part(prefix: str) -> Dict[str, np.ndarray]:
        return {name(k.removeprefix(prefix)): v for k, v in data.items() if k.startswith(prefix)}

    def assert_all_close(actual: Dict[str, torch.Tensor], expected: Dict[str, np.ndarray]) -> None:
        for k, v in expected.items():
            assert_close(actual[k].detach().numpy() if folder == ORACLE else sample(actual[k].detach()), v, what=k)

    model = timm.create_model('sharesnet164_cifar', **PREACT)
    init = {k: torch.from_numpy(v) for k, v in part('init.').items()}
    missing = model.load_state_dict(init, strict=False)
    assert not missing.unexpected_keys and all('num_batches' in k for k in missing.missing_keys)
    model = model.double()
    x, target = torch.from_numpy(data['input']).double(), torch.from_numpy(data['target0'])
    with torch.no_grad():
        assert_close(model.eval()(x), data['output_eval'], 1e-6, 'output_eval')  # stored in float32

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    losses = []
    model.train()
    for step in range(3):
        output = model(x)
        loss = F.cross_entropy(output, target)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            assert_close(output.detach(), data['train_output'], what='train_output')
            assert_close(loss.item(), data['train_loss'], what='train_loss')
            grads = {k: p.grad for k, p in model.named_parameters()}
            assert grads.keys() == part('grad.').keys()
            assert_all_close(grads, part('grad.'))
            assert_all_close(model.state_dict(), part('after1.'))
        optimizer.step()
    assert_close(losses, data['sgd_losses'], what='sgd_losses')
    assert_all_close(model.state_dict(), part('sgd3.'))
    with torch.no_grad():
        assert_close(model.eval()(x), data['sgd_output_eval'], what='sgd_output_eval')


# ---- What is read


@pytest.mark.parametrize('name,kwargs', SMALL, ids=[name for name, _ in SMALL])
def test_reads_all_models(name, kwargs, tmp_path):
    model = create(name, **kwargs)
    net = tree(model, gradients='net34' not in name)
    assert_same(load_torch7(write(tmp_path / 'net.t7', net), name, **kwargs), model)


@pytest.mark.slow
@pytest.mark.parametrize('name', FULL)
def test_reads_all_models_in_full_size(name, tmp_path):
    model = create(name)
    assert_same(load_torch7(write(tmp_path / 'net.t7', tree(model, cudnn=True)), name), model)


@pytest.mark.parametrize('kind', ['Float', 'Double', 'Half', 'Cuda', 'CudaDouble', 'CudaHalf'])
@pytest.mark.parametrize('make', [small_bottleneck, small_wide])
def test_reads_tensors_of_all_floating_point_types(make, kind, tmp_path):
    model = make()
    if kind.endswith('Half'):
        model = model.half().float()
    assert_same(load_like(write(tmp_path / 'net.t7', tree(model, kind, cudnn='Cuda' in kind)), model), model)


def test_reads_gzip_under_any_name(tmp_path):
    model = small_preact()
    (tmp_path / 'net').write_bytes(gzip.compress(serialize(tree(model)), 1))
    assert_same(load_like(tmp_path / 'net', model), model)


def test_reads_inverse_standard_deviations_of_old_batch_norm(tmp_path):
    model = small_preact()
    net = tree(model, 'Double')
    for bn in net.walk('BatchNormalization'):
        bn.version = 1
        bn.fields['running_std'] = Tensor(Storage((bn.fields.pop('running_var').values + 1e-5) ** -0.5, 'Double'))
    state_dict = load_like(write(tmp_path / 'net.t7', net), model)
    torch.testing.assert_close(state_dict, dict(model.state_dict()), rtol=2e-7, atol=0)


def test_reads_running_std_only_where_the_class_is_old(tmp_path):
    model = small_preact()
    net = tree(model)
    for bn in net.walk('BatchNormalization'):
        bn.fields['running_std'] = Tensor(Storage(np.ones(bn.fields['weight'].size)))
    assert_same(load_like(write(tmp_path / 'net.t7', net), model), model)


def test_reads_flat_weights_and_zero_biases_of_old_convolutions(tmp_path):
    model = small_preact()
    net = tree(model)
    for conv in net.walk('SpatialConvolution'):
        conv.name = 'nn.SpatialConvolutionMM'
        size = conv.fields['weight'].size
        conv.fields['weight'].size = (size[0], int(np.prod(size[1:])))
        conv.fields['bias'] = Tensor(Storage(np.zeros(size[0])))
        conv.fields['padding'] = conv.fields.pop('padW')
        del conv.fields['padH']
    assert_same(load_like(write(tmp_path / 'net.t7', net), model), model)


def test_reads_dropout_before_the_second_convolution(tmp_path):
    model = small_wide()
    net = tree(model)
    for branch, i in (net[1][0][2][0], 3), (net[1][1][0][0], 5), (net[1][2][0][0], 5):
        branch.fields['modules'].insert(i, Module('nn.Dropout', p=0.3, v2=True))
    assert_same(load_like(write(tmp_path / 'net.t7', net), model), model)


def test_reads_equal_copies_of_a_shared_convolution(tmp_path):
    model = small_preact()
    net = tree(model)
    conv = net[1][2][0][0][5]
    conv.fields['weight'] = Tensor(Storage(conv.fields['weight'].values))
    assert_same(load_like(write(tmp_path / 'net.t7', net), model), model)


def test_reads_an_unshared_twin(tmp_path):
    model = create('resnet164_cifar', layers=(2, 1, 1))
    assert_same(load_like(write(tmp_path / 'net.t7', tree(model)), model), model)


# ---- What is refused

Change = Callable[[Module], Any]


def field(path: str, key: str, value: Any) -> Change:
    """Set a field of the module at `path`, e.g. '1.0.3'."""

    def change(net: Module) -> None:
        at(net, path).fields[key] = value

    return change


def at(net: Module, path: str) -> Module:
    for i in path.split('.'):
        net = net[int(i)]
    return net


def insert(path: str, i: int, module: Module) -> Change:
    return lambda net: (at(net, path) if path else net).fields['modules'].insert(i, module)


def remove(path: str, i: int) -> Change:
    return lambda net: (at(net, path) if path else net).fields['modules'].pop(i)


def replace(path: str, module: Any) -> Change:
    *head, last = path.split('.')

    def change(net: Module) -> None:
        (at(net, '.'.join(head)) if head else net).fields['modules'][int(last)] = module

    return change


def poke(path: str, key: str, value: float) -> Change:
    def change(net: Module) -> None:
        at(net, path).fields[key].values.flat[1] = value

    return change


def tensor(*size: int) -> Tensor:
    return Tensor(Storage(np.ones(size)))


def rename(path: str, name: str) -> Change:
    def change(net: Module) -> None:
        at(net, path).name = name

    return change


def alias(path: str, other: str) -> Change:
    def change(net: Module) -> None:
        at(net, path).fields['weight'] = at(net, other).fields['weight']

    return change


def unshare(path: str) -> Change:
    def change(net: Module) -> None:
        conv = at(net, path)
        conv.fields['weight'] = Tensor(Storage(conv.fields['weight'].values))
        conv.fields['weight'].values.flat[-1] += 1e-3

    return change


# change, the beginning of the complaint (a layer), expected, found
REFUSED_PREACT = {
    'kernel': (field('0', 'kW', 5), 'conv1:', 'kernel (3, 3)', 'kernel (3, 5)'),
    'stride': (field('2.0.2.0.0', 'dH', 1), 'layer2.blocks.0.conv1:', 'stride (2, 2)', 'stride (1, 2)'),
    'padding': (field('1.0.2.0.3', 'padH', 0), 'layer1.blocks.0.conv2:', 'padding (1, 1)', 'padding (0, 1)'),
    'groups': (field('0', 'groups', 2), 'conv1:', 'groups 1', 'groups 2'),
    'planes': (field('0', 'nInputPlane', 1), 'conv1:', '3 -> 16', '1 -> 16'),
    'not_a_number': (field('0', 'kW', {}), 'conv1:', 'kernel (3, 3)', "kernel (3, '?')"),
    'dilated': (rename('0', 'nn.SpatialDilatedConvolution'), 'conv1:', 'convolution', 'nn.SpatialDilatedConvolution'),
    'bias': (field('0', 'bias', tensor(16)), 'conv1:', 'bias False', 'bias True'),
    'eps': (field('4', 'eps', 1e-3), 'norm:', 'eps 1e-05', 'eps 0.001'),
    'momentum': (field('4', 'momentum', 0.9), 'norm:', 'momentum 0.1', 'momentum 0.9'),
    'activation': (rename('5', 'nn.Tanh'), 'act:', 'ReLU', 'nn.Tanh'),
    'threshold': (field('1.0.1', 'threshold', 1), 'layer1.blocks.0.act1:', 'ReLU', 'nn.ReLU'),
    'pooling_kernel': (field('6', 'kH', 7), 'global_pool:', 'kernel (8, 8)', 'kernel (7, 8)'),
    'sum_pooling': (field('6', 'divide', False), 'global_pool:', 'avg pooling', 'sum pooling'),
    'max_pooling': (rename('6', 'nn.SpatialMaxPooling'), 'global_pool:', 'avg pooling', 'max pooling'),
    'no_view': (remove('', 7), 'global_pool.flatten:', 'nn.View', 'Linear'),
    'no_classifier': (remove('', 8), 'fc:', '9 modules', '8'),
    'softmax': (insert('', 9, Module('nn.LogSoftMax')), 'fc:', '9 modules', '10'),
    'scaling_dropout': (
        insert('1.0.2.0', 3, Module('nn.Dropout', p=0.3)),
        'layer1.blocks.0.conv2:',
        'convolution',
        'nn.Dropout that scales',
    ),
    'misplaced_dropout': (
        insert('1.0.2.0', 5, Module('nn.Dropout', v2=True)),
        'layer1.blocks.0.drop:',
        'nn.Dropout',
        'convolution',
    ),
    'block_missing': (remove('1', 2), 'layer1:', '3 blocks', '2'),
    'block_added': (insert('2', 1, Module('nn.Sequential')), 'layer2:', '1 blocks', '2'),
    'shortcut_for_identity': (
        replace('1.1.0.1', Module('nn.Sequential')),
        'layer1.blocks.1.downsample:',
        'nn.Identity',
        'nn.Sequential',
    ),
    'identity_for_shortcut': (
        replace('1.0.2.1', Module('nn.Identity')),
        'layer1.blocks.0.downsample:',
        'nn.Sequential',
        'nn.Identity',
    ),
    'norm_in_shortcut': (
        insert('1.0.2.1', 1, Module('nn.SpatialBatchNormalization')),
        'layer1.blocks.0.downsample:',
        '1 modules',
        '2',
    ),
    'no_sum': (replace('1.1.1', Module('nn.CMulTable')), 'layer1.blocks.1:', 'nn.CAddTable', 'nn.CMulTable'),
    'nil': (replace('5', None), 'act:', 'ReLU', 'nothing'),
    'table': (replace('5', {}), 'act:', 'ReLU', 'no module'),
    'no_modules': (field('1', 'modules', None), 'layer1:', '3 blocks', '0'),
    'classes': (field('8', 'weight', tensor(7, 256)), 'fc.weight:', '(10, 256)', '(7, 256)'),
    'no_weight': (field('4', 'weight', None), 'norm.weight:', 'a tensor of shape (256,)', 'none'),
    'statistics_missing': (field('4', 'running_var', None), 'norm.running_var:', 'a tensor', 'none'),
    'flat_norm': (field('4', 'weight', tensor(256, 1)), 'norm.weight:', '(256,)', '(256, 1)'),
    'long': (
        field('8', 'bias', Tensor(Storage(np.ones(10), 'Long'))),
        'fc.bias:',
        'floating point numbers',
        'int64',
    ),
    'outside_storage': (
        field('8', 'bias', Tensor(Storage(np.ones(12)), (10,), 3)),
        'fc.bias:',
        'floating point numbers',
        'none in its storage',
    ),
    'negative_offset': (
        field('8', 'bias', Tensor(Storage(np.ones(12)), (10,), -1)),
        'fc.bias:',
        'floating point numbers',
        'none in its storage',
    ),
    'nan': (poke('8', 'weight', np.nan), 'fc.weight:', 'finite values', 'NaN or infinity in 1 of 2560'),
    'inf': (poke('4', 'running_mean', -np.inf), 'norm.running_mean:', 'finite values', 'NaN or infinity in 1 of 256'),
    'nan_in_shared': (
        poke('1.1.0.0.5', 'weight', np.nan),
        'layer1.conv.weight (in layer1.blocks.1):',
        'finite values',
        'NaN or infinity in 1 of 2304',
    ),
    'negative_variance': (poke('4', 'running_var', -0.5), 'norm.running_var:', 'variances', 'a minimum of -0.5'),
    'unshared': (unshare('1.2.0.0.5'), 'layer1.conv.weight (in layer1.blocks.2):', 'one tensor for all', 'another'),
    'first_block_shared': (
        alias('1.1.0.0.5', '1.0.2.0.3'),
        'layer1.conv.weight (in layer1.blocks.1):',
        'a tensor of its own',
        'the one of layer1.blocks.0.conv2.weight',
    ),
    'shared_norm': (
        alias('1.2.0.0.0', '1.1.0.0.0'),
        'layer1.blocks.2.bn1.weight:',
        'a tensor of its own',
        'the one of layer1.blocks.1.bn1.weight',
    ),
}
REFUSED_IMAGENET = {
    'max_pool': (field('3', 'kH', 2), 'maxpool:', 'kernel (3, 3)', 'kernel (2, 3)'),
    'ceil_mode': (field('3', 'ceil_mode', True), 'maxpool:', 'ceil_mode False', 'ceil_mode True'),
    'no_norm_in_shortcut': (remove('5.0.0.1', 1), 'layer2.blocks.0.downsample:', '2 modules', '1'),
    'stride_of_shortcut': (field('5.0.0.1.0', 'dW', 1), 'layer2.blocks.0.downsample.0:', '(2, 2)', '(2, 1)'),
    'no_relu_after_sum': (remove('4.0', 2), 'layer1.blocks.0:', '3 modules', '2'),
    'dropout': (insert('4.0.0.0', 3, Module('nn.Dropout', v2=True)), 'layer1.conv (in', 'convolution', 'Dropout'),
}


def assert_refused(model: nn.Module, net: Module, tmp_path: Path, layer: str, expected: str, found: str) -> None:
    path = write(tmp_path / 'net.t7', net)
    with pytest.raises(ValueError) as e:
        load_like(path, model)
    name, _ = model.made_by
    before, _, after = str(e.value).partition(', found ')
    assert before.startswith(f'{path} does not hold {name}: {layer}')
    assert expected in before.partition(': expected ')[2]
    assert found in after


@pytest.fixture(scope='module')
def preact():
    return small_preact()


@pytest.mark.parametrize('fault', REFUSED_PREACT)
def test_refuses_a_net_that_differs_in(fault, preact, tmp_path):
    change, *message = REFUSED_PREACT[fault]
    net = tree(preact)
    change(net)
    assert_refused(preact, net, tmp_path, *message)


@pytest.fixture(scope='module')
def imagenet():
    return create('sharesnet34', layers=(1, 1, 1, 1), num_classes=10)


@pytest.mark.parametrize('fault', REFUSED_IMAGENET)
def test_refuses_an_imagenet_net_that_differs_in(fault, imagenet, tmp_path):
    change, *message = REFUSED_IMAGENET[fault]
    net = tree(imagenet, gradients=False)
    change(net)
    assert_refused(imagenet, net, tmp_path, *message)


@pytest.mark.parametrize(
    'path,layer',
    [
        ('4.0.0.0.3', 'layer1.conv.weight (in layer1.blocks.1)'),  # the first block shares
        ('4.2.0.0.3', 'layer1.conv.weight (in layer1.blocks.2)'),
        ('5.1.0.0.3', 'layer2.conv.weight (in layer2.blocks.1)'),
    ],
)
def test_refuses_unshared_uses_in_basic_blocks(path, layer, tmp_path):
    model = small_basic()
    net = tree(model, gradients=False)
    unshare(path)(net)
    assert_refused(model, net, tmp_path, layer, 'one tensor for all', 'another')


def test_refuses_the_first_3x3_of_basic_blocks_shared(tmp_path):
    model = small_basic()
    net = tree(model, gradients=False)
    alias('4.1.0.0.0', '4.0.0.0.0')(net)
    layer = 'layer1.blocks.1.conv1.weight'
    assert_refused(model, net, tmp_path, layer, 'a tensor of its own', 'the one of layer1.blocks.0.conv1.weight')


def test_refuses_unshared_uses_in_bottlenecks(tmp_path):
    model = small_bottleneck()
    net = tree(model, gradients=False)
    unshare('5.2.0.0.3')(net)
    layer = 'layer2.conv.weight (in layer2.blocks.2)'
    assert_refused(model, net, tmp_path, layer, 'one tensor for all', 'another')


def test_refuses_a_shared_net_for_its_unshared_twin():
    with pytest.raises(
        ValueError, match='layer1.blocks.2.conv2.weight: expected a tensor of its own, found the one of'
    ):
        load_torch7(DATA / 'preact-29-c10.t7.gz', 'resnet164_cifar', **PREACT)


def test_refuses_an_unshared_net_for_its_shared_twin(tmp_path):
    path = write(tmp_path / 'net.t7', tree(create('wrn40_4', **WIDE)))
    with pytest.raises(ValueError, match=r'layer1.conv.weight \(in layer1.blocks.2\): expected one tensor for all'):
        load_torch7(path, 'shawrn40_4', **WIDE)


@pytest.mark.parametrize(
    'name,kwargs,complaint',
    [
        ('sharesnet34', {}, 'conv1: expected convolution 3 -> 64'),
        ('shawrn40_4', PREACT, r'layer1.blocks.0.conv1: expected .*kernel \(3, 3\).*found .*kernel \(1, 1\)'),
        ('sharesnet164_cifar', {}, 'layer1: expected 18 blocks, found 3'),
        ('sharesnet164_cifar', dict(layers=(2, 3, 3)), 'layer1: expected 2 blocks, found 3'),
        ('sharesnet164_cifar', dict(layers=(3, 3, 4)), 'layer3: expected 4 blocks, found 3'),
        ('sharesnet164_cifar', dict(widen_factor=2, **PREACT), 'layer1.blocks.0.conv1: expected convolution 16 -> 32'),
        (
            'sharesnet164_cifar',
            dict(num_classes=100, **PREACT),
            r'fc.weight: expected shape \(100, 256\), found \(10, ',
        ),
        ('sharesnet164_cifar', dict(num_classes=0, **PREACT), 'fc: expected Identity, found Linear'),
        ('sharesnet164_cifar', dict(in_chans=1, **PREACT), 'conv1: expected convolution 1 -> 16'),
        ('sharesnet164_cifar', dict(act_layer='silu', **PREACT), 'layer1.blocks.0.act1: expected SiLU, found ReLU'),
        ('sharesnet164_cifar', dict(global_pool='max', **PREACT), 'global_pool: expected max pooling'),
    ],
)
def test_refuses_another_net(name, kwargs, complaint):
    with pytest.raises(ValueError, match=f'does not hold {name}: {complaint}'):
        load_torch7(DATA / 'preact-29-c10.t7.gz', name, **kwargs)


@pytest.mark.parametrize(
    'name,complaint',
    [
        ('sharesnet50', r'layer1.blocks.0.conv1: expected .*kernel \(1, 1\).*found .*kernel \(3, 3\)'),
        ('sharesnet164_cifar', 'conv1: expected convolution 3 -> 16'),
    ],
)
def test_refuses_an_imagenet_net_for(name, complaint, tmp_path):
    path = write(tmp_path / 'net.t7', tree(small_basic(), gradients=False))
    with pytest.raises(ValueError, match=f'does not hold {name}: {complaint}'):
        load_torch7(path, name)


def test_refuses_another_depth_of_the_same_kind(tmp_path):
    kwargs = dict(base_width=4, num_classes=10)
    path = write(tmp_path / 'net.t7', tree(create('sharesnet50', **kwargs), gradients=False))
    with pytest.raises(ValueError, match='does not hold sharesnet101: layer3: expected 23 blocks, found 6'):
        load_torch7(path, 'sharesnet101', **kwargs)


def test_refuses_layers_that_the_author_s_nets_lack(tmp_path):
    model = create('sharesnet34', layers=(1, 1, 1, 1), num_classes=10)
    path = write(tmp_path / 'net.t7', tree(model, gradients=False))
    with pytest.raises(ValueError, match='layer1.blocks.0.se.fc1.weight: expected one of the layers of the author'):
        load_torch7(path, 'sharesnet34', layers=(1, 1, 1, 1), num_classes=10, block_args=dict(attn_layer='se'))


@pytest.mark.parametrize(
    'name,kwargs,complaint',
    [
        ('resnet50', {}, 'resnet50 is no model of timm_sharesnet'),
        ('no_such_model', {}, 'timm knows no model no_such_model'),
        ('shawrn40_4', dict(layers='abc'), 'shawrn40_4 cannot be built with'),
        ('shawrn40_4', dict(depth=3), "shawrn40_4 cannot be built with .*'depth'"),
    ],
)
def test_refuses_what_is_no_model(name, kwargs, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_torch7(DATA / 'preact-29-c10.t7.gz', name, **kwargs)


# ---- Damaged files


def damaged(data: bytes) -> Dict[str, bytes]:
    storage = data.index(b'torch.FloatStorage') + len(b'torch.FloatStorage')  # its size follows
    tensor = data.index(b'torch.FloatTensor') + len(b'torch.FloatTensor')  # its number of dimensions follows
    huge = struct.pack('<q', 2**62)
    z = gzip.compress(data, 1)
    return {
        'empty': b'',
        'short': data[:3],
        'first_value_only': data[:4],
        'in_a_name': data[:20],
        'in_a_number': data[: tensor + 2],
        'in_the_weights': data[: storage + 1000],
        'last_byte_missing': data[:-1],
        'followed_by_more': data + b'more',
        'huge_storage': data[:storage] + huge + data[storage + 8 :],
        'negative_storage': data[:storage] + struct.pack('<q', -1) + data[storage + 8 :],
        'huge_dimension': data[:tensor] + struct.pack('<i', 2**31 - 1) + data[tensor + 4 :],
        'negative_dimension': data[:tensor] + struct.pack('<i', -1) + data[tensor + 4 :],
        'unknown_type': data[:8] + struct.pack('<i', 1 << 30) + data[12:],
        'deep': struct.pack('<iii', 4, 1, 0) + b''.join(struct.pack('<iii', 3, i, 1) for i in range(2, 5000)),
        'huge_table': struct.pack('<iii', 4, 1, 0) + struct.pack('<iii', 3, 2, 2**31 - 1),
        'huge_name': struct.pack('<iii', 4, 1, 10**9) + b'V 1',
        'ascii': b'4\n1\n3\nV 1\n13\nnn.Sequential\n',
        'pickle': pickle.dumps({'state_dict': 1}),
        'zip': b'PK\3\4' + bytes(100),
        'text': b'hello world\n',
        'gzip_of_text': gzip.compress(b'hello world\n'),
        'gzip_of_nothing': gzip.compress(b''),
        'gzip_truncated': z[:-100],
        'gzip_corrupt': z[: len(z) // 2] + bytes(50) + z[len(z) // 2 + 50 :],
        'gzip_wrong_checksum': z[:-8] + bytes(4) + z[-4:],
        'gzip_header_only': z[:5],
    }


@pytest.fixture(scope='module')
def net_bytes(preact):
    return serialize(tree(preact))


@pytest.mark.parametrize('fault', damaged(b'V 1torch.FloatTensortorch.FloatStorage'))
def test_refuses_a_damaged_file(fault, net_bytes, preact, tmp_path):
    path = tmp_path / 'net.t7'
    path.write_bytes(damaged(net_bytes)[fault])
    with pytest.raises(ValueError) as e:
        load_like(path, preact)
    kind = 'a damaged gzip file' if fault.startswith('gzip_') and '_of_' not in fault else '(truncated or )?no Torch7'
    assert re.match(re.escape(str(path)) + f' is {kind}', str(e.value))


def test_says_how_to_save_an_ascii_file_in_binary(preact, tmp_path):
    (tmp_path / 'net.t7').write_bytes(b'4\n1\n3\nV 1\n13\nnn.Sequential\n')
    with pytest.raises(ValueError, match='may be ascii, save it with torch.save'):
        load_like(tmp_path / 'net.t7', preact)


def test_refuses_a_file_that_holds_no_module(preact, tmp_path):
    with pytest.raises(ValueError, match='fc: expected nn.Sequential, found no module'):
        load_like(write(tmp_path / 'net.t7', tensor(3)), preact)


@pytest.mark.parametrize('error,path', [(FileNotFoundError, 'missing.t7'), (IsADirectoryError, '.')])
def test_a_file_that_cannot_be_opened_is_an_os_error(error, path, tmp_path):
    with pytest.raises(error):
        load_torch7(tmp_path / path, 'sharesnet34')


def test_no_damage_has_other_consequences_than_a_refusal(tmp_path):
    """Bits flipped at random outside the values: the file is refused, or the damage was to what nobody reads."""
    model = create('shawrn40_4', layers=(2, 1, 1), widen_factor=1)
    data = serialize(tree(model, gradients=False))
    storages = [(m.end() + 8, struct.unpack_from('<q', data, m.end())[0]) for m in re.finditer(b'FloatStorage', data)]
    values = np.zeros(len(data), bool)
    for start, n in storages:
        values[start : start + 4 * n] = True
    rng = np.random.default_rng(0)
    refused = 0
    for i in rng.choice(np.flatnonzero(~values), 60, replace=False):
        damaged = bytearray(data)
        damaged[i] ^= 1 << rng.integers(8)
        (tmp_path / 'net.t7').write_bytes(damaged)
        try:
            state_dict = load_like(tmp_path / 'net.t7', model)
        except ValueError:
            refused += 1
        else:
            assert state_dict.keys() == model.state_dict().keys()
    assert refused > 20


# ---- Hostile files


def nested(head: bytes, n: int, tail: bytes = b'') -> bytes:
    """n objects of which each holds the next. `head` is what stands in each before it, from its type on."""
    kind, rest = head[:4], head[4:]
    return b''.join(kind + struct.pack('<i', 10**6 + i) + rest for i in range(n)) + bytes(4) + n * tail


def in_a_row(head: bytes, n: int, tail: bytes = b'', as_keys: bool = False) -> bytes:
    """A table of n objects of which each refers to the one before it."""
    kind, rest = head[:4], head[4:]
    out = [struct.pack('<iii', 3, 10**6 - 1, n)]
    for i in range(n):
        before = kind + struct.pack('<i', 10**6 + i - 1) if i else bytes(4)
        value = kind + struct.pack('<i', 10**6 + i) + rest + before + tail
        out.append(value + bytes(4) if as_keys else struct.pack('<id', 1, i + 1) + value)
    return b''.join(out)


def text(s: str) -> bytes:
    return struct.pack('<i', len(s)) + s.encode()


ONE = struct.pack('<id', 1, 1)
VERSION = struct.pack('<i', 4) + text('V 1')
HOLDERS = {  # what begins an object that holds another, and what ends it
    'function': (struct.pack('<ii', 6, 0), b''),
    'new_function': (struct.pack('<ii', 8, 0), b''),
    'tensor': (VERSION + text('torch.FloatTensor') + struct.pack('<iqqq', 1, 1, 1, 1), b''),
    'object': (VERSION + text('nn.Identity'), b''),
    'table': (struct.pack('<ii', 3, 1) + ONE, b''),
    'key_of_a_table': (struct.pack('<ii', 3, 1), bytes(4)),
    'vec': (VERSION + text('tds.Vec') + struct.pack('<ii', 1, 0), b''),
    'key_of_a_hash': (VERSION + text('tds.Hash') + struct.pack('<ii', 1, 0), bytes(4)),
}


def raw(data: bytes) -> Raw:
    return Raw(('b', data))


def refusal(path: Path, model: nn.Module) -> str:
    """Why a file is refused. The message begins with its path, and is not long."""
    with pytest.raises((ValueError, OSError)) as e:
        load_like(path, model)
    assert str(e.value).startswith(f'{path} ') and len(str(e.value)) < len(str(path)) + 500
    return str(e.value).removeprefix(str(path))


@pytest.mark.parametrize('holder', HOLDERS)
def test_refuses_200000_objects_within_each_other(holder, preact, tmp_path):
    head, tail = HOLDERS[holder]
    net = tree(preact, gradients=False)
    net.fields['output'] = raw(nested(head, 200_000, tail))
    assert 'nested more than 64 deep' in refusal(write(tmp_path / 'net.t7', net), preact)
    net.fields['output'] = raw(struct.pack('<iii', 3, 10**6 - 1, 1) + nested(head, 200_000, tail) + bytes(4))
    assert 'nested more than 64 deep' in refusal(write(tmp_path / 'net.t7', net), preact)


@pytest.mark.parametrize('holder', HOLDERS)
def test_refuses_200000_objects_as_keys(holder, preact, tmp_path):
    """Each refers to the one before it, so that nothing is deep to read, but all is to hash."""
    head, tail = HOLDERS[holder]
    net = tree(preact, gradients=False)
    net.fields['output'] = raw(in_a_row(head, 200_000, tail, as_keys=True))
    message = refusal(write(tmp_path / 'net.t7', net), preact)
    assert 'the key of a table is a number or text' in message or 'an array of float32 or nothing' in message


def test_refuses_more_objects_than_the_model_can_need(preact, tmp_path):
    net = tree(preact, gradients=False)
    net.fields['output'] = raw(in_a_row(HOLDERS['object'][0], 200_000))
    assert 'objects, which such a model cannot need' in refusal(write(tmp_path / 'net.t7', net), preact)


@pytest.mark.parametrize(
    'holder', ['function', *(pytest.param(h, marks=pytest.mark.slow) for h in ('object', 'table', 'vec'))]
)
def test_frees_200000_objects_that_refer_to_each_other(holder, preact, tmp_path, monkeypatch):
    """If the model is so large that it might need them. They are not deep in the file, but in memory."""
    monkeypatch.setattr(torch7, '_OBJECTS_PER_MODULE', 10**6)
    net = tree(preact, gradients=False)
    net.fields['output'] = raw(in_a_row(HOLDERS[holder][0], 200_000))
    assert_same(load_like(write(tmp_path / 'net.t7', net), preact), preact)


class TableOfOne(dict):
    def __init__(self, key: Any) -> None:
        super().__init__(any=1)
        self.key = key

    def items(self) -> Any:
        return [(self.key, 1)]


@pytest.mark.parametrize(
    'key',
    [
        *(None, True, {}, [], tensor(3), Storage(np.ones(3)), Module('nn.Identity'), float('nan')),
        *(raw(head + bytes(4)) for head in (struct.pack('<iii', 6, 999, 0), struct.pack('<iii', 8, 999, 0))),
    ],
    ids='nil boolean table list tensor storage object nan function new_function'.split(),
)
def test_refuses_keys_that_are_no_numbers_or_text(key, preact, tmp_path):
    net = tree(preact, gradients=False)
    net.fields['output'] = TableOfOne(key)
    assert 'the key of a table is a number or text, found' in refusal(write(tmp_path / 'net.t7', net), preact)


def test_refuses_a_key_twice(preact, tmp_path):
    net = tree(preact, gradients=False)
    net.fields['output'] = raw(struct.pack('<iii', 3, 998, 2) + 4 * ONE)
    assert 'a table has a key twice' in refusal(write(tmp_path / 'net.t7', net), preact)


def test_refuses_a_tensor_in_place_of_a_storage(preact, tmp_path):
    net = tree(preact, gradients=False)
    head = VERSION[:4] + struct.pack('<i', 998) + VERSION[4:] + text('torch.FloatTensor')
    for storage in (ONE, serialize('text'), struct.pack('<iii', 3, 999, 0), struct.pack('<ii', 4, 1)):
        net.fields['output'] = raw(head + struct.pack('<iqqq', 1, 3, 1, 1) + storage)
        assert 'an array of float32 or nothing' in refusal(write(tmp_path / 'net.t7', net), preact)


def test_reads_a_net_that_contains_itself_where_nobody_looks(preact, tmp_path):
    net = tree(preact)
    net.fields['parent'], net.fields['fields'] = net, net.fields
    assert_same(load_like(write(tmp_path / 'net.t7', net), preact), preact)


@pytest.mark.parametrize('path,layer', [('1', 'layer1'), ('1.1', 'layer1.blocks.1'), ('', 'conv1')])
def test_refuses_a_container_that_contains_itself(path, layer, preact, tmp_path):
    net = tree(preact)
    container = at(net, path) if path else net
    container.fields['modules'][0] = container
    assert f'does not hold sharesnet164_cifar: {layer}' in refusal(write(tmp_path / 'net.t7', net), preact)


@pytest.mark.parametrize('stride', [2**62, 2**63 - 1, -(2**63), -1])
def test_refuses_strides_beyond_the_storage(stride, preact, tmp_path):
    net = tree(preact)
    net[8].fields['weight'].stride = [stride, 1]
    message = refusal(write(tmp_path / 'net.t7', net), preact)
    assert 'fc.weight: expected floating point numbers, found none in its storage' in message


@pytest.mark.parametrize('stride', [2**62, -1])
def test_reads_a_dimension_of_one_with_any_stride(stride, tmp_path):
    model = create('sharesnet164_cifar', layers=(1, 1, 1), num_classes=1)
    net = tree(model)
    net[8].fields['weight'].stride = [stride, 1]
    assert_same(load_like(write(tmp_path / 'net.t7', net), model), model)


@pytest.mark.parametrize('ndim', [9, 70, 2**16])
def test_refuses_tensors_of_many_dimensions(ndim, preact, tmp_path):
    net = tree(preact, gradients=False)
    net[0].fields['bias'] = Tensor(Storage(np.ones(16)), ndim * (1,), stride=ndim * [1])
    assert f'a tensor has {ndim} dimensions' in refusal(write(tmp_path / 'net.t7', net), preact)


@pytest.mark.parametrize('size', [(16, 1), (2**40,), (2**62, 2**62), (17,), (-16,), (0,)])
def test_refuses_biases_of_other_shapes_even_if_zero(size, preact, tmp_path):
    net = tree(preact)
    net[0].fields['bias'] = Tensor(Storage(np.zeros(16)), size, stride=len(size) * [0])
    assert 'conv1: expected' in refusal(write(tmp_path / 'net.t7', net), preact)


def test_refuses_a_bias_without_values(preact, tmp_path):
    net = tree(preact)
    net[0].fields['bias'] = Tensor(Storage(np.zeros(8)), (16,))
    assert 'found convolution' in refusal(write(tmp_path / 'net.t7', net), preact)
    net[0].fields['bias'] = 0
    assert 'found convolution' in refusal(write(tmp_path / 'net.t7', net), preact)


@pytest.mark.parametrize('name', ['', 'A' * 10**6, 'nn.\n', 'nn.\0ReLU', 'nn.Größe'])
def test_refuses_strange_names_of_classes_in_a_short_message(name, preact, tmp_path):
    net = tree(preact, gradients=False)
    net[5].name = name
    assert 'is no name of a class' in refusal(write(tmp_path / 'net.t7', net), preact)


@pytest.mark.parametrize('value', [1e308, -1e308, float('inf'), float('nan'), 2.0**62])
def test_refuses_strange_numbers_in_a_short_message(value, preact, tmp_path):
    net = tree(preact, gradients=False)
    net[0].fields.update({key: value for key in ('kW', 'kH', 'dW', 'dH', 'padH', 'padW', 'nInputPlane', 'groups')})
    assert 'found convolution ? -> 16' in refusal(write(tmp_path / 'net.t7', net), preact)


@pytest.mark.parametrize('version', ['V nan', 'V inf', 'V 1e999', 'V x', 'V '])
def test_refuses_strange_versions(version, preact, tmp_path):
    path = tmp_path / 'net.t7'
    path.write_bytes(serialize(tree(preact, gradients=False)).replace(text('V 1'), text(version), 1))
    assert 'is truncated or no Torch7 model' in refusal(path, preact)


def bomb(size: int) -> bytes:
    """A gzip file that unpacks to `size` bytes, a thousand times as many as it has."""
    packer = zlib.compressobj(9, wbits=31)
    start = packer.compress(struct.pack('<i', 4)) + packer.flush(zlib.Z_FULL_FLUSH)
    packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + block * (size >> 20)


def test_unpacks_no_more_than_the_model_can_need(preact, tmp_path):
    path = tmp_path / 'net.t7'
    path.write_bytes(bomb(8 << 30))
    assert path.stat().st_size < 10 << 20
    tracemalloc.start()
    start = time.perf_counter()
    message = refusal(path, preact)
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert re.search(r'it would hold at most [\d,]+ bytes, found more', message)
    assert peak < 200 << 20 and seconds < 20


@pytest.mark.parametrize('name,twin', [('sharesnet164_cifar', 'resnet164_cifar'), ('shawrn40_4', 'wrn40_4')])
def test_a_model_may_need_a_shared_convolution_for_each_block(name, twin):
    shared, unshared = timm.create_model(name, layers=(3, 3, 3)), timm.create_model(twin, layers=(3, 3, 3))
    assert torch7._numel(torch7._tree(shared)) == sum(v.numel() for v in unshared.state_dict().values())


def test_reads_no_file_larger_than_the_model_can_need(preact, tmp_path):
    path = tmp_path / 'net.t7'
    path.write_bytes(struct.pack('<i', 4))
    os.truncate(path, 20 << 30)
    start = time.perf_counter()
    assert re.search(r'it would hold at most [\d,]+ bytes, found more', refusal(path, preact))
    assert time.perf_counter() - start < 5


def test_refuses_more_after_a_gzip(preact, tmp_path):
    packed = gzip.compress(serialize(tree(preact)), 1)
    path = tmp_path / 'net.t7'
    for more in (b'\0', packed, gzip.compress(b'') * 100_000):
        path.write_bytes(packed + more)
        assert refusal(path, preact) == ' is a damaged gzip file: more follows its end'


@pytest.mark.parametrize('extra', [-1, 0, 1])
def test_reads_a_gzip_of_whole_blocks(extra, preact, tmp_path):
    net = tree(preact)
    net.fields['output'] = ''
    net.fields['output'] = ((-len(serialize(net))) % torch7._BLOCK + extra) * 'x'
    for level in (0, 9):
        (tmp_path / 'net.t7').write_bytes(gzip.compress(serialize(net), level))
        assert_same(load_like(tmp_path / 'net.t7', preact), preact)


def test_refuses_what_is_no_regular_file(preact, tmp_path):
    os.mkfifo(tmp_path / 'net.t7')  # to open it would wait for a writer
    for path in (tmp_path / 'net.t7', Path('/dev/zero'), Path('/dev/null')):
        assert refusal(path, preact) == ' is no regular file'


@pytest.mark.parametrize('path', ['net\0.t7', '\ud800.t7'])
def test_refuses_what_is_no_path(path):
    with pytest.raises(ValueError) as e:
        load_torch7(path, 'sharesnet34')
    assert str(e.value).startswith(f'{path!r} is no path of a file: ')


@pytest.mark.skipif(not Path('/proc/self/mem').exists(), reason='needs a file that opens and cannot be read')
def test_an_error_while_reading_names_the_file():
    with pytest.raises(OSError, match=r"Input/output error: '/proc/self/mem'"):
        load_torch7('/proc/self/mem', 'sharesnet34')


@pytest.mark.parametrize('function', ['_content', '_File', '_convert'])
def test_lack_of_memory_is_an_os_error_that_names_the_file(function, monkeypatch):
    def no_memory(*args: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(torch7, function, no_memory)
    with pytest.raises(OSError, match=r"Cannot allocate memory: '.*preact-29-c10.t7.gz'"):
        load_torch7(DATA / 'preact-29-c10.t7.gz', 'sharesnet164_cifar', **PREACT)


def test_a_full_stack_is_not_blamed_on_the_file():
    def at_depth(n: int) -> Any:
        if n > 0:
            return at_depth(n - 1)
        return load_torch7(DATA / 'preact-29-c10.t7.gz', 'sharesnet164_cifar', **PREACT)

    limit, outcomes = sys.getrecursionlimit(), set()
    depth = len(inspect.stack(0))
    for left in range(15, 100, 8):
        try:
            at_depth(limit - depth - left)
            outcomes.add('read')
        except ValueError as e:
            assert re.search('cannot be read this deep in the stack|cannot be built with', str(e))
            outcomes.add('refused')
    assert outcomes == {'read', 'refused'} and sys.getrecursionlimit() == limit


def test_says_what_to_install_without_torchfile(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchfile', None)
    with pytest.raises(ImportError, match=r"pip install 'timm-sharesnet\[torch7\]'"):
        load_torch7(DATA / 'preact-29-c10.t7.gz', 'sharesnet164_cifar', **PREACT)


def test_leaves_torchfile_as_it_is():
    import torchfile

    before = dict(torchfile.type_handlers)
    load_torch7(DATA / 'preact-29-c10.t7.gz', 'sharesnet164_cifar', **PREACT)
    assert torchfile.type_handlers == before


# ---- The command line


spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def main(*args: Any) -> Any:
    """The script's error message, None after success."""
    return script.main([str(arg) for arg in args])


def test_command_writes_what_timm_loads(tmp_path, capsys):
    checkpoint, out = DATA / 'wrn-22-2-c10.t7.gz', tmp_path / 'new' / 'wrn'
    error = main(
        checkpoint, '--model', 'shawrn40_4', '--output', out, '--model-kwargs', 'layers=3,3,3', 'widen_factor=2'
    )
    assert error is None
    assert sorted(p.name for p in out.iterdir()) == ['config.json', 'model.safetensors']
    assert [p.name for p in out.parent.iterdir()] == ['wrn']
    captured = capsys.readouterr()
    assert f"timm.create_model('local-dir:{out}', pretrained=True)" in captured.out and '886,106' in captured.out
    assert captured.out.count('\n') == 1 and not captured.err
    io = np.load(DATA / 'wrn-22-2-c10.io.npz')
    with torch.no_grad():
        model = timm.create_model(f'local-dir:{out}', pretrained=True)
        output = model.double().eval()(torch.from_numpy(io['input']).double())
    assert_close(output, io['output'])
    assert model.pretrained_cfg['tag'] == 'torch7'
    source = dict(file=checkpoint.name, sha256=hashlib.sha256(checkpoint.read_bytes()).hexdigest())
    config = json.loads((out / 'config.json').read_text())
    assert config['torch7'] == source
    assert config['model_args']['layers'] == [3, 3, 3] and 'num_classes' not in config['model_args']


def test_command_suggests_for_a_mistyped_model(tmp_path):
    """The nearest models of the package: the others of timm's cannot be in such a file."""
    for name, suggested in {
        'shawrn40_5': 'did you mean shawrn40_4',
        'resnet50': 'did you mean sharesnet50',
        'sharesnet34.torch7': 'did you mean sharesnet34.torch7_in1k',
    }.items():
        error = main(DATA / 'wrn-22-2-c10.t7.gz', '--model', name, '--output', tmp_path / 'out')
        assert suggested in error and ' or resnet' not in error


@pytest.mark.parametrize('layers', ['2,1,1', '(2,1,1)', '[2, 1, 1]'])
def test_command_records_the_architecture(layers, tmp_path):
    model = create('sharesnet164_cifar', layers=(2, 1, 1), num_classes=7, in_chans=1)
    kwargs = [f'layers={layers}', 'num_classes=7', 'in_chans=1', 'act_layer=relu']
    net = write(tmp_path / 'net.t7', tree(model))
    assert main(net, '--model', 'sharesnet164_cifar', '--output', tmp_path, '--model-kwargs', *kwargs) is None
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert_same(loaded.state_dict(), model)
    assert loaded.num_classes == 7 and loaded.pretrained_cfg['num_classes'] == 7


def test_command_replaces_an_older_import(tmp_path):
    for name in ('model.safetensors', 'config.json', 'README.md'):
        (tmp_path / name).write_text('old')
    args = ('--model', 'sharesnet164_cifar', '--output', tmp_path, '--model-kwargs', 'layers=3,3,3')
    assert main(DATA / 'preact-29-c10.t7.gz', *args) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    assert (tmp_path / 'README.md').read_text() == 'old'
    timm.create_model(f'local-dir:{tmp_path}', pretrained=True)


@pytest.mark.parametrize(
    'args,complaint',
    [
        (['x.t7', '--model', 'sharesnet34'], 'No such file'),
        (['.', '--model', 'sharesnet34'], 'Is a directory'),
        ([DATA / 'preact-29-c10.t7.gz', '--model', 'sharesnet50'], 'conv1: expected'),
        ([DATA / 'preact-29-c10.t7.gz', '--model', 'nonsense'], 'nonsense is no model of timm_sharesnet'),
        ([__file__, '--model', 'sharesnet34'], 'is no Torch7 model'),
        ([DATA / 'preact-29-c10.t7.gz', '--model', 'shawrn40_4', '--model-kwargs', 'layers'], 'expected key=value'),
        ([DATA / 'preact-29-c10.t7.gz', '--model', 'shawrn40_4', '--model-kwargs', 'layers=(3'], 'cannot be built'),
        ([DATA / 'preact-29-c10.t7.gz', '--model', 'shawrn40_4', '--model-kwargs', 'a=1'], 'cannot be built'),
    ],
)
def test_command_refuses_in_one_line_and_writes_nothing(args, complaint, tmp_path, capsys):
    error = main(*args, '--output', tmp_path / 'a' / 'b')
    assert complaint in error and '\n' not in error
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ('', '')


def test_command_keeps_an_older_import_if_it_fails(monkeypatch, tmp_path):
    def no_space(model: nn.Module, folder: str, **kwargs: Any) -> None:
        Path(folder).mkdir()
        (Path(folder) / 'model.safetensors').write_text('half of it')
        raise OSError('No space left on device')

    (tmp_path / 'model.safetensors').write_text('old')
    monkeypatch.setattr(script, 'save_for_hf', no_space)
    args = ('--model', 'sharesnet164_cifar', '--model-kwargs', 'layers=3,3,3', '--output')
    assert 'No space left' in main(DATA / 'preact-29-c10.t7.gz', *args, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['model.safetensors']
    assert (tmp_path / 'model.safetensors').read_text() == 'old'
    assert 'No space left' in main(DATA / 'preact-29-c10.t7.gz', *args, tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


def test_command_does_not_write_over_a_file(tmp_path):
    (tmp_path / 'out').write_text('mine')
    args = ('--model', 'sharesnet164_cifar', '--model-kwargs', 'layers=3,3,3', '--output')
    assert 'is not a directory' in main(DATA / 'preact-29-c10.t7.gz', *args, tmp_path / 'out')
    assert (tmp_path / 'out').read_text() == 'mine'
    assert main(DATA / 'preact-29-c10.t7.gz', *args, tmp_path / 'out' / 'below')


def test_command_exits_with_1_and_one_line_on_stderr(tmp_path):
    args = [SCRIPT, DATA / 'preact-29-c10.t7.gz', '--model', 'sharesnet164_cifar', '--output', tmp_path / 'out']
    run = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ''
    assert re.fullmatch(r'import_torch7.py: error: .* layer1: expected 18 blocks, found 3\n', run.stderr)
    assert not (tmp_path / 'out').exists()

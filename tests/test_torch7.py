"""The importer of the author's Torch7 checkpoints: against his own outputs, and against files written for the tests.

`data/torch7` holds copies of his small nets; of the larger files in SHARESNET_SHARED/oracle the tests that need them
are skipped where that folder is missing.
"""

import copy
import gzip
import hashlib
import importlib.util
import inspect
import json
import os
import pickle
import re
import struct
import sys
import time
import tracemalloc
import zlib
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Tuple

import forks
import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from models import SHARED, create
from torch7_writer import HOLDERS, Module, Raw, Storage, Tensor, pack, serialize, tree, write

from timm_sharesnet import load_torch7, torch7
from timm_sharesnet.cli import CommandError

DATA = Path(__file__).parent / 'data' / 'torch7'
ORACLE = Path(os.environ.get('SHARESNET_SHARED', 'not-set')) / 'oracle'
AUTHOR = DATA / 'preact-29-c10.t7.gz'
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
# A small net of each kind
NETS = {
    'preact': ('sharesnet164_cifar', dict(layers=(3, 1, 1))),
    'wide': ('shawrn28_10', dict(layers=(3, 1, 1), widen_factor=1)),
    'basic': ('sharesnet34', dict(layers=(3, 2, 1, 1), num_classes=10)),
    'bottleneck': ('sharesnet50', dict(layers=(3, 3, 1, 1), base_width=4, num_classes=10)),
    'shallow': ('sharesnet34', dict(layers=(1, 1, 1, 1), num_classes=10)),
}


@lru_cache(maxsize=None)
def net(kind: str) -> nn.Module:
    name, kwargs = NETS[kind]
    return create(name, **kwargs)


@pytest.fixture
def preact():
    return net('preact')


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'net.t7'


def load_like(path: Path, model: nn.Module) -> Dict[str, torch.Tensor]:
    name, kwargs = model.made_by
    return load_torch7(path, name, **kwargs)


def assert_reads(path: Path, model: nn.Module) -> None:
    assert_same(load_like(path, model), model)


def refusal(path: Path, model: nn.Module) -> str:
    """Why a file is refused. The message begins with its path, and is not long."""
    with pytest.raises((ValueError, OSError)) as e:
        load_like(path, model)
    assert str(e.value).startswith(f'{path} ') and len(str(e.value)) < len(str(path)) + 500
    return str(e.value).removeprefix(str(path))


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
def test_reads_all_models(name, kwargs, path):
    model = create(name, **kwargs)
    assert_reads(write(path, tree(model, gradients='net34' not in name)), model)


@pytest.mark.slow
@pytest.mark.parametrize('name', SHARED)
def test_reads_all_models_in_full_size(name, path):
    model = create(name)
    assert_reads(write(path, tree(model, cudnn=True)), model)


@pytest.mark.parametrize('number', ['Float', 'Double', 'Half', 'Cuda', 'CudaDouble', 'CudaHalf'])
@pytest.mark.parametrize('kind', ['bottleneck', 'wide'])
def test_reads_tensors_of_all_floating_point_types(kind, number, path):
    model = copy.deepcopy(net(kind)).half().float() if number.endswith('Half') else net(kind)
    assert_reads(write(path, tree(model, number, cudnn='Cuda' in number)), model)


def test_reads_gzip_under_any_name(preact, tmp_path):
    (tmp_path / 'net').write_bytes(gzip.compress(serialize(tree(preact)), 1))
    assert_reads(tmp_path / 'net', preact)


def test_reads_inverse_standard_deviations_of_old_batch_norm(preact, path):
    file = tree(preact, 'Double')
    for bn in file.walk('BatchNormalization'):
        bn.version = 1
        bn.fields['running_std'] = Tensor(Storage((bn.fields.pop('running_var').values + 1e-5) ** -0.5, 'Double'))
    state_dict = load_like(write(path, file), preact)
    torch.testing.assert_close(state_dict, dict(preact.state_dict()), rtol=2e-7, atol=0)


def running_std_of_a_class_that_is_not_old(file: Module) -> None:
    for bn in file.walk('BatchNormalization'):
        bn.fields['running_std'] = Tensor(Storage(np.ones(bn.fields['weight'].size)))


def flat_weights_and_zero_biases_of_old_convolutions(file: Module) -> None:
    for conv in file.walk('SpatialConvolution'):
        conv.name = 'nn.SpatialConvolutionMM'
        size = conv.fields['weight'].size
        conv.fields['weight'].size = (size[0], int(np.prod(size[1:])))
        conv.fields['bias'] = Tensor(Storage(np.zeros(size[0])))
        conv.fields['padding'] = conv.fields.pop('padW')
        del conv.fields['padH']


def dropout_before_the_second_convolution(file: Module) -> None:
    for branch, i in (file[1][0][2][0], 3), (file[1][1][0][0], 5), (file[1][2][0][0], 5):
        branch.fields['modules'].insert(i, Module('nn.Dropout', p=0.3, v2=True))


def equal_copies_of_a_shared_convolution(file: Module) -> None:
    conv = file[1][2][0][0][5]
    conv.fields['weight'] = Tensor(Storage(conv.fields['weight'].values))


def a_net_that_contains_itself_where_nobody_looks(file: Module) -> None:
    file.fields['parent'], file.fields['fields'] = file, file.fields


@pytest.mark.parametrize(
    'kind,change',
    [
        ('preact', running_std_of_a_class_that_is_not_old),
        ('preact', flat_weights_and_zero_biases_of_old_convolutions),
        ('wide', dropout_before_the_second_convolution),
        ('preact', equal_copies_of_a_shared_convolution),
        ('preact', a_net_that_contains_itself_where_nobody_looks),
    ],
    ids=lambda x: getattr(x, '__name__', x),
)
def test_reads(kind, change, path):
    file = tree(net(kind))
    change(file)
    assert_reads(write(path, file), net(kind))


def test_reads_an_unshared_twin(path):
    model = create('resnet164_cifar', layers=(2, 1, 1))
    assert_reads(write(path, tree(model)), model)


@pytest.mark.parametrize('stride', [2**62, -1])
def test_reads_a_dimension_of_one_with_any_stride(stride, path):
    model = create('sharesnet164_cifar', layers=(1, 1, 1), num_classes=1)
    file = tree(model)
    file[8].fields['weight'].stride = [stride, 1]
    assert_reads(write(path, file), model)


@pytest.mark.parametrize('extra', [-1, 0, 1])
def test_reads_a_gzip_of_whole_blocks(extra, preact, path):
    file = tree(preact)
    file.fields['output'] = ''
    file.fields['output'] = ((-len(serialize(file))) % torch7._BLOCK + extra) * 'x'
    for level in (0, 9):
        path.write_bytes(gzip.compress(serialize(file), level))
        assert_reads(path, preact)


# ---- What is refused

Change = Callable[[Module], Any]


def at(file: Module, path: str) -> Module:
    """The module at a path, e.g. '1.0.3'; '' is that of the whole net."""
    for i in filter(None, path.split('.')):
        file = file[int(i)]
    return file


def field(path: str, key: str, value: Any) -> Change:
    return lambda file: at(file, path).fields.update({key: value})


def insert(path: str, i: int, module: Module) -> Change:
    return lambda file: at(file, path).fields['modules'].insert(i, module)


def remove(path: str, i: int) -> Change:
    return lambda file: at(file, path).fields['modules'].pop(i)


def replace(path: str, module: Any) -> Change:
    head, _, last = path.rpartition('.')
    return lambda file: at(file, head).fields['modules'].__setitem__(int(last), module)


def poke(path: str, key: str, value: float) -> Change:
    return lambda file: at(file, path).fields[key].values.flat.__setitem__(1, value)


def rename(path: str, name: str) -> Change:
    return lambda file: setattr(at(file, path), 'name', name)


def alias(path: str, other: str) -> Change:
    return lambda file: at(file, path).fields.update(weight=at(file, other).fields['weight'])


def unshare(path: str) -> Change:
    def change(file: Module) -> None:
        conv = at(file, path)
        conv.fields['weight'] = Tensor(Storage(conv.fields['weight'].values))
        conv.fields['weight'].values.flat[-1] += 1e-3

    return change


def tensor(*shape: int, number: str = 'Float', **place: Any) -> Tensor:
    return Tensor(Storage(np.ones(shape), number), **place)


DROPOUT, SEQUENTIAL, IDENTITY = Module('nn.Dropout', v2=True), Module('nn.Sequential'), Module('nn.Identity')
BATCH_NORM = Module('nn.SpatialBatchNormalization')
OWN, NUMBERS = 'a tensor of its own', 'floating point numbers'
# kind of net, change, the beginning of the complaint (a layer), expected, found
REFUSED = [
    ('preact', field('0', 'kW', 5), 'conv1:', 'kernel (3, 3)', 'kernel (3, 5)'),
    ('preact', field('2.0.2.0.0', 'dH', 1), 'layer2.blocks.0.conv1:', 'stride (2, 2)', 'stride (1, 2)'),
    ('preact', field('1.0.2.0.3', 'padH', 0), 'layer1.blocks.0.conv2:', 'padding (1, 1)', 'padding (0, 1)'),
    ('preact', field('0', 'groups', 2), 'conv1:', 'groups 1', 'groups 2'),
    ('preact', field('0', 'nInputPlane', 1), 'conv1:', '3 -> 16', '1 -> 16'),
    ('preact', field('0', 'kW', {}), 'conv1:', 'kernel (3, 3)', "kernel (3, '?')"),
    ('preact', rename('0', 'nn.SpatialDilatedConvolution'), 'conv1:', 'convolution', 'nn.SpatialDilatedConvolution'),
    ('preact', field('0', 'bias', tensor(16)), 'conv1:', 'bias False', 'bias True'),
    ('preact', field('4', 'eps', 1e-3), 'norm:', 'eps 1e-05', 'eps 0.001'),
    ('preact', field('4', 'momentum', 0.9), 'norm:', 'momentum 0.1', 'momentum 0.9'),
    ('preact', rename('5', 'nn.Tanh'), 'act:', 'ReLU', 'nn.Tanh'),
    ('preact', field('1.0.1', 'threshold', 1), 'layer1.blocks.0.act1:', 'ReLU', 'nn.ReLU'),
    ('preact', field('6', 'kH', 7), 'global_pool:', 'kernel (8, 8)', 'kernel (7, 8)'),
    ('preact', field('6', 'divide', False), 'global_pool:', 'avg pooling', 'sum pooling'),
    ('preact', rename('6', 'nn.SpatialMaxPooling'), 'global_pool:', 'avg pooling', 'max pooling'),
    ('preact', remove('', 7), 'global_pool.flatten:', 'nn.View', 'Linear'),
    ('preact', remove('', 8), 'fc:', '9 modules', '8'),
    ('preact', insert('', 9, Module('nn.LogSoftMax')), 'fc:', '9 modules', '10'),
    (
        'preact',
        insert('1.0.2.0', 3, Module('nn.Dropout', p=0.3)),
        'layer1.blocks.0.conv2:',
        'convolution',
        'nn.Dropout that scales',
    ),
    ('preact', insert('1.0.2.0', 5, DROPOUT), 'layer1.blocks.0.drop:', 'nn.Dropout', 'convolution'),
    ('preact', remove('1', 2), 'layer1:', '3 blocks', '2'),
    ('preact', insert('2', 1, SEQUENTIAL), 'layer2:', '1 blocks', '2'),
    ('preact', replace('1.1.0.1', SEQUENTIAL), 'layer1.blocks.1.downsample:', 'nn.Identity', 'nn.Sequential'),
    ('preact', replace('1.0.2.1', IDENTITY), 'layer1.blocks.0.downsample:', 'nn.Sequential', 'nn.Identity'),
    ('preact', insert('1.0.2.1', 1, BATCH_NORM), 'layer1.blocks.0.downsample:', '1 modules', '2'),
    ('preact', replace('1.1.1', Module('nn.CMulTable')), 'layer1.blocks.1:', 'nn.CAddTable', 'nn.CMulTable'),
    ('preact', replace('5', None), 'act:', 'ReLU', 'nothing'),
    ('preact', replace('5', {}), 'act:', 'ReLU', 'no module'),
    ('preact', field('1', 'modules', None), 'layer1:', '3 blocks', '0'),
    ('preact', field('8', 'weight', tensor(7, 256)), 'fc.weight:', '(10, 256)', '(7, 256)'),
    ('preact', field('4', 'weight', None), 'norm.weight:', 'a tensor of shape (256,)', 'none'),
    ('preact', field('4', 'running_var', None), 'norm.running_var:', 'a tensor', 'none'),
    ('preact', field('4', 'weight', tensor(256, 1)), 'norm.weight:', '(256,)', '(256, 1)'),
    ('preact', field('8', 'bias', tensor(10, number='Long')), 'fc.bias:', NUMBERS, 'int64'),
    ('preact', field('8', 'bias', tensor(12, size=(10,), offset=3)), 'fc.bias:', NUMBERS, 'none in its storage'),
    ('preact', field('8', 'bias', tensor(12, size=(10,), offset=-1)), 'fc.bias:', NUMBERS, 'none in its storage'),
    ('preact', poke('8', 'weight', np.nan), 'fc.weight:', 'finite', 'NaN or infinity in 1 of 2560'),
    ('preact', poke('4', 'running_mean', -np.inf), 'norm.running_mean:', 'finite', 'NaN or infinity in 1 of 256'),
    (
        'preact',
        poke('1.1.0.0.5', 'weight', np.nan),
        'layer1.conv.weight (in layer1.blocks.1):',
        'finite',
        'NaN or infinity in 1 of 2304',
    ),
    ('preact', poke('4', 'running_var', -0.5), 'norm.running_var:', 'variances', 'a minimum of -0.5'),
    ('preact', unshare('1.2.0.0.5'), 'layer1.conv.weight (in layer1.blocks.2):', 'one tensor for all', 'another'),
    (
        'preact',
        alias('1.1.0.0.5', '1.0.2.0.3'),
        'layer1.conv.weight (in layer1.blocks.1):',
        OWN,
        'the one of layer1.blocks.0.conv2.weight',
    ),
    (
        'preact',
        alias('1.2.0.0.0', '1.1.0.0.0'),
        'layer1.blocks.2.bn1.weight:',
        OWN,
        'the one of layer1.blocks.1.bn1.weight',
    ),
    ('shallow', field('3', 'kH', 2), 'maxpool:', 'kernel (3, 3)', 'kernel (2, 3)'),
    ('shallow', field('3', 'ceil_mode', True), 'maxpool:', 'ceil_mode False', 'ceil_mode True'),
    ('shallow', remove('5.0.0.1', 1), 'layer2.blocks.0.downsample:', '2 modules', '1'),
    ('shallow', field('5.0.0.1.0', 'dW', 1), 'layer2.blocks.0.downsample.0:', '(2, 2)', '(2, 1)'),
    ('shallow', remove('4.0', 2), 'layer1.blocks.0:', '3 modules', '2'),
    ('shallow', insert('4.0.0.0', 3, DROPOUT), 'layer1.conv (in', 'convolution', 'Dropout'),
    (
        'basic',
        unshare('4.0.0.0.3'),
        'layer1.conv.weight (in layer1.blocks.1)',
        'one tensor for all',
        'another',
    ),  # the first block shares
    ('basic', unshare('4.2.0.0.3'), 'layer1.conv.weight (in layer1.blocks.2)', 'one tensor for all', 'another'),
    ('basic', unshare('5.1.0.0.3'), 'layer2.conv.weight (in layer2.blocks.1)', 'one tensor for all', 'another'),
    (
        'basic',
        alias('4.1.0.0.0', '4.0.0.0.0'),
        'layer1.blocks.1.conv1.weight',
        OWN,
        'the one of layer1.blocks.0.conv1.weight',
    ),
    ('bottleneck', unshare('5.2.0.0.3'), 'layer2.conv.weight (in layer2.blocks.2)', 'one tensor for all', 'another'),
]


@pytest.mark.parametrize('kind,change,layer,expected,found', REFUSED)
def test_refuses_a_net_that_differs(kind, change, layer, expected, found, path):
    file = tree(net(kind), gradients=kind == 'preact')
    change(file)
    before, _, after = refusal(write(path, file), net(kind)).partition(', found ')
    assert before.startswith(f' does not hold {NETS[kind][0]}: {layer}')
    assert expected in before.partition(': expected ')[2]
    assert found in after


# model of the file (None: the author's preact-29), model that is asked for, complaint
WRN = ('wrn40_4', WIDE)
NARROW = dict(base_width=4, num_classes=10)
ANOTHER = [
    (None, 'sharesnet34', {}, 'conv1: expected convolution 3 -> 64'),
    (None, 'shawrn40_4', PREACT, r'layer1.blocks.0.conv1: expected .*kernel \(3, 3\).*found .*kernel \(1, 1\)'),
    (None, 'sharesnet164_cifar', {}, 'layer1: expected 18 blocks, found 3'),
    (None, 'sharesnet164_cifar', dict(layers=(2, 3, 3)), 'layer1: expected 2 blocks, found 3'),
    (None, 'sharesnet164_cifar', dict(layers=(3, 3, 4)), 'layer3: expected 4 blocks, found 3'),
    (
        None,
        'sharesnet164_cifar',
        dict(widen_factor=2, **PREACT),
        'layer1.blocks.0.conv1: expected convolution 16 -> 32',
    ),
    (
        None,
        'sharesnet164_cifar',
        dict(num_classes=100, **PREACT),
        r'fc.weight: expected shape \(100, 256\), found \(10, ',
    ),
    (None, 'sharesnet164_cifar', dict(num_classes=0, **PREACT), 'fc: expected Identity, found Linear'),
    (None, 'sharesnet164_cifar', dict(in_chans=1, **PREACT), 'conv1: expected convolution 1 -> 16'),
    (None, 'sharesnet164_cifar', dict(act_layer='silu', **PREACT), 'layer1.blocks.0.act1: expected SiLU, found ReLU'),
    (None, 'sharesnet164_cifar', dict(global_pool='max', **PREACT), 'global_pool: expected max pooling'),
    (None, 'resnet164_cifar', PREACT, 'layer1.blocks.2.conv2.weight: expected a tensor of its own, found the one of'),
    (WRN, 'shawrn40_4', WIDE, r'layer1.conv.weight \(in layer1.blocks.2\): expected one tensor for all'),
    (NETS['basic'], 'sharesnet50', {}, r'layer1.blocks.0.conv1: .*kernel \(1, 1\).*found .*kernel \(3, 3\)'),
    (NETS['basic'], 'sharesnet164_cifar', {}, 'conv1: expected convolution 3 -> 16'),
    (('sharesnet50', NARROW), 'sharesnet101', NARROW, 'layer3: expected 23 blocks, found 6'),
    # layers that the author's nets lack
    (
        NETS['shallow'],
        'sharesnet34',
        {**NETS['shallow'][1], 'block_args': dict(attn_layer='se')},
        'layer1.blocks.0.se.fc1.weight: expected one of the layers of the author',
    ),
]


@pytest.mark.parametrize('of,name,kwargs,complaint', ANOTHER)
def test_refuses_another_net(of, name, kwargs, complaint, path):
    file = AUTHOR if of is None else write(path, tree(create(of[0], **of[1]), gradients=False))
    with pytest.raises(ValueError, match=f'does not hold {name}: {complaint}'):
        load_torch7(file, name, **kwargs)


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
        load_torch7(AUTHOR, name, **kwargs)


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
def net_bytes():
    return serialize(tree(net('preact')))


@pytest.mark.parametrize('fault', damaged(b'V 1torch.FloatTensortorch.FloatStorage'))
def test_refuses_a_damaged_file(fault, net_bytes, preact, path):
    path.write_bytes(damaged(net_bytes)[fault])
    kind = 'a damaged gzip file' if fault.startswith('gzip_') and '_of_' not in fault else '(truncated or )?no Torch7'
    assert re.match(f' is {kind}', refusal(path, preact))


def test_says_how_to_save_an_ascii_file_in_binary(preact, path):
    path.write_bytes(damaged(b'torch.FloatTensortorch.FloatStorage')['ascii'])
    assert 'may be ascii, save it with torch.save' in refusal(path, preact)


@pytest.mark.parametrize('error,path', [(FileNotFoundError, 'missing.t7'), (IsADirectoryError, '.')])
def test_a_file_that_cannot_be_opened_is_an_os_error(error, path, tmp_path):
    with pytest.raises(error):
        load_torch7(tmp_path / path, 'sharesnet34')


def test_no_damage_has_other_consequences_than_a_refusal(path):
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
        path.write_bytes(damaged)
        try:
            state_dict = load_like(path, model)
        except ValueError:
            refused += 1
        else:
            assert state_dict.keys() == model.state_dict().keys()
    assert refused > 20


# ---- Hostile files


def nested(holder: str, n: int) -> bytes:
    """n objects of which each holds the next. A holder's second atom is its number."""
    (kind, _, *rest), tail = HOLDERS[holder]
    rest = pack(rest)
    return b''.join(struct.pack('<ii', kind[1], 10**6 + i) + rest for i in range(n)) + bytes(4) + n * pack(tail)


def in_a_row(holder: str, n: int, as_keys: bool = False) -> bytes:
    """A table of n objects of which each refers to the one before it."""
    (kind, _, *rest), tail = HOLDERS[holder]
    rest, tail = pack(rest), pack(tail)
    out = [struct.pack('<iii', 3, 10**6 - 1, n)]
    for i in range(n):
        before = struct.pack('<ii', kind[1], 10**6 + i - 1) if i else bytes(4)
        value = struct.pack('<ii', kind[1], 10**6 + i) + rest + before + tail
        out.append(value + bytes(4) if as_keys else struct.pack('<id', 1, i + 1) + value)
    return b''.join(out)


def text(s: str) -> bytes:
    return struct.pack('<i', len(s)) + s.encode()


def raw(data: bytes) -> Raw:
    return Raw(('b', data))


def output(value: Callable[[], Any]) -> Change:
    """Give the net an output, which nobody reads."""
    return lambda file: file.fields.update(output=value())


MANY = 200_000
DEEP = 'nested more than 64 deep'
KEY = 'the key of a table is a number or text'
ARRAY = 'an array of float32 or nothing'
ONE = struct.pack('<id', 1, 1)
TENSOR = struct.pack('<ii', 4, 998) + text('V 1') + text('torch.FloatTensor') + struct.pack('<iqqq', 1, 3, 1, 1)


class TableOfOne(dict):
    def __init__(self, key: Any) -> None:
        super().__init__(any=1)
        self.key = key

    def items(self) -> Any:
        return [(self.key, 1)]


KEYS = {
    'nil': None,
    'boolean': True,
    'table': {},
    'list': [],
    'tensor': tensor(3),
    'storage': Storage(np.ones(3)),
    'object': IDENTITY,
    'nan': float('nan'),
    'function': raw(struct.pack('<iiii', 6, 999, 0, 0)),
    'new_function': raw(struct.pack('<iiii', 8, 999, 0, 0)),
}
STORAGES = ONE, serialize('text'), struct.pack('<iii', 3, 999, 0), struct.pack('<ii', 4, 1)
SIZES = [(16, 1), (2**40,), (2**62, 2**62), (17,), (-16,), (0,)]
NUMBER_FIELDS = ('kW', 'kH', 'dW', 'dH', 'padH', 'padW', 'nInputPlane', 'groups')


def hostile() -> Iterator[Tuple[str, Change, str]]:
    """What is hostile, the change that makes it so, and the complaint."""
    for holder in HOLDERS:
        yield f'deep {holder}', output(partial(lambda h: raw(nested(h, MANY)), holder)), DEEP
        deep_key = partial(lambda h: raw(struct.pack('<iii', 3, 10**6 - 1, 1) + nested(h, MANY) + bytes(4)), holder)
        yield f'deep {holder} as a key', output(deep_key), DEEP
        # Each refers to the one before it, so that nothing is deep to read, but all is to hash
        keys = output(partial(lambda h: raw(in_a_row(h, MANY, as_keys=True)), holder))
        yield f'{holder}s as keys', keys, f'({KEY}|{ARRAY})'
    many = output(lambda: raw(in_a_row('object', MANY)))
    yield 'more objects than the model can need', many, 'objects, which such a model cannot need'
    for name, key in KEYS.items():
        yield f'{name} as a key', output(partial(TableOfOne, key)), f'{KEY}, found'
    yield 'a key twice', output(lambda: raw(struct.pack('<iii', 3, 998, 2) + 4 * ONE)), 'a table has a key twice'
    for storage in STORAGES:
        yield 'no storage', output(partial(raw, TENSOR + storage)), ARRAY
    for path, layer in ('1', 'layer1'), ('1.1', 'layer1.blocks.1'), ('', 'conv1'):
        itself = partial(lambda path, file: at(file, path).fields['modules'].__setitem__(0, at(file, path)), path)
        yield f'{layer} within itself', itself, f'does not hold sharesnet164_cifar: {layer}'
    for stride in 2**62, 2**63 - 1, -(2**63), -1:
        strides = partial(lambda stride, file: setattr(at(file, '8').fields['weight'], 'stride', [stride, 1]), stride)
        yield f'stride {stride}', strides, f'fc.weight: expected {NUMBERS}, found none in its storage'
    for ndim in 9, 70, 2**16:
        bias = Tensor(Storage(np.ones(16)), ndim * (1,), stride=ndim * [1])
        yield f'{ndim} dimensions', field('0', 'bias', bias), f'a tensor has {ndim} dimensions'
    for size in SIZES:
        bias = Tensor(Storage(np.zeros(16)), size, stride=len(size) * [0])
        yield f'zero bias of {size}', field('0', 'bias', bias), 'conv1: expected'
    for bias in Tensor(Storage(np.zeros(8)), (16,)), 0:
        yield 'bias without values', field('0', 'bias', bias), 'found convolution'
    for name in '', 'A' * 10**6, 'nn.\n', 'nn.\0ReLU', 'nn.Größe':
        yield f'class {name[:9]!r}', rename('5', name), 'is no name of a class'
    for value in 1e308, -1e308, float('inf'), float('nan'), 2.0**62:
        numbers = partial(lambda value, file: at(file, '0').fields.update(dict.fromkeys(NUMBER_FIELDS, value)), value)
        yield f'number {value}', numbers, r'found convolution \? -> 16'


@pytest.mark.parametrize('what,change,complaint', [pytest.param(*case, id=case[0]) for case in hostile()])
def test_refuses(what, change, complaint, preact, path):
    file = tree(preact, gradients=False)
    change(file)
    assert re.search(complaint, refusal(write(path, file), preact))


@pytest.mark.parametrize(
    'holder', ['function', *(pytest.param(h, marks=pytest.mark.slow) for h in ('object', 'table', 'vec'))]
)
def test_frees_200000_objects_that_refer_to_each_other(holder, preact, path, monkeypatch):
    """If the model is so large that it might need them. They are not deep in the file, but in memory."""
    monkeypatch.setattr(torch7, '_OBJECTS_PER_MODULE', 10**6)
    file = tree(preact, gradients=False)
    file.fields['output'] = raw(in_a_row(holder, MANY))
    assert_reads(write(path, file), preact)


@pytest.mark.parametrize('version', ['V nan', 'V inf', 'V 1e999', 'V x', 'V '])
def test_refuses_strange_versions(version, preact, path):
    path.write_bytes(serialize(tree(preact, gradients=False)).replace(text('V 1'), text(version), 1))
    assert 'is truncated or no Torch7 model' in refusal(path, preact)


def bomb(size: int) -> bytes:
    """A gzip file that unpacks to `size` bytes, a thousand times as many as it has."""
    packer = zlib.compressobj(9, wbits=31)
    start = packer.compress(struct.pack('<i', 4)) + packer.flush(zlib.Z_FULL_FLUSH)
    packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + block * (size >> 20)


def test_unpacks_no_more_than_the_model_can_need(preact, path):
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


def test_reads_no_file_larger_than_the_model_can_need(preact, path):
    path.write_bytes(struct.pack('<i', 4))
    os.truncate(path, 20 << 30)
    start = time.perf_counter()
    assert re.search(r'it would hold at most [\d,]+ bytes, found more', refusal(path, preact))
    assert time.perf_counter() - start < 5


def test_refuses_more_after_a_gzip(preact, path):
    packed = gzip.compress(serialize(tree(preact)), 1)
    for more in (b'\0', packed, gzip.compress(b'') * 100_000):
        path.write_bytes(packed + more)
        assert refusal(path, preact) == ' is a damaged gzip file: more follows its end'


def test_refuses_what_is_no_regular_file(preact, path):
    os.mkfifo(path)  # to open it would wait for a writer
    for file in path, Path('/dev/zero'), Path('/dev/null'):
        assert refusal(file, preact) == ' is no regular file'


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
        load_torch7(AUTHOR, 'sharesnet164_cifar', **PREACT)


def test_a_full_stack_is_not_blamed_on_the_file():
    def at_depth(n: int) -> Any:
        if n > 0:
            return at_depth(n - 1)
        return load_torch7(AUTHOR, 'sharesnet164_cifar', **PREACT)

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
        load_torch7(AUTHOR, 'sharesnet164_cifar', **PREACT)


def test_leaves_torchfile_as_it_is():
    import torchfile

    before = dict(torchfile.type_handlers)
    load_torch7(AUTHOR, 'sharesnet164_cifar', **PREACT)
    assert torchfile.type_handlers == before


# ---- The command line


spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


# timm 1.0.28 does not take what is no literal for text
UNREADABLE = 'cannot be built' if hasattr(timm.models, 'get_model_args') else 'must be KEY=VALUE'
IMPORT = (AUTHOR, '--model', 'sharesnet164_cifar', '--model-kwargs', 'layers=3,3,3', '--output')


def main(*args: Any) -> Any:
    """The script's error message, None after success."""
    try:
        script.main.__wrapped__([str(arg) for arg in args])
    except (CommandError, OSError) as e:
        return str(e)
    return None


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
    assert main(*IMPORT, tmp_path) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    assert (tmp_path / 'README.md').read_text() == 'old'
    timm.create_model(f'local-dir:{tmp_path}', pretrained=True)


@pytest.mark.parametrize(
    'args,complaint',
    [
        (['x.t7', '--model', 'sharesnet34'], 'No such file'),
        (['.', '--model', 'sharesnet34'], 'Is a directory'),
        ([AUTHOR, '--model', 'sharesnet50'], 'conv1: expected'),
        ([AUTHOR, '--model', 'nonsense'], 'nonsense is no model of timm_sharesnet'),
        ([__file__, '--model', 'sharesnet34'], 'is no Torch7 model'),
        ([AUTHOR, '--model', 'shawrn40_4', '--model-kwargs', 'layers'], 'must be KEY=VALUE'),
        ([AUTHOR, '--model', 'shawrn40_4', '--model-kwargs', 'layers=(3'], UNREADABLE),
        ([AUTHOR, '--model', 'shawrn40_4', '--model-kwargs', 'a=1'], 'cannot be built'),
    ],
)
def test_command_refuses_in_one_line_and_writes_nothing(args, complaint, tmp_path, capsys):
    error = main(*args, '--output', tmp_path / 'a' / 'b')
    assert complaint in error and '\n' not in error
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ('', '')


def test_command_keeps_an_older_import_if_it_fails(monkeypatch, tmp_path):
    def no_space(tensors: Any, file: Path, **kwargs: Any) -> None:
        file.write_text('half of it')
        raise OSError('No space left on device')

    (tmp_path / 'model.safetensors').write_text('old')
    monkeypatch.setattr('safetensors.torch.save_file', no_space)
    assert 'No space left' in main(*IMPORT, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['model.safetensors']
    assert (tmp_path / 'model.safetensors').read_text() == 'old'
    assert 'No space left' in main(*IMPORT, tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


def test_command_does_not_write_over_a_file(tmp_path):
    (tmp_path / 'out').write_text('mine')
    assert 'is not a directory' in main(*IMPORT, tmp_path / 'out')
    assert (tmp_path / 'out').read_text() == 'mine'
    assert main(*IMPORT, tmp_path / 'out' / 'below')


def test_command_exits_with_2_and_one_line_on_stderr(tmp_path):
    run = forks.run([SCRIPT, AUTHOR, '--model', 'sharesnet164_cifar', '--output', tmp_path / 'out'])
    assert run.returncode == 2 and run.stdout == ''
    assert re.fullmatch(r'import_torch7.py: .* layer1: expected 18 blocks, found 3\n', run.stderr)
    assert not (tmp_path / 'out').exists()

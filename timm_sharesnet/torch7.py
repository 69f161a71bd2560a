"""Reads the checkpoints of the author's Torch7 models.

A. Boulch trained ShaResNet in Torch7 and saved whole models: trees of modules in Torch7's binary serialization
(https://github.com/torch/torch7/blob/master/doc/serialization.md). The PyPI package `torchfile` parses it and runs none
of it; what a file may make it do is bounded here, because a file may be anything. The tree is compared with the timm
model module by module, so that a file whose tensors happen to fit does not pass for the network it is not.
"""

import errno
import importlib.util
import math
import os
import re
import stat
import struct
import zlib
from functools import lru_cache
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from io import BufferedReader
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union, cast

import numpy as np
import timm
import torch
import torch.nn as nn
from timm.layers import to_2tuple

from .resnet import ShaResNet
from .resnetv2 import CifarResNetV2, PreActBottleneck
from .stage import SharingBlock
from .weights import unknown_model

__all__ = ['load_torch7']

# The order of modules in the author's files, in timm's names.
_NET = {
    ShaResNet: 'conv1 bn1 act1 maxpool layer1 layer2 layer3 layer4 global_pool view fc',
    CifarResNetV2: 'conv1 layer1 layer2 layer3 norm act global_pool view fc',
}

_MAGIC = b'\x04\0\0\0'  # a file begins with the type of its value, 4 for an object

# What a file may cost. The author's, cleared models with gradients in single precision, have 8 bytes per number of the
# state dict, and 32 objects (numbers, names, tables, tensors, ...) per module of timm's model, nested 19 deep.
_BYTES_PER_NUMBER = 4 * 8  # double precision for the number, its gradient, its momentum and a copy
_OTHER_BYTES = 64 << 20  # outputs and buffers of a small batch, names, code
_OBJECTS_PER_MODULE = 1000
_MAX_DEPTH = 64
_MAX_DIMS = 8
_BLOCK = 1 << 20  # bytes read at a time

# What a layer is, in words. Two layers are the same if these are.
_CONV = 'convolution {} -> {}, kernel {}, stride {}, padding {}, dilation {}, groups {}, bias {}'
_NORM = 'batch norm, eps {}, momentum {}'
_MAX_POOL = 'max pooling, kernel {}, stride {}, padding {}, ceil_mode {}'
_AVG_POOL = '{} pooling, kernel {}, padding {}'


def load_torch7(path: Union[str, 'PathLike[str]'], model_name: str, **model_kwargs: Any) -> Dict[str, torch.Tensor]:
    """Read a checkpoint of the author's Torch7 models as the state dict of a model of this package.

        >>> state_dict = load_torch7('resnet-34.t7', 'sharesnet34')  # doctest: +SKIP

    The model may have been saved on a CPU or a GPU, with or without gradients, and gzipped. A convolution that the
    model shares must have the same values wherever the file uses it, and other layers may not share memory. The file
    need not be trusted: time and memory are bounded by the size of the model that it is said to hold.

    Args:
        path: File in Torch7's binary format.
        model_name: Model that the file is said to hold, as for `timm.create_model`.
        **model_kwargs: Its arguments where they differ from the default, such as `layers` or `num_classes`.

    Returns:
        State dict in float32, to which double precision is rounded, that the model loads with `strict=True`.

    Raises:
        ImportError: If torchfile is not installed.
        OSError: If the file cannot be read, or memory runs out.
        ValueError: If the model cannot be built, or the file is damaged, holds more than such a model can need or holds
            another network. Then the message names the first layer that differs, what was expected there and what was
            found.
    """
    torchfile, path = _torchfile(), Path(path)
    try:
        model = timm.create_model(model_name, device='meta', **model_kwargs)
        tree = _tree(model) if type(model) in _NET else None
    except Exception as e:  # whatever the arguments upset
        unknown = unknown_model(model_name) if ':' not in model_name else ''
        reason = unknown or f'{model_name} cannot be built with {model_kwargs}: {type(e).__name__}: {e}'
        raise ValueError(f'{path} cannot be read: {reason}') from e
    if tree is None:
        reason = f'{model_name} is no model of timm_sharesnet, and only these exist in Torch7.'
        raise ValueError(f'{path} cannot be read: {reason}')
    try:
        return _convert(model, tree, _read(torchfile, path, model, tree))
    except _Mismatch as e:
        raise ValueError(f'{path} does not hold {model_name}: {e}') from None
    except MemoryError as e:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), str(path)) from e
    except RecursionError as e:
        raise ValueError(f'{path} cannot be read this deep in the stack: {e}') from e


# ---- The file


class _File:
    """A file in memory that is never read beyond its end, so that a corrupt size fails and allocates nothing."""

    def __init__(self, data: bytearray) -> None:
        self.data, self.position = memoryview(data), 0

    def read(self, size: int) -> bytes:
        return bytes(self.view(size))

    def view(self, size: int) -> memoryview:
        start, end = self.position, self.position + size
        if not start <= end <= len(self.data):
            raise ValueError(f'{size} bytes are to follow at {start} of {len(self.data)}')
        self.position = end
        return self.data[start:end]


class _Table(dict):
    """A Lua table. Torch7 allows any object as key, but models have none, and to hash a deep one ends the process."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) not in (int, float, bytes) or key != key:
            raise ValueError(f'the key of a table is a number or text, found {type(key).__name__}')
        if key in self:
            raise ValueError('a table has a key twice')
        super().__setitem__(key, value)


class _Tensor(NamedTuple):
    """A Torch7 tensor: a view of a storage."""

    storage: Optional[np.ndarray]
    offset: int
    size: Tuple[int, ...]
    stride: Tuple[int, ...]

    def numpy(self) -> Optional[np.ndarray]:
        """The values, None if the tensor is empty or more than its storage holds."""
        if self.storage is None or not self.size or min(self.size) < 1:
            return None
        stride = [s if n > 1 else 0 for n, s in zip(self.size, self.stride, strict=True)]  # of one nobody steps
        last = self.offset + sum((n - 1) * s for n, s in zip(self.size, stride, strict=True))
        if min(stride) < 0 or not 0 <= self.offset <= last < len(self.storage):
            return None
        if math.prod(self.size) > len(self.storage):
            return None
        strides = [s * self.storage.itemsize for s in stride]
        return np.lib.stride_tricks.as_strided(self.storage[self.offset :], self.size, strides, writeable=False)


def _torchfile() -> ModuleType:
    try:
        import torchfile
    except ImportError as e:
        raise ImportError("Torch7 files are read with torchfile: pip install 'timm-sharesnet[torch7]'") from e
    return _bounded(torchfile)


@lru_cache(maxsize=None)
def _bounded(torchfile: ModuleType) -> Any:
    """Copy torchfile, whose classes and table of readers are global to it, and bound what a file makes it do.

    Its tables become `_Table`, its tensors of all types `_Tensor`, its storages views of the file's memory.
    """
    spec = cast(ModuleSpec, torchfile.__spec__)
    module: Any = importlib.util.module_from_spec(spec)
    cast(Loader, spec.loader).exec_module(module)

    class Reader(module.T7Reader):
        def __init__(self, file: _File, max_objects: int) -> None:
            super().__init__(file, use_list_heuristic=False)
            self.depth, self.left, self.max_objects = 0, max_objects, max_objects

        def read_obj(self) -> Any:
            if self.depth == _MAX_DEPTH:
                raise ValueError(f'objects are nested more than {_MAX_DEPTH} deep')
            if not self.left:
                raise ValueError(f'there are more than {self.max_objects:,} objects, which such a model cannot need')
            self.left -= 1
            self.depth += 1
            value = super().read_obj()
            self.depth -= 1
            return value

        def read_string(self, disable_utf8: bool = False) -> bytes:
            text: bytes = super().read_string(disable_utf8)
            if disable_utf8 and not re.fullmatch(rb'[ -~]{1,80}', text):  # the name of a class, or its version
                raise ValueError(f'{text[:20]!r} of {len(text)} bytes is no name of a class')
            return text

    def read_longs(reader: Any, n: int) -> Tuple[int, ...]:
        return struct.unpack(f'<{n}q', reader.f.read(8 * n))

    def tensor_reader(dtype: np.dtype) -> Any:
        def read(reader: Any, version: bytes) -> _Tensor:
            ndim = reader.read_int()
            if not 0 <= ndim <= _MAX_DIMS:
                raise ValueError(f'a tensor has {ndim} dimensions, no model needs more than {_MAX_DIMS}')
            size, stride, (offset,) = read_longs(reader, ndim), read_longs(reader, ndim), read_longs(reader, 1)
            storage = reader.read_obj()
            if storage is not None and not (isinstance(storage, np.ndarray) and storage.dtype == dtype):
                raise ValueError(f'the storage of a tensor is an array of {dtype} or nothing')
            return _Tensor(storage, offset - 1, size, stride)

        return read

    def storage_reader(dtype: np.dtype) -> Any:
        return lambda reader, version: np.frombuffer(reader.f.view(read_longs(reader, 1)[0] * dtype.itemsize), dtype)

    names = dict(Byte='u1', Char='i1', Short='<i2', Int='<i4', Long='<i8', Half='<f2', Float='<f4', Double='<f8')
    names |= {f'Cuda{name}': dtype for name, dtype in names.items()} | {'Cuda': '<f4'}  # CudaTensor is single precision
    for name, dtype in names.items():
        module.register_handler(f'torch.{name}Tensor'.encode())(tensor_reader(np.dtype(dtype)))
        module.register_handler(f'torch.{name}Storage'.encode())(storage_reader(np.dtype(dtype)))
    module.T7Reader, module.hashable_uniq_dict = Reader, _Table
    return module


def _read(torchfile: Any, path: Path, model: nn.Module, tree: '_Node') -> Any:
    """Parse a file that is said to hold a model."""
    content = _File(_content(path, _OTHER_BYTES + _BYTES_PER_NUMBER * _numel(tree)))
    max_objects = _OBJECTS_PER_MODULE * len(list(model.modules()))
    try:
        root = torchfile.T7Reader(content, max_objects).read_obj()
    except (MemoryError, RecursionError):  # of this process, not of the file
        raise
    except Exception as e:  # in a damaged file anything can be anywhere
        reason = str(e) if isinstance(e, ValueError) else f'{type(e).__name__}: {e}'
        raise ValueError(f'{path} is truncated or no Torch7 model: {reason}') from e
    if left := len(content.data) - content.position:
        raise ValueError(f'{path} is no Torch7 model: {left} bytes follow the end of one')
    return root


def _content(path: Path, max_size: int) -> bytearray:
    """What a file holds, unpacked if it is gzipped."""
    too_large = f'{path} is no file of such a model: it would hold at most {max_size:,} bytes, found more'
    data = bytearray()
    try:
        mode = path.stat().st_mode
    except ValueError as e:
        raise ValueError(f'{str(path)!r} is no path of a file: {e}') from e
    try:
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a directory fails to open, a pipe might wait for ever
            raise ValueError(f'{path} is no regular file')
        with path.open('rb') as f:
            if os.fstat(f.fileno()).st_size > max_size:
                raise ValueError(too_large)
            for block in _blocks(f):
                data += block
                if not data.startswith(_MAGIC[: len(data)]):
                    break
                if len(data) > max_size:
                    raise ValueError(too_large)
    except zlib.error as e:
        raise ValueError(f'{path} is a damaged gzip file: {e}') from e
    except OSError as e:
        if e.filename is None:  # if reading fails, not opening
            raise OSError(e.errno, e.strerror, str(path)) from e
        raise
    if not data.startswith(_MAGIC):
        head = bytes(data[:4])
        hint = "; it may be ascii, save it with torch.save(path, model, 'binary')" if head.startswith(b'4\n') else ''
        raise ValueError(f'{path} is no Torch7 model: expected it to begin with {_MAGIC!r}, found {head!r}{hint}')
    return data


def _blocks(f: BufferedReader) -> Iterator[bytes]:
    """The content of a file in parts of at most `_BLOCK` bytes, however well they were packed."""
    unpacker = zlib.decompressobj(wbits=31) if f.peek(2)[:2] == b'\x1f\x8b' else None  # of gzip, checksum and all
    while packed := f.read(_BLOCK):
        if unpacker is None:
            yield packed
            continue
        while packed and not unpacker.eof:
            yield unpacker.decompress(packed, _BLOCK)
            packed = unpacker.unconsumed_tail
        if unpacker.unused_data or packed:
            raise zlib.error('more follows its end')
    if unpacker is not None:
        yield unpacker.flush()
        if not unpacker.eof:
            raise zlib.error('its end is missing')


def _fields(obj: Any) -> Dict[bytes, Any]:
    """The fields of a Torch7 module, none if it is something else."""
    fields = obj._obj if isinstance(obj, _torchfile().TorchObject) else None
    return fields if isinstance(fields, dict) else {}


def _modules(obj: Any) -> List[Any]:
    """The modules of a Torch7 container."""
    modules = _fields(obj).get(b'modules')
    return [modules.get(i + 1) for i in range(len(modules))] if isinstance(modules, dict) else []


# ---- The comparison


class _Mismatch(Exception):
    def __init__(self, place: Any, expected: Any, found: Any) -> None:
        super().__init__(f'{place}: expected {expected}, found {found}')


class _Node(NamedTuple):
    """A place in the author's tree of modules."""

    name: str  # timm's
    layer: Union[nn.Module, str]  # timm's, or what `_describe` says of a module that timm has no layer for
    children: Tuple['_Node', ...] = ()
    unit: str = 'modules'  # what the children are
    user: str = ''  # the block, if the layer is its stage's

    def __str__(self) -> str:
        return f'{self.name} (in {self.user})' if self.user else self.name


def _tree(model: Any) -> _Node:
    """The author's tree of modules for a model."""

    def leaf(name: str, user: str = '') -> _Node:
        return _Node(name, model.get_submodule(name), user=user)

    def branch_node(name: str, part: str, stage: str) -> _Node:
        if part == 'drop':
            return _Node(f'{name}.drop', 'nn.Dropout')
        if part == 'conv2' and model.get_submodule(name).conv2 is None:
            index = int(name.rpartition('.')[2])
            return leaf(f'{stage}.{model.get_submodule(stage).conv_name(index)}', user=name)
        return leaf(f'{name}.{part}')

    def block_node(name: str, block: SharingBlock, stage: str) -> _Node:
        preact = isinstance(model, CifarResNetV2)
        first: List[_Node] = []
        parts = [part for part in block.branch if part.rstrip('123') in ('conv', 'bn', 'act', 'drop')]  # the author's
        branch = [branch_node(name, part, stage) for part in parts]
        last = [leaf(f'{name}.{part}') for part in block.after]
        downsample = f'{name}.downsample'
        if block.downsample is None:
            shortcut = _Node(downsample, 'nn.Identity')
        elif not preact:
            shortcut = _Node(downsample, 'nn.Sequential', (leaf(f'{downsample}.0'), leaf(f'{downsample}.1')))
        else:
            first, branch = branch[:2], branch[2:]  # the BN and ReLU feed the shortcut, too
            shortcut = leaf(downsample)
            if isinstance(block, PreActBottleneck):
                shortcut = _Node(downsample, 'nn.Sequential', (shortcut,))
        fork = _Node(name, 'nn.ConcatTable', (_Node(name, 'nn.Sequential', tuple(branch)), shortcut))
        return _Node(name, 'nn.Sequential', (*first, fork, _Node(name, 'nn.CAddTable'), *last))

    nodes = []
    for name in _NET[type(model)].split():
        if name == 'view':
            nodes.append(_Node('global_pool.flatten', 'nn.View'))
        elif name == 'global_pool':
            kernel = tuple(model.pretrained_cfg['pool_size'])
            nodes.append(_Node(name, _AVG_POOL.format(model.global_pool.pool_type, kernel, (0, 0))))
        elif name.startswith('layer'):
            blocks = enumerate(model.get_submodule(name).blocks)
            children = tuple(block_node(f'{name}.blocks.{i}', block, name) for i, block in blocks)
            nodes.append(_Node(name, 'nn.Sequential', children, 'blocks'))
        else:
            nodes.append(leaf(name))
    return _Node('fc', 'nn.Sequential', tuple(nodes), 'modules before and with it')


def _numel(node: _Node) -> int:
    """The numbers that a file needs for a tree, if it keeps a shared convolution anew for each block."""
    own = node.layer.state_dict().values() if isinstance(node.layer, nn.Module) else ()
    return sum(value.numel() for value in own) + sum(map(_numel, node.children))


def _describe(layer: Any) -> str:
    """Say what a layer is, of timm's and Torch7's in the same words."""
    m: Any = layer
    if isinstance(m, str):
        return m
    if type(m) is nn.Conv2d:
        chs = (m.in_channels, m.out_channels)
        return _CONV.format(*chs, m.kernel_size, m.stride, m.padding, m.dilation, m.groups, m.bias is not None)
    if type(m) is nn.BatchNorm2d:
        return _NORM.format(m.eps, m.momentum)
    if type(m) is nn.MaxPool2d:
        return _MAX_POOL.format(*map(to_2tuple, (m.kernel_size, m.stride, m.padding)), m.ceil_mode)
    if isinstance(m, nn.Module):
        return type(m).__name__  # of those of the author's nets ReLU and Linear

    if not isinstance(m, _torchfile().TorchObject):
        return 'nothing' if m is None else 'no module'
    name = m._typename.decode()
    kind = name.removeprefix('cudnn.').removeprefix('nn.')
    fields = _fields(m)

    def get(key: bytes, default: Any = None) -> Any:
        value = fields.get(key, default)
        return value if isinstance(value, (int, float)) and abs(value) < 1e9 else '?'

    kernel, stride = (get(b'kH'), get(b'kW')), (get(b'dH'), get(b'dW'))
    padding = (get(b'padH', fields.get(b'padding', 0)), get(b'padW', fields.get(b'padding', 0)))  # one in old files
    if kind in ('SpatialConvolution', 'SpatialConvolutionMM'):
        chs = (get(b'nInputPlane'), get(b'nOutputPlane'))
        bias = fields.get(b'bias')
        has_bias = bias is not None
        if isinstance(bias, _Tensor) and bias.size in ((), chs[1:]):  # else of no convolution, and may be of any size
            values = bias.numpy()
            has_bias = bool(bias.size) and (values is None or bool(np.any(values)))  # zeros if an old cuDNN needed one
        return _CONV.format(*chs, kernel, stride, padding, (1, 1), get(b'groups', 1), has_bias)
    if kind == 'SpatialBatchNormalization':
        return _NORM.format(get(b'eps'), get(b'momentum'))
    if kind == 'SpatialMaxPooling':
        return _MAX_POOL.format(kernel, stride, padding, get(b'ceil_mode', False))
    if kind == 'SpatialAveragePooling':
        return _AVG_POOL.format('avg' if get(b'divide', True) else 'sum', kernel, padding)
    if kind == 'ReLU' and get(b'threshold', 0) == get(b'val', 0) == 0 or kind == 'Linear':
        return kind
    if kind == 'Dropout' and fields.get(b'v2') is not True:
        return f'{name} that scales in evaluation'
    return name


def _walk(node: _Node, obj: Any) -> Iterator[Tuple[_Node, Any]]:
    """Compare the file's tree with the model's and yield the pairs of layers that are the same."""
    expected, found = _describe(node.layer), _describe(obj)
    if expected != found:
        raise _Mismatch(node, expected, found)
    if isinstance(node.layer, nn.Module):
        yield node, obj
    elif node.children:
        modules = _modules(obj)
        has_drop = any(_describe(module) == 'nn.Dropout' for module in modules)  # nothing to a trained net: optional
        children = [child for child in node.children if child.layer != 'nn.Dropout' or has_drop]
        for child, module in zip(children, modules, strict=False):
            yield from _walk(child, module)
        if len(children) != len(modules):
            raise _Mismatch(node, f'{len(children)} {node.unit}', len(modules))


def _convert(model: nn.Module, tree: _Node, root: Any) -> Dict[str, torch.Tensor]:
    """Collect the state dict. Each tensor is checked where it is met, so that the first fault is the one named."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    state_dict: Dict[str, torch.Tensor] = {}
    owners: Dict[Tuple[int, int], str] = {}  # (storage, offset) -> name
    for node, obj in _walk(tree, root):
        for key in cast(nn.Module, node.layer).state_dict():
            name, place = f'{node.name}.{key}', node._replace(name=f'{node.name}.{key}')
            if key == 'num_batches_tracked':
                state_dict[name] = torch.tensor(0)
                continue
            tensor, values = _values(place, obj, key, shapes[name])
            owner = owners.setdefault((id(tensor.storage), tensor.offset), name)
            if owner != name:
                raise _Mismatch(place, 'a tensor of its own', f'the one of {owner}')
            value = torch.from_numpy(values)
            if not torch.equal(state_dict.setdefault(name, value), value):
                raise _Mismatch(place, 'one tensor for all blocks that share it', 'another than in the blocks before')
    for name in shapes:
        if name not in state_dict:
            raise _Mismatch(name, "one of the layers of the author's models", 'an addition to them')
    return {name: state_dict[name] for name in shapes}


def _values(place: _Node, obj: Any, key: str, shape: Tuple[int, ...]) -> Tuple[_Tensor, np.ndarray]:
    """Get a tensor of a layer and its values in single precision."""
    fields = _fields(obj)
    # Before version 2 batch norm held the inverse standard deviation.
    inverse_std = key == 'running_var' and obj._version_number < 2 and b'running_std' in fields
    tensor = fields.get(b'running_std' if inverse_std else key.encode())
    if not isinstance(tensor, _Tensor):
        raise _Mismatch(place, f'a tensor of shape {shape}', 'none')
    old_conv_shape = (shape[0], math.prod(shape[1:]))  # of SpatialConvolutionMM
    if tensor.size != shape and not (len(shape) == 4 and tensor.size == old_conv_shape):
        raise _Mismatch(place, f'shape {shape}', tensor.size)
    values = tensor.numpy()
    if values is None or values.dtype.kind != 'f':
        raise _Mismatch(place, 'floating point numbers', 'none in its storage' if values is None else values.dtype)
    eps = getattr(place.layer, 'eps', 0)
    with np.errstate(all='ignore'):  # what becomes infinite is refused below
        if inverse_std:
            values = values.astype(np.float64) ** -2 - eps
        values = np.array(values, np.float32).reshape(shape)
    bad = values.size - np.isfinite(values).sum()
    if bad:
        raise _Mismatch(place, 'finite values', f'NaN or infinity in {bad} of {values.size}')
    if key == 'running_var' and values.min() + eps <= 0:
        raise _Mismatch(place, 'variances', f'a minimum of {values.min()}')
    return tensor, values

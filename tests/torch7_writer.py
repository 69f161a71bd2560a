"""Writes models as the author's Torch7 files: for the tests of the importer.

`tree` builds the tree of modules of a timm model, `write` serializes it. Between the two a test changes what it likes:
modules are found by index, as in Lua but from 0 (`net[4][0]`), and fields by name (`net[0].fields['kW'] = 5`). What no
Lua program could save is written as `Raw`, or changed between `atoms` and `pack`.
"""

import struct
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import numpy as np
import torch
import torch.nn as nn

from timm_sharesnet import CifarResNetV2, PreActBottleneck

DTYPES = {'Float': '<f4', 'Double': '<f8', 'Half': '<f2', 'Long': '<i8', 'Int': '<i4'}


class Storage:
    def __init__(self, values: Any, kind: str = 'Float') -> None:
        """`kind` is the name before Storage and Tensor in the file: Float, Cuda (single precision), CudaDouble, ..."""
        self.kind = kind
        values = values.detach().numpy() if isinstance(values, torch.Tensor) else values
        self.values = np.array(values, DTYPES[kind.removeprefix('Cuda') or 'Float'])


class Tensor:
    def __init__(self, storage: Storage, size: Any = None, offset: int = 0, stride: Any = None) -> None:
        self.storage, self.offset, self.stride = storage, offset, stride
        self.size = tuple(storage.values.shape if size is None else size)

    @property
    def values(self) -> np.ndarray:
        """View of the storage: what is assigned to its elements is written."""
        return self.storage.values[self.offset :][: int(np.prod(self.size))].reshape(self.size)


class Module:
    def __init__(self, name: str, *modules: 'Module', version: int = 1, **fields: Any) -> None:
        self.name, self.version, self.fields = name, version, fields
        if modules or name.endswith(('Sequential', 'ConcatTable')):
            self.fields['modules'] = list(modules)

    def __getitem__(self, i: int) -> 'Module':
        return self.fields['modules'][i]

    def walk(self, name: str = '') -> Iterator['Module']:
        """All modules whose class name ends with `name`."""
        if self.name.endswith(name):
            yield self
        for module in self.fields.get('modules', []):
            yield from module.walk(name)


def tree(model: nn.Module, kind: str = 'Float', cudnn: bool = False, gradients: bool = True) -> Module:
    """The author's tree of modules for a model, with the model's values.

    Args:
        model: Model of timm_sharesnet.
        kind: Type of the tensors, see `Storage`.
        cudnn: Use cudnn's classes where they exist.
        gradients: Keep gradients, of which each is NaN: nobody may read them.
    """
    lib = 'cudnn' if cudnn else 'nn'
    # All parameters are views of one storage, all gradients of another.
    parameters = dict(model.named_parameters())
    flat = Storage(torch.cat([p.detach().flatten() for p in parameters.values()]), kind)
    flat_grad = Storage(np.full(len(flat.values), np.nan), kind)
    offsets = dict(zip(parameters, np.cumsum([0] + [p.numel() for p in parameters.values()]).tolist(), strict=False))

    def tensors(layer: str, *names: str) -> Dict[str, Tensor]:
        fields = {}
        for name in names:
            size, offset = parameters[f'{layer}.{name}'].shape, offsets[f'{layer}.{name}']
            fields[name] = Tensor(flat, size, offset)
            if gradients:
                fields[f'grad{name.capitalize()}'] = Tensor(flat_grad, size, offset)
        return fields

    def conv(name: str) -> Module:
        m: Any = model.get_submodule(name)
        (kh, kw), (dh, dw), (ph, pw) = m.kernel_size, m.stride, m.padding
        sizes = dict(nInputPlane=m.in_channels, nOutputPlane=m.out_channels, kH=kh, kW=kw, dH=dh, dW=dw, padH=ph)
        return Module(f'{lib}.SpatialConvolution', padW=pw, **sizes, **tensors(name, 'weight'))

    def bn(name: str) -> Module:
        m: Any = model.get_submodule(name)
        statistics = {key: Tensor(Storage(getattr(m, key), kind)) for key in ('running_mean', 'running_var')}
        fields = dict(eps=m.eps, momentum=m.momentum, affine=True, **tensors(name, 'weight', 'bias'), **statistics)
        return Module('nn.SpatialBatchNormalization', version=2, **fields)

    def relu() -> Module:
        return Module(f'{lib}.ReLU', inplace=True, threshold=0, val=0)

    def block(name: str, m: Any, stage: str) -> Module:
        conv2 = conv(f'{stage}.conv' if m.conv2 is None else f'{name}.conv2')
        bn1, conv1, bn2 = bn(f'{name}.bn1'), conv(f'{name}.conv1'), bn(f'{name}.bn2')
        third = [bn(f'{name}.bn3'), conv(f'{name}.conv3')] if hasattr(m, 'bn3') else []
        add = Module('nn.CAddTable', inplace=True)
        if not isinstance(model, CifarResNetV2):
            branch = [conv1, bn1, relu(), conv2, bn2]
            branch += [relu(), third[1], third[0]] if third else []
            shortcut = Module('nn.Identity', train=True)
            if m.downsample is not None:
                shortcut = Module('nn.Sequential', conv(f'{name}.downsample.0'), bn(f'{name}.downsample.1'))
            fork = Module('nn.ConcatTable', Module('nn.Sequential', *branch), shortcut)
            return Module('nn.Sequential', fork, add, relu())
        branch = [conv1, bn2, relu(), conv2]
        branch += [third[0], relu(), third[1]] if third else []
        if m.downsample is None:
            branch = [bn1, relu(), *branch]
            fork = Module('nn.ConcatTable', Module('nn.Sequential', *branch), Module('nn.Identity', train=True))
            return Module('nn.Sequential', fork, add)
        shortcut = conv(f'{name}.downsample')
        if isinstance(m, PreActBottleneck):
            shortcut = Module('nn.Sequential', shortcut)
        return Module(
            'nn.Sequential', bn1, relu(), Module('nn.ConcatTable', Module('nn.Sequential', *branch), shortcut), add
        )

    def stage(name: str) -> Module:
        blocks = enumerate(model.get_submodule(f'{name}.blocks').children())
        return Module('nn.Sequential', *(block(f'{name}.blocks.{i}', m, name) for i, m in blocks))

    def average(k: int) -> Module:
        return Module(f'{lib}.SpatialAveragePooling', kH=k, kW=k, dH=1, dW=1, padH=0, padW=0, ceil_mode=False)

    fc: Any = model.get_submodule('fc')
    view = Module('nn.View', numElements=fc.in_features)
    linear = Module('nn.Linear', **tensors('fc', 'weight', 'bias'))
    if isinstance(model, CifarResNetV2):
        stages = [stage(f'layer{i}') for i in (1, 2, 3)]
        return Module('nn.Sequential', conv('conv1'), *stages, bn('norm'), relu(), average(8), view, linear)
    indices = Tensor(Storage([], 'CudaLong' if kind.startswith('Cuda') else 'Long'))
    sizes = dict(kH=3, kW=3, dH=2, dW=2, padH=1, padW=1)
    pool = Module('nn.SpatialMaxPooling', ceil_mode=False, indices=indices, **sizes)
    stages = [stage(f'layer{i}') for i in (1, 2, 3, 4)]
    return Module('nn.Sequential', conv('conv1'), bn('bn1'), relu(), pool, *stages, average(7), view, linear)


Atom = Tuple[str, Any]  # an int (i), long (q), double (d), text after its length (t) or bytes as they are (b)


class Raw:
    """A value given by its atoms."""

    def __init__(self, *atoms: Atom) -> None:
        self.atoms = atoms


# What begins an object that holds another (its second atom is its number), and what ends it. Tables and such hold it as
# the value or as the key of a number.
_OBJECT: List[Atom] = [('i', 4), ('i', 0), ('t', b'V 1')]
_ONE: List[Atom] = [('i', 1), ('d', 1.0)]
_NIL: List[Atom] = [('i', 0)]
HOLDERS: Dict[str, Tuple[List[Atom], List[Atom]]] = {
    'function': ([('i', 6), ('i', 0), ('t', b'')], []),
    'legacy_function': ([('i', 7), ('i', 0), ('t', b'')], []),
    'new_function': ([('i', 8), ('i', 0), ('t', b'')], []),
    'tensor': ([*_OBJECT, ('t', b'torch.FloatTensor'), ('i', 1), *[('q', 1)] * 3], []),
    'object': ([*_OBJECT, ('t', b'nn.Identity')], []),
    'table': ([('i', 3), ('i', 0), ('i', 1), *_ONE], []),
    'key_of_a_table': ([('i', 3), ('i', 0), ('i', 1)], _NIL),
    'vec': ([*_OBJECT, ('t', b'tds.Vec'), ('i', 1), ('i', 0)], []),
    'hash': ([*_OBJECT, ('t', b'tds.Hash'), ('i', 1), ('i', 0), *_ONE], []),
    'key_of_a_hash': ([*_OBJECT, ('t', b'tds.Hash'), ('i', 1), ('i', 0)], _NIL),
}


def serialize(value: Any) -> bytes:
    """Torch7's binary serialization."""
    return pack(atoms(value))


def pack(atoms: List[Atom]) -> bytes:
    def one(kind: str, value: Any) -> bytes:
        if kind == 't':
            return struct.pack('<i', len(value)) + value
        return value if kind == 'b' else struct.pack(f'<{kind}', value)

    return b''.join(one(*atom) for atom in atoms)


def atoms(value: Any) -> List[Atom]:
    """What the file of a value consists of. Tables and objects are written once, then referred to by their number."""
    out: List[Atom] = []
    numbers: Dict[int, int] = {}

    def put(kinds: str, *values: Any) -> None:
        out.extend(zip(kinds, values, strict=True))

    def string(s: str) -> None:
        put('t', s.encode())

    def new(type_index: int, x: Any) -> bool:
        known = id(x) in numbers
        put('ii', type_index, numbers.setdefault(id(x), len(numbers) + 1))
        return not known

    def torch_object(x: Any, name: str, version: int, body: Callable[[], None]) -> None:
        if new(4, x):
            string(f'V {version}')
            string(name)
            body()

    def tensor(x: Tensor) -> None:
        size = x.size if x.storage.values.size else ()
        stride = x.stride or [int(np.prod(size[i + 1 :])) for i in range(len(size))]
        put('i' + 'q' * (2 * len(size) + 1), len(size), *size, *stride, x.offset + 1)
        write(x.storage if size else None)

    def storage(x: Storage) -> None:
        put('qb', x.values.size, x.values.tobytes())

    def write(x: Any) -> None:
        if isinstance(x, Raw):
            out.extend(x.atoms)
        elif x is None:
            put('i', 0)
        elif isinstance(x, bool):
            put('ii', 5, x)
        elif isinstance(x, (int, float)):
            put('id', 1, x)
        elif isinstance(x, str):
            put('i', 2)
            string(x)
        elif isinstance(x, (list, dict)):
            if new(3, x):
                items = enumerate(x, start=1) if isinstance(x, list) else x.items()
                put('i', len(x))
                for key, item in items:
                    write(key)
                    write(item)
        elif isinstance(x, Module):
            torch_object(x, x.name, x.version, lambda: write(x.fields))
        elif isinstance(x, Tensor):
            torch_object(x, f'torch.{x.storage.kind}Tensor', 1, lambda: tensor(x))
        else:
            torch_object(x, f'torch.{x.kind}Storage', 1, lambda: storage(x))

    write(value)
    return out


def write(path: Path, net: Any) -> Path:
    path.write_bytes(serialize(net))
    return path

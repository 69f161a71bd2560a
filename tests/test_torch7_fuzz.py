"""Torch7 files damaged by chance, one per seed: each gives a whole state dict or is refused, whatever it holds.

A failure names its seed, and `damaged(seed)` is the content of that file. The slow test runs this file as a program, in
processes of limited memory:

    python tests/test_torch7_fuzz.py FIRST_SEED COUNT FOLDER
"""

import gzip
import json
import re
import resource
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, List
from unittest import mock

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from models import create
from torch7_writer import HOLDERS, Atom, Module, Raw, Storage, Tensor, atoms, pack, tree

from timm_sharesnet import load_torch7

MODEL = ('shawrn40_4', dict(layers=(3, 1, 1), widen_factor=1))
SECONDS = 5  # for a file of at most a few MB
MEMORY = 512 << 20  # above what the imports take

INTS = [-(2**31), -2, -1, *range(10), 32, 65, 70, 255, 10_000, 2**16, 2**30, 2**31 - 1]
LONGS = [-(2**63), -(2**62), -1, 0, 1, 2, 3, 16, 2**31, 2**32, 2**61, 2**62, 2**63 - 1]
DOUBLES = [np.nan, np.inf, -np.inf, -0.0, 0.0, 1.0, 3.0, 0.5, -1.0, 1e-320, 2.0**53, 2.0**62, 1e308, -1e308]
TEXTS = [b'A' * 5000, b'V ', b'V 1e400', b'V 1\n', b'\xff\xfe', b'\0', b'']
TEXTS += b'V,V 0,V 2,V -1,V nan,V inf,modules,weight,bias,running_std,running_var,padding,groups,v2,train'.split(b',')
TEXTS += b'torch.FloatTensor torch.FloatStorage torch.LongStorage torch.HalfTensor tds.Vec tds.Hash'.split()
TEXTS += b'nn.Sequential nn.Identity nn.Dropout cudnn.ReLU nn.SpatialConvolutionMM'.split()


class TookTooLong(BaseException):  # not an OSError as TimeoutError, nor anything that a reader catches
    pass


@lru_cache(maxsize=None)
def model(device: str) -> nn.Module:
    return create(MODEL[0], **MODEL[1]) if device == 'cpu' else timm.create_model(MODEL[0], device=device, **MODEL[1])


def chain(rng: Any) -> Raw:
    """One kind of value within another, deep in the file or in memory: a row of which each refers to the one before."""
    n = int(rng.choice([3, 20, 60, 100, 1000, 100_000], p=[0.24, 0.24, 0.14, 0.14, 0.22, 0.02]))
    by_reference, as_key, first = rng.random() < 0.5, rng.random() < 0.5, 10**6
    (kind, _, *rest), tail = HOLDERS[str(rng.choice(list(HOLDERS)))]
    nil = [('i', 0)]
    out: List[Atom] = []
    if not by_reference:
        for i in range(n):
            out += [kind, ('i', first + i), *rest]
        return Raw(*out, *nil, *tail * n)
    out += [('i', 3), ('i', first), ('i', n)]
    for i in range(1, n + 1):
        value = [kind, ('i', first + i), *rest, *([kind, ('i', first + i - 1)] if i > 1 else nil), *tail]
        out += value + nil if as_key else [('i', 1), ('d', float(i)), *value]
    return Raw(*out)


def any_value(rng: Any, modules: List[Module]) -> Any:
    ndim = int(rng.choice([1, 1, 2, 4, 8, 9, 70]))
    size = [int(n) for n in rng.choice([0, 1, 2, 3, 16, 2**40, 2**62, -1], ndim)] if rng.random() < 0.5 else [1] * ndim
    strange: Any = Raw(
        *[('i', 4), ('i', 10**7), ('t', b'V 1'), ('t', b'torch.FloatTensor'), ('i', len(size))],
        *[('q', n) for n in size],
        *[('q', int(rng.choice(LONGS))) for _ in size],
        *[('q', int(rng.choice(LONGS))), ('i', 4), ('i', 10**7 + 1), ('t', b'V 1'), ('t', b'torch.FloatStorage')],
        *[('q', 16), ('b', bytes(64))],
    )
    own = modules[rng.integers(len(modules))]
    fields = list(own.fields.values())
    choices = [
        *(None, True, False, {}, [], {'a': 1.0}, strange, strange, own, own.fields, chain(rng), chain(rng)),
        *(float(rng.choice(DOUBLES)), int(rng.integers(-2, 9)), Raw(('i', 2), ('t', TEXTS[rng.integers(len(TEXTS))]))),
        *(Tensor(Storage(rng.normal(size=int(rng.integers(40))))), fields[rng.integers(len(fields))] if fields else 0),
    ]
    return choices[rng.integers(len(choices))]


def damage_tree(rng: Any, modules: List[Module]) -> None:
    """Change a module, or what a module holds, to something that can be serialized."""
    m, other = (modules[i] for i in rng.integers(len(modules), size=2))
    key = list(m.fields)[rng.integers(len(m.fields))] if m.fields else 'x'
    change = rng.integers(8)
    if change == 0:
        m.fields[key] = any_value(rng, modules)
    elif change == 1:
        convs = [x for x in modules if x.name.endswith('SpatialConvolution')] or modules
        m = convs[rng.integers(len(convs))]
        m.fields[str(rng.choice(['bias', 'padding', 'groups', 'weight', 'version']))] = any_value(rng, modules)
    elif change == 2:
        m.fields.pop(key, None)
    elif change == 3:
        m.fields = other.fields if rng.random() < 0.5 else {**other.fields, **m.fields}
    elif change == 4:
        m.name, m.version = other.name, int(rng.integers(-1, 4))
    elif change == 5:
        tensors = [v for v in m.fields.values() if isinstance(v, Tensor)]
        for t in tensors[:1]:
            n, numel = t.storage.values.size, int(np.prod(t.size))
            if rng.random() < 0.5:
                t.offset = int(rng.choice([-1, 0, 1, 10**9, n, n - numel]))
            if rng.random() < 0.5:
                t.stride = [numel := numel // max(size, 1) for size in t.size]
                t.stride[rng.integers(len(t.size))] = int(rng.choice(LONGS))
            else:
                t.size = tuple(rng.permutation(t.size).tolist())
    elif change == 6:
        m.fields['output'] = any_value(rng, modules)  # which nobody reads
    else:
        rows = [x.fields['modules'] for x in modules if isinstance(x.fields.get('modules'), list)]
        row = rows[rng.integers(len(rows))] if rows else []
        i = int(rng.integers(len(row) + 1))
        row[i : i + int(rng.integers(3))] = [any_value(rng, modules), other, row][: int(rng.integers(4))]


def damage_atoms(rng: Any, out: List[Atom]) -> None:
    """Change numbers and text, or move parts."""
    change = rng.integers(8)
    i, j = sorted(int(i) for i in rng.integers(len(out) + 1, size=2))
    part = slice(i, min(j, i + int(rng.integers(1, 40))))
    if change == 0:
        del out[part]
    elif change == 1:
        out[j:j] = out[part]
    elif change == 2:
        out[i:i] = chain(rng).atoms
    else:
        kind = rng.choice(list('iqdtb'))
        places = [i for i, atom in enumerate(out) if atom[0] == kind]
        if not places:
            return
        i = places[rng.integers(len(places))]
        value = out[i][1]
        if kind == 'd':
            new: Any = float(rng.choice(DOUBLES))
        elif kind == 't':
            new = TEXTS[rng.integers(len(TEXTS))]
        elif kind == 'b':
            new = bytearray(value)
            k = 4 * int(rng.integers(len(value) // 4 + 1))
            new[k : k + 4] = rng.bytes(int(rng.choice([0, 4, 4, 4])))
            new = bytes(new)
        else:
            known = [out[k][1] for k in places]
            near = [value - 1, value + 1, 2 * value, known[rng.integers(len(known))]]
            bits = 32 if kind == 'i' else 64
            new = near[rng.integers(4)] if rng.random() < 0.5 else int(rng.choice(INTS if kind == 'i' else LONGS))
            new = (new + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)
        out[i] = (kind, new)


def damage_bytes(rng: Any, data: bytearray) -> None:
    i = int(rng.integers(len(data) + 1))
    change = rng.integers(4)
    if change == 0:
        del data[i:]
    elif change == 1:
        data[i:i] = rng.bytes(int(rng.integers(1, 20)))
    elif change == 2:
        del data[i : i + int(rng.integers(1, 20))]
    elif i < len(data):
        data[i] ^= 1 << int(rng.integers(8))


@lru_cache(maxsize=None)
def sound(kind: str, cudnn: bool, gradients: bool) -> List[Atom]:
    return atoms(tree(model('cpu'), kind, cudnn, gradients))


def damaged(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    kind = str(rng.choice(['Float', 'Float', 'Double', 'Half', 'Cuda']))
    cudnn, gradients = bool(rng.integers(2)), bool(rng.random() < 0.3)
    level, times = rng.integers(4), int(rng.choice([1, 1, 2, 5]))
    if level <= 1:
        net = tree(model('cpu'), kind, cudnn, gradients)
        modules = list(net.walk())
        for _ in range(times):
            damage_tree(rng, modules)
        out = atoms(net)
    else:
        out = list(sound(kind, cudnn, gradients))
    if level in (1, 2):
        for _ in range(times):
            damage_atoms(rng, out)
    data = bytearray(pack(out))
    if level == 3:
        for _ in range(times):
            damage_bytes(rng, data)
    if rng.random() < 0.1:
        data = bytearray(gzip.compress(data, 1, mtime=0))
        if rng.random() < 0.5:
            damage_bytes(rng, data)
    return bytes(data)


def is_read(path: Path) -> bool:
    """Whether a file is read, and to all that the model has. If not, the error names it and is not long."""
    try:
        state_dict = load_torch7(path, MODEL[0], **MODEL[1])
    except (ValueError, OSError) as e:
        assert re.match(re.escape(str(path)) + ' (is|does not hold) ', str(e)) and len(str(e)) < len(str(path)) + 500
        return False
    expected = model('meta').state_dict()
    assert list(state_dict) == list(expected)
    for name, value in expected.items():
        assert (state_dict[name].shape, state_dict[name].dtype) == (value.shape, value.dtype), name
        assert torch.isfinite(state_dict[name]).all(), name
    return True


def fuzz(first: int, count: int, folder: Path) -> Dict[str, Any]:
    """Try the files of some seeds. Returns how many were read, and the longest that one took in seconds."""

    def too_long(*_: Any) -> None:
        raise TookTooLong

    previous = signal.signal(signal.SIGALRM, too_long)
    read, slowest = 0, 0.0
    model('cpu')  # before timm gives the same model each time
    with mock.patch.object(timm, 'create_model', return_value=model('meta')):
        for seed in range(first, first + count):
            (folder / 'seed').write_text(str(seed))  # for those who find this process dead
            (folder / 'net.t7').write_bytes(damaged(seed))
            start = time.perf_counter()
            signal.alarm(SECONDS)
            try:
                read += is_read(folder / 'net.t7')
            except BaseException as e:
                raise AssertionError(f'seed {seed}: {type(e).__name__}: {e}') from e
            finally:
                signal.alarm(0)
            slowest = max(slowest, time.perf_counter() - start)
    signal.signal(signal.SIGALRM, previous)
    return dict(read=read, slowest=slowest)


def test_a_damaged_file_is_read_whole_or_refused(tmp_path):
    read = fuzz(0, 200, tmp_path)['read']
    assert 10 < read < 100  # little damage is to what nobody reads


@pytest.mark.slow
@pytest.mark.parametrize('first', range(0, 20_000, 2_500))
def test_no_damaged_file_takes_much_time_or_memory(first, tmp_path):
    command = [sys.executable, __file__, str(first), '2500', str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    seed = (tmp_path / 'seed').read_text() if (tmp_path / 'seed').exists() else 'none'
    assert run.returncode == 0, f'exit {run.returncode} at seed {seed}: {run.stderr[-3000:]}'
    assert json.loads(run.stdout)['read'] > 100


if __name__ == '__main__':
    first, count, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    damaged(0), model('meta').state_dict()
    size = int(re.search(r'VmSize:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = fuzz(first, count, folder)
    result['peak_mb'] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps(result))

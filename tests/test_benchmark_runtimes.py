"""Runtimes of benchmarks/deploy.py: each computes what the net does, where it is installed; shared kernels in ncnn."""

import pytest
import torch
from hub_project import ROOT
from models import error, small

from timm_sharesnet import fold, unshare

PARAM = """7767517
5 5
Input in 0 1 in
Convolution a 1 1 in x 0=2 1=3 4=1 5=1 6=36 9=1
Convolution b 1 1 x y 0=2 1=3 4=1 5=1 6=36
Convolution c 1 1 y z 0=2 1=3 4=1 5=0 6=36
InnerProduct d 1 1 z out 0=1 1=1 2=2
"""


@pytest.fixture
def runtimes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tests' / 'benchmarks'))
    import runtimes

    return runtimes


def floats(*values):
    return torch.tensor(values).numpy().tobytes()


def test_ncnn_file_is_rewritten_with_each_equal_kernel_once(runtimes, tmp_path):
    kernel, other, flag = floats(*map(float, range(36))), floats(*[0.5] * 36), bytes(4)
    biases, rest = [floats(1.0, 2.0), floats(3.0, 4.0)], flag + floats(1.0, 2.0, 3.0)
    (tmp_path / 'net.param').write_text(PARAM)
    (tmp_path / 'net.bin').write_bytes(flag + kernel + biases[0] + flag + kernel + biases[1] + flag + other + rest)
    runtimes.share_ncnn(tmp_path / 'net')
    assert (tmp_path / 'net.bin').read_bytes() == kernel + biases[0] + biases[1] + flag + other + rest
    lines = (tmp_path / 'net.param').read_text().splitlines()
    assert lines[1] == f'{len(lines) - 2} {sum(int(line.split()[3]) for line in lines[2:])}'
    assert 'MemoryData kernel0 0 1 kernel0 0=3 1=3 11=2 2=2' in lines
    assert 'Convolution b 3 1 x kernel0_b bias_b y 0=2 1=3 4=1 5=1 6=36 19=1' in lines
    assert 'Convolution c 1 1 y z 0=2 1=3 4=1 5=0 6=36' in lines


def test_ncnn_file_that_is_not_understood_is_left_alone(runtimes, tmp_path):
    (tmp_path / 'net.param').write_text(PARAM)
    (tmp_path / 'net.bin').write_bytes(bytes(10))
    with pytest.raises(ValueError, match='net.bin has 10 bytes'):
        runtimes.share_ncnn(tmp_path / 'net')
    assert (tmp_path / 'net.param').read_text() == PARAM and (tmp_path / 'net.bin').read_bytes() == bytes(10)


def test_size_counts_all_files_of_a_net_and_no_other(runtimes, tmp_path):
    (tmp_path / 'net.mlpackage').mkdir()
    for name in 'net.mlpackage/weights', 'net.bin', 'net', 'network':
        (tmp_path / name).write_bytes(bytes(10))
    assert runtimes.size_of(tmp_path / 'net') == 30


def test_missing_packages_are_named_once(runtimes):
    runtime = runtimes.Runtime((), ('torch', 'absent_runtime', 'absent_runtime.part'), None, None)
    assert runtime.missing() == ['absent_runtime']


def test_each_use_of_a_kernel_gets_a_parameter_and_nothing_else_changes(runtimes):
    model = fold(small('bottleneck'))
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    module = runtimes.exported(model, images).module()

    def kernels():
        return [node for node in module.graph.nodes if node.op == 'get_attr' and 'conv' in node.target]

    uses = sum(len(node.users) for node in kernels())
    assert len(kernels()) < uses
    runtimes.separate_uses(module)
    assert len(kernels()) == len({node.target for node in kernels()}) == uses
    with torch.no_grad():
        assert module(images).equal(model(images))


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('form', ['folded', 'twin'])
@pytest.mark.parametrize(
    'key',
    [
        pytest.param(('ncnn', 'fp32')),
        pytest.param(('ncnn-shared', 'fp32')),
        pytest.param(('mnn', 'fp32')),
        pytest.param(('litert', 'fp32')),
        pytest.param(('litert', 'int8')),
        pytest.param(('executorch', 'fp32')),
        pytest.param(('executorch', 'int8'), marks=pytest.mark.slow),
        pytest.param(('nncf', 'int8')),
        pytest.param(('aoti', 'fp32'), marks=pytest.mark.slow),
    ],
    ids='-'.join,
)
def test_runtime_computes_what_the_net_computes(runtimes, key, form, tmp_path):
    runtime, model = runtimes.RUNTIMES[key], small('bottleneck')
    for module in runtime.missing():
        pytest.importorskip(module)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    runtime.convert(fold(model if form == 'folded' else unshare(model)), images, str(tmp_path / 'net'))
    found = torch.from_numpy(runtime.load(str(tmp_path / 'net'), 1)(images.numpy()))
    with torch.no_grad():
        assert error(found, model(images)) <= (1e-2 if key[1] == 'fp32' else 0.3)

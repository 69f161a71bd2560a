"""ONNX files of deployed nets: what ONNX Runtime holds after its own optimisation, int8, fp16, and the command line."""

import copy
import errno
import sys
from functools import lru_cache
from pathlib import Path

import forks
import onnx
import pytest
import timm
import torch
import torch.nn as nn
from demo import load_images
from models import SHARED, create, error, images, kernels, kinds, save_folder, slow_but_for, small
from timm.utils import reparameterize_model

from timm_sharesnet import fold, unshare
from timm_sharesnet.cli import CommandError
from timm_sharesnet.export import export, export_onnx, inspect, main, open_session, quantize, run, session_memory
from timm_sharesnet.loading import load_model

slow = pytest.mark.slow
SIZE = (3, 32, 32)
FORMS = {
    'folded': fold,
    'folded twin': lambda model: fold(unshare(model)),
    'not folded': lambda model: model,
    "timm's reparam": reparameterize_model,
}


@pytest.fixture(scope='session')
def file(tmp_path_factory):
    """The file of a net, of a kind or by name, in one of `FORMS`: written once for all tests that read it."""

    @lru_cache(maxsize=None)
    def write(net, form):
        model = create(net) if net in SHARED else small(net)
        path = tmp_path_factory.mktemp('file') / 'net.onnx'
        export_onnx(FORMS[form](model), path, model.pretrained_cfg['input_size'] if net in SHARED else SIZE)
        return path

    return write


def computed(model: nn.Module) -> int:
    """Number of 3x3 convolutions that a forward pass computes."""
    return kernels(unshare(model))


def outputs(path: Path, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(run(open_session(path), x.numpy()))


def assert_outputs(path: Path, model: nn.Module, tolerance: float = 1e-4) -> None:
    """For one image and for two."""
    for n in 1, 2:
        x = images(model, n)
        assert error(model(x), outputs(path, x)) <= tolerance


# ---- What ONNX Runtime holds


@kinds
def test_optimised_net_that_is_folded_holds_each_shared_kernel_once(kind, file):
    model = small(kind)
    x, found = images(model), inspect(file(kind, 'folded'))
    assert (found.kernels, found.uses) == (kernels(model), computed(model))
    assert computed(model) > kernels(model)
    assert error(outputs(file(kind, 'folded'), x), model(x)) <= 1e-5


@slow_but_for('bottleneck')
def test_optimised_net_that_is_not_folded_holds_a_kernel_for_each_use_as_the_twin(kind, file):
    """What `fold` is for. If it fails, ONNX Runtime is cured."""
    model = small(kind)
    # No batch norm follows the shared convolution of a wide block: nothing is folded into it in any case.
    once = kind == 'wide'
    assert inspect(file(kind, 'not folded')).kernels == (kernels(model) if once else computed(model))
    assert inspect(file(kind, 'folded twin')).kernels == computed(model)


@slow_but_for('basic', 'preact')
def test_int8_file_holds_each_shared_kernel_once_and_agrees_with_the_twin_s(kind, file, tmp_path):
    model = small(kind)
    x = images(model, 16)
    errors, sizes = [], []
    for form, expected in ('folded', kernels(model)), ('folded twin', computed(model)):
        quantize(file(kind, form), tmp_path / 'int8.onnx', [x.numpy()])
        contents = inspect(tmp_path / 'int8.onnx')
        assert (contents.kernels, contents.uses) == (expected, computed(model))
        errors.append(error(outputs(tmp_path / 'int8.onnx', x), model(x)))
        sizes.append(contents.weight_bytes)
    assert errors[0] <= 2 * errors[1] + 0.05 and errors[1] < 0.5
    assert sizes[0] < sizes[1]


def test_file_whose_weights_are_in_a_second_one_is_quantized(tmp_path, monkeypatch):
    monkeypatch.setattr('timm_sharesnet.export.EXTERNAL_ABOVE', 0)
    model = small('wide')
    x, path = images(model), tmp_path / 'net.onnx'
    export_onnx(fold(model), path, SIZE)
    assert (tmp_path / 'net.onnx_data').exists()
    quantize(path, tmp_path / 'int8.onnx', [x.numpy()])
    assert error(outputs(tmp_path / 'int8.onnx', x), model(x)) <= 0.3


@slow_but_for('shawrn40_4', name='name', of=SHARED)
def test_each_model_takes_the_memory_of_its_own_weights(name, file):
    model = create(name)
    paths = file(name, 'folded'), file(name, 'folded twin')
    shared, twin = map(inspect, paths)
    held = [memory and memory.held for memory in map(session_memory, paths)]
    assert (shared.kernels, twin.kernels) == (kernels(model), computed(model))
    saved = twin.weight_bytes - shared.weight_bytes
    parameters = sum(p.numel() for p in unshare(model).parameters()) - sum(p.numel() for p in model.parameters())
    assert saved == pytest.approx(4 * parameters, rel=0.02)
    if held[0] is not None:
        assert held[1] - held[0] > 0.6 * saved / 2**20


@slow_but_for('bottleneck')
def test_reparam_of_timm_s_scripts_keeps_the_kernels_too(kind, file):
    assert inspect(file(kind, "timm's reparam")).kernels == kernels(small(kind))


def test_weights_beyond_16_mb_are_in_a_second_file(file):
    path = file('shawrn40_4', 'folded')
    second = path.with_name('net.onnx_data')
    assert {p.name for p in path.parent.iterdir()} == {path.name, second.name}
    assert path.stat().st_size < 1e6
    assert second.stat().st_mode == path.stat().st_mode
    assert inspect(path).bytes > 23e6
    model = create('shawrn40_4')
    x = images(model)
    torch.testing.assert_close(outputs(path, x), model(x), rtol=1e-4, atol=1e-4)


def test_files_do_not_tell_where_they_were_made(file):
    content = file('preact', 'folded').read_bytes()
    assert b'layer1.conv.weight' in content
    assert b'.py' not in content and str(Path(timm.__file__).parents[1]).encode() not in content


# ---- The command


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """60 real images in class folders, and a checkpoint of a small net as train.py writes it."""
    folder = tmp_path_factory.mktemp('export')
    pictures, labels, classes = load_images()
    for i in range(60):
        path = folder / 'images' / classes[labels[i]] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures[i].save(path)
    model = small('preact', num_classes=5)
    other = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    torch.save({'arch': model.made_by[0], 'state_dict': other, 'state_dict_ema': model.state_dict()}, folder / 'c.pth')
    return folder


NET = ['sharesnet164_cifar', '--num-classes', '5', '--model-kwargs', 'layers=(3, 3, 1)']


def test_command_writes_fp32_fp16_and_int8_of_a_checkpoint(folder, tmp_path, capsys):
    options = ['--checkpoint', str(folder / 'c.pth'), '--output', str(tmp_path / 'net.onnx'), '--fp16', '--int8']
    options += ['--calibration-dir', str(folder / 'images'), '--calibration-images', '20']
    assert main([*NET, *options]) == 0, capsys.readouterr().err
    lines = capsys.readouterr().out.splitlines()
    model = small('preact', num_classes=5)  # the averaged weights
    tolerances = {'net.onnx': 1e-4, 'net_fp16.onnx': 1e-2, 'net_quantized.onnx': 0.2}
    assert {p.name for p in tmp_path.iterdir()} == set(tolerances)
    for name, tolerance in tolerances.items():
        onnx.checker.check_model(str(tmp_path / name))
        session = open_session(tmp_path / name)
        assert (session.get_inputs()[0].name, session.get_outputs()[0].name) == ('pixel_values', 'logits')
        assert_outputs(tmp_path / name, model, tolerance)
        line = next(line for line in lines if line.startswith(f'{name}: '))
        assert f'{kernels(model)} 3x3 kernels for {computed(model)} uses' in line
    assert f'calibrating int8 on 20 of 60 images of {folder / "images"}' in lines
    assert 'of 40 others' in lines[-1]


def test_command_reads_a_local_dir(tmp_path):
    model = small('basic')
    save_folder(model, tmp_path / 'net', **model.made_by[1])
    options = ['--output', str(tmp_path / 'net.onnx'), '--img-size', '32']
    assert main([f'local-dir:{tmp_path / "net"}', *options]) == 0
    assert_outputs(tmp_path / 'net.onnx', model)


@pytest.mark.parametrize(
    'argv,complaint',
    [
        (['sharesnet55', '--output', 'o.onnx'], 'timm knows no model sharesnet55, did you mean sharesnet50'),
        (['vit_tiny_patch16_224', '--checkpoint', 'c.pth', '--output', 'o.onnx'], 'is no checkpoint of vit_tiny'),
        (['sharesnet164_cifar', '--checkpoint', 'c.pth', '--output', 'o.onnx'], '--num-classes'),
        (['sharesnet164_cifar', '--checkpoint', 'none.pth', '--output', 'o.onnx'], 'there is no file none.pth'),
        (['sharesnet164_cifar', '--checkpoint', 'bad.pth', '--output', 'o.onnx'], 'bad.pth is damaged'),
        (['sharesnet50', '--output', 'o.onnx'], 'No weights are published for sharesnet50'),
        (['sharesnet164_cifar', '--output', 'o.bin'], 'must end in .onnx'),
        (['sharesnet164_cifar', '--output', 'none/o.onnx'], 'lie in a folder that exists'),
        (['sharesnet164_cifar', '--output', 'old.onnx'], 'old.onnx exists already (--force overwrites)'),
        (['sharesnet164_cifar', '--output', 'o.onnx', '--int8'], '--int8 and --calibration-dir go together'),
        (['sharesnet164_cifar', '--output', 'o.onnx', '--int8', '--calibration-dir', 'none'], 'none'),
        (['sharesnet164_cifar', '--output', 'o.onnx', '--int8', '--calibration-dir', 'empty'], 'no images in empty'),
        (['sharesnet164_cifar', '--output', 'o.onnx', '--int8', '--calibration-dir', 'broken'], 'x.png cannot be read'),
        (['sharesnet164_cifar', '--output', 'o.onnx', '--img-size', '0'], 'images of (3, 0, 0)'),
        (['sharesnet164_cifar', '--output', 'o.onnx', '--img-size', '-5'], 'images of (3, -5, -5)'),
        (['sharesnet164_cifar', '--output', 'o.onnx', '--model-kwargs', 'colour=3'], 'colour'),
    ],
)
def test_command_refuses_in_one_line_and_leaves_nothing(folder, tmp_path, monkeypatch, capsys, argv, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'c.pth').write_bytes((folder / 'c.pth').read_bytes())
    (tmp_path / 'bad.pth').write_bytes(b'PK not a checkpoint')
    (tmp_path / 'old.onnx').write_bytes(b'old')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'broken' / 'cat').mkdir(parents=True)
    (tmp_path / 'broken' / 'cat' / 'x.png').write_bytes(b'no image')
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.startswith('export: ') and error.count('\n') == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert (tmp_path / 'old.onnx').read_bytes() == b'old'


def test_force_replaces_the_files_of_before(tmp_path):
    (tmp_path / 'net.onnx').write_bytes(b'old')
    (tmp_path / 'net.onnx_data').write_bytes(b'old weights')
    list(export(small('wide'), tmp_path / 'net.onnx', force=True))
    assert {p.name for p in tmp_path.iterdir()} == {'net.onnx'}
    onnx.checker.check_model(str(tmp_path / 'net.onnx'))


def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules['timm_sharesnet.export'], 'fold', lambda model: small('preact'))
    with pytest.raises(CommandError, match='differs from the net'):
        list(export(small('wide'), tmp_path / 'net.onnx'))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'to',
    [
        torch.float16,
        pytest.param(torch.bfloat16, marks=slow),
        torch.float64,
        pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')),
    ],
)
def test_a_net_of_another_precision_or_device_is_written_in_fp32_and_not_changed(to, tmp_path):
    model = small('wide').to(to)
    before = copy.deepcopy(model.state_dict())
    list(export(model, tmp_path / 'net.onnx'))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert_outputs(tmp_path / 'net.onnx', model.to('cpu', torch.float32))
    types = {tensor.data_type for tensor in onnx.load(tmp_path / 'net.onnx').graph.initializer}
    assert types <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}  # whole numbers are shapes


def without_values(part: str) -> nn.Module:
    model = small('wide')
    model.get_submodule(part).to('meta')
    return model


NO_VALUES = 'on the meta device and has no values to write: load its weights first'
A_LIST = 'the net gives a list, and a file is written of one that gives a tensor'


@pytest.mark.parametrize(
    'make, size, complaint',
    [
        (lambda: without_values(''), SIZE, NO_VALUES),
        (lambda: without_values('norm'), SIZE, NO_VALUES),
        (lambda: small('preact', features_only=True), SIZE, A_LIST),
        (lambda: small('wide').half(), (1, 32, 32), r'does not take images of \(1, 32, 32\): .*to have 3 channels'),
    ],
    ids=['no values', 'a part without values', 'several outputs', 'images of another size'],
)
def test_a_net_that_cannot_be_written_is_refused_and_nothing_written(tmp_path, make, size, complaint):
    with pytest.raises(CommandError, match=complaint):
        list(export(make(), tmp_path / 'net.onnx', size))
    assert not list(tmp_path.iterdir())


def test_a_net_of_one_channel_is_written_for_its_images(tmp_path):
    list(export(small('wide', in_chans=1), tmp_path / 'net.onnx'))
    assert open_session(tmp_path / 'net.onnx').get_inputs()[0].shape[1:] == [1, 32, 32]


@pytest.mark.parametrize(
    'function,error,message',
    [
        ('os.replace', OSError(errno.ENOSPC, 'No space left on device'), 'No space left on device'),
        ('onnx.save', OSError(), 'OSError'),
    ],
)
def test_a_full_disk_is_said_in_one_line_and_nothing_is_left(
    folder, tmp_path, monkeypatch, capsys, function, error, message
):
    def fail(*_, **__):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(function, fail)
    assert main([*NET, '--checkpoint', str(folder / 'c.pth'), '--output', 'net.onnx']) == 2
    assert capsys.readouterr().err == f'export: net.onnx: {message}\n'
    assert not list(tmp_path.iterdir())


def test_what_onnx_runtime_cannot_do_is_said_with_the_folder_that_may_be_full(tmp_path):
    (tmp_path / 'bad.onnx').write_bytes(b'no model')
    with pytest.raises(CommandError, match='^bad.onnx cannot be optimised, with temporary files in .*Protobuf'):
        inspect(tmp_path / 'bad.onnx')
    with pytest.raises(CommandError, match='^bad.onnx cannot be quantized, with temporary files in '):
        quantize(tmp_path / 'bad.onnx', tmp_path / 'int8.onnx', [images(small('wide')).numpy()])
    assert [path.name for path in tmp_path.iterdir()] == ['bad.onnx']


def test_missing_packages_are_named_with_the_extra(tmp_path):
    code = "import sys; sys.modules['onnxscript'] = None; from timm_sharesnet.export import main; sys.exit(main())"
    result = forks.run(['-c', code, 'sharesnet164_cifar', '--output', tmp_path / 'net.onnx'])
    assert result.returncode == 2
    assert "onnxscript is not installed: pip install 'timm-sharesnet[onnx]'" in result.stderr


def test_averaged_weights_are_preferred(folder):
    model = load_model('sharesnet164_cifar', folder / 'c.pth', 5, model_kwargs={'layers': (3, 3, 1)})
    assert torch.equal(model.conv1.weight, small('preact', num_classes=5).conv1.weight)

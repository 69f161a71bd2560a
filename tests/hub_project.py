"""A copy of what the scripts of hub/ read and write, so that no test touches the checkout, and fixtures of it."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch

ROOT = Path(__file__).parent.parent
NAME = 'sharesnet164_cifar.cpu_c10'
sys.path.insert(0, str(ROOT / 'hub'))  # the tests import the scripts from the checkout


def copy_project(target):
    shutil.copytree(ROOT / 'hub', target / 'hub', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copytree(ROOT / 'timm_sharesnet' / 'weights', target / 'timm_sharesnet' / 'weights')
    shutil.copyfile(ROOT / 'timm_sharesnet' / 'weights.json', target / 'timm_sharesnet' / 'weights.json')
    (target / 'tests').mkdir()
    (target / 'tests' / 'data').symlink_to(ROOT / 'tests' / 'data')
    return target


@pytest.fixture
def project(tmp_path):
    """What the scripts read and write, copied."""
    return copy_project(tmp_path / 'project')


@pytest.fixture
def scripts(project, monkeypatch):
    """Let the scripts, imported from the checkout, work on the copy. Returns it as they see it."""
    import catalog

    monkeypatch.setattr(catalog, 'OURS', catalog.Shelf(project / 'hub', project / 'timm_sharesnet'))
    return catalog.OURS


@pytest.fixture
def no_memory(scripts, monkeypatch):
    """Do not measure the memory of ONNX sessions, each in a process of its own."""
    from timm_sharesnet.export import Memory

    monkeypatch.setattr('build.session_memory', lambda _: Memory(2.0, 1.0, 3.0))


@pytest.fixture
def any_onnx(scripts, monkeypatch):
    """Take the project's ONNX file in place of a net's own, which takes long to write and open."""

    def write_onnx(_model, _dataset, target, _batches):
        shutil.copyfile(ROOT / 'hub' / NAME / 'onnx' / 'model.onnx', target / 'model.onnx')

    monkeypatch.setattr('build.write_onnx', write_onnx)
    monkeypatch.setattr('build.measure_session', lambda _: {'kernels': 7, 'session': None})


def read_manifest(path, name=NAME):
    """The entry of manifest.json below a directory."""
    return json.loads((path / 'manifest.json').read_text())[name]


def read_files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def snapshot(project):
    """Contents of all files but compiled ones and the lock."""
    folders = [project / 'hub', project / 'timm_sharesnet']
    files = [p for folder in folders for p in folder.rglob('*') if p.is_file() and '__pycache__' not in p.parts]
    files = [p for p in files if p.name != '.lock']
    return {str(p): p.read_bytes() for p in files}


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def snippets(card, language='python'):
    """The code of a card's text."""
    return re.findall(rf'```{language}\n(.*?)\n```', card, re.S)


def edit_json(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def small_net(monkeypatch, **kwargs):
    """Make sharesnet164_cifar a net of three blocks a stage instead of 18, of which ONNX files are made in seconds.

    Returns one with random weights.
    """
    from catalog import NETS
    from timm.models import _registry

    from timm_sharesnet import resnetv2

    def sharesnet164_cifar(pretrained=False, **kwargs):
        args = {'block': resnetv2.PreActBottleneck, 'layers': (3, 3, 3), **kwargs}
        return resnetv2._create_resnetv2_cifar('sharesnet164_cifar', pretrained, **args)

    monkeypatch.setitem(_registry._model_entrypoints, 'sharesnet164_cifar', sharesnet164_cifar)
    counts = []
    for rate in (1.0, 0.0):
        model = timm.create_model('sharesnet164_cifar', share_rate=rate)
        counts.append(sum(p.numel() for p in model.parameters()))
    net = NETS['sharesnet164_cifar']._replace(parameters=counts[0], twin_parameters=counts[1])
    monkeypatch.setitem(NETS, 'sharesnet164_cifar', net)
    torch.manual_seed(0)
    return timm.create_model('sharesnet164_cifar', **kwargs)


def save(path, state_dict):
    torch.save({'state_dict': state_dict}, path)
    return path


def release(path):
    """What the folder of a copy is."""
    import catalog

    return catalog.parse(path.name, catalog.OURS)


@pytest.fixture
def run_imported(capsys):
    """Run an imported script: exit code, output, lines of standard error."""

    def run(script, *argv):
        capsys.readouterr()
        try:
            code = __import__(script).main([*map(str, argv)])
        except SystemExit as e:  # of --help
            code = e.code
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return run


@pytest.fixture
def run(run_imported):
    return run_imported


@pytest.fixture
def built(run_imported):
    """Run build.py, which must find nothing wrong. Returns its output."""

    def built(*argv):
        code, out, err = run_imported('build', *argv)
        assert (code, err) == (0, [])
        return out

    return built


@pytest.fixture
def refused(scripts, run_imported):
    """Run build.py, which must refuse it with one line that says so, and write nothing. Returns the line."""

    def refused(message, *argv):
        before = snapshot(scripts.path.parent)
        code, out, err = run_imported('build', *argv)
        assert (code, out, len(err)) == (2, '', 1) and err[0].startswith('build.py: ') and message in err[0], err
        assert snapshot(scripts.path.parent) == before
        return err[0]

    return refused

"""hub/check.py finds what is wrong with a folder and names it."""

import functools
import os
import shutil
import subprocess
import sys
from collections import Counter

import catalog
import check
import folder
import pytest
import torch
import yaml
from hub_project import NAME, ROOT, edit, edit_json, flip_last_byte, read_manifest, release, snapshot
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures('scripts')


@pytest.fixture
def unloaded(monkeypatch):
    """Without loading any model, which is slow, and tested by itself."""
    monkeypatch.setattr(check, 'model_faults', lambda *_: [])
    monkeypatch.setattr(check, 'session_faults', lambda *_: [])


@pytest.fixture
def path(project):
    return project / 'hub' / NAME


def test_missing_onnx_runtime_is_told_before_anything_is_verified(path, run, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    error = "check.py: onnxruntime is not installed: pip install 'timm-sharesnet[onnx]'"
    assert run('check', path) == (2, '', [error])


def test_tracked_weights_stay_under_80_mb():
    command = 'git ls-files -z --cached --others --exclude-standard *.safetensors *.onnx *.onnx_data'.split()
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        pytest.skip('not a git checkout')
    files = [ROOT / name for name in result.stdout.split('\0') if name]
    assert files and sum(file.stat().st_size for file in files) < 80e6


def in_json(name, *keys, **values):
    """Set values of what lies below the keys; `...` takes one out."""

    def change(data):
        for key in keys:
            data = data[key]
        data.update(values)
        for key in [key for key, value in data.items() if value is ...]:
            del data[key]

    return lambda path: edit_json(path / name, change)


in_config = functools.partial(in_json, 'config.json')
in_manifest = functools.partial(in_json, '../manifest.json', NAME)
in_onnx = functools.partial(in_manifest, 'onnx', 'files', 'model.onnx')
in_pin = functools.partial(in_json, '../../timm_sharesnet/weights.json', NAME)


def in_card(old, new):
    return lambda path: edit(path / 'README.md', old, new)


def flip(name):
    return lambda path: flip_last_byte(path / name)


def write(name, text=''):
    return lambda path: (path / name).write_text(text)


def truncate(name):
    return lambda path: os.truncate(path / name, 1000)


def unlink(name):
    return lambda path: (path / name).unlink()


def link(name, moved):
    return lambda path: (path / name).rename(path / moved) and (path / name).symlink_to(path / moved)


W, ARGS = 'model.safetensors', "config.json has model_args {'in_chans': 3, 'global_pool': 'avg'"
DAMAGE = {
    'a flipped byte': (flip(W), 'model.safetensors has the SHA-256 '),
    'a truncated file': (truncate(W), 'model.safetensors has 1,000 bytes, weights.json says 3,902,048'),
    'no weights': (unlink(W), 'model.safetensors is missing'),
    'no card': (unlink('README.md'), 'README.md is missing'),
    'a pickle': (write('pytorch_model.bin'), 'pytorch_model.bin does not belong there'),
    'a folder': (lambda p: (p / '.cache').mkdir(), '.cache does not belong there'),
    'a link': (link('curves.png', 'x'), 'curves.png does not belong there'),
    'no provenance': (unlink('training.json'), 'it does not tell how the weights came about'),
    'a path': (in_json('training.json', how='/home/me/runs/last.pth'), 'training.json: how is not in plain words'),
    'broken provenance': (write('training.json', '{'), 'training.json cannot be read'),
    'another seed': (in_json('training.json', seed=7), 'seed: the manifest says 0, the record 7'),
    'no curves': (unlink('curves.png'), 'curves.png is missing'),
    'broken curves': (write('curves.png', 'PNG'), 'provenance cannot be verified'),
    'another architecture': (
        in_config(architecture='resnet164_cifar'),
        "config.json has architecture 'resnet164_cifar' instead of 'sharesnet164_cifar'",
    ),
    'another tag': (in_config('pretrained_cfg', tag='x_c10'), "config.json has tag 'x_c10' instead of 'cpu_c10'"),
    'other labels': (in_config(label_names=catalog.DATASETS['c10'].names()[::-1]), 'config.json has label_names'),
    'what transformers would pass twice': (
        in_config('model_args', num_classes=10),
        f"{ARGS}, 'num_classes': 10}} instead of {{'in_chans'",
    ),
    'other arguments': (
        in_config('model_args', act_layer='silu'),
        f"{ARGS}, 'act_layer': 'silu'}} instead of {{'in_chans'",
    ),
    'a pooling that only the config has for information': (
        in_manifest('model_args', global_pool='max'),
        f"{ARGS}}} instead of {{'in_chans': 3, 'global_pool': 'm",
    ),
    'arguments of what is loaded by name': (
        in_manifest('model_args', share_rate=0.5),
        'weights.json has a pin or "packaged", by which they would load without `share_rate=0.5`',
    ),
    'other labels for transformers.js': (
        in_config(id2label={'0': 'cat'}),
        "config.json has id2label {'0': 'cat'} instead",
    ),
    'weights beside the ONNX file': (
        in_config(**{'transformers.js_config': {'use_external_data_format': {'model.onnx': 1}}}),
        'config.json has 1 keys that build.py does not write',
    ),
    'no preprocessing for transformers.js': (
        unlink('preprocessor_config.json'),
        'preprocessor_config.json is missing',
    ),
    'other preprocessing for transformers.js': (
        in_json('preprocessor_config.json', image_processor_type='ViTImageProcessor', resample=3),
        'preprocessor_config.json is not as build.py writes it: image_processor_type, resample',
    ),
    'another hash': (in_config(sha256='0'), "config.json has sha256 '0' instead"),
    'a source': (
        in_config('pretrained_cfg', url='https://example.org/x.bin'),
        'config.json must not name a source of weights: url',
    ),
    'broken config': (write('config.json', '{'), 'config.json is not valid'),
    'arguments in the card': (
        in_card('| Parameters |', '| Arguments (`model_args`) | `x=1` |\n| Parameters |'),
        'README.md: line 54 is not one that build.py writes',
    ),
    'a second row for the accuracy': (
        in_card('| **this model** |', '| **this model** | 99.31 % | - |  |\n| **this model** |'),
        'README.md: line 69 is not one that build.py writes',
    ),
    'an addition to the metadata': (
        in_card('license: apache-2.0', 'license: apache-2.0\nbase_model: foo/bar'),
        'README.md: line 6 is not one that build.py writes',
    ),
    'broken manifest': (write('../manifest.json', '{'), 'manifest.json is not valid'),
    'no entry': (write('../manifest.json', '{}'), 'no entry in manifest.json'),
    'no pin': (write('../../timm_sharesnet/weights.json', '{}'), 'no entry in weights.json'),
    'half an entry': (in_manifest(sample=...), 'no valid entry in manifest.json: sample is missing or unknown'),
    'other data': (in_manifest(data='CIFAR-100'), 'data: the manifest says CIFAR-100, the tag CIFAR-10'),
    'another hash in the package': (in_pin(sha256='0' * 64), f'weights.json says {"0" * 64}'),
    'a pin of another repository': (
        in_pin(repo='x/y', revision='a' * 40),
        f'weights.json pins x/y@{"a" * 40}, not timm-sharesnet/{NAME} at a full commit',
    ),
    'a pin that can move': (
        in_pin(repo=f'timm-sharesnet/{NAME}', revision='main'),
        f'weights.json pins timm-sharesnet/{NAME}@main',
    ),
    'a flipped byte in ONNX': (flip('onnx/model.onnx'), 'onnx/model.onnx has the SHA-256 '),
    'a truncated ONNX file': (truncate('onnx/model.onnx'), 'onnx/model.onnx has 1,000 bytes, the manifest says '),
    'int8 in place of fp32': (
        lambda p: shutil.copyfile(p / 'onnx/model_quantized.onnx', p / 'onnx/model.onnx'),
        'onnx/model.onnx has ',
    ),
    'no int8': (unlink('onnx/model_quantized.onnx'), 'onnx/model_quantized.onnx is missing'),
    'no ONNX at all': (lambda p: shutil.rmtree(p / 'onnx'), 'onnx/ is missing'),
    'another ONNX file': (write('onnx/model_fp16.onnx'), 'onnx/model_fp16.onnx does not belong there'),
    'a folder in onnx/': (lambda p: (p / 'onnx/x').mkdir(), 'onnx/x does not belong there'),
    'a link to ONNX': (link('onnx/model.onnx', 'x'), 'onnx/model.onnx does not belong there'),
    'a link to the folder': (link('onnx', '../x'), 'onnx does not belong there'),
    'half an ONNX entry': (in_onnx(kernels=...), 'onnx/model.onnx: kernels is missing or unknown in the manifest'),
    'no fp32 in the manifest': (
        in_manifest('onnx', 'files', **{'model.onnx': ...}),
        'onnx: the manifest must have model.onnx',
    ),
    'no twin': (in_manifest('onnx', twin=None), "the manifest has [] of the twin's files"),
    'an impossible session': (in_onnx('session', held=99.9), 'onnx/model.onnx: a session of '),
    'another accuracy of fp32': (
        in_onnx('accuracy', top1=95.31),
        'onnx/model.onnx: the top-1 is 95.31 %, that of model.safetensors 94.31 %',
    ),
}
# What a line of the card has, and what else it says then
CARD = {
    'accuracy': ('| **this model** | 94.31 %', '| **this model** | 95.31 %'),
    'accuracy in the metadata': ('value: 0.9431', 'value: 0.9531'),
    'parameters': ('| Parameters | 929,114', '| Parameters | 829,114'),
    "the twin's accuracy": ('same recipe | not measured', 'same recipe | 94.50 %'),
    'license': ('license: apache-2.0', 'license: mit'),
    'data set in the metadata': ('type: uoft-cs/cifar10', 'type: uoft-cs/cifar100'),
    'broken metadata': ('license: apache-2.0', 'license: ['),
    'accuracy of int8': ('| 94.37 % | 7 |', '| 94.97 % | 7 |'),
    "the size of the twin's file": ("its unshared twin's, fp32 | 6", "its unshared twin's, fp32 | 9"),
    'a file that the manifest does not have': ('| `onnx/model.onnx` |', '| `onnx/model_fp16.onnx` |'),
}


def assert_named(damage, message, project, path, run):
    damage(path)
    before = snapshot(project)
    code, _, err = run('check', path)
    assert code == 2 and any(message in line for line in err), err
    assert snapshot(project) == before


@pytest.mark.parametrize('case', DAMAGE)
def test_damage_is_named(unloaded, project, path, run, case):
    assert_named(*DAMAGE[case], project, path, run)


@pytest.mark.parametrize(('old', 'new'), CARD.values(), ids=CARD)
def test_line_of_the_card_that_says_something_else_is_named(unloaded, project, path, run, old, new):
    line = next(line for line in (path / 'README.md').read_text().splitlines() if old in line)
    assert_named(in_card(old, new), f'{NAME}: README.md does not have the line: {line}', project, path, run)


@pytest.mark.parametrize(
    ('damage', 'message'),
    {
        'missing': (lambda t: t.pop('norm.weight'), 'norm.weight is missing'),
        'extra': (lambda t: t.update(x=torch.zeros(1)), 'x is not part of the model'),
        'shape': (lambda t: t.update({'fc.bias': torch.zeros(9)}), 'fc.bias has shape (9,) instead of (10,)'),
        'value': (lambda t: t['fc.bias'].fill_(torch.nan), 'fc.bias has values that are not finite'),
        'type': (
            lambda t: t.update({'fc.bias': torch.zeros(10).bfloat16()}),
            'model.safetensors is bfloat16 and float32, the manifest says float32',
        ),
    }.values(),
)
def test_wrong_tensors_are_named(path, damage, message):
    tensors = load_file(path / 'model.safetensors')
    damage(tensors)
    save_file(tensors, path / 'model.safetensors')
    assert any(message in fault for fault in check.model_faults(release(path), sample=False))


def test_wrong_figures_and_preprocessing_are_named(path, monkeypatch):
    recorded = read_manifest(path.parent)['sample']['wrong']
    monkeypatch.setattr('folder.wrong_in_sample', lambda *_: recorded)  # slow; the whole is run above
    assert check.model_faults(release(path)) == []
    in_manifest(parameters=1, gmacs=9.9, dtype='float16')(path)
    in_config('pretrained_cfg', mean=[0.5, 0.5, 0.5])(path)
    assert check.model_faults(release(path)) == [
        'model.safetensors is float32, the manifest says float16',
        'config.json has mean [0.5, 0.5, 0.5] in pretrained_cfg, the package (0.4914, 0.4822, 0.4465)',
        'parameters: measured 929,114, the manifest says 1',
        'gmacs: measured 0.2445, the manifest says 9.9',
        'parameters: the manifest says 1, the original 929,114',
    ]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'gp': 'max'}, "gp: args.yaml says 'max', config.json 'avg': correct the wrong one"),
        (
            {'model_kwargs': {'act_layer': 'silu'}},
            "model_args: the manifest says {}, args.yaml and config.json {'act_layer': 'silu'}",
        ),
    ],
)
def test_net_without_arguments_that_it_was_trained_with_is_named(unloaded, path, options, message):
    (path / 'args.yaml').write_text(yaml.safe_dump({'model': 'sharesnet164_cifar', **options}))
    assert message in check._collect(check.trained_faults, release(path))


def change_graph(change):
    """A copy of the ONNX file with something changed."""

    def damage(file):
        import onnx

        proto = onnx.load(file)
        change(proto.graph)
        onnx.save(proto, file)

    return damage


def split_kernel(graph):
    """Give one use of a shared kernel a copy of its own."""
    convs = [node for node in graph.node if node.op_type == 'Conv']
    first, second = [node for node in convs if node.input[1].endswith('layer1.conv.weight')][:2]
    copy = graph.initializer.add()
    copy.CopyFrom(next(tensor for tensor in graph.initializer if tensor.name == first.input[1]))
    copy.name = second.input[1] = 'copy'


def change_bias(graph):
    import onnx

    tensor = next(tensor for tensor in graph.initializer if tensor.name.endswith('fc.bias'))
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + 0.01, tensor.name))


@pytest.mark.parametrize(
    ('damage', 'message'),
    {
        'invalid': (lambda file: file.write_bytes(file.read_bytes()[:-1000]), 'onnx/model.onnx cannot be verified: '),
        'int8': (
            lambda file: shutil.copyfile(file.with_name('model_quantized.onnx'), file),
            'onnx/model.onnx differs from model.safetensors by ',
        ),
        'values': (change_graph(change_bias), 'onnx/model.onnx differs from model.safetensors by '),
        'kernels': (
            change_graph(split_kernel),
            'onnx/model.onnx has 8 3x3 kernels in ONNX Runtime, the manifest says 7, the net has 7',
        ),
        'a path': (
            change_graph(lambda graph: setattr(graph, 'doc_string', 'File "/home/me/net.py", line 1')),
            'onnx/model.onnx names a file of the machine that wrote it: /home/',
        ),
    }.values(),
)
def test_onnx_file_that_is_not_the_net_s_is_named(path, monkeypatch, damage, message):
    """Whatever the manifest says of its bytes."""
    recorded = read_manifest(path.parent)['onnx']
    wrong = recorded['files']['model_quantized.onnx']['sample']['wrong']
    monkeypatch.setattr('folder.wrong_in_sample', lambda *_: wrong)  # slow; the whole is run above
    damage(path / 'onnx' / 'model.onnx')
    faults = check.session_faults(release(path))
    assert len(faults) == 1 and faults[0].startswith(message), faults


def test_int8_that_classifies_otherwise_and_wrong_kernels_of_the_twin_are_named(path, monkeypatch):
    in_manifest('onnx', 'twin', 'model.onnx', kernels=7)(path)
    monkeypatch.setattr('folder.wrong_in_sample', lambda *_: [0, 1, 2, 3])
    int8, twin = check.session_faults(release(path))
    assert int8.startswith('onnx/model_quantized.onnx is wrong: 50 images of cifar10_test_1000 are not classified as')
    assert twin == "onnx, the twin's model.onnx has 55 3x3 kernels, the manifest says 7"


def test_at_most_three_images_may_be_classified_otherwise():
    recorded = {'images': 'cifar10_test_1000', 'wrong': [1, 2, 3, 4]}
    assert check.sample_faults([1, 2, 5], recorded, catalog.DATASETS['c10']) == []  # 3, 4 and 5
    faults = check.sample_faults([1, 5, 6], recorded, catalog.DATASETS['c10'])
    assert faults == [
        '5 images of cifar10_test_1000 are not classified as the manifest says (3 may be so): '
        '2, 3, 4, 5, 6; 3 wrong instead of 4'
    ]
    assert check.sample_faults([], None, catalog.DATASETS['c10']) == [
        'the manifest does not have the sample cifar10_test_1000'
    ]


@pytest.mark.parametrize('dataset', ['c10', 'c100'])
def test_sample_has_1000_images_evenly_of_all_classes(dataset):
    dataset = catalog.DATASETS[dataset]
    images, labels = zip(*folder.load_sample(dataset), strict=True)
    assert len(images) == 1000 and {image.size for image in images} == {(32, 32)}
    assert set(Counter(labels).values()) == {1000 // dataset.classes} and max(labels) == dataset.classes - 1
    assert len(set(dataset.names())) == dataset.classes


def test_folder_may_lie_anywhere(unloaded, path, tmp_path, run, monkeypatch):
    shutil.move(path, tmp_path / NAME)
    monkeypatch.chdir(tmp_path)
    for argument in (NAME, tmp_path / NAME, f'./{NAME}/'):
        assert run('check', argument) == (0, f'{NAME}: ok\n', [])
    assert 'no folder' in run('check', 'wrn28_4.x_c10')[2][0]
    assert 'is not ARCH.TAG' in run('check', tmp_path)[2][0]


def test_untracked_weights_need_not_be_there(path, run):
    (path / 'model.safetensors').unlink()
    with (path.parent / '.gitignore').open('a') as file:
        file.write(f'/{NAME}/model.safetensors\n')
    assert run('check') == (0, f'{NAME}: ok, model.safetensors not here\n', [])
    edit(path / 'README.md', '94.31 %', '94.32 %')  # the rest is verified all the same
    assert run('check')[0] == 2


def test_what_the_folders_have_in_common_is_verified(unloaded, project, path, run, monkeypatch):
    flip_last_byte(project / 'timm_sharesnet' / 'weights' / f'{NAME}.safetensors')
    (project / 'timm_sharesnet' / 'weights' / 'x.safetensors').touch()
    (project / 'hub' / 'wrn28_4.x_c10').mkdir()
    monkeypatch.setattr('catalog.TRACKED_BYTES', 7e6)
    files = [path / 'model.safetensors', *(path / 'onnx').iterdir()]
    total = sum(file.stat().st_size for file in [files[0], *files])  # the weights are there twice
    code, _, err = run('check')
    assert code == 2
    assert err == [
        f'check.py: the tracked weights have {total:,} bytes, 7,000,000 are the limit',
        f'check.py: {NAME}.safetensors in the package does not have the SHA-256 of weights.json',
        'check.py: x.safetensors in the package is not "packaged" in weights.json',
        'check.py: wrn28_4.x_c10: no entry in manifest.json',
        'check.py: wrn28_4.x_c10: no entry in weights.json',
    ]

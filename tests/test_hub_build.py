"""hub/build.py makes a folder of what train.py or the importer left, or writes nothing at all."""

import argparse
import hashlib
import json
import shutil
import sys
import threading
from pathlib import Path

import build
import catalog
import check
import folder
import import_torch7
import models
import pytest
import timm
import torch
import yaml
from hub_project import NAME, edit, edit_json, read_files, read_manifest, release, save, small_net, snapshot, snippets
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torchvision.transforms.functional import to_tensor

ARGS = {
    'model': 'shawrn40_4',
    'data_dir': '/home/me/data/cifar10',
    'dataset': 'torch/cifar10',
    'initial_checkpoint': '../old runs/last.pth.tar',
    'resume': '',
    'kd_model_name': 'local-dir:/home/me/teacher',
    'epochs': 3,
    'lr': 0.1,
    'bce_loss': False,
    'amp': False,
    'amp_dtype': 'float16',
    'sched': 'multistep',
    'decay_milestones': [2],
    'decay_epochs': 90,
    'smoothing': 0.0,
    'opt_kwargs': {'filter_bias_and_bn': False},
    'seed': 42,
}
SUMMARY = """epoch,train_loss,lr
0,2.1,0.1
1,1.9,1.5,40.0,90.0,0.05
2,1.7,0.01
"""


@pytest.fixture(autouse=True)
def few_images(scripts, monkeypatch):
    load_sample = folder.load_sample
    monkeypatch.setattr(folder, 'load_sample', lambda dataset: load_sample(dataset)[:40])  # 1,000 images are slow


def constant_model(name, label, seed=0):
    """A model that takes every image for one class."""
    torch.manual_seed(seed)
    model = timm.create_model(name)
    torch.nn.init.zeros_(model.fc.weight)
    torch.nn.init.zeros_(model.fc.bias).data[label] = 1.0
    return model


@pytest.fixture
def train_run(tmp_path):
    """Write an output directory as train.py leaves it, given the labels that both sets of weights predict."""

    def write(last, ema):
        path = tmp_path / 'train run'
        path.mkdir()
        args = argparse.Namespace(**ARGS)
        checkpoint = {'epoch': 2, 'arch': ARGS['model'], 'args': args, 'optimizer': {'lr': 0.1}, 'metric': 40.0}
        state_dict = constant_model('shawrn40_4', last, seed=1).state_dict()
        checkpoint['state_dict'] = {f'_orig_mod.{k}': v for k, v in state_dict.items()}
        checkpoint['state_dict_ema'] = constant_model('shawrn40_4', ema, seed=2).state_dict()
        torch.save(checkpoint, path / 'last.pth.tar')
        torch.save({'state_dict': {}}, path / 'model_best.pth.tar')  # not the one to take
        (path / 'args.yaml').write_text(yaml.safe_dump(ARGS))
        (path / 'summary.csv').write_text(SUMMARY)
        return path, state_dict, checkpoint['state_dict_ema']

    return write


@pytest.fixture
def data(tmp_path):
    """A test split of 13 real images, three of them cats (3), two ships (8)."""
    dataset = catalog.DATASETS['c10']
    left = dict.fromkeys(range(10), 1) | {3: 3, 8: 2}
    for i, (image, label) in enumerate(folder.load_sample(dataset)):
        if left[label]:
            left[label] -= 1
            path = tmp_path / 'data' / 'test' / dataset.names()[label] / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    assert not any(left.values())
    return tmp_path / 'data'


@pytest.mark.parametrize(
    ('last', 'ema', 'better'), [(8, 3, 'EMA'), pytest.param(3, 8, 'not averaged', marks=pytest.mark.slow)]
)
def test_train_run_becomes_a_folder_with_the_better_weights(
    project, train_run, data, no_memory, built, request, last, ema, better
):
    if better == 'EMA':
        request.getfixturevalue('any_onnx')
    path, *state_dicts = train_run(last, ema)
    name = 'shawrn40_4.test_c10'
    out = built(path, '--model', name, '--data-dir', data)
    folder = project / 'hub' / name
    files = {'model.safetensors', 'config.json', 'README.md', 'args.yaml', 'summary.csv', 'curves.png', 'onnx'}
    files.add('preprocessor_config.json')
    assert {path.name for path in folder.iterdir()} == files

    # 23 MB of fp32, so fp16; nothing but the better weights
    expected = state_dicts[better == 'EMA']
    found = load_file(folder / 'model.safetensors')
    assert found.keys() == expected.keys()
    for k, v in expected.items():
        assert torch.equal(found[k], v.half() if v.is_floating_point() else v)
    with safe_open(folder / 'model.safetensors', framework='pt') as file:
        assert file.metadata() == {'format': 'pt'}

    entry = read_manifest(project / 'hub', name)
    assert entry['accuracy'] == {'top1': round(300 / 13, 4), 'top5': entry['accuracy']['top5'], 'images': 13}
    other = {'EMA': 'not averaged', 'not averaged': 'EMA'}[better]
    assert entry['picked'] == f'{better} (top-1 23.08 %, {other} 15.38 %)'
    assert entry['picked'] in out
    assert (entry['parameters'], entry['dtype'], entry['seed'], entry['data']) == (5852634, 'float16', 42, 'CIFAR-10')

    args = yaml.safe_load((folder / 'args.yaml').read_text())
    cut = {'initial_checkpoint': 'last.pth.tar', 'kd_model_name': 'local-dir:'}
    assert args == {key: value for key, value in (ARGS | cut).items() if key not in ('data_dir', 'dataset')}
    text = (folder / 'README.md').read_text()
    assert 'its unshared twin `wrn40_4`, same recipe | not measured' in text
    assert '| **this model** | 23.08 % |' in text and '| WRN-40-4, shared | 94.90 % |' in text
    assert '| `epochs` | 3 |' in text and '| `smoothing` | 0.0 |' in text and '| `decay_milestones` | [2] |' in text
    assert not any(option in text for option in ('bce_loss', 'amp_dtype', 'decay_epochs'))  # they had no effect
    assert 'model-index' not in text  # 13 images are not the test split
    assert '/home' not in text

    assert check.common_faults(catalog.OURS, *catalog.OURS.read()) == []
    faults = check.check(release(folder))
    if better == 'EMA':  # with another net's ONNX file
        faults = [fault for fault in faults if not fault.startswith('onnx/')]
    assert faults == []


@pytest.mark.parametrize(
    ('tag', 'message'),
    [
        ('torch7_c10', 'is for weights that hub/import_torch7.py wrote'),
        ('other_c10', 'were imported from Torch7'),
    ],
)
def test_origin_of_weights_is_what_their_folder_says(tag, message, project, refused):
    """Also if the path is that of the file: neither can trained weights pass for the author's, nor his for ours."""
    path = project / 'hub' / NAME
    if tag == 'other_c10':
        edit(path / 'config.json', '"tag": "cpu_c10"', '"tag": "torch7"')
    refused(message, path / 'model.safetensors', '--model', f'sharesnet164_cifar.{tag}')


def test_a_folder_s_weights_file_brings_its_provenance(project, built):
    path = project / 'hub' / NAME
    before = (path / 'training.json').read_bytes()
    built(path / 'model.safetensors', '--model', NAME)
    assert (path / 'training.json').read_bytes() == before and (path / 'curves.png').is_file()


def test_import_becomes_a_folder_with_its_source_in_fp32(project, no_memory, tmp_path, built, run, monkeypatch, capsys):
    model = timm.create_model('sharesnet34')
    (tmp_path / 'resnet-34.t7').write_bytes(b'the file of the author')
    import_torch7.write(model, {}, tmp_path / 'resnet-34.t7', tmp_path / 'imported')
    monkeypatch.setattr(catalog, 'TRACKED_BYTES', 50e6)
    name = 'sharesnet34.torch7_in1k'
    out = built(tmp_path / 'imported', '--model', name)
    path = project / 'hub' / name
    names = {'model.safetensors', 'config.json', 'preprocessor_config.json', 'README.md', 'source.json', 'onnx'}
    assert {file.name for file in path.iterdir()} == names
    found = load_file(path / 'model.safetensors')
    assert all(torch.equal(found[k], v) for k, v in model.state_dict().items())
    text = (path / 'README.md').read_text()
    assert '| **this model** | not measured | - |  |' in text and '| ResNet-34, shared | 71.75 % | 90.58 % |' in text
    assert 'license: other' in text and 'model-index' not in text
    source = json.loads((path / 'source.json').read_text())
    assert source['source'] == 'https://github.com/aboulch/sharesnet' and source['file'] == 'resnet-34.t7'
    assert source['sha256'] == hashlib.sha256(b'the file of the author').hexdigest()
    Image.new('RGB', (300, 250)).save(tmp_path / 'image.png')
    (tmp_path / 'image.png').rename(path / 'image.png')
    monkeypatch.chdir(path)
    for code in snippets(text):
        exec(code.replace(f'hf-hub:timm-sharesnet/{name}', f'local-dir:{path}'), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and lines[-2] == '(1, 512)'  # five classes with ImageNet names, five maps, one vector
    assert lines[-1] == str(imagenet_class(model, path / 'image.png'))
    (path / 'image.png').unlink()

    # neither 54 MB of fp32 in ONNX nor the weights may be tracked here
    assert {file.name for file in (path / 'onnx').iterdir()} == {'model.onnx', 'model.onnx_data'}
    for part in ('onnx/', 'model.safetensors'):
        assert f'hub/{name}/{part} goes beyond 50 MB in all' in out
        assert f'\n/{name}/{part}\n' in (project / 'hub' / '.gitignore').read_text()
    assert check.session_faults(release(path)) == []
    shutil.rmtree(path / 'onnx')
    (path / 'model.safetensors').unlink()
    assert run('check', path) == (0, f'{name}: ok, onnx/ not here, model.safetensors not here\n', [])


def imagenet_class(model, image):
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    with torch.inference_mode(), Image.open(image) as image:
        return model.eval()(transform(image)[None]).argmax().item()


def test_onnx_files_are_calibrated_on_training_images_and_kept_with_the_weights(
    project, data, tmp_path, built, monkeypatch
):
    name = 'sharesnet164_cifar.test_c10'
    path, onnx = project / 'hub' / name, project / 'hub' / name / 'onnx'
    weights = save(tmp_path / 'x.pth', small_net(monkeypatch).state_dict())
    shutil.copytree(data / 'test', data / 'train')
    read = []
    monkeypatch.setattr(build, 'CALIBRATION', 5)
    monkeypatch.setattr('PIL.Image.open', spy(Image.open, read))
    out = built(weights, '--model', name, '--data-dir', data)
    assert sum('/train/' in file for file in read) == 5
    assert {file.name for file in onnx.iterdir()} == {'model.onnx', 'model_quantized.onnx'}
    assert (onnx / 'model_quantized.onnx').stat().st_size < (onnx / 'model.onnx').stat().st_size / 2
    assert check.check(release(path)) == []
    entry = read_manifest(project / 'hub', name)
    files, twin = entry['onnx']['files'], entry['onnx']['twin']
    assert files['model.onnx']['accuracy'] == entry['accuracy']
    assert files['model_quantized.onnx']['accuracy']['images'] == 13
    for file, record in twin.items():
        assert files[file]['kernels'] == 7 and record['kernels'] == 10 and files[file]['size'] < record['size']
    text = (path / 'README.md').read_text()
    assert 'int8, calibrated on 5 training images, measured on 13 of 10,000 test images' in text
    assert '`onnx/model.onnx`' in text and '| 7 |' in text

    # the same weights again, without data
    before = snapshot(project)
    built(path, '--model', name)
    assert snapshot(project) == before

    # and with data, but none to calibrate with: the same fp32 file, measured, and no int8
    shutil.rmtree(data / 'train')
    out = built(path, '--model', name, '--data-dir', data)
    assert [file.name for file in onnx.iterdir()] == ['model.onnx']
    assert f'no onnx/model_quantized.onnx: {data} has no folder train to calibrate it with' in out
    assert (onnx / 'model.onnx').read_bytes() == before[str(onnx / 'model.onnx')]
    assert check.check(release(path)) == []


def spy(function, calls):
    def called(file, *args, **kwargs):
        calls.append(str(getattr(file, 'name', file)))
        return function(file, *args, **kwargs)

    return called


def test_new_weights_without_data_have_no_int8_and_no_accuracy(project, any_onnx, tmp_path, built):
    weights = save(tmp_path / 'x.pth', timm.create_model('sharesnet164_cifar').state_dict())
    out = built(weights, '--model', NAME)
    assert 'no onnx/model_quantized.onnx: without --data-dir there are no images to calibrate it with' in out
    entry = read_manifest(project / 'hub')
    assert entry['accuracy'] is None and entry['onnx']['files'].keys() == {'model.onnx'}


def test_missing_onnx_runtime_is_told_before_anything_is_read(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    error = "build.py: onnxruntime is not installed: pip install 'timm-sharesnet[onnx]'"
    assert refused('', 'missing', '--model', NAME) == error


def test_renewed_folder_keeps_what_was_measured(project, built, monkeypatch):
    path = project / 'hub' / NAME
    before = snapshot(project)
    edit_json(catalog.OURS.pins, lambda pins: pins[NAME].update(repo=f'timm-sharesnet/{NAME}', revision='a' * 40))
    manifest, pins = catalog.OURS.read()
    monkeypatch.setenv('TIMM_SHARESNET_NAMESPACE', 'me')
    built(path, '--model', NAME)
    manifest[NAME]['sample']['wrong'] = [i for i in manifest[NAME]['sample']['wrong'] if i < 40]
    assert catalog.OURS.read() == (manifest, pins)
    text = before[str(path / 'README.md')].decode()
    assert (path / 'README.md').read_text() == text.replace('timm-sharesnet/', 'me/')
    for name in ('model.safetensors', 'training.json'):
        assert (path / name).read_bytes() == before[str(path / name)]


class Evil:
    def __reduce__(self):
        return (print, ('executed',))


C10 = 'shawrn40_4.test_c10'
# What lies at PATH, and what the error says
PATHS = {
    'no path': (lambda path: None, 'x does not exist'),
    'an empty folder': (Path.mkdir, 'has none of model.safetensors, last.pth.tar, model_best.pth.tar'),
    'no checkpoint': (lambda path: path.write_bytes(b'x'), 'x cannot be read'),
    'code in a pickle': (lambda path: save(path, {'a': Evil()}), 'x cannot be read: UnpicklingError'),
    'no state dict': (lambda path: torch.save([1], path), 'holds no state dict but a list'),
}
# What the weights have otherwise
CHANGES = {
    'a missing tensor': ({'fc.bias': None}, 'fc.bias is missing'),
    'an extra tensor': ({'x': torch.ones(1)}, 'x is not part of the model'),
    'another shape': ({'fc.bias': torch.ones(9)}, 'fc.bias has shape (9,) instead of (10,)'),
    'a value that is not finite': ({'fc.bias': torch.full((10,), torch.nan)}, 'fc.bias has values that are not finite'),
    'a value too large for fp16': (
        {'fc.bias': torch.full((10,), 1e6)},
        'the written file does not hold the same finite values as torch.float16',
    ),
}
# What is given as --model, and further arguments
ARGUMENTS = {
    'another model': (
        ['wrn40_4.test_c10'],
        'the 3x3 kernels are those of another share_rate than 0, all else is of wrn40_4',
    ),
    'an unknown model': (['resnet50.a1_in1k'], 'resnet50 is no architecture of this package'),
    'no data set in the tag': (['shawrn40_4.test'], 'is not ARCH.TAG with a tag that ends in _c10'),
    'no tag': (['shawrn40_4'], 'is not ARCH.TAG'),
    'no namespace': ([C10, '--namespace', 'a/b'], "'a/b' is not a name that the Hub accepts"),
    'an unknown option': ([C10, '--x'], 'unrecognized arguments: --x'),
    'data without a test split': ([C10, '--data-dir', '.'], 'has no folder test'),
}


@pytest.mark.parametrize('case', PATHS)
def test_nothing_is_written_for(tmp_path, refused, case):
    make, message = PATHS[case]
    make(tmp_path / 'x')
    refused(message, tmp_path / 'x', '--model', C10)


@pytest.mark.parametrize(
    ('changes', 'arguments', 'message'),
    [(changes, [C10], message) for changes, message in CHANGES.values()]
    + [({}, arguments, message) for arguments, message in ARGUMENTS.values()],
    ids=[*CHANGES, *ARGUMENTS],
)
def test_nothing_is_written_where_there_is(tmp_path, refused, changes, arguments, message):
    tensors = timm.create_model('shawrn40_4').state_dict() | changes
    weights = save(tmp_path / 'x', {key: tensor for key, tensor in tensors.items() if tensor is not None})
    refused(message, weights, '--model', *arguments)


@pytest.mark.parametrize(
    ('file', 'old', 'new', 'message'),
    [
        ('summary.csv', '2,1.7,0.01', '2,1.7', 'summary.csv: a row of 2 values'),
        ('args.yaml', 'shawrn40_4', 'wrn40_4', 'args.yaml says wrn40_4, --model says shawrn40_4'),
    ],
)
def test_nothing_is_written_for_a_train_run_with(train_run, refused, file, old, new, message):
    path = train_run(0, 1)[0]
    edit(path / file, old, new)
    refused(message, path, '--model', C10)


def test_imported_weights_must_be_tagged_so(project, tmp_path, refused):
    (tmp_path / 'in').mkdir()
    config = '{"architecture": "sharesnet34", "pretrained_cfg": {"tag": "torch7_in1k"}}'
    (tmp_path / 'in' / 'config.json').write_text(config)
    shutil.copyfile(project / 'hub' / NAME / 'model.safetensors', tmp_path / 'in' / 'model.safetensors')
    refused('the tag must start with torch7_', tmp_path / 'in', '--model', 'sharesnet34.mine_in1k')
    message = 'config.json says sharesnet34, --model says sharesnet50'
    refused(message, tmp_path / 'in', '--model', 'sharesnet50.torch7_in1k')


@pytest.mark.parametrize(
    ('classes', 'message'),
    [('ab', 'has 2 classes'), ('abcdefghij', 'does not have the classes of CIFAR-10: a, b, c')],
)
def test_images_of_other_classes_are_refused(project, tmp_path, refused, classes, message):
    for name in classes:
        (tmp_path / 'data' / 'test' / name).mkdir(parents=True)
        shutil.copyfile(project / 'hub' / NAME / 'curves.png', tmp_path / 'data' / 'test' / name / 'x.png')
    weights = save(tmp_path / 'x.pth', {'fc.bias': torch.zeros(10)})
    refused(message, weights, '--model', C10, '--data-dir', tmp_path / 'data')


@pytest.mark.parametrize('split', ['test', 'train'])
def test_an_image_that_cannot_be_read_is_named_and_no_other_taken_for_it(data, tmp_path, refused, split):
    if split == 'train':
        shutil.copytree(data / 'test', data / 'train')
    path = sorted((data / split / 'cat').iterdir())[0]
    path.write_bytes(path.read_bytes()[:200])
    weights = save(tmp_path / 'x.pth', constant_model('sharesnet164_cifar', 3).state_dict())
    argv = [weights, '--model', 'sharesnet164_cifar.test_c10', '--data-dir', data]
    refused(f'build.py: {path} cannot be read: ', *argv)


def test_missing_matplotlib_is_told_before_anything_is_measured(project, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    monkeypatch.setattr(build, 'build', None)
    error = 'build.py: drawing the curves needs matplotlib: pip install matplotlib'
    assert refused('', project / 'hub' / NAME, '--model', NAME) == error


# The net that was trained, which need not be the one of its name

SMALL = 'sharesnet164_cifar.small_c10'


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Make a small net, and write what train.py leaves of it: its options beside the weights, with them, or nowhere."""
    small_net(monkeypatch)

    def train(options=None, inside=False, **kwargs):
        model = models.create('sharesnet164_cifar', **kwargs)
        checkpoint, path = {'state_dict': model.state_dict()}, tmp_path / 'run'
        path.mkdir()
        if options is not None:
            options = {'model': 'sharesnet164_cifar', 'drop': 0.0, 'gp': None, 'model_kwargs': {}} | options
            if inside:
                checkpoint['args'] = argparse.Namespace(**options)
            else:
                (path / 'args.yaml').write_text(yaml.safe_dump(options))
        torch.save(checkpoint, path / 'last.pth.tar')
        return path, model

    return train


def error(path, model):
    """How much the net of a folder differs from another, of the largest output."""
    loaded = timm.create_model(f'local-dir:{path}', pretrained=True).eval()
    images = torch.randn(2, *loaded.pretrained_cfg['input_size'])
    with torch.inference_mode():
        return models.error(loaded(images), model(images))


# Options of train.py, and what it passes on to the net
TRAINED = {
    'an activation': ({'model_kwargs': {'act_layer': 'silu'}}, {'act_layer': 'silu'}),
    'a pooling': ({'gp': 'max'}, {'global_pool': 'max'}),
    'a wider embedding': ({'gp': 'catavgmax'}, {'global_pool': 'catavgmax'}),
    'a rate': ({'model_kwargs': {'layers': [5, 3, 3], 'share_rate': 0.5}}, {'layers': [5, 3, 3], 'share_rate': 0.5}),
    'runs of blocks': (
        {'model_kwargs': {'layers': [4, 4, 1], 'share_rate': [0, [[1, 3]], 1.0]}},
        {'layers': [4, 4, 1], 'share_rate': [0, [[1, 3]], 1.0]},
    ),
    'no sharing': ({'model_kwargs': {'share_rate': 0.0}}, {'share_rate': 0.0}),
    'wide feature maps': ({'model_kwargs': {'widen_factor': 2}}, {'widen_factor': 2}),
    'gray images': ({'input_size': [1, 40, 32], 'mean': [0.3], 'std': [0.2]}, {'in_chans': 1}),
    'transparent images': ({'in_chans': 4, 'input_img_mode': 'RGBA'}, {'in_chans': 4}),
    'dropout': (
        {'drop': 0.2, 'drop_path': 0.1, 'model_kwargs': {'block_drop_rate': 0.3}},
        {'drop_rate': 0.2, 'drop_path_rate': 0.1, 'block_drop_rate': 0.3},
    ),
}


@pytest.mark.parametrize('case', TRAINED)
def test_folder_loads_to_the_net_that_was_trained(project, train, any_onnx, built, case):
    options, kwargs = TRAINED[case]
    source, model = train(options, **kwargs)
    path = project / 'hub' / SMALL
    out = built(source, '--model', SMALL)
    assert error(path, model) == 0
    config, entry = json.loads((path / 'config.json').read_text()), read_manifest(path.parent, SMALL)
    assert config['model_args'] == {'in_chans': 3, 'global_pool': 'avg'} | kwargs and entry['model_args'] == kwargs
    assert check.static_faults(release(path)) == check.model_faults(release(path)) == []
    text = (path / 'README.md').read_text()
    assert all(f'`{key}={value!r}`' in text for key, value in kwargs.items())
    colours = kwargs.get('in_chans', 3) == 3  # which transformers.js wants
    assert ('no preprocessor_config.json: ' in out) != colours and ('```js' in text) == colours
    # only with dropout it still computes as the paper's net
    assert ('the paper, Table 2' in text) == (case == 'dropout')
    size = tuple(options.get('input_size', [kwargs.get('in_chans', 3), 32, 32]))
    images = torch.zeros(1, *size)
    with torch.inference_mode():
        features = model.forward_intermediates(images, intermediates_only=True)
        embedding = model.forward_head(model.forward_features(images), pre_logits=True)
    assert f'# {", ".join(str(tuple(f.shape)) for f in features)}\n' in text and f'# {tuple(embedding.shape)}\n' in text
    assert f'(batch, {", ".join(map(str, size))})' in ' '.join(text.split())

    before = snapshot(project)
    built(path, '--model', SMALL)
    assert snapshot(project) == before


def test_figures_onnx_files_and_twin_are_of_the_net_that_was_trained(project, train, no_memory, data, built):
    """It sees gray images, normalized as timm's loader does without other options: by the means of three colours'."""
    kwargs = {'act_layer': 'silu', 'layers': [5, 3, 3], 'share_rate': 0.5}
    source, model = train({'gp': 'max', 'in_chans': 1, 'model_kwargs': kwargs}, global_pool='max', in_chans=1, **kwargs)
    shutil.copytree(data / 'test', data / 'train')
    built(source, '--model', SMALL, '--data-dir', data)
    assert check.check(release(project / 'hub' / SMALL)) == []
    entry = read_manifest(project / 'hub', SMALL)
    files = entry['onnx']['files']
    kernels = [record['kernels'] for record in (*files.values(), *entry['onnx']['twin'].values())]
    assert files.keys() == {'model.onnx', 'model_quantized.onnx'} and kernels == [10, 10, 12, 12]

    mean, std = (sum(values) / 3 for values in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    files = sorted((data / 'test').glob('*/*.png'))
    images = torch.stack([to_tensor(Image.open(file).convert('L')) for file in files])
    with torch.inference_mode():
        best = model((images - mean) / std).argmax(1)
    classes = sorted({file.parent.name for file in files})
    right = sum(classes[i] == file.parent.name for i, file in zip(best, files, strict=True))
    assert entry['accuracy']['top1'] == round(100 * right / 13, 4)


def test_checkpoint_alone_is_built_with_the_options_that_it_holds(project, train, any_onnx, built):
    options = {'model_kwargs': {'act_layer': 'silu', 'layers': (2, 3, 2)}, 'output': '/home/me/runs'}
    source, model = train(options, inside=True, act_layer='silu', layers=(2, 3, 2))
    path = project / 'hub' / SMALL
    built(source / 'last.pth.tar', '--model', SMALL)
    assert error(path, model) == 0 and 'output' not in yaml.safe_load((path / 'args.yaml').read_text())


@pytest.mark.parametrize('made_by', ['save_for_hf', 'share'])
def test_arguments_and_preprocessing_of_a_config_beside_the_weights_are_kept(
    project, train, any_onnx, tmp_path, built, made_by
):
    from timm_sharesnet import share

    args = {'act_layer': 'silu', 'layers': [5, 3, 2]}
    if made_by == 'share':
        model = share(models.create('resnet164_cifar', **args), 0.5, init='mean')
        args['share_rate'] = 0.5
    else:
        model = models.create('sharesnet164_cifar', **args)
    model.pretrained_cfg |= {'mean': (0.5, 0.5, 0.5), 'input_size': (3, 48, 48)}
    timm.models.save_for_hf(model, str(tmp_path / 'saved'), model_args=args, safe_serialization=True)
    path = project / 'hub' / SMALL
    built(tmp_path / 'saved', '--model', SMALL)
    assert error(path, model) == 0
    cfg = json.loads((path / 'config.json').read_text())['pretrained_cfg']
    assert (cfg['mean'], cfg['input_size'], cfg['std']) == ([0.5] * 3, [3, 48, 48], [0.247, 0.2435, 0.2616])
    before = snapshot(project)
    built(path, '--model', SMALL)
    assert snapshot(project) == before


# Options of train.py that no folder can carry, and what the error names
LOST = {
    'another rate': (None, 'the 3x3 kernels are those of another share_rate than 1, all else is of sharesnet164_cifar'),
    'a rate that was not trained': (
        {'model_kwargs': {'layers': [5, 3, 3], 'share_rate': 0.25}},
        'another share_rate than 0.25',
    ),
    'no argument of the net': ({'bn_eps': 0.001}, 'sharesnet164_cifar cannot be built with bn_eps 0.001: '),
    'no pooling': ({'gp': 'mean'}, "cannot be built with gp 'mean': "),
    'a mistyped activation': ({'model_kwargs': {'act_layer': 'sillu'}}, "with model_kwargs: act_layer 'sillu': "),
    'what JSON has no word for': (
        {'model_kwargs': {'layers': {1, 2, 3}}},
        'model_kwargs: layers: config.json cannot hold {1, 2, 3}',
    ),
    'keys that JSON turns into text': (
        {'model_kwargs': {'block_args': {1: 'se'}}},
        "model_kwargs: block_args: config.json cannot hold {1: 'se'}",
    ),
    'split batch norms': ({'split_bn': True}, 'split_bn: timm builds no net with split batch norms'),
    'images that nobody would read so': ({'input_img_mode': 'HSV'}, 'input_img_mode: config.json has no place for HSV'),
    'more channels than images have': ({'in_chans': 5}, 'in_chans: images have 1 to 4 channels, not 5'),
    'two stories': ({'gp': 'max'}, "gp: args.yaml says 'max', config.json 'avg': correct the wrong one"),
}


@pytest.mark.parametrize('case', LOST)
def test_nothing_is_written_for_a_net_trained_with(train, refused, case):
    options, message = LOST[case]
    source, _ = train(options, layers=(5, 3, 3), share_rate=0.5)
    if case in ('another rate', 'two stories'):
        args = {'layers': [5, 3, 3]} if case == 'another rate' else {'global_pool': 'avg'}
        (source / 'config.json').write_text(json.dumps({'model_args': args}))
    refused(message, source, '--model', SMALL)


def test_weights_that_load_by_name_are_not_replaced_by_those_of_a_net_with_arguments(project, train, any_onnx, refused):
    source, _ = train({'gp': 'max'}, global_pool='max')
    message = f'{NAME} is "packaged" in weights.json: loaded by name it lacks `global_pool=\'max\'`'
    refused(message, source, '--model', NAME)


# Replacing what was there


@pytest.fixture
def places(tmp_path):
    """An old folder and an old file, a finished one for each, and a file that was not there: path -> finished one."""
    there, new = tmp_path / 'there', tmp_path / 'new'
    for path in (there, new):
        (path / 'x').mkdir(parents=True)
        for file in ('x/file', 'y'):
            (path / file).write_text(path.name)
    (new / 'z').write_text('new')
    return {there / name: new / name for name in 'xyz'}


def test_what_is_finished_takes_the_place_of_what_was_there(places, tmp_path):
    folder.replace(places)
    assert read_files(tmp_path / 'there') == {'x/file': b'new', 'y': b'new', 'z': b'new'}


@pytest.mark.parametrize('failing', ['missing', 'copy', 0, 1, 2, 3])
def test_failure_to_replace_leaves_all_as_it_was(places, tmp_path, monkeypatch, failing):
    """A full disk at the copy, or whatever at any of the renames: old folder aside, folder, file, new file."""
    if failing == 'missing':
        (tmp_path / 'new' / 'z').unlink()
    before, calls, rename = read_files(tmp_path / 'there'), [], Path.rename

    def fail(source, target):
        calls.append(source)
        return fail_copy() if len(calls) == failing + 1 else rename(source, target)

    if failing == 'copy':
        monkeypatch.setattr(shutil, 'copyfile', lambda source, target: Path(target).write_text('o') and fail_copy())
    elif failing != 'missing':
        monkeypatch.setattr(Path, 'rename', fail)
    with pytest.raises(OSError):
        folder.replace(places)
    assert read_files(tmp_path / 'there') == before


def fail_copy():
    raise OSError(28, 'No space left on device')


def test_full_disk_at_the_copy_into_the_package_leaves_all_as_it_was(project, refused, monkeypatch):
    write_bytes = Path.write_bytes

    def write(path, data):
        if path.name.startswith(NAME):
            write_bytes(path, data[:1000])
            fail_copy()
        return write_bytes(path, data)

    (project / 'timm_sharesnet' / 'weights' / f'{NAME}.safetensors').write_bytes(b'other')  # so that it is copied
    monkeypatch.setattr(Path, 'write_bytes', write)
    refused('No space left on device', project / 'hub' / NAME, '--model', NAME)


def test_two_builds_at_once_leave_the_entries_of_both(project, any_onnx, tmp_path, built, run, monkeypatch):
    weights = save(tmp_path / 'x.pth', timm.create_model('sharesnet164_cifar').state_dict())
    build_onnx, codes = build.build_onnx, []

    def meanwhile(*args):
        if not codes:
            codes.append(None)
            codes[0] = run('build', weights, '--model', 'sharesnet164_cifar.b_c10')[0]
        return build_onnx(*args)

    monkeypatch.setattr(build, 'build_onnx', meanwhile)
    built(weights, '--model', 'sharesnet164_cifar.a_c10')
    assert codes == [0]
    names = {NAME, 'sharesnet164_cifar.a_c10', 'sharesnet164_cifar.b_c10'}
    manifest, pins = catalog.OURS.read()
    assert manifest.keys() == pins.keys() == names


def test_manifests_are_written_by_one_process_at_a_time(project):
    """As by one thread here: a lock belongs to an opened file."""
    entered, leave, order = threading.Event(), threading.Event(), []

    def write(name):
        with catalog.OURS.locked():
            entered.set()
            leave.wait(60)
            order.append(name)

    first = threading.Thread(target=write, args=['first'])
    first.start()
    assert entered.wait(60)
    second = threading.Thread(target=write, args=['second'])
    second.start()
    second.join(0.2)
    assert second.is_alive() and not order
    leave.set()
    first.join(60)
    second.join(60)
    assert order == ['first', 'second']


def test_next_build_puts_back_what_a_killed_one_moved_aside(project, tmp_path, run):
    before = snapshot(project)
    path = project / 'hub' / NAME
    path.rename(folder.aside(path))  # killed before the new folder was there
    assert f'.{NAME}.old is what a build left' in run('check')[2][0]
    assert run('build', tmp_path / 'missing', '--model', NAME)[0] == 2
    assert snapshot(project) == before
    shutil.copytree(path, folder.aside(path))  # killed when the new folder was there
    run('build', tmp_path / 'missing', '--model', NAME)
    assert snapshot(project) == before

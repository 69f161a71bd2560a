"""Nets trained on people's own data are built, verified and published from a directory of their own."""

import json
import os
import shutil

import catalog
import numpy as np
import pytest
import timm
import torch
import yaml
from hub_project import ROOT, read_files, save, small_net, snippets
from PIL import Image
from transformers import pipeline

TAG = 'sharesnet164_cifar.oiseaux'
CLASSES = ['1 mésange', '2 pie', '10 geai']  # as a list of texts, 10 would be the second
FACTS = ['--dataset-name', 'Mes oiseaux', '--dataset-id', 'me/oiseaux', '--dataset-license', 'cc-by-4.0']


@pytest.fixture
def own(scripts, tmp_path, monkeypatch):
    """The directory of people's own, which is not there yet. The working directory is none of the project's."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / 'à moi' / 'hub'


@pytest.fixture
def arguments(own):
    return ['--model', TAG, '--output', own, '--namespace', 'me']


@pytest.fixture
def data(tmp_path):
    """Images of three classes: one, two and three to validate with, and two each to calibrate with."""
    noise = np.random.default_rng(0)
    for split, counts in {'val': (1, 2, 3), 'train': (2, 2, 2)}.items():
        for name, count in zip(CLASSES, counts, strict=True):
            for i in range(count):
                path = tmp_path / 'mes données' / split / name / f'{i}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(noise.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(path)
    return tmp_path / 'mes données'


@pytest.fixture
def train_run(own, tmp_path, monkeypatch):
    """What train.py left of a net of three classes that takes every image for the last, at 48 px."""
    model = small_net(monkeypatch, num_classes=3)
    torch.nn.init.zeros_(model.fc.weight)
    torch.nn.init.zeros_(model.fc.bias).data[2] = 1.0
    (tmp_path / 'run').mkdir()
    save(tmp_path / 'run' / 'last.pth.tar', model.state_dict())
    options = {'model': 'sharesnet164_cifar', 'data_dir': '/home/me/oiseaux', 'num_classes': 3, 'epochs': 2, 'seed': 7}
    options |= {'img_size': 48, 'mean': [0.5, 0.5, 0.5], 'std': [0.25, 0.25, 0.25], 'crop_pct': 0.9}
    (tmp_path / 'run' / 'args.yaml').write_text(yaml.safe_dump(options))
    return tmp_path / 'run'


def test_net_of_own_data_becomes_a_folder_that_all_load(
    project, own, arguments, train_run, data, tmp_path, built, run, monkeypatch, capsys
):
    """build, check, timm, transformers, its snippets, and build again; nothing of ours is touched."""
    ours = read_files(project)
    argv = [train_run, *arguments, '--data-dir', data, *FACTS, '--license', 'mit', '--base-model', 'me/before']
    assert built(*argv).startswith('à moi/hub/sharesnet164_cifar.oiseaux: ')
    assert read_files(project) == ours
    path = own / TAG
    assert {p.name for p in own.iterdir()} == {TAG, 'manifest.json', 'weights.json', '.lock'}
    files = {'model.safetensors', 'config.json', 'preprocessor_config.json', 'README.md', 'args.yaml', 'onnx'}
    assert {file.name for file in path.iterdir()} == files

    entry = json.loads((own / 'manifest.json').read_text())[TAG]
    assert entry['accuracy'] == {'top1': 50.0, 'top5': None, 'images': 6}  # three of six
    assert entry['data']['label_names'] == CLASSES and entry['data']['images'] == 6 and entry['seed'] == 7
    assert json.loads((own / 'weights.json').read_text())[TAG]['packaged'] is False
    text = (path / 'README.md').read_text()
    data_row = '[Mes oiseaux](https://huggingface.co/datasets/me/oiseaux) (licence: cc-by-4.0), 3 classes'
    assert f'| Task | image classification, {data_row} |' in text
    assert '| **this model** | 50.00 % | - | measured from this file on 6 of 6 validation images |' in text
    assert 'the paper, Table' not in text and 'topk(3)' in text and 'made for research' not in text
    metadata = yaml.safe_load(text.split('---\n')[1])
    assert (metadata['license'], metadata['base_model']) == ('mit', 'me/before')
    assert metadata['datasets'] == ['me/oiseaux'] and len(metadata['model-index'][0]['results'][0]['metrics']) == 1
    config = json.loads((path / 'config.json').read_text())
    assert config['label_names'] == [*config['id2label'].values()] == CLASSES and config['num_classes'] == 3
    assert config['pretrained_cfg']['input_size'] == [3, 48, 48] and config['pretrained_cfg']['mean'] == [0.5] * 3

    assert run('check', '--output', own) == (0, f'{TAG}: ok\n', [])
    model = timm.create_model(f'local-dir:{path}', pretrained=True).eval()
    assert model.pretrained_cfg['label_names'] == CLASSES and model.num_classes == 3
    image = next((data / 'val' / CLASSES[2]).iterdir())
    assert pipeline('image-classification', model=str(path))(str(image))[0]['label'] == CLASSES[2]
    monkeypatch.chdir(path)
    shutil.copyfile(image, 'image.png')
    for code in snippets(text):
        exec(code.replace(f'hf-hub:me/{TAG}', f'local-dir:{path}'), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f'% {CLASSES[2]}') and lines[-1] == CLASSES[2]
    os.unlink('image.png')
    monkeypatch.chdir(tmp_path)

    # again, with nothing but its name: what was told is kept
    before = read_files(own)
    built(path, *arguments)
    assert read_files(own) == before
    # other facts, and none
    built(path, *arguments, '--dataset-license', '', '--base-model', '', '--new-version', 'me/after')
    text = (path / 'README.md').read_text()
    metadata = yaml.safe_load(text.split('---\n')[1])
    assert '| Task | image classification, [Mes oiseaux](https://huggingface.co/datasets/me/oiseaux), 3 cl' in text
    assert metadata['new_version'] == 'me/after' and 'base_model' not in metadata and metadata['license'] == 'mit'
    assert run('check', path, '--output', own)[0] == 0
    assert read_files(project) == ours


def test_without_data_the_names_come_from_a_file_or_are_numbers(own, arguments, train_run, any_onnx, tmp_path, built):
    built(train_run, *arguments, '--dataset-name', 'Oiseaux | pies')
    text = (own / TAG / 'README.md').read_text()
    assert '| Task | image classification, Oiseaux \\| pies, 3 classes |' in text
    assert 'No licence is stated for the weights' in text and 'license' not in text.split('---\n')[1]
    assert json.loads((own / TAG / 'config.json').read_text())['label_names'] == ['0', '1', '2']
    (tmp_path / 'classes.txt').write_text('\n'.join(CLASSES) + '\n', encoding='utf-8')
    built(own / TAG, *arguments, '--class-names', tmp_path / 'classes.txt')
    assert json.loads((own / TAG / 'config.json').read_text())['label_names'] == CLASSES


REFUSALS = {
    'nothing is told of the data': ([], 'what was sharesnet164_cifar.oiseaux trained on? Say --dataset-name NAME'),
    'more names than classes': (['--class-names', 'four.txt', *FACTS], 'have 3 classes, and there are names for 4'),
    'a name twice': (['--class-names', 'twice.txt', *FACTS], 'must have a name for each class, one a line, none twice'),
    'other classes in the data': (['--class-names', 'three.txt', '--data-dir', 'DATA', *FACTS], 'does not have the'),
    'no id of the Hub': ([*FACTS, '--dataset-id', 'oiseaux'], "--dataset-id must be NS/NAME, found 'oiseaux'"),
    'no licence of the Hub': ([*FACTS, '--license', 'Mine!'], '--license must be an identifier like cc-by-4.0'),
    'no base model': ([*FACTS, '--base-model', 'x'], "--base-model must be NS/NAME, found 'x'"),
    'our namespace': ([*FACTS, '--namespace', 'timm-sharesnet'], '--output needs the namespace of your own'),
    'our directory': ([*FACTS, '--output', ROOT / 'hub' / 'x'], '--output is for folders of your own'),
    'a tag that no URL has': ([*FACTS, '--model', 'sharesnet164_cifar.été'], 'is not ARCH.TAG'),
    'a mistyped network': (
        [*FACTS, '--model', 'sharesnet54.x'],
        'no architecture of this package, did you mean sharesnet50 or',
    ),
}


@pytest.mark.parametrize('case', REFUSALS)
def test_nothing_is_written_where(case, own, arguments, train_run, data, tmp_path, refused, monkeypatch):
    if case == 'our directory':
        monkeypatch.setattr(catalog, 'OURS', catalog.Shelf(ROOT / 'hub', ROOT / 'timm_sharesnet'))
    for name, text in {'four': 'a\nb\nc\nd', 'twice': 'a\nb\na', 'three': 'a\nb\nc'}.items():
        (tmp_path / f'{name}.txt').write_text(text)
    extra, message = REFUSALS[case]
    refused(message, train_run, *arguments, *(data if argument == 'DATA' else argument for argument in extra))
    assert not own.exists()


def test_options_of_own_data_are_refused_for_folders_of_ours(own, train_run, refused):
    for extra in (FACTS, ['--license', 'mit'], ['--class-names', 'x']):
        refused('give --output DIR, too', train_run, '--model', 'sharesnet164_cifar.x_c10', *extra)
    message = 'a net trained on other data is published from a directory of your own'
    refused(message, train_run, '--model', 'sharesnet164_cifar.x')


def test_net_of_a_known_data_set_may_be_one_s_own(own, arguments, any_onnx, built, monkeypatch):
    """With the sample, the paper's figures and the names of the classes, as of ours."""
    model = small_net(monkeypatch)
    weights = save(own.parent.parent / 'x.pth', model.state_dict())
    built(weights, '--model', 'sharesnet164_cifar.mine_c10', *arguments[2:])
    text = (own / 'sharesnet164_cifar.mine_c10' / 'README.md').read_text()
    assert 'the paper, Table 2' in text and 'uoft-cs/cifar10' in text and 'apache-2.0' not in text

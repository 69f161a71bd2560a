"""timm_sharesnet.preflight: each fault ends in exit code 2 and one line that names the file or key."""

import argparse
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from timm.models import save_for_hf

from timm_sharesnet.preflight import main, train_parser

TRAIN_CONFIGS = Path(__file__).parents[1] / 'train_configs'
CONFIG = {
    'model': 'resnet92_cifar',
    'data_dir': 'data',
    'val_split': 'test',
    'num_classes': 10,
    'batch_size': 8,
    'lr': 0.1,
    'scale': [0.64, 1.0],
    'opt_kwargs': {'fused': True},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Working directory with CONFIG as c.yaml and an ImageFolder of ten classes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'c.yaml').write_text(yaml.safe_dump(CONFIG))
    add_images(tmp_path / 'data' / 'train', 10)
    add_images(tmp_path / 'data' / 'test', 10)
    return tmp_path


def add_images(split, classes, first=0):
    """Only names: preflight opens no image."""
    for i in range(first, first + classes):
        (split / f'class{i}').mkdir(parents=True)
        (split / f'class{i}' / '0.png').touch()


def change(**changes):
    """Rewrite c.yaml with some keys changed, None removes one."""
    config = {k: v for k, v in {**CONFIG, **changes}.items() if v is not None}
    with open('c.yaml', 'w') as f:
        f.write(yaml.safe_dump(config))


def save_checkpoint(path, model='resnet92_cifar', **more):
    """A checkpoint as train.py writes it: the arguments, too, and names as torch.compile leaves them."""
    weights = {f'_orig_mod.{k}': v for k, v in timm.create_model(model).state_dict().items()}
    torch.save({'epoch': 3, 'version': 2, 'args': argparse.Namespace(lr=0.1), 'state_dict': weights, **more}, path)


def accepted(capsys, *options):
    code = main(['c.yaml', *options])
    output = capsys.readouterr()
    assert (code, output.err) == (0, '')
    return output.out


def refused(capsys, *options, config='c.yaml'):
    code = main([config, *options])
    output = capsys.readouterr()
    assert (code, output.out) == (2, '')
    assert output.err.startswith('preflight: ') and output.err.count('\n') == 1
    return output.err.removeprefix('preflight: ').rstrip('\n')


def test_accepts_a_good_config_and_says_what_it_checked(folder, capsys):
    summary = accepted(capsys)
    assert 'resnet92_cifar: 961,370 parameters, 10 classes, 32 x 32 px' in summary
    assert 'data/train 10 images, data/test 10 images, 10 classes' in summary
    assert 'NOT CHECKED' not in summary


@pytest.mark.parametrize(
    'options',
    [
        ['-b', '4', '-j', '2', '-vb', '32'],
        ['--lr=0.2', '--batch-size=4'],
        ['--weight-dec', '0.1'],  # argparse takes an unambiguous beginning
        ['--no-aug', '--no-prefetcher', '--amp'],
        ['--torchcompile', '--device', 'cpu'],
        ['--opt-kwargs', 'fused=True', 'filter_bias_and_bn=False', '--model-kwargs', 'block_drop_rate=0.3'],
        ['--scale', '0.5', '1', '--decay-milestones', '61', '121'],
        ['--dr', '0.2', '--local_rank', '1'],
    ],
    ids=' '.join,
)
def test_accepts_options_in_all_forms_that_train_py_does(folder, capsys, options):
    accepted(capsys, *options)


@pytest.mark.parametrize('path', sorted(TRAIN_CONFIGS.glob('*.yaml')), ids=lambda path: path.stem)
def test_accepts_our_configs_with_the_data_that_they_are_for(tmp_path, monkeypatch, capsys, path):
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(path.read_text())
    for split in config['train_split'], config['val_split']:
        add_images(tmp_path / 'data' / split, config['num_classes'])
    teacher = config.get('kd_model_name', '')
    if teacher.startswith('local-dir:'):
        folder = teacher.removeprefix('local-dir:')
        save_for_hf(timm.create_model(Path(folder).name), folder, safe_serialization=True)
    assert main([str(path), '--dataset', '', '--data-dir', 'data', '-b', '8']) == 0  # of one image a class
    assert f'model   {config["model"]}: ' in capsys.readouterr().out


def test_command_line_wins_over_the_config(folder, capsys):
    change(num_classes=7)
    assert refused(capsys).startswith('num_classes: 7 ')
    accepted(capsys, '--num-classes', '10')


def test_accepts_the_args_yaml_that_train_py_writes(folder, capsys):
    parser = train_parser()
    parser.set_defaults(**CONFIG)
    with open('c.yaml', 'w') as f:
        f.write(yaml.safe_dump(vars(parser.parse_args([]))))
    accepted(capsys)


def test_names_keys_that_older_versions_of_train_py_do_not_have(folder, capsys):
    assert 'only in a train.py newer than timm 1.0.28' not in accepted(capsys)
    change(train_img_sizes=[24, 32])
    assert 'train_img_sizes: only in a train.py newer than timm 1.0.28' in accepted(capsys)


@pytest.mark.parametrize(
    'changes, message',
    [
        (
            {'batch-size': 64},
            'c.yaml: batch-size: not an option of train.py (timm 1.0.29.dev0). Did you mean batch_size?',
        ),
        (
            {'bach_size': 64},
            'c.yaml: bach_size: not an option of train.py (timm 1.0.29.dev0). Did you mean batch_size?',
        ),
        ({'dr': 0.2}, 'c.yaml: dr: not an option of train.py (timm 1.0.29.dev0). Did you mean decay_rate?'),
        ({'zzz': 1}, 'c.yaml: zzz: not an option of train.py (timm 1.0.29.dev0).'),
        ({'batch_size': 64.0}, 'c.yaml: batch_size: must be an integer, not 64.0.'),
        ({'batch_size': True}, 'c.yaml: batch_size: must be an integer, not True.'),
        ({'lr': 'high'}, "c.yaml: lr: must be a number, not 'high'."),
        ({'amp': 'false'}, "c.yaml: amp: must be true or false, not 'false'."),
        ({'amp': 1}, 'c.yaml: amp: must be true or false, not 1.'),
        ({'experiment': 2024}, 'c.yaml: experiment: must be text, not 2024.'),
        ({'scale': 0.64}, 'c.yaml: scale: must be a list, not 0.64.'),
        ({'scale': ['8e-2', 1]}, "c.yaml: scale: must be a list with a number in each place, not '8e-2'."),
        ({'input_size': [32, 32]}, 'c.yaml: input_size: must be a list of 3, not [32, 32].'),
        ({'device_modules': 'mine'}, "c.yaml: device_modules: must be a list, not 'mine'."),
        ({'torchcompile': True}, 'c.yaml: torchcompile: must be text, not True.'),
        ({'kd_distill_type': 'soft'}, "c.yaml: kd_distill_type: must be one of logit, feature, token, not 'soft'."),
        ({'opt_kwargs': ['fused']}, "c.yaml: opt_kwargs: must be a mapping, not ['fused']."),
        ({'opt_kwargs': {'eps': '1e-6'}}, "c.yaml: opt_kwargs: eps is the text '1e-6' to YAML, which needs a point"),
        ({'mean': [0.5, 0.5]}, 'mean, std: must have one number for each input channel.'),
        ({'model': 'sharesnet51'}, 'model: sharesnet51 cannot be built: RuntimeError: Unknown model (sharesnet51)'),
        ({'model_kwargs': {'depth': 3}}, 'model: resnet92_cifar cannot be built: TypeError: '),
    ],
    ids=str,
)
def test_refuses_wrong_keys_and_values(folder, capsys, changes, message):
    change(**changes)
    assert refused(capsys).startswith(message)


def test_takes_a_number_written_as_text_where_train_py_converts_it(folder, capsys):
    with open('c.yaml', 'a') as f:
        f.write('weight_decay: 5e-4\n')  # text in YAML 1.1
    assert isinstance(yaml.safe_load(open('c.yaml'))['weight_decay'], str)
    accepted(capsys)


@pytest.mark.parametrize('text', ['', '- lr', 'lr: [1', 'lr: 2024-13-01', b'\xff\xfe\xfa'], ids=repr)
def test_refuses_a_file_that_is_no_config(folder, capsys, text):
    with open('c.yaml', 'wb') as f:
        f.write(text if isinstance(text, bytes) else text.encode())
    assert refused(capsys).startswith('c.yaml: not ')


def test_refuses_a_config_that_is_not_there(folder, capsys):
    assert refused(capsys, config='d.yaml') == 'd.yaml: No such file or directory'


@pytest.mark.parametrize(
    'options, message',
    [
        (['--bach-size', '64'], '--bach-size: not an option of train.py. Did you mean --batch-size?'),
        (['--config', 'd.yaml'], '--config: not an option of train.py.'),
        (['--batch-size', 'big'], "argument -b/--batch-size: invalid int value: 'big'"),
        (['--kd-distill-type', 'soft'], "argument --kd-distill-type: invalid choice: 'soft'"),
        (['--torchscript', '--torchcompile'], 'argument --torchcompile: not allowed with argument --torchscript'),
        (['--opt-kwargs', 'fused'], '--model-kwargs, --opt-kwargs: must be KEY=VALUE.'),
    ],
    ids=' '.join,
)
def test_refuses_wrong_options(folder, capsys, options, message):
    assert refused(capsys, *options).startswith(message)


def test_says_how_it_is_called(folder, capsys):
    assert main([]) == 2
    assert (
        capsys.readouterr().err == 'preflight: usage: python -m timm_sharesnet.preflight CONFIG [options of train.py]\n'
    )


@pytest.mark.parametrize('option', ['-h', '--help'])
def test_help_is_no_fault(option, capsys):
    assert main([option]) == 0
    assert 'python -m timm_sharesnet.preflight CONFIG' in capsys.readouterr().out


def test_refuses_a_batch_that_the_images_do_not_fill(folder, capsys):
    assert refused(capsys, '-b', '1000').startswith('batch_size: 1000, but data/train has ')


def test_refuses_a_data_folder_that_is_not_there(folder, capsys):
    assert refused(capsys, '--data-dir', 'elsewhere') == 'data_dir: there is no folder elsewhere.'
    change(data_dir=None)
    assert refused(capsys) == 'data_dir: not set, the folder of the data is needed.'
    accepted(capsys, 'data')  # as train.py: the folder may be the positional argument


def test_refuses_a_split_for_which_timm_would_take_everything(folder, capsys):
    change(val_split=None)  # train.py's default is validation
    message = (
        "val_split: there is no folder 'validation' in data (but test, train), and train.py would silently take all"
    )
    assert refused(capsys).startswith(message)
    (folder / 'data' / 'test').rename(folder / 'data' / 'val')  # timm knows val as validation
    assert 'data/val 10 images' in accepted(capsys)
    (folder / 'data' / 'train').rename(folder / 'data' / 'fit')
    assert refused(capsys).startswith("train_split: there is no folder 'train' in data")


def test_refuses_a_split_without_images(folder, capsys):
    for i in range(10):
        (folder / 'data' / 'test' / f'class{i}' / '0.png').rename(folder / 'data' / 'test' / f'class{i}' / '0.txt')
    assert refused(capsys) == 'val_split: there are no images in data/test.'


def test_validation_may_be_off(folder, capsys):
    assert 'test' not in accepted(capsys, '--val-split', '')


def test_refuses_another_number_of_classes_than_num_classes(folder, capsys):
    assert refused(capsys, '--num-classes', '12') == 'num_classes: 12 (but data/train has 10 classes).'
    change(num_classes=None, model='wrn28_10')
    assert refused(capsys) == "num_classes: 100 (wrn28_10's default, but data/train has 10 classes)."


def test_refuses_splits_with_different_classes(folder, capsys):
    (folder / 'data' / 'test' / 'class3').rename(folder / 'data' / 'test' / 'other')
    assert "'class3' is in data/train, not in data/test" in refused(capsys)


@pytest.mark.parametrize(
    'model, size, fits',
    [
        ('sharesnet164_cifar', 32, True),
        ('sharesnet164_cifar', 96, True),
        ('sharesnet164_cifar', 224, False),
        ('sharesnet34', 64, True),
        ('sharesnet34', 224, True),
        ('sharesnet34', 32, False),
    ],
)
def test_image_size_must_fit_the_net(folder, capsys, model, size, fits):
    change(model=model, img_size=size)
    if fits:
        assert f'{size} x {size} px' in accepted(capsys)
    else:
        assert refused(capsys).startswith(f'img_size: {size} px does not fit {model}')


def test_checks_the_sizes_of_a_schedule_and_of_input_size(folder, capsys):
    assert refused(capsys, '--train-img-sizes', '32', '256').startswith('img_size: 256 px')
    assert refused(capsys, '--input-size', '3', '224', '224').startswith('img_size: 224 px')


def test_torch_dataset_must_be_there_unless_it_is_downloaded(folder, capsys):
    change(dataset='torch/cifar10')
    message = 'data_dir: data has no complete torch/cifar10 (train_split), --dataset-download fetches it.'
    assert refused(capsys) == message
    missing = 'torch/cifar10: 10 classes, not complete in new, train.py will download it'
    assert missing in accepted(capsys, '--dataset-download', '--data-dir', 'new')
    assert not os.path.exists('new')  # preflight downloads nothing
    assert refused(capsys, '--dataset-download', '--data-dir', 'c.yaml') == 'data_dir: c.yaml is not a folder.'


def test_torch_dataset_that_is_there_is_counted(folder, capsys, monkeypatch):
    monkeypatch.setattr('torchvision.datasets.cifar.check_integrity', lambda path, md5: os.path.isfile(path))
    (folder / 'data' / 'cifar-10-batches-py').mkdir()
    names = {f'data_batch_{i}': 3 for i in range(1, 6)} | {'test_batch': 4}
    for name, size in names.items():
        batch = {'data': torch.zeros(size, 3072, dtype=torch.uint8).numpy(), 'labels': [0] * size}
        (folder / 'data' / 'cifar-10-batches-py' / name).write_bytes(pickle.dumps(batch))
    meta = {'label_names': [str(i) for i in range(10)]}
    (folder / 'data' / 'cifar-10-batches-py' / 'batches.meta').write_bytes(pickle.dumps(meta))
    change(dataset='torch/cifar10')
    assert 'torch/cifar10 in data: train 15 images, test 4 images, 10 classes' in accepted(capsys)


def test_refuses_a_split_name_that_makes_timm_train_on_the_test_set(folder, capsys):
    change(dataset='torch/cifar10', dataset_download=True, train_split='training_set')
    assert refused(capsys).startswith("train_split: timm takes 'training_set' for the test set of torch/cifar10")
    change(dataset='torch/cifar10', dataset_download=True, val_split='train')
    assert refused(capsys).startswith("val_split: timm takes 'train' for the training set of torch/cifar10")


def test_refuses_the_wrong_torch_dataset_for_num_classes(folder, capsys):
    change(dataset='torch/cifar100', dataset_download=True)
    assert refused(capsys) == 'num_classes: 10 (but torch/cifar100 has 100 classes).'


def test_says_that_streamed_data_is_not_checked(folder, capsys):
    change(dataset='hfids/timm/imagenet-1k-wds', num_classes=1000, model='sharesnet34')
    assert 'hfids/timm/imagenet-1k-wds: splits, classes and access NOT CHECKED' in accepted(capsys)


def test_accepts_checkpoints_of_the_model(folder, capsys):
    save_checkpoint('last.pth.tar')
    save_file(timm.create_model('resnet92_cifar').state_dict(), 'model.safetensors')
    summary = accepted(capsys, '--resume', 'last.pth.tar', '--initial-checkpoint', 'model.safetensors')
    assert 'last.pth.tar: all 551 tensors of the model' in summary
    assert 'model.safetensors: all 551 tensors of the model' in summary


@pytest.mark.parametrize('option', ['--resume', '--initial-checkpoint'])
def test_refuses_checkpoints_that_are_damaged_missing_or_of_another_model(folder, capsys, option):
    key = option.lstrip('-').replace('-', '_')
    assert refused(capsys, option, 'none.pth') == f'{key}: there is no file none.pth.'
    save_checkpoint('wide.pth', 'wrn40_4')
    assert refused(capsys, option, 'wide.pth').startswith(f'{key}: wide.pth is not a checkpoint of resnet92_cifar: ')
    save_checkpoint('last.pth')
    with open('last.pth', 'r+b') as f:
        f.truncate(1_000_000)
    assert refused(capsys, option, 'last.pth').startswith(f'{key}: last.pth cannot be read as a checkpoint: ')


def test_refuses_a_checkpoint_with_another_number_of_classes(folder, capsys):
    save_checkpoint('last.pth', 'resnet92_cifar')
    (folder / 'data' / 'train' / 'class9' / '0.png').unlink()
    (folder / 'data' / 'test' / 'class9' / '0.png').unlink()
    message = 'resume: last.pth is not a checkpoint of resnet92_cifar: 2 tensors differ, fc.bias has shape (10,)'
    assert refused(capsys, '--resume', 'last.pth', '--num-classes', '9').startswith(message)


def test_resume_needs_more_than_weights(folder, capsys):
    save_file(timm.create_model('resnet92_cifar').state_dict(), 'model.safetensors')
    assert refused(capsys, '--resume', 'model.safetensors').startswith('resume: model.safetensors has weights only')


class Touch:
    def __reduce__(self):
        return open, ('touched', 'w')


def test_runs_no_code_of_a_checkpoint(folder, capsys):
    save_checkpoint('last.pth', extra=Touch())
    assert refused(capsys, '--resume', 'last.pth').startswith('resume: last.pth cannot be read as a checkpoint: ')
    assert not os.path.exists('touched')


def test_teacher_folder_must_load_and_have_the_classes_of_the_student(folder, capsys):
    change(kd_model_name='local-dir:teacher')
    assert refused(capsys) == 'kd_model_name: there is no folder teacher.'
    (folder / 'teacher').mkdir()
    assert refused(capsys).startswith('kd_model_name: local-dir:teacher cannot be loaded: FileNotFoundError: ')
    save_for_hf(timm.create_model('resnet92_cifar'), 'teacher', safe_serialization=True)
    assert 'local-dir:teacher: 10 classes, loads' in accepted(capsys)
    save_for_hf(timm.create_model('resnet92_cifar', num_classes=11), 'teacher', safe_serialization=True)
    assert refused(capsys) == 'kd_model_name: local-dir:teacher has 11 classes, the student 10.'
    with open('teacher/model.safetensors', 'r+b') as f:
        f.truncate(1_000_000)
    assert refused(capsys).startswith('kd_model_name: local-dir:teacher cannot be loaded: SafetensorError: ')


def test_teacher_by_name_must_have_weights_and_the_classes_of_the_student(folder, capsys):
    change(kd_model_name='wrn40_4')
    assert refused(capsys).startswith('kd_model_name: timm has no weights for wrn40_4, name a folder')
    change(kd_model_name='resnet50')
    assert refused(capsys) == 'kd_model_name: resnet50 has 1000 classes, the student 10.'
    change(kd_model_name='sharesnet164_cifar')
    assert 'sharesnet164_cifar: 10 classes, weights NOT CHECKED' in accepted(capsys)


def test_as_a_module_it_prints_one_line_and_no_traceback(folder):
    with open('last.pth', 'wb') as f:
        f.write(b'PK\x03\x04 no checkpoint')
    command = [sys.executable, '-m', 'timm_sharesnet.preflight', 'c.yaml', '--resume', 'last.pth']
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, '')
    assert result.stderr.startswith('preflight: resume: last.pth cannot be read') and result.stderr.count('\n') == 1

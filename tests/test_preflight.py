"""timm_sharesnet.preflight: each fault ends in exit code 2 and one line that names the file or key."""

import argparse
import os
import pickle
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from models import save_folder
from safetensors.torch import save_file
from timm.data.transforms import _str_to_torch_interpolation
from timm.models import save_for_hf

from timm_sharesnet.preflight import main, train_options, train_parser
from timm_sharesnet.preflight.values import RANGES, VALUES

NO_OPTION = 'not an option of train.py (timm 1.0.29.dev0)'
WDS = 'hfids/timm/imagenet-1k-wds'
CIFAR = '--dataset torch/cifar10 --dataset-download'
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
    'device': 'cpu',
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
    Path('c.yaml').write_text(yaml.safe_dump(config))


def resnet92(**kwargs):
    return timm.create_model('resnet92_cifar', **kwargs)


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


@pytest.mark.parametrize('path', sorted(TRAIN_CONFIGS.glob('*.yaml')), ids=lambda path: path.stem)
def test_accepts_our_configs_with_the_data_that_they_are_for(tmp_path, monkeypatch, capsys, path):
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(path.read_text())
    for split in config['train_split'], config['val_split']:
        add_images(tmp_path / 'data' / split, config['num_classes'])
    teacher = config.get('kd_model_name', '')
    if teacher.startswith('local-dir:'):
        folder = teacher.removeprefix('local-dir:')
        save_folder(timm.create_model(Path(folder).name), folder)
    if 'initial_checkpoint' in config:
        save_folder(timm.create_model(config['model']), Path(config['initial_checkpoint']).parent)
    assert main([str(path), '--dataset', '', '--data-dir', 'data', '--device', 'cpu', '-b', '8']) == 0
    assert f'model   {config["model"]}: ' in capsys.readouterr().out


def test_command_line_wins_over_the_config(folder, capsys):
    change(num_classes=7)
    assert refused(capsys).startswith('num_classes: 7 ')
    accepted(capsys, '--num-classes', '10')


def test_accepts_the_args_yaml_that_train_py_writes(folder, capsys):
    parser = train_parser()
    parser.set_defaults(**CONFIG)
    Path('c.yaml').write_text(yaml.safe_dump(vars(parser.parse_args([]))))
    accepted(capsys)


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'batch-size': 64}, f'c.yaml: batch-size: {NO_OPTION}, did you mean batch_size'),
        ({'bach_size': 64}, f'c.yaml: bach_size: {NO_OPTION}, did you mean batch_size'),
        ({'dr': 0.2}, f'c.yaml: dr: {NO_OPTION}, did you mean decay_rate'),
        ({'zzz': 1}, f'c.yaml: zzz: {NO_OPTION}.'),
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
        ({'model': 'sharesnet51'}, 'model: timm knows no model sharesnet51, did you mean sharesnet50 or '),
        ({'model': 'resnet50.a9_in1k'}, 'model: timm knows no model resnet50.a9_in1k, did you mean resnet50.'),
        ({'model': 'local-dir:none'}, 'model: there is no folder none.'),
        ({'model_kwargs': {'depth': 3}}, 'model: resnet92_cifar cannot be built: TypeError: '),
        ({'data_dir': None}, 'data_dir: not set, the folder of the data is needed.'),
        (
            {'num_classes': None, 'model': 'wrn28_10'},
            "num_classes: 100 (wrn28_10's default, but data/train has 10 classes).",
        ),
    ],
    ids=str,
)
def test_refuses_wrong_keys_and_values(folder, capsys, changes, message):
    change(**changes)
    assert refused(capsys).startswith(message)


def test_data_folder_may_be_the_positional_argument_as_in_train_py(folder, capsys):
    change(data_dir=None)
    accepted(capsys, 'data')


def test_takes_a_number_written_as_text_where_train_py_converts_it(folder, capsys):
    with open('c.yaml', 'a') as f:
        f.write('weight_decay: 5e-4\n')  # text in YAML 1.1
    assert isinstance(yaml.safe_load(open('c.yaml'))['weight_decay'], str)
    accepted(capsys)


@pytest.mark.parametrize(
    'text, message',
    [
        *((text, 'c.yaml: not ') for text in ('', '- lr', 'lr: [1', 'lr: 2024-13-01', b'\xff\xfe\xfa')),
        ('lr: 0.1\nlr: 0.2', 'c.yaml: lr: given twice, in lines 1 and 2.'),
        ('opt_kwargs:\n  eps: 1\n  eps: 2', 'c.yaml: eps: given twice, in lines 2 and 3.'),
        ('opt_kwargs: {eps: 1, "eps": 2}', 'c.yaml: eps: given twice, in lines 1 and 1.'),
        ('model_kwargs: &a {b: *a}', 'c.yaml: line 1: write the value in place of the alias.'),
        ('a: &a [lol]\nb: [*a, *a]', 'c.yaml: line 2: write the value in place of the alias.'),
        ('scale: ' + '[' * 3000, 'c.yaml: nested more than 32 deep.'),
        ('- ' * 3000, 'c.yaml: nested more than 32 deep.'),
        ('#' * 200_000, 'c.yaml: not a config of train.py, it has more than 100,000 bytes.'),
        ('batch_size: 0x' + 'F' * 5000, 'batch_size: must be a finite number, not a number of thousands of digits.'),
        ('lr: .nan', 'lr: must be a finite number, not nan.'),
        ('opt_kwargs: {eps: .inf}', 'opt_kwargs: must be a finite number, not inf.'),
        ('experiment: "a\\0b"', "experiment: must be text without a null character, not 'a\\x00b'."),
        ('batch_size: 0', 'batch_size: must be at least 1, not 0.'),
        ('model_kwargs: {pretrained: true}\ndevice: cpu', "model_kwargs: pretrained is train.py's own"),
    ],
    ids=lambda text: text[:20],
)
def test_refuses_yaml_that_is_no_config_endless_ambiguous_or_senseless(folder, capsys, text, message):
    Path('c.yaml').write_bytes(text if isinstance(text, bytes) else text.encode())
    assert refused(capsys).startswith(message)


def test_refuses_a_config_that_is_no_regular_file(folder, capsys):
    os.mkfifo('pipe')
    for path in 'pipe', '/dev/zero', 'data':
        assert refused(capsys, config=path) == f'{path}: not a file.'


def test_refuses_a_config_that_is_not_there(folder, capsys):
    assert refused(capsys, config='d.yaml') == 'd.yaml: No such file or directory'


@pytest.mark.parametrize(
    'options, message',
    [
        ('--bach-size 64', '--bach-size: not an option of train.py, did you mean --batch-size'),
        ('--config d.yaml', '--config: not an option of train.py.'),
        ('--batch-size big', "argument -b/--batch-size: invalid int value: 'big'"),
        ('--kd-distill-type soft', "argument --kd-distill-type: invalid choice: 'soft'"),
        ('--torchscript --torchcompile', 'argument --torchcompile: not allowed with argument --torchscript'),
        ('--opt-kwargs fused', '--model-kwargs, --opt-kwargs must be KEY=VALUE'),
        ("--model-kwargs 'layers={[]: 1}'", '--model-kwargs, --opt-kwargs must be KEY=VALUE'),
        # What train.py notices late or takes for something else
        ('--eval-metric prec1', "eval_metric: must be one of top1, top5, loss, not 'prec1'."),
        ('--mixup-mode foo', "mixup_mode: must be one of batch, pair, elem, half, not 'foo'."),
        ('--remode foo', 'remode: must be one of '),
        ('--clip-mode foo', 'clip_mode: must be one of norm, value, agc'),
        ('--train-interpolation foo', 'train_interpolation: must be one of '),
        ('--interpolation random', 'interpolation: must be one of '),
        ('--aa original --train-interpolation lanczos', 'aa: rotates and shears, which PIL cannot do with lanczos'),
        ('--aa rand-m9 --train-interpolation= --interpolation box', 'aa: rotates and shears, which PIL cannot do with'),
        ('--train-crop-mode foo', 'train_crop_mode: must be one of '),
        ('--amp-dtype bf16', 'amp_dtype: must be one of float16, bfloat16'),
        ('--dist-bn foo', 'dist_bn: must be one of '),
        ('--worker-seeding foo', 'worker_seeding: must be one of all, part'),
        ('--lr-base-scale foo', 'lr_base_scale: must be one of '),
        ('--aa foo', "aa: 'foo' is not all read by timm."),
        ('--aa rand-foo', "aa: 'rand-foo' is not all read by timm."),  # timm leaves out foo
        ('--aa rand-m12-mmax12', "aa: 'rand-m12-mmax12' is not all read by timm."),  # crashes in posterize, sometimes
        ('--opt sgdd', 'opt: timm knows no optimizer sgdd, did you mean sgd or '),
        ('--opt foo_sgd', 'opt: timm knows no optimizer foo_sgd, did you mean sgd?'),  # sgd to timm
        ('--opt adamw --opt-betas 0.9', 'opt, opt_kwargs: adamw cannot be made: IndexError'),
        ('--opt-kwargs foo=1', 'opt, opt_kwargs: sgd cannot be made: TypeError: '),
        ('--sched none', 'sched: none is no schedule'),
        ('--sched foo', 'sched: foo '),
        ('--sched plateau --sched-on-updates', 'sched_on_updates: plateau steps by epoch only.'),
        ('--sched multistep --decay-milestones 5 3', 'decay_milestones: must be increasing, not [5, 3].'),
        ('--torchcompile foo', "torchcompile, torchcompile_mode: InvalidBackend: Invalid backend: 'foo'"),
        ('--torchcompile --torchcompile-mode foo', 'torchcompile, torchcompile_mode: RuntimeError: Unrecognized mode'),
        ('--gp foo', 'model: resnet92_cifar cannot be built: AssertionError: Invalid pool type: foo'),
        ('--input-img-mode foo', "input_img_mode: PIL has no mode 'foo'."),
        ('--in-chans 1', 'in_chans: 1, but train.py would read images of mode RGB with 3 channels'),
        ('--device-modules foo_device', 'device_modules: foo_device cannot be imported: ModuleNotFoundError'),
        ('--model-kwargs pretrained=True', "model_kwargs: pretrained is train.py's own, by the option pretrained."),
        ('--model-kwargs global_pool=max', "model_kwargs: global_pool is train.py's own, by the option gp."),
        ('--mixup 0.2 -b 7', 'batch_size: 7 is odd'),
        ('--cutmix 1 --train-img-sizes 32 64 --train-batch-sizes 8 5', 'train_batch_sizes: 5 is odd'),
        ('--cutmix-minmax 0.8 0.2', 'cutmix_minmax: must be two numbers, the smaller first, not [0.8, 0.2].'),
        ('--scale 0.5', 'scale: must be two numbers, the smaller first, not [0.5].'),
        ('--bce-loss --smoothing 0', 'bce_loss: is used only with mixup, cutmix or smoothing'),
        ('--jsd-loss', 'jsd_loss: needs aug_splits of at least 2.'),
        ('--aug-splits 1', 'aug_splits: must be 0 or at least 2'),
        ('--amp --model-dtype bfloat16', 'model_dtype: must be float32 with amp'),
        ('--train-size-probs 0.5 0.5', 'train_size_probs: must have one number for each of train_img_sizes'),
        ('--naflex-loader', 'naflex_loader: makes patches for a vision transformer'),
        ('--start-epoch 300', 'start_epoch: 300 of 300 epochs'),
        ('--dataset torch/cifar11', 'dataset: timm has no torch/cifar11, it knows cifar10, '),
        ('--class-map none.txt', 'class_map: there is no file none.txt'),
        ('--batch-size 0', 'batch_size: must be at least 1, not 0.'),
        ('--epochs -1', 'epochs: must be at least 1, not -1.'),
        ('--workers -1', 'workers: must be at least 0, not -1.'),
        ('--val-interval 0', 'val_interval: must be at least 1, not 0.'),
        ('--lr nan', 'lr: must be a finite number, not nan.'),
        ('--weight-decay inf', 'weight_decay: must be a finite number, not inf.'),
        ('--lr 0', 'lr: must be above 0, not 0.0.'),  # lr_base to train.py
        ('--hflip 1.5', 'hflip: must be from 0 to 1, not 1.5.'),
        ('--drop-path 1', 'drop_path: must be at least 0 and below 1, not 1.0.'),
        ('--mean 0.5 0.5 nan', 'mean: must be a finite number, not nan.'),
        ('--std 0.2 0.2 0', 'std: must be above 0, not 0.0.'),
        ('--seed -1', 'seed: must be from 0 to 4294967295, not -1.'),
        ('--train-img-sizes 32 256', 'img_size: 256 px'),
        ('--input-size 3 224 224', 'img_size: 224 px'),
        ('--model shawrn40_4 --pretrained', 'pretrained: timm has no weights for shaw'),
        ('--kd-model-name wrn40_4', 'kd_model_name: timm has no weights for wrn40_4, name a folder'),
        ('--kd-model-name resnet5O', 'kd_model_name: timm knows no model resnet5O, did you mean resnet50 or '),
        ('--kd-model-name resnet50', 'kd_model_name: resnet50 has 1000 classes, the student 10.'),
        # Data
        ('-b 1000', 'batch_size: 1000, but data/train has '),
        ('--data-dir elsewhere', 'data_dir: there is no folder elsewhere.'),
        ('--num-classes 12', 'num_classes: 12 (but data/train has 10 classes).'),
        ('--dataset torch/cifar100 --dataset-download', 'num_classes: 10 (but torch/cifar100 has 100 classes).'),
        (
            f'{CIFAR} --train-split training_set',
            "train_split: timm takes 'training_set' for the test set of torch",
        ),
        (f'{CIFAR} --val-split train', "val_split: timm takes 'train' for the training set of torch/cifar10"),
    ],
)
def test_refuses_wrong_options_and_values(folder, capsys, options, message):
    assert refused(capsys, *shlex.split(options)).startswith(message)


@pytest.mark.parametrize(
    'options',
    [
        # In all forms that train.py takes
        '-b 4 -j 2 -vb 32',
        '--lr=0.2 --batch-size=4',
        '--weight-dec 0.1',  # argparse takes an unambiguous beginning
        '--no-aug --no-prefetcher --amp',
        '--torchcompile --device cpu',
        '--opt-kwargs fused=True filter_bias_and_bn=False --model-kwargs block_drop_rate=0.3',
        '--scale 0.5 1 --decay-milestones 61 121',
        '--dr 0.2 --local_rank 1',
        # All that timm knows
        '--aa rand-m9-mstd0.5-inc1 --reprob 0.25 --remode rand --mixup 0.8 --cutmix 1 --mixup-mode elem',
        '--aa augmix-m3-w3 --aug-splits 3 --jsd-loss --split-bn --no-prefetcher',
        '--aa original-mstd0.5 --train-crop-mode rkrc --train-interpolation bicubic',
        '--aa 3a --train-crop-mode rkrc --train-interpolation lanczos',
        '--aa original --no-aug --train-interpolation lanczos',
        '--opt lookahead_adamw --opt-eps 1e-6 --opt-betas 0.9 0.99 --layer-decay 0.7 --clip-grad 1 --clip-mode agc',
        '--sched plateau --eval-metric loss --warmup-epochs 0',
        '--sched multistep --decay-milestones 61 121 161 --dr 0.2',
        '--in-chans 1 --img-size 32 --mean 0.5 --std 0.2',
        '--train-img-sizes 32 64 --train-batch-sizes 8 4 --train-size-probs 1 0',
        '--torchcompile eager --torchcompile-mode reduce-overhead --amp --amp-dtype bfloat16',
        '-b 7',  # is odd, without mixing
    ],
)
def test_accepts_what_train_py_takes(folder, capsys, options):
    accepted(capsys, *options.split())


@pytest.mark.parametrize(
    'options, said',
    [
        ('--train-img-sizes 24 32', 'train_img_sizes: only in a train.py newer than timm 1.0.28'),
        ('--aug-repeats 3', 'aug_repeats: only with several processes'),
        ('--model sharesnet164_cifar --pretrained', 'of sharesnet164_cifar: load'),
        ('--model resnet50 --img-size 64 --pretrained', 'of resnet50: NOT CHECKED, they are downloaded'),
        ('--kd-model-name sharesnet164_cifar', 'sharesnet164_cifar: 10 classes, weights NOT CHECKED'),
        (f'--dataset {WDS} --num-classes 1000 --model sharesnet34', f'{WDS}: splits, classes and access NOT CHECKED'),
    ],
)
def test_says_what_needs_more_or_is_not_checked(folder, capsys, options, said):
    assert said in accepted(capsys, *options.split())
    assert said not in accepted(capsys)


def test_validation_may_be_off(folder, capsys):
    assert 'test' not in accepted(capsys, '--val-split', '')


# Text that is a name or path of the user's, or asked of torch, timm or PIL
OTHER_TEXT = {
    *('data', 'data_dir', 'dataset', 'train_split', 'val_split', 'class_map', 'input_key', 'target_key'),
    *('model', 'pretrained_path', 'initial_checkpoint', 'resume', 'output', 'experiment', 'kd_model_name'),
    *('wandb_project', 'wandb_tags', 'wandb_resume_id'),
    *('gp', 'input_img_mode', 'opt', 'sched', 'aa', 'device', 'device_modules', 'torchcompile', 'torchcompile_mode'),
}
ANY_NUMBER = {'mean', 'head_init_scale', 'head_init_bias', 'local_rank'}


def test_no_option_of_train_py_is_without_a_check_of_its_value():
    options = train_options().values()
    text = {o['name'] for o in options if o['type'] == 'str' and 'choices' not in o}
    assert text - set(VALUES) - OTHER_TEXT == set()
    assert OTHER_TEXT & set(VALUES) == set()
    numbers = {o['name'] for o in options if o['type'] in ('int', 'float')}
    ranges = [name for _, names in RANGES.values() for name in names.split()]
    assert sorted([*ranges, *ANY_NUMBER]) == sorted(numbers)


def test_interpolations_are_those_of_timm():
    assert set(VALUES['interpolation']) == {'', *_str_to_torch_interpolation}


@pytest.mark.parametrize('device', ['gpu', 'meta', 'cuda:99'])
def test_refuses_a_device_that_is_not_there_and_says_how_to_do_without(folder, capsys, device):
    message = refused(capsys, '--device', device)
    assert message.startswith(f"device: '{device}' cannot be used here (")
    assert message.endswith('--device cpu trains on the CPU, and lets a config for another machine be checked.')


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without CUDA')
def test_refuses_the_default_device_of_train_py_without_cuda(folder, capsys):
    change(device=None)
    assert refused(capsys).startswith("device: 'cuda' cannot be used here (")


@pytest.mark.parametrize('output', ['c.yaml', 'c.yaml/x', '/proc/x', '/dev/null/x', 'x' * 300])
def test_refuses_an_output_that_cannot_be_written(folder, capsys, output):
    assert refused(capsys, '--output', output).startswith('output')


def test_writes_nothing(folder, capsys):
    before = sorted(folder.rglob('*'))
    assert 'writes to out/a/b' in accepted(capsys, '--output', 'out/a', '--experiment', 'b')
    assert sorted(folder.rglob('*')) == before


def test_says_how_it_is_called(folder, capsys):
    assert main([]) == 2
    usage = 'python -m timm_sharesnet.preflight CONFIG [options of train.py]'
    assert capsys.readouterr().err == f'preflight: usage: {usage}\n'


@pytest.mark.parametrize('argv', [['-h'], ['--help'], ['c.yaml', '--help']], ids=' '.join)
def test_help_is_no_fault_and_says_what_is_written_and_what_the_exit_codes_mean(argv, capsys):
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert 'python -m timm_sharesnet.preflight CONFIG' in text
    assert 'writes nothing' in text and 'Exit code 0' in text and 'Exit code 2' in text


def test_refuses_a_split_for_which_timm_would_take_everything(folder, capsys):
    change(val_split=None)  # train.py's default is validation
    there = 'data (but test, train), and train.py would silently take all'
    assert refused(capsys).startswith(f"val_split: there is no folder 'validation' in {there}")
    (folder / 'data' / 'test').rename(folder / 'data' / 'val')  # timm knows val as validation
    assert 'data/val 10 images' in accepted(capsys)
    (folder / 'data' / 'train').rename(folder / 'data' / 'fit')
    assert refused(capsys).startswith("train_split: there is no folder 'train' in data")


def test_refuses_a_split_without_images(folder, capsys):
    for path in sorted((folder / 'data' / 'test').rglob('0.png')):
        path.rename(path.with_suffix('.txt'))
    assert refused(capsys) == 'val_split: there are no images in data/test.'


def rename_class(folder, old, new):
    for split in 'train', 'test':
        (folder / 'data' / split / old).rename(folder / 'data' / split / new)


@pytest.mark.parametrize('names', [('Cat', 'cat'), ('class1', 'class01'), ('\u00c4', '\u00e4')])
def test_refuses_classes_that_timm_orders_by_chance(folder, capsys, names):
    for i, name in zip((1, 2), names, strict=True):
        rename_class(folder, f'class{i}', f'{name}.new')
        rename_class(folder, f'{name}.new', name)
    message = refused(capsys)
    assert message.startswith('data/train: the class folders ') and all(repr(name) in message for name in names)
    accepted(capsys, '--dataset', 'torch/image_folder')  # by torchvision, which does not


@pytest.mark.slow
def test_timm_does_order_such_classes_by_chance(folder):
    rename_class(folder, 'class1', 'Cat')
    rename_class(folder, 'class2', 'cat')
    code = "from timm.data import create_dataset as c; print(c('', 'data', split='train').reader.class_to_idx['cat'])"
    orders = set()
    for seed in range(1, 9):
        env = {**os.environ, 'PYTHONHASHSEED': str(seed)}
        orders.add(subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, check=True).stdout)
        if len(orders) == 2:
            break
    assert len(orders) == 2


def test_refuses_a_class_that_timm_cannot_sort(folder, capsys):
    rename_class(folder, 'class1', '\u00b2')
    assert refused(capsys).startswith("data/train: timm cannot sort the class folder '\u00b2'")


@pytest.mark.parametrize('link, target', [('class0/up', '../..'), ('class0/self', '.'), ('again', 'class1')])
def test_refuses_links_by_which_timm_would_count_images_again_or_without_end(folder, capsys, link, target):
    (folder / 'data' / 'train' / link).symlink_to(target)
    assert refused(capsys).startswith(f'data/train/{link}: this link leads to {folder.resolve()}/data')


def test_accepts_links_to_folders_elsewhere(folder, capsys):
    (folder / 'data' / 'test').rename(folder / 'there')
    (folder / 'data' / 'test').symlink_to(folder / 'there')
    (folder / 'data' / 'train' / 'class0').rename(folder / 'class0')
    (folder / 'data' / 'train' / 'class0').symlink_to(folder / 'class0')
    assert 'data/train 10 images, data/test 10 images' in accepted(capsys)


def test_refuses_splits_with_different_classes(folder, capsys):
    (folder / 'data' / 'test' / 'class3').rename(folder / 'data' / 'test' / 'other')
    assert "'class3' is in data/train, not in data/test" in refused(capsys)


@pytest.mark.parametrize('size', [32, 64, 96, 224])
@pytest.mark.parametrize('model, fit', [('sharesnet164_cifar', (32, 64, 96)), ('sharesnet34', (64, 96, 224))])
def test_image_size_must_fit_the_net(folder, capsys, model, size, fit):
    change(model=model, img_size=size)
    if size in fit:
        assert f'{size} x {size} px' in accepted(capsys)
    else:
        assert refused(capsys).startswith(f'img_size: {size} px does not fit {model}')


def test_torch_dataset_must_be_there_unless_it_is_downloaded(folder, capsys):
    change(dataset='torch/cifar10')
    (folder / 'empty').mkdir()
    message = 'data_dir: empty has no complete torch/cifar10 (train_split), --dataset-download fetches it.'
    assert refused(capsys, '--data-dir', 'empty') == message
    missing = 'torch/cifar10: 10 classes, not complete in new, train.py will download it'
    assert missing in accepted(capsys, '--dataset-download', '--data-dir', 'new')
    assert not os.path.exists('new')  # preflight downloads nothing
    assert refused(capsys, '--dataset-download', '--data-dir', 'c.yaml') == 'data_dir: c.yaml is not a folder.'


@pytest.mark.parametrize('options', [[], ['--dataset-download']], ids=str)
def test_refuses_folders_of_images_as_a_torch_dataset_and_says_how_to_name_them(folder, capsys, options):
    change(dataset='torch/cifar10')
    message = "dataset: data has no torch/cifar10, but folders of images, for which write dataset: '' (--dataset '')."
    assert refused(capsys, *options) == message
    accepted(capsys, '--dataset', '')


def test_torch_dataset_that_is_there_is_counted(folder, capsys, monkeypatch):
    monkeypatch.setattr('torchvision.datasets.cifar.check_integrity', lambda path, md5: os.path.isfile(path))
    files = {'batches.meta': {'label_names': [str(i) for i in range(10)]}}
    for name, size in {**{f'data_batch_{i}': 3 for i in range(1, 6)}, 'test_batch': 4}.items():
        files[name] = {'data': torch.zeros(size, 3072, dtype=torch.uint8).numpy(), 'labels': [0] * size}
    (folder / 'data' / 'cifar-10-batches-py').mkdir()
    for name, content in files.items():
        (folder / 'data' / 'cifar-10-batches-py' / name).write_bytes(pickle.dumps(content))
    change(dataset='torch/cifar10')
    assert 'torch/cifar10 in data: train 15 images, test 4 images, 10 classes' in accepted(capsys)


def test_accepts_checkpoints_of_the_model(folder, capsys):
    save_checkpoint('last.pth.tar')
    save_file(resnet92().state_dict(), 'model.safetensors')
    summary = accepted(capsys, '--resume', 'last.pth.tar', '--initial-checkpoint', 'model.safetensors')
    for path in 'last.pth.tar', 'model.safetensors':
        assert f'{path}: all 551 tensors of the model' in summary


@pytest.mark.parametrize('option', ['--resume', '--initial-checkpoint'])
def test_refuses_checkpoints_that_are_damaged_missing_diverged_or_of_another_model(folder, capsys, option):
    key = option.lstrip('-').replace('-', '_')
    weights = resnet92().state_dict()
    torch.save({'epoch': 3, 'state_dict': {**weights, 'fc.bias': weights['fc.bias'] / 0}}, 'diverged.pth')
    message = 'diverged.pth is not a checkpoint of resnet92_cifar: fc.bias has values that are not finite.'
    assert refused(capsys, option, 'diverged.pth') == f'{key}: {message}'
    assert refused(capsys, option, 'none.pth') == f'{key}: there is no file none.pth.'
    save_checkpoint('wide.pth', 'wrn40_4')
    assert refused(capsys, option, 'wide.pth').startswith(f'{key}: wide.pth is not a checkpoint of resnet92_cifar: ')
    save_checkpoint('last.pth')
    os.truncate('last.pth', 1_000_000)
    assert refused(capsys, option, 'last.pth').startswith(f'{key}: last.pth is damaged or no checkpoint')


@pytest.mark.parametrize('option', ['--resume', '--initial-checkpoint'])
def test_names_the_way_that_loads_a_checkpoint_with_another_number_of_classes(folder, capsys, option):
    save_checkpoint('last.pth')
    for split in 'train', 'test':
        shutil.rmtree(folder / 'data' / split / 'class9')
    message = refused(capsys, option, 'last.pth', '--num-classes', '9')
    assert 'last.pth has another classifier than the model with its 9 classes' in message
    way = '--pretrained --pretrained-path last.pth --num-classes 9'
    assert way in message
    assert 'last.pth: all 549 tensors of the model but the classifier' in accepted(capsys, *way.split())


@pytest.mark.parametrize(
    'saved, options, fault',
    [
        (dict(act_layer='silu'), [], 'layer1.blocks.0.act1 is ReLU() in place of SiLU(). The options for it are'),
        (dict(global_pool='max'), [], 'global_pool is SelectAdaptivePool2d(pool_type=avg'),
        (
            dict(share_rate=(0, 0, [[1, 3], [2, 4, 5]])),
            ['share_rate=(0,0,[[1,4,5],[2,3]])'],
            'layer3 is SharedStage(conv.1: blocks [1, 4, 5], conv.2: blocks [2, 3]) in place of SharedStage(conv.1',
        ),
    ],
    ids=['activation', 'pooling', 'runs'],
)
def test_weights_are_not_those_of_a_net_that_computes_something_else(folder, capsys, saved, options, fault):
    kwargs = dict(layers=(2, 2, 6))
    save_folder(resnet92(**kwargs, **saved), 'run', **kwargs, **saved)
    change(model_kwargs=kwargs)
    kwargs_option = ['--model-kwargs', 'layers=(2,2,6)', *options]
    ways = [['--initial-checkpoint'], ['--pretrained', '--pretrained-path']]
    for way in ways if 'act_layer' in saved else ways[:1]:  # a new classifier may come with another pooling
        message = refused(capsys, *way, 'run/model.safetensors', *kwargs_option)
        key = way[-1][2:].replace('-', '_')
        assert message.startswith(f'{key}: run/model.safetensors has the weights of a net that')
        assert fault in message
        found = shlex.split(message.partition('The options for it are ')[2].rstrip('.'))
        accepted(capsys, *way, 'run/model.safetensors', *found)
        accepted(capsys, *way, 'run/model.safetensors', *found, '--drop', '0.1', '--drop-path', '0.1')
    Path('run/config.json').write_text('{"architecture": "resnet164_cifar", "model_args": {"layers": 5}}')
    message = refused(capsys, '--initial-checkpoint', 'run/model.safetensors', *kwargs_option)
    assert 'run/model.safetensors lies beside a config that builds no model: ' in message
    for content in '', '[]', '{}', '{"architecture": "of_another_kind"}', '{"architecture": 5}':
        Path('run/config.json').write_text(content)
        accepted(capsys, '--initial-checkpoint', 'run/model.safetensors', *kwargs_option)


def test_pretrained_path_must_be_there_hold_the_model_and_be_used(folder, capsys):
    way = '--pretrained', '--pretrained-path'
    assert refused(capsys, *way, 'none.pth') == 'pretrained_path: there is no file none.pth.'
    assert refused(capsys, way[1], 'none.pth').startswith('pretrained_path: is not loaded without pretrained')
    save_checkpoint('wide.pth', 'wrn40_4')
    wide = refused(capsys, *way, 'wide.pth')
    assert wide.startswith('pretrained_path: wide.pth cannot be loaded: RuntimeError: The ')
    weights = timm.create_model('resnet18', num_classes=3).state_dict()
    torch.save(weights, 'whole.pth')
    torch.save({k: v for k, v in weights.items() if not k.startswith('layer4')}, 'part.pth')  # timm leaves it at random
    options = ['--model', 'resnet18', '--img-size', '64']
    message = 'pretrained_path: part.pth lacks 30 tensors of resnet18, layer4.0.bn1.bias is one.'
    assert refused(capsys, *options, *way, 'part.pth').startswith(message[:50])
    assert 'whole.pth: all' in accepted(capsys, *options, *way, 'whole.pth')


def test_refuses_to_resume_what_has_no_epoch_left(folder, capsys):
    save_checkpoint('last.pth')  # of epoch 3, the fourth
    assert refused(capsys, '--resume', 'last.pth', '--epochs', '4').startswith('resume: last.pth has 4 epochs of 4, ')
    accepted(capsys, '--resume', 'last.pth', '--epochs', '5')
    accepted(capsys, '--initial-checkpoint', 'last.pth', '--epochs', '4')


def test_resume_needs_more_than_weights(folder, capsys):
    save_file(resnet92().state_dict(), 'model.safetensors')
    assert refused(capsys, '--resume', 'model.safetensors').startswith('resume: model.safetensors has weights only')


class Touch:
    def __reduce__(self):
        return open, ('touched', 'w')


def test_runs_no_code_of_a_checkpoint_and_does_not_advise_to(folder, capsys):
    save_checkpoint('more.pth', extra=Touch())
    torch.save(resnet92(), 'model.pth')
    torch.save(resnet92(), 'old.pth', _use_new_zipfile_serialization=False)
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), 'script.pth')
    for path in 'more.pth', 'model.pth', 'old.pth', 'script.pth':
        message = refused(capsys, '--initial-checkpoint', path)
        assert message.startswith(f'initial_checkpoint: {path} is a pickled model or holds other objects than tensors')
        assert 'save model.state_dict()' in message and 'weights_only' not in message
    assert not os.path.exists('touched')


def test_says_of_files_that_are_no_checkpoint_what_they_are_in_a_sentence(folder, capsys):
    Path('text.pth').write_text('export FOO=1\n')  # KeyError: 101 to torch
    Path('empty.pth').touch()
    Path('zip.pth').write_bytes(b'PK\x03\x04')
    Path('weights.safetensors').write_bytes(b'x' * 50)
    torch.save(torch.zeros(3), 'tensor.pth')
    torch.save({'net': {}, 'epoch': 3}, 'nested.pth')
    damaged = 'damaged or no checkpoint, torch cannot read it.'
    other = 'no checkpoint: it does not hold a state_dict, names with tensors.'
    faults = dict.fromkeys(('text.pth', 'empty.pth', 'zip.pth', 'weights.safetensors'), damaged)
    for path, fault in {**faults, 'tensor.pth': other, 'nested.pth': other}.items():
        assert refused(capsys, '--initial-checkpoint', path) == f'initial_checkpoint: {path} is {fault}'


def test_teacher_folder_must_load_and_have_the_classes_of_the_student(folder, capsys):
    change(kd_model_name='local-dir:teacher')
    assert refused(capsys) == 'kd_model_name: there is no folder teacher.'
    (folder / 'teacher').mkdir()
    os.mkfifo('teacher/config.json')
    assert refused(capsys).startswith('kd_model_name: teacher has no file config.json')
    os.unlink('teacher/config.json')
    save_folder(resnet92(), 'teacher')
    assert 'local-dir:teacher: 10 classes, loads' in accepted(capsys)
    save_folder(resnet92(num_classes=11), 'teacher')
    assert refused(capsys) == 'kd_model_name: local-dir:teacher has 11 classes, the student 10.'
    os.truncate('teacher/model.safetensors', 1_000_000)
    assert refused(capsys).startswith('kd_model_name: local-dir:teacher cannot be loaded: SafetensorError: ')


def test_teacher_folder_that_is_no_model_is_refused_in_a_sentence(folder, capsys):
    change(kd_model_name='local-dir:teacher')
    save_for_hf(resnet92(), 'teacher', safe_serialization=False)
    torch.save(resnet92(), 'teacher/pytorch_model.bin')
    assert refused(capsys).startswith('kd_model_name: local-dir:teacher is a pickled model or holds other objects')
    Path('teacher/pytorch_model.bin').write_text('export FOO=1\n')
    message = 'kd_model_name: local-dir:teacher cannot be loaded: its weights or its config.json '
    assert refused(capsys).startswith(message)


NAME = '\u00e4  \u043a\u0438\u0442 \U0001f40b'  # with two blanks, and outside of cp1252


def test_paths_with_blanks_and_in_other_scripts_work(folder, capsys):
    (folder / 'data').rename(folder / NAME)
    rename = {'data_dir': NAME, 'output': NAME, 'experiment': NAME}
    summary = accepted(capsys, *(f'--{key.replace("_", "-")}={value}' for key, value in rename.items()))
    assert f'{NAME}/train 10 images' in summary and f'writes to {NAME}/{NAME}' in summary


@pytest.mark.parametrize(
    'flags, options, message',
    [
        (['-W', 'error'], ['--resume', 'last.pth'], 'resume: last.pth is damaged or no checkpoint'),
        pytest.param(['-O'], ['--gp', 'foo'], 'model: resnet92_cifar cannot be built: Assert', marks=pytest.mark.slow),
    ],
)
def test_as_a_module_it_prints_one_line_and_no_traceback(folder, flags, options, message):
    Path('last.pth').write_bytes(b'PK\x03\x04 no checkpoint')
    command = [sys.executable, *flags, '-m', 'timm_sharesnet.preflight', 'c.yaml', *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, '')
    assert result.stderr.startswith(f'preflight: {message}') and result.stderr.count('\n') == 1

"""timm's own scripts, unmodified, by their own command lines: each training config, and each model in the others.

The scripts are in timm's repository only: set TIMM_REPO to a clone of it, or have one beside this checkout. The data
are a few of the real images in tests/data. The configs are used as they are but for what a CPU needs (`ON_CPU`).
"""

import argparse
import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import yaml
from demo import load_images
from models import CIFAR_TWINS, SHARED, create, kernels, save_folder
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from timm_sharesnet.export import inspect

ROOT = Path(__file__).parents[1]
TIMM_REPO = Path(os.environ.get('TIMM_REPO') or ROOT.parent / 'pytorch-image-models')
SCRIPTS = ['train.py', 'validate.py', 'inference.py', 'onnx_export.py', 'benchmark.py']
CONFIGS = sorted((ROOT / 'train_configs').glob('*.yaml'))
PAPER = [c for c in CONFIGS if c.stem.split('_', 1)[1] in SHARED and not c.stem.startswith('tinyimagenet')]
FAST = 'cifar10_shawrn40_4_modern'  # the default run's: bf16, augmentation, EMA
CLASSES, BATCH = 5, 8
SHORT = ['--device', 'cpu', '-b', 2, '--num-warm-iter', 1, '--num-bench-iter', 5]
ON_CPU = ['--device', 'cpu', '--dataset', '', '--data-dir', 'images', '--workers', '1', '--num-classes', str(CLASSES)]


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """Working directory with timm's scripts, which would import the clone's timm inside the clone, and images."""
    if not (TIMM_REPO / 'train.py').is_file():
        pytest.skip(f"needs a clone of timm's repository, there is none at {TIMM_REPO}: set TIMM_REPO")
    folder = tmp_path_factory.mktemp('train')
    tag = f'v{timm.__version__}'  # the scripts of the timm that is installed, where the clone has them
    for script in SCRIPTS:
        show = subprocess.run(['git', '-C', TIMM_REPO, 'show', f'{tag}:{script}'], capture_output=True)
        (folder / script).write_bytes(show.stdout if show.returncode == 0 else (TIMM_REPO / script).read_bytes())
    images, labels, classes = load_images()
    for label in range(CLASSES):
        members = [image for image, y in zip(images, labels, strict=True) if y == label]
        for split, part in ('train', members[:8]), ('test', members[8:12]), ('many', members[12:64]):
            (folder / 'images' / split / classes[label]).mkdir(parents=True)
            for i, image in enumerate(part):
                image.save(folder / 'images' / split / classes[label] / f'{classes[label]}_{i}.png')
    for name in 'validation', 'val':  # what the configs for ImageNet and Tiny-ImageNet call it
        (folder / 'images' / name).symlink_to('test')
    return folder


@pytest.fixture
def output(folder):
    """Folder for train.py's output, gone after the test: checkpoints are large."""
    yield folder / 'output'
    shutil.rmtree(folder / 'output', ignore_errors=True)


def run(folder, *command, program=sys.executable):
    """Run a script and return what it printed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    env = {**os.environ, 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1', 'PATH': path}
    result = subprocess.run([program, *map(str, command)], cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def results(folder, script, *options):
    """Run a script and return what it wrote."""
    run(folder, script, *options, '--results-file', 'results.json', '--results-format', 'json')
    return json.loads((folder / 'results.json').read_text())


def on_cpu(config, processes=1):
    """The config's values, and train.py's options for it: all that the run changes."""
    values = yaml.safe_load(config.read_text())
    options = ['--config', config, *ON_CPU, '--batch-size', BATCH, '--img-size', 64 if values['img_size'] > 32 else 16]
    options += ['--lr', values['lr'] * BATCH / values['batch_size']]
    if 'model_ema' in values:
        options += ['--model-ema-decay', 0.5]  # the config's is for thousands of steps, here are 15
    if 'torchcompile' in values:
        options += ['--torchcompile', 'eager']  # traced, but without a C++ compiler and its minutes
    if 'aug_repeats' in values:  # needs several processes and 256 images
        options += ['--aug-repeats', 0] if processes == 1 else ['--train-split', 'many']
    return values, options


@pytest.mark.parametrize('config', PAPER, ids=lambda config: config.stem)
def test_recipe_of_the_paper_lowers_the_rate_after_its_epochs_and_decays_every_parameter(config):
    values = yaml.safe_load(config.read_text())
    args = argparse.Namespace(**values)
    model = timm.create_model(args.model, device='meta')
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    assert [group['weight_decay'] for group in optimizer.param_groups] == [args.weight_decay]
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults['nesterov']
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args))
    rates = []
    for epoch in range(epochs):  # as train.py does
        rates.append(optimizer.param_groups[0]['lr'])
        scheduler.step(epoch + 1)
    cifar = config.stem.startswith('cifar')
    steps = {0: 0.1, 60: 0.02, 120: 0.004, 160: 0.0008} if cifar else {0: 0.1, 30: 0.01, 60: 0.001}
    assert epochs == (200 if cifar else 90)
    assert rates == pytest.approx([steps[max(e for e in steps if e <= epoch)] for epoch in range(epochs)])


def summary(path):
    with open(path) as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize(
    'config', [pytest.param(c, id=c.stem, marks=[] if c.stem == FAST else [pytest.mark.slow]) for c in CONFIGS]
)
def test_config_trains_resumes_and_its_checkpoint_loads(folder, output, config):
    values, options = on_cpu(config)
    if 'kd_model_name' in values:
        teacher = 'resnet164_cifar' if values['kd_model_name'].startswith('local-dir:') else 'resnet50'
        save_folder(create(teacher, num_classes=CLASSES), folder / 'teachers' / teacher)
        if teacher == 'resnet50':
            options += ['--kd-model-name', 'local-dir:teachers/resnet50']  # the config's is on the Hub
    options += ['--output', output]
    if 'initial_checkpoint' in values:
        save_folder(create(values['model'], num_classes=CLASSES), folder / Path(values['initial_checkpoint']).parent)

    log = run(folder, 'train.py', *options, '--epochs', 2, '--experiment', 'first')
    assert ('LogitDistillationTask' in log) == ('kd_model_name' in values)
    first = torch.load(output / 'first' / 'last.pth.tar', weights_only=False)
    resume = ['--experiment', 'resumed', '--resume', output / 'first' / 'last.pth.tar']
    resume += ['--initial-checkpoint', ''] if 'initial_checkpoint' in values else []
    run(folder, 'train.py', *options, '--epochs', 3, *resume)
    rows = summary(output / 'first' / 'summary.csv') + summary(output / 'resumed' / 'summary.csv')
    assert [int(row['epoch']) for row in rows][-2:] == [1, 2]
    assert all(math.isfinite(float(row['train_loss'])) for row in rows)

    path = output / 'resumed' / 'last.pth.tar'
    last = torch.load(path, weights_only=False)
    assert last['epoch'] == 2 and last['arch'] == values['model']
    assert ('state_dict_ema' in last) == ('model_ema' in values)
    shared = [name for name in last['state_dict'] if re.fullmatch(r'layer\d\.conv\.weight', name)]
    rates = values.get('model_kwargs', {}).get('share_rate', [1.0, 1.0, 1.0])
    assert len(shared) >= sum(rate > 0 for rate in rates)
    for name in shared:
        assert not torch.equal(last['state_dict'][name], first['state_dict'][name])

    model_kwargs = values.get('model_kwargs', {})
    model = timm.create_model(values['model'], num_classes=CLASSES, checkpoint_path=path, **model_kwargs)
    expected = last.get('state_dict_ema', last['state_dict'])
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())

    same = ['--img-size', options[options.index('--img-size') + 1], '--crop-pct', values.get('crop_pct', 1.0)]
    same += ['--amp', '--amp-dtype', values['amp_dtype']] if 'amp' in values else []
    same += ['--channels-last'] if 'channels_last' in values else []
    same += ['--use-ema'] if 'model_ema' in values else []
    same += ['--model-kwargs', *(f'{k}={v}'.replace(' ', '') for k, v in model_kwargs.items())] if model_kwargs else []
    assert validate(folder, values['model'], path, *same) == pytest.approx(float(rows[-1]['eval_top1']))


BUILD_ONLY = """
import runpy, sys, timm, torch
create_model = timm.models.create_model

def build_only(*args, **kwargs):
    timm.models.create_model = create_model
    model = create_model(*args, **kwargs).eval()
    torch.save(model(torch.load('images.pt')), 'outputs.pt')
    sys.exit()

timm.models.create_model = build_only
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""
# train.py, up to the model that it builds


@pytest.mark.parametrize(
    'name, kwargs, rate',
    [
        ('resnet164_cifar', dict(layers=(2, 3, 3), act_layer='silu', global_pool='max'), '0.5,1,[[1,2]]'),
        ('seresnet50', dict(layers=(2, 2, 3, 1), in_chans=1, num_classes=5, output_stride=16), '0.5,1,[[1,2]],0'),
    ],
)
def test_options_that_share_prints_work_when_pasted(folder, tmp_path, name, kwargs, rate):
    model = create(name, **kwargs)
    save_folder(model, tmp_path / 'plain', **kwargs)
    share = ['-m', 'timm_sharesnet.sharing', f'local-dir:{tmp_path}/plain', '--init', 'mean', '--rate', rate]
    shared = tmp_path / 'with a space'
    options = run(folder, *share, '--output', shared).splitlines()[-1]
    torch.save(torch.randn(2, model.in_chans, 64, 64), folder / 'images.pt')
    (folder / 'build_only.py').write_text(BUILD_ONLY)
    command = f'"{sys.executable}" build_only.py train.py --data-dir images --device cpu {options}'
    run(folder, '-c', command, program='bash')
    expected = timm.create_model(f'local-dir:{shared}', pretrained=True).eval()
    assert torch.equal(torch.load(folder / 'outputs.pt'), expected(torch.load(folder / 'images.pt')))


@pytest.mark.slow
def test_commands_for_fine_tuning_run_as_they_stand_in_the_readme(folder, output):
    text = (ROOT / 'train_configs' / 'README.md').read_text()
    commands = re.search(r'## Fine-tune.*?```bash\n(.*?)```', text, re.S)[1]
    log = run(folder, '-ec', commands, program='bash')
    rows = summary(output / 'train' / 'finetune' / 'summary.csv')
    assert len(rows) == 5 and float(rows[-1]['eval_top1']) > 40  # from scratch it would be 20
    weights = torch.load(output / 'train' / 'finetune' / 'last.pth.tar', weights_only=False)['state_dict']
    assert weights['fc.weight'].shape == (CLASSES, 256)
    assert ('*Top1' in log or '"top1"' in log) and 'finetune.onnx: ' in log
    for file in folder.glob('finetune*'):
        file.unlink()


def validate(folder, model, checkpoint, *options):
    """Accuracy on the test images by validate.py."""
    options = ['--model', model, '--checkpoint', checkpoint, *ON_CPU, '--split', 'test', '-b', BATCH, *options]
    return results(folder, 'validate.py', *options)['top1']


@pytest.mark.parametrize('name', [FAST, pytest.param('imagenet_sharesnet50_a2', marks=pytest.mark.slow)])
def test_two_processes_end_with_the_same_weights(folder, output, name):
    values, options = on_cpu(ROOT / 'train_configs' / f'{name}.yaml', processes=2)
    options += ['--model-ema', '--grad-checkpointing', '--epochs', 2]
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    launcher = ROOT / 'tests' / 'train_launcher.py'
    log = run(folder, *torchrun, launcher, 'train.py', *options, '--output', output, '--experiment', 'run')
    hashes = {(when, rank): digest for when, rank, digest in re.findall(r'weights (\w+) (\d) (\w{64})', log)}
    assert len(hashes) == 4
    assert hashes['before', '0'] != hashes['after', '0'] == hashes['after', '1']
    checkpoint = torch.load(output / 'run' / 'last.pth.tar', weights_only=False)
    assert checkpoint['args'].aug_repeats == values.get('aug_repeats', 0) and checkpoint['args'].grad_checkpointing
    assert checkpoint['state_dict_ema'].keys() == checkpoint['state_dict'].keys()


@pytest.fixture(scope='module')
def checkpoint(folder, request):
    """Net with weights and statistics that are not trivial, and the path of its checkpoint."""
    model = create(request.param, num_classes=CLASSES)
    path = folder / f'{request.param}.pth.tar'
    torch.save({'arch': request.param, 'state_dict': model.state_dict()}, path)
    yield request.param, model, path
    path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize('checkpoint', SHARED + CIFAR_TWINS, indirect=True)
def test_other_scripts_give_what_the_model_gives(folder, checkpoint):
    name, model, path = checkpoint
    img_size = min(64, model.pretrained_cfg['input_size'][-1])
    same = ['--model', name, '--num-classes', CLASSES, '--img-size', img_size]
    from_checkpoint = [*same, '--checkpoint', path]

    dataset = timm.data.create_dataset('', root=folder / 'images', split='test')
    config = timm.data.resolve_data_config({'img_size': img_size}, model=model)
    dataset.transform = timm.data.create_transform(**config)
    images, labels = zip(*dataset, strict=True)
    with torch.inference_mode():
        logits = model(torch.stack(images))
    tolerance = 1e-4 * logits.abs().max().item()

    accuracy = (logits.argmax(1) == torch.tensor(labels)).double().mean().item()
    assert validate(folder, name, path, '--img-size', img_size) == pytest.approx(100 * accuracy)

    options = [*from_checkpoint, *ON_CPU, '--split', 'test', '--output-type', 'logit', '--topk', 0, '-b', BATCH]
    by_name = results(folder, 'inference.py', *options)
    inferred = [by_name[filename]['logit'] for filename in dataset.filenames(basename=True)]
    np.testing.assert_allclose(inferred, logits, rtol=0, atol=tolerance)

    run(folder, 'onnx_export.py', 'model.onnx', *from_checkpoint, '--dynamo')
    stored = sum(math.prod(tensor.dims) for tensor in onnx.load(folder / 'model.onnx').graph.initializer)
    assert stored <= sum(tensor.numel() for tensor in model.state_dict().values())  # each shared weight once
    session = onnxruntime.InferenceSession(folder / 'model.onnx')
    exported = session.run(None, {session.get_inputs()[0].name: torch.stack(images).numpy()})[0]
    np.testing.assert_allclose(exported, logits, rtol=0, atol=tolerance)

    benchmark = results(folder, 'benchmark.py', *same, *SHORT)
    assert benchmark['param_count'] == round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
    assert benchmark['infer_samples_per_sec'] > 0 and benchmark['train_samples_per_sec'] > 0


@pytest.mark.parametrize(
    'checkpoint',
    [n if n == 'sharesnet34' else pytest.param(n, marks=pytest.mark.slow) for n in SHARED],
    indirect=True,
)
def test_reparam_gives_the_same_net_with_each_shared_kernel_once(folder, checkpoint):
    name, model, path = checkpoint
    size = ['--img-size', min(64, model.pretrained_cfg['input_size'][-1])]
    assert validate(folder, name, path, *size, '--reparam') == validate(folder, name, path, *size)

    same = ['--model', name, '--num-classes', CLASSES, *size]
    run(folder, 'onnx_export.py', 'model.onnx', *same, '--checkpoint', path, '--dynamo', '--reparam')
    contents = inspect(folder / 'model.onnx')
    assert contents.kernels == kernels(model) < contents.uses

    benchmark = results(folder, 'benchmark.py', *same, *SHORT, '--bench', 'infer', '--reparam')
    assert benchmark['infer_samples_per_sec'] > 0

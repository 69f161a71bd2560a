"""Every file of train_configs/ against train.py's options, without running it (test_train.py does that)."""

import os
import re
from pathlib import Path

import pytest
import timm
import yaml
from models import SHARED, TWINS
from train_options import TABLE, table

from timm_sharesnet.preflight import PreflightError, check_config, train_options
from timm_sharesnet.preflight.options import VERSIONS

ROOT = Path(__file__).parents[1]
TIMM_REPO = Path(os.environ.get('TIMM_REPO') or ROOT.parent / 'pytorch-image-models')
CONFIGS = sorted((ROOT / 'train_configs').glob('*.yaml'))
# Keys that train.py reads only if others are set
NEEDS = {
    'amp_dtype': lambda config: config.get('amp'),
    'bce_target_thresh': lambda config: config.get('bce_loss'),
    'decay_epochs': lambda config: config['sched'] == 'step',
    'decay_milestones': lambda config: config['sched'] == 'multistep',
    'decay_rate': lambda config: config['sched'] in ('step', 'multistep', 'poly'),
    'distill_loss_weight': lambda config: config.get('kd_model_name'),
    'kd_temperature': lambda config: config.get('kd_model_name'),
    'mixup_prob': lambda config: config.get('mixup') or config.get('cutmix'),
    'model_ema_decay': lambda config: config.get('model_ema'),
    'train_size_probs': lambda config: config.get('train_img_sizes'),
    'train_size_random_mix': lambda config: config.get('train_size_schedule') == 'progressive',
    'train_size_schedule': lambda config: config.get('train_img_sizes'),
    'remode': lambda config: config.get('reprob'),
    'task_loss_weight': lambda config: config.get('kd_model_name'),
    'torchcompile_mode': lambda config: config.get('torchcompile'),
    'warmup_lr': lambda config: config['warmup_epochs'],
}

each_config = pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)


def load(path):
    return yaml.safe_load(path.read_text())


def numbers_as_text(value):
    """Texts anywhere in a value that are numbers, like 5e-3, which YAML 1.1 takes for text."""
    if isinstance(value, (list, dict)):
        return [t for v in (value.values() if isinstance(value, dict) else value) for t in numbers_as_text(v)]
    return [value] if isinstance(value, str) and re.fullmatch(r'[-+]?[\d.]+(e[-+]?\d+)?', value, re.I) else []


@pytest.mark.skipif(
    not (TIMM_REPO / 'train.py').is_file(),
    reason=f"needs a clone of timm's repository, there is none at {TIMM_REPO}: set TIMM_REPO",
)
def test_table_of_options_is_what_its_generator_writes():
    versions = yaml.safe_load(TABLE.read_text())['versions']
    assert TABLE.read_text() == table(TIMM_REPO, versions.values())


@pytest.mark.parametrize('version', VERSIONS)
@each_config
def test_keys_and_values_are_options_of_train_py(path, version):
    config = load(path)
    if version != VERSIONS[-1] and 'train_img_sizes' in config:
        config = {key: value for key, value in config.items() if not key.startswith('train_size_')}
        del config['train_img_sizes']  # the config says that it needs a newer one
    check_config(config, version)


@pytest.mark.parametrize('version', VERSIONS)
def test_a_key_that_train_py_would_ignore_fails(version):
    config = load(CONFIGS[0])
    with pytest.raises(PreflightError, match='learning_rate'):
        check_config({**config, 'learning_rate': 0.1}, version)
    with pytest.raises(PreflightError, match='epochs'):
        check_config({**config, 'epochs': [300]}, version)


def test_a_key_fails_at_the_versions_that_do_not_have_it():
    check_config({'train_img_sizes': [32]}, '1.0.29.dev0')
    with pytest.raises(PreflightError, match='train_img_sizes'):
        check_config({'train_img_sizes': [32]}, '1.0.28')


@each_config
def test_form(path):
    text, config = path.read_text(), load(path)
    assert re.match(r'model: \w+( |\n)', text)  # first and unquoted
    assert None not in config.values()
    assert not numbers_as_text(config)
    assert 'input_size' not in config and config['img_size']
    keys = re.findall(r'^(\w+):', text, re.M)
    assert len(keys) == len(set(keys)), 'YAML keeps the last of two equal keys'
    assert len(keys) == len(config)


@each_config
def test_no_key_is_without_effect(path):
    config = load(path)
    assert [key for key in config.keys() & NEEDS.keys() if not NEEDS[key](config)] == []


@each_config
def test_name_is_dataset_model_and_recipe(path):
    config = load(path)
    dataset, rest = path.stem.split('_', 1)
    assert rest == config['model'] or rest.startswith(config['model'] + '_')
    classes = {'cifar10': 10, 'cifar100': 100, 'imagenet': 1000, 'tinyimagenet': 200}[dataset]
    size = {'cifar10': [24, 32], 'cifar100': [32], 'imagenet': [160, 224], 'tinyimagenet': [64]}[dataset]
    assert config['num_classes'] == classes and config['img_size'] in size
    if dataset.startswith('cifar'):
        assert config['dataset'] == f'torch/{dataset}' and config['dataset_download']
        assert config['val_split'] == 'test'  # of an ImageFolder, too
    else:
        assert 'dataset' not in config  # an ImageFolder


@each_config
def test_comment_states_the_total_batch(path):
    config = load(path)
    pattern = r'^# TOTAL batch (\d+) = batch_size x processes x grad_accum_steps(?:, here with (\d+) processes)?\.'
    total, processes = re.search(pattern, path.read_text(), re.M).groups()
    assert int(total) == config['batch_size'] * int(processes or 1) * config.get('grad_accum_steps', 1)


@pytest.mark.parametrize('model', SHARED)
def test_each_model_has_the_recipe_of_the_paper(model):
    dataset = {10: 'cifar10', 100: 'cifar100', 1000: 'imagenet'}[timm.get_pretrained_cfg(model).num_classes]
    config = load(ROOT / 'train_configs' / f'{dataset}_{model}.yaml')
    common = {'opt': 'sgd', 'momentum': 0.9, 'lr': 0.1, 'warmup_epochs': 0, 'smoothing': 0.0}
    if dataset.startswith('cifar'):
        paper = {'epochs': 200, 'batch_size': 128, 'weight_decay': 5e-4, 'sched': 'multistep', 'decay_rate': 0.2}
        paper.update(decay_milestones=[61, 121, 161])  # timm applies a milestone one epoch early
    else:
        paper = {'epochs': 90, 'batch_size': 256, 'weight_decay': 1e-4, 'sched': 'step', 'decay_rate': 0.1}
        paper.update(decay_epochs=30)
    assert common | paper == {key: config.get(key) for key in common | paper}
    assert config['opt_kwargs'] == {'filter_bias_and_bn': False}  # weight decay on every parameter
    assert config.get('model_kwargs') == ({'block_drop_rate': 0.3} if model == 'shawrn28_10' else None)


def test_net_whose_last_stage_alone_shares_has_the_recipe_of_the_paper():
    paper, last = (load(ROOT / 'train_configs' / f'cifar10_sharesnet164_cifar{end}.yaml') for end in ('', '_last'))
    assert last == paper | {'model_kwargs': {'share_rate': [0.0, 0.0, 1.0]}}


def test_each_cifar_model_has_a_modern_recipe_and_both_datasets_a_distillation():
    names = [path.stem for path in CONFIGS]
    for model in 'cifar10_sharesnet164_cifar', 'cifar10_shawrn40_4', 'cifar100_shawrn28_10':
        assert f'{model}_modern' in names
    for dataset in 'cifar10', 'imagenet':
        assert any(name.startswith(f'{dataset}_') and name.endswith('_distill') for name in names)


@each_config
def test_teacher_is_the_unshared_twin(path):
    config = load(path)
    teacher = config.get('kd_model_name')
    assert (teacher is not None) == path.stem.endswith(('_distill', '_warm'))
    if teacher:
        assert re.split('[/.]', teacher.removeprefix('local-dir:')).count(TWINS[config['model']]) == 1


@each_config
def test_twin_is_named_where_it_can_be_trained(path):
    config = load(path)
    if not config.get('kd_model_name'):
        assert f'--model {TWINS[config["model"]]}' in path.read_text().splitlines()[0]


def test_readme_names_every_config():
    text = (ROOT / 'train_configs' / 'README.md').read_text()
    assert [path.name for path in CONFIGS if path.name not in text and path.stem not in text] == []
    others = {'args.yaml', 'finetune.yaml'}
    assert sorted(set(re.findall(r'\b\w+\.yaml', text)) - {path.name for path in CONFIGS} - others) == []


@each_config
def test_every_command_of_the_readme_keeps_the_total_batch(path):
    text = (ROOT / 'train_configs' / 'README.md').read_text()
    row = re.search(rf'^\| `{path.stem}` \|(.*)\|$', text, re.M)[1].split('|')
    total = int(re.search(r'TOTAL batch (\d+)', path.read_text())[1])
    assert int(row[0]) == total
    for processes, command in zip([1, 8, 16], row[1:4], strict=True):
        batch = int(re.search(r'-b (\d+)', command)[1])
        steps = int(re.search(r'--grad-accum-steps (\d+)|$', command)[1] or 1)
        assert batch * steps * processes == total, command


def test_options_in_the_readme_are_those_of_train_py():
    flags = {flag for option in train_options().values() for flag in option['flags']}
    text = (ROOT / 'train_configs' / 'README.md').read_text()
    commands = re.findall(r'train\.py((?:[^\n]|(?<=\\)\n)*)', text)
    used = {flag for command in commands for flag in re.findall(r'(?<=\s)--?[a-z][\w-]*', command)}
    assert used - flags - {'--config'} == set()

"""What a net was built with is saved, printed and compared."""

import ast
import shlex
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
import yaml
from models import create, error, images, save_folder, through_folder
from plain_nets import NARROW, stages
from timm.models.resnet import Bottleneck, ResNet

from timm_sharesnet import CifarResNetV2, PreActWideBasic, share, unshare
from timm_sharesnet.model_args import options_for_train, unlike_its_name
from timm_sharesnet.preflight import build_model, train_parser
from timm_sharesnet.share_rate import as_python
from timm_sharesnet.sharing.__main__ import main


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


RUNS = [[1, 3], [5, 4, 2]], [[1, 4, 5], [2, 3]]  # tensors of the same names


@pytest.mark.skipif(not hasattr(timm.models, 'get_model_args'), reason='timm 1.0.28 does not pass on what is saved')
def test_saved_runs_are_not_replaced_by_others_of_the_same_names(tmp_path):
    model = create('resnet164_cifar', layers=(1, 1, 6))
    shared = share(model, (0, 0, RUNS[0]), init='mean')
    save_folder(shared, tmp_path)
    name = f'local-dir:{tmp_path}'
    loaded = timm.create_model(name, pretrained=True, share_rate=(0, 1, [[3, 1], [2, 4, 5]])).eval()
    assert torch.equal(loaded(images(model)), shared(images(model)))
    with pytest.raises(RuntimeError, match='other blocks share than with the share_rate that was given'):
        timm.create_model(name, pretrained=True, share_rate=(0, 0, RUNS[1]))
    kwargs = dict(pretrained=True, layers=(1, 1, 6))
    kwargs['pretrained_cfg_overlay'] = dict(file=f'{tmp_path}/model.safetensors')
    loaded = timm.create_model('sharesnet164_cifar', share_rate=(0, 0, RUNS[0]), **kwargs).eval()
    assert torch.equal(loaded(images(model)), shared(images(model)))
    with pytest.raises(RuntimeError, match=r"conv.2': \[2, 4, 5\].* given .*'conv.2': \[2, 3\]"):
        timm.create_model('sharesnet164_cifar', share_rate=(0, 0, RUNS[1]), **kwargs)
    assert timm.create_model(name, share_rate=(0, 0, RUNS[1])).layer3.runs()['conv.1'] == [1, 4, 5]


@pytest.mark.parametrize('indices', [(0, 1), (1, 2), (0, 1, 2, 3)])
def test_a_saved_net_of_several_kernels_loads_as_a_backbone_of_some_stages(tmp_path, indices):
    model = create('sharesnet164_cifar', layers=(5, 5, 5), share_rate=0.5)
    args = model.made_by[1]
    save_folder(model, tmp_path, **args)
    kwargs = dict(pretrained=True, features_only=True, out_indices=indices)
    backbone = timm.create_model(f'local-dir:{tmp_path}', **kwargs).eval()
    expected = model.forward_intermediates(images(model), indices=list(indices), intermediates_only=True)
    assert all(map(torch.equal, backbone(images(model)), expected))


def built_by_train_py(line: str) -> nn.Module:
    """The net that train.py builds by options, given as text to a shell."""
    args = train_parser().parse_args(shlex.split(line))
    model = build_model(args)
    timm.models.load_checkpoint(model, args.initial_checkpoint)
    return model.eval()


@pytest.mark.parametrize(
    'name, kwargs, rate, options',
    [
        (
            'resnet164_cifar',
            dict(layers=(2, 3, 3), act_layer='silu'),
            '0.5,1,[[1,2]]',
            "act_layer=silu 'share_rate=[0.5, 1, [[1, 2]]]'",
        ),
        ('resnet164_cifar', dict(layers=(2, 2, 2), global_pool='max', num_classes=7), '1', '--gp max'),
        ('wrn40_4', dict(layers=(2, 2, 2), widen_factor=1, in_chans=1), '0', '--input-size 1 32 32'),
        (
            'resnet50',
            dict(NARROW, output_stride=16, stem_type='deep', stem_width=16, act_layer='leaky_relu'),
            '0.5',
            "'channels=[16, 24, 32, 40]' output_stride=16 stem_type=deep stem_width=16 act_layer=leaky_relu",
        ),
        ('seresnet50', dict(NARROW, global_pool='catavgmax'), '1,0,1,0', '--model sharesnet --num-classes 10 --gp'),
        ('resnet34', dict(NARROW, block_args=dict(attn_layer='eca')), '1', 'attn_layer'),
    ],
)
def test_options_that_the_command_prints_build_what_it_wrote(cwd, capsys, name, kwargs, rate, options):
    model = create(name, **kwargs)
    save_folder(model, 'a net', **kwargs)
    assert main(['local-dir:a net', '--rate', rate, '--init', 'mean', '--output', 'a shared net']) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert options in line and line.endswith("--initial-checkpoint 'a shared net/model.safetensors'")
    shared = timm.create_model('local-dir:a shared net', pretrained=True).eval()
    x = images(model)[:, : model.in_chans]
    assert torch.equal(built_by_train_py(line)(x), shared(x))
    assert error(shared(x), share(model, as_python(ast.literal_eval(rate)), init='mean')(x)) < 1e-6


def test_printed_options_have_the_rates_of_training_and_the_preprocessing():
    model = timm.create_model(
        'resnet164_cifar',
        layers=(2, 2, 2),
        drop_rate=0.2,
        drop_path_rate=0.1,
        block_drop_rate=0.3,
        pretrained_cfg_overlay=dict(mean=(0.5, 0.5, 0.5), input_size=(3, 64, 64)),
    )
    shared = share(model)
    if not hasattr(timm.models, 'get_model_args'):  # timm 1.0.28 records none
        shared._model_args.update(layers=(2, 2, 2), drop_rate=0.2, drop_path_rate=0.1, block_drop_rate=0.3)
    line = shlex.join(options_for_train(shared))
    for option in '--drop 0.2', '--drop-path 0.1', 'block_drop_rate=0.3', '--input-size 3 64 64', '--mean 0.5 0.5 0.5':
        assert option in line
    assert '--std' not in line and '--num-classes' not in line
    args = train_parser().parse_args(shlex.split(line))
    assert str(build_model(args)) == str(shared)
    data = timm.data.resolve_data_config(vars(args), model=build_model(args))
    assert data == timm.data.resolve_data_config({}, model=shared)


def test_checkpoint_is_shared_with_the_arguments_that_it_was_trained_with(cwd, capsys):
    model = create('resnet164_cifar', layers=(2, 2, 2), in_chans=1, act_layer='silu', num_classes=4)
    torch.save(model.state_dict(), 'plain.pth')
    argv = ['resnet164_cifar', '--checkpoint', 'plain.pth', '--num-classes', '4', '--in-chans', '1', '--init', 'mean']
    argv += ['--output', 'out', '--model-kwargs', 'layers=(2,2,2)', 'act_layer=silu']
    assert main(argv) == 0
    x = images(model)[:, :1]
    line = capsys.readouterr().out.splitlines()[-1]
    assert error(built_by_train_py(line)(x), share(model, init='mean')(x)) < 1e-6
    assert main([*argv, '--model-kwargs', 'silu']) == 2
    assert capsys.readouterr().err == 'share: --model-kwargs must be KEY=VALUE\n'


@pytest.mark.parametrize(
    'kwargs, args, options',
    [
        (dict(act_layer='silu'), dict(model_kwargs=dict(act_layer='silu')), '--model-kwargs act_layer=silu'),
        (dict(global_pool='max', drop_rate=0.1), dict(gp='max', drop=0.1, input_size=[3, 32, 32]), '--gp max'),
    ],
)
def test_checkpoint_of_train_py_is_compared_with_its_args(cwd, capsys, kwargs, args, options):
    Path('run').mkdir()
    torch.save({'state_dict': create('resnet92_cifar', **kwargs).state_dict(), 'epoch': 1}, 'run/last.pth.tar')
    Path('run/args.yaml').write_text(yaml.safe_dump({'model': 'resnet92_cifar', 'num_classes': None, **args}))
    argv = ['resnet92_cifar', '--checkpoint', 'run/last.pth.tar', '--init', 'mean', '--output', 'out']
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert 'computes something else, by args.yaml beside it: ' in err and options in err
    assert main([*argv, '--model-kwargs', *(f'{k}={v}' for k, v in kwargs.items())]) == 0


def test_checkpoint_of_other_runs_than_its_config_says_is_refused(cwd, capsys):
    kwargs = dict(layers=(2, 2, 2), act_layer='silu')
    save_folder(create('resnet164_cifar', **kwargs), 'plain', **kwargs)
    argv = ['resnet164_cifar', '--checkpoint', 'plain/model.safetensors', '--init', 'mean', '--output', 'out']
    assert main([*argv, '--model-kwargs', 'layers=(2,2,2)']) == 2
    err = capsys.readouterr().err
    assert 'plain/model.safetensors has the weights of a net that computes something else' in err
    assert 'layer1.blocks.0.act1 is ReLU() in place of SiLU()' in err and 'act_layer=silu' in err
    assert not Path('out').exists()
    assert main([*argv, '--model-kwargs', 'layers=(2,2,2)', 'act_layer=silu']) == 0


@pytest.mark.parametrize('net', ['resnet50', 'resnet164_cifar', 'seresnet50'])
def test_a_shared_net_at_rate_0_is_shared_under_its_own_name(tmp_path, net):
    name = {'seresnet50': 'sharesnet'}.get(net, f'sha{net}')
    base = dict(base=net) if name == 'sharesnet' else {}
    kwargs = dict(layers=(2, 3, 2) if 'cifar' in net else (2, 3, 2, 1), num_classes=10)
    model = create(name, **base, **kwargs, share_rate=0.0)
    shared = share(model, 0.5, init='first')
    assert shared.pretrained_cfg['architecture'] == name
    if not hasattr(timm.models, 'get_model_args'):  # timm 1.0.28 records none
        shared._model_args.update(kwargs)
    assert not unlike_its_name(shared)
    assert torch.equal(through_folder(shared, tmp_path, **shared._model_args)(images(model)), shared(images(model)))


@pytest.mark.parametrize('base', ['seresnet50', 'resnet50.a1_in1k', 'wrn28_10'])
def test_unshared_a_net_of_any_base_is_that_base(tmp_path, base):
    layers = (1, 2, 1) if base == 'wrn28_10' else (2, 1, 1, 1)
    model = create('sharesnet', base=base, layers=layers)
    plain = unshare(model)
    assert plain.pretrained_cfg['architecture'] == base.partition('.')[0]
    loaded = through_folder(plain, tmp_path, layers=layers)
    assert not stages(loaded) or all(stage.conv is None for stage in stages(loaded))
    assert torch.equal(loaded(images(model)), plain(images(model)))


def test_a_new_classifier_is_saved_with_the_net(tmp_path):
    model = create('resnet164_cifar')
    model.reset_classifier(7)
    shared = share(model, 0.5, init='mean')
    assert 'does not build it again' not in str(shared.share_report)
    assert torch.equal(through_folder(shared, tmp_path, **shared._model_args)(images(model)), shared(images(model)))
    assert '--num-classes 7' in shlex.join(options_for_train(shared))


def test_a_base_with_a_tag_makes_a_net_that_is_shared_again_and_loads(tmp_path):
    model = create('sharesnet', base='seresnet50.ra2_in1k', layers=(2, 1, 1, 1), share_rate=0.0)
    shared = share(model)
    assert shared._model_args['base'] == 'seresnet50'
    loaded = through_folder(shared, tmp_path, **{**shared._model_args, 'layers': (2, 1, 1, 1)})
    assert torch.equal(loaded(images(model)), shared(images(model)))
    assert loaded.pretrained_cfg['crop_pct'] == shared.pretrained_cfg['crop_pct']


def test_a_net_made_from_its_class_is_shared_and_the_report_says_that_it_has_no_name():
    model = ResNet(Bottleneck, (2, 2, 1, 1)).eval()
    shared = share(model, 0.0)
    assert error(shared(torch.ones(1, 3, 64, 64)), model(torch.ones(1, 3, 64, 64))) < 1e-6
    assert 'made from its class' in str(shared.share_report)
    wide = CifarResNetV2(PreActWideBasic, (3, 3, 3), share_rate=0.0)
    assert 'made from its class' in str(share(wide, images=[torch.randn(4, 3, 32, 32)]).share_report)


@pytest.mark.parametrize('name, left', [('resnet50', 2), ('resnet164_cifar', 2), ('resnet34', 1)])
def test_a_pruned_net_shares_the_stages_that_are_left(name, left):
    model = create(name)
    model.prune_intermediate_layers([left])
    x = images(model)
    for rate in 0.5, (1.0, 1.0, 0.5, 0.0)[: 3 if 'cifar' in name else 4]:
        shared = share(model, rate, init='first', images=[x])
        assert len(stages(shared)) == left and shared.forward_features(x).isfinite().all()
    assert 'does not build it again by name' in str(shared.share_report)
    assert error(share(model, 0.0).forward_features(x), model.forward_features(x)) < 1e-6
    model.prune_intermediate_layers([0])
    with pytest.raises(TypeError, match='no stage left'):
        share(model)

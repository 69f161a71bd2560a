"""`share`: a shared net of any plain one, at any rate."""

import copy
import json
from pathlib import Path
from typing import Any, Dict, List

import pytest
import timm
import torch
import torch.nn as nn
from demo import load_images
from models import TWINS, create, error, images
from plain_nets import NARROW, kinds, plain_nets, stages
from torch.nn.utils import prune

from timm_sharesnet import CifarResNetV2, ShaResNet, fold, share, unshare
from timm_sharesnet.sharing.__main__ import main
from timm_sharesnet.sharing.run import permute_channels
from timm_sharesnet.weights import save_folder


@plain_nets
def test_at_rate_0_it_computes_what_the_model_does(name: str, kwargs: Dict[str, Any]) -> None:
    model = create(name, **kwargs).double()
    shared = share(model, 0.0)
    assert isinstance(shared, (ShaResNet, CifarResNetV2)) and not shared.share_report.merges
    x = images(model)[:, : model.in_chans]
    assert error(shared(x), model(x)) <= 1e-12


@plain_nets
def test_result_is_a_shared_net_that_folds_and_unshares_and_the_model_stays(name: str, kwargs: Dict[str, Any]) -> None:
    model = create(name, **kwargs).double()
    before = copy.deepcopy(model.state_dict())
    shared = share(model, 1.0, init='mean')
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in after.items())
    saved = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in shared.parameters())
    assert saved == sum(merge.saved for merge in shared.share_report.merges) > 0
    x = images(model)[:, : model.in_chans]
    y = shared(x)
    assert error(fold(shared)(x), y) <= 1e-9
    plain = unshare(shared)
    assert error(plain(x), y) <= 1e-12
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert plain.pretrained_cfg['architecture'] == name and type(plain) is type(model)


@kinds
@pytest.mark.parametrize('rate', [1.0, 0.5])
def test_alignment_finds_the_order_of_channels_in_which_the_kernels_are_equal(
    name: str, kwargs: Dict[str, Any], rate: float
) -> None:
    source = timm.create_model(name, **kwargs)
    for norm in (m for m in source.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.ones_(norm.weight)
    model = unshare(share(source, rate, init='first')).double().eval()  # the blocks of a run have equal kernels
    shared = share(model, rate, init='first').double().eval()
    generator = torch.Generator().manual_seed(0)
    for stage in stages(shared):
        for i, block in enumerate(stage):
            if stage.conv_of(i) is not None:
                conv = stage.conv_of(i)
                block.take_conv2(copy.deepcopy(conv))
    for block in (block for stage in stages(shared) for block in stage):
        ins, outs = (torch.randperm(n, generator=generator) for n in block.conv2.weight.shape[1::-1])
        if 'conv3' not in block.branch:
            outs = torch.arange(len(outs))
        with torch.no_grad():
            permute_channels(block, ins, outs)
            block.conv2.weight.copy_(block.conv2.weight[outs][:, ins])
    for stage in stages(shared):
        stage.conv, stage.several = None, False
    permuted = unshare(shared)
    x = images(model)
    assert error(permuted(x), model(x)) <= 1e-9  # so far, permutations change nothing
    aligned = share(permuted, rate)
    assert all(merge.after > 0.999 for merge in aligned.share_report.merges)
    assert min(merge.before for merge in aligned.share_report.merges) < 0.5
    assert error(aligned(x), model(x)) <= 1e-6
    assert error(share(permuted, rate, init='mean')(x), model(x)) > 0.1


@kinds
def test_alignment_brings_independent_kernels_nearer(name: str, kwargs: Dict[str, Any]) -> None:
    for merge in share(create(name, **kwargs)).share_report.merges:
        nearer = merge.after - merge.before
        assert nearer > 0.03 if name in ('resnet50', 'resnet164_cifar') else nearer > -0.01


def test_grouped_convolutions_are_not_aligned_and_the_report_says_so() -> None:
    report = str(share(create('resnext50_32x4d', layers=(2, 2, 2, 2))).share_report)
    assert 'layer1: grouped convolutions are not aligned' in report and 'no images were given' in report
    assert report.splitlines()[0].startswith('layer1 blocks 0 to 1: 2 kernels to 1, 4,608 parameters saved, cosine')


@plain_nets
def test_saved_it_loads_by_its_config(name: str, kwargs: Dict[str, Any], tmp_path: Path) -> None:
    model = timm.create_model(name, **kwargs).eval()
    shared = share(model, 0.5, init='first')
    model_args = {**kwargs, **shared._model_args}  # timm 1.0.28 records none of kwargs
    save_folder(shared, tmp_path, model_args)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = images(model)[:, : model.in_chans]
    assert torch.equal(loaded(x), shared(x))
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['architecture'] == {v: k for k, v in TWINS.items()}.get(name, 'sharesnet')
    assert config['model_args']['share_rate'] == 0.5


# ---- Errors


def test_what_is_no_plain_net_is_refused() -> None:
    model = create('resnet50', **NARROW)
    with pytest.raises(ValueError, match='layer1 is shared or folded already'):
        share(share(model, init='mean'))
    with pytest.raises(TypeError, match='Sequential cannot be shared'):
        share(nn.Sequential(model))
    with pytest.raises(ValueError, match="init must be one of align, mean, first, random, got 'last'"):
        share(model, init='last')
    with pytest.raises(ValueError, match='layer1.0.conv2 is no plain convolution, or is folded'):
        share(fold(model))
    with pytest.raises(ValueError, match='layer1 is shared or folded already'):
        share(fold(create('resnet164_cifar', layers=(3, 3, 3), share_rate=1.0)))
    with pytest.raises(ValueError, match='on the meta device and has no values to share: load its weights first'):
        share(timm.create_model('resnet50', **NARROW, device='meta'))
    broken = copy.deepcopy(model)
    broken.layer3[1].bn2.bias.data[3] = float('nan')
    with pytest.raises(ValueError, match='layer3.1.bn2.bias has values that are not finite'):
        share(broken)
    nn.init.constant_(broken.layer3[1].bn2.bias, 1e30)
    with pytest.raises(ValueError, match='got values that are not finite: those of the model or the images are too'):
        share(broken, images=[torch.randn(8, 3, 64, 64)])
    prune.random_unstructured(model.layer2[1].conv2, 'weight', 0.5)
    with pytest.raises(ValueError, match='layer2.1.conv2 is no plain convolution'):
        share(model)


# ---- The command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with some images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'images').mkdir()
    for i, image in enumerate(load_images()[0][:20]):
        image.save(f'images/{i}.png')
    return tmp_path


def test_command_writes_a_folder_that_loads_and_says_how_to_train_it(folder: Path, capsys: Any) -> None:
    argv = ['sharesnet164_cifar', '--rate', '0.5', '--output', 'half', '--init', 'mean']
    torch.save(timm.create_model('resnet164_cifar').state_dict(), 'plain.pth')
    argv = ['resnet164_cifar', '--checkpoint', 'plain.pth', *argv[1:]]
    assert main([*argv, '--calibration-dir', 'images', '--calibration-images', '10']) == 0
    out = capsys.readouterr().out
    assert 'half: 1,316,186 parameters' in out
    line = '--model sharesnet164_cifar --model-kwargs share_rate=0.5 --initial-checkpoint half/model.safetensors'
    assert line in out
    model = timm.create_model('local-dir:half', pretrained=True)
    assert model.norm.num_batches_tracked == 1
    assert sorted(path.name for path in folder.iterdir()) == ['half', 'images', 'plain.pth']
    assert main(argv) == 2 and 'half exists already' in capsys.readouterr().err


@pytest.mark.parametrize(
    'argv, message',
    [
        (['resnt50'], 'timm knows no model resnt50, did you mean resnet50'),
        (['vgg11', '--checkpoint', 'vgg.pth'], 'there is no file vgg.pth'),
        (['resnet164_cifar', '--checkpoint', 'plain.pth', '--rate', '2'], 'share_rate must be from 0 to 1'),
        (['resnet164_cifar', '--checkpoint', 'plain.pth', '--calibration-dir', 'no'], 'there are no images in no'),
        (['resnet164_cifar', '--checkpoint', 'plain.pth', '--device', 'nowhere'], '--device nowhere: Expected one of'),
        (['sharesnet164_cifar'], 'layer1 is shared or folded already'),
    ],
)
def test_command_refuses_in_one_line_and_leaves_nothing(
    folder: Path, capsys: Any, argv: List[str], message: str
) -> None:
    torch.save(timm.create_model('resnet164_cifar').state_dict(), 'plain.pth')
    assert main([*argv, '--output', 'out']) == 2
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1 and err.startswith('share: ')
    assert not Path('out').exists() and not list(folder.glob('.share*'))

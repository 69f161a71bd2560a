"""The model `sharesnet`: any base, made to share."""

from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
from models import SHARED, TWINS


@pytest.mark.parametrize('name', SHARED)
def test_entry_point_builds_the_seven_nets_as_their_own_names_do(name: str) -> None:
    for rate in (1.0, 0.5):
        model = timm.create_model('sharesnet', base=TWINS[name], share_rate=rate, device='meta')
        own = timm.create_model(name, share_rate=rate, device='meta')
        assert type(model) is type(own) and str(model) == str(own)
        assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in own.state_dict().items()}


def test_entry_point_takes_what_the_base_takes_and_has_its_preprocessing() -> None:
    model = timm.create_model('sharesnet', base='seresnext26d_32x4d', share_rate=1.0, num_classes=7, in_chans=1)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 7)
    base = timm.get_pretrained_cfg('seresnext26d_32x4d')
    for key in ('mean', 'std', 'crop_pct', 'interpolation', 'first_conv'):
        assert model.pretrained_cfg[key] == getattr(base, key)
    assert not {'url', 'hf_hub_id', 'file'} & model.pretrained_cfg.keys()
    features = timm.create_model('sharesnet', base='resnet18', features_only=True)(torch.randn(1, 3, 64, 64))
    assert [f.shape[1] for f in features] == [64, 64, 128, 256, 512]
    features = timm.create_model('sharesnet', base='resnet164_cifar', features_only=True)(torch.randn(1, 3, 32, 32))
    assert [f.shape[1] for f in features] == [16, 64, 128, 256]


@pytest.mark.parametrize('base', ['resnet51', 'vit_tiny_patch16_224', 'resnetv2_50', 'resnest14d', 'res2net50_26w_4s'])
def test_entry_point_refuses_what_cannot_be_shared(base: str) -> None:
    with pytest.raises((TypeError, ValueError), match='cannot be shared|can share|knows no model resnet51'):
        timm.create_model('sharesnet', base=base, device='meta')


@pytest.mark.parametrize(
    'base, message',
    [
        ('sharesnet50', 'base must be a plain model, and sharesnet50 shares'),
        ('shawrn40_4', 'base must be a plain model, and shawrn40_4 shares'),
        ('sharesnet', 'base must be a plain model, and sharesnet shares'),
        ('sharesnet50.torch7_in1k', 'base must be a plain model'),
        (5, "base must be the name of a model such as 'resnet50', got 5"),
        (nn.Identity(), 'base must be the name of a model'),
        ('resnet50.a1_in2k', 'knows no model resnet50.a1_in2k, did you mean'),
        ('', 'knows no model'),
    ],
    ids=str,
)
def test_entry_point_refuses_what_is_no_base(base: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        timm.create_model('sharesnet', base=base, device='meta')


def test_entry_point_refuses_a_tag_as_timm_does() -> None:
    for name in 'sharesnet', 'sharesnet50':
        with pytest.raises(RuntimeError, match=rf'Invalid pretrained tag \(foo\) for {name}'):
            timm.create_model(f'{name}.foo', device='meta')
    assert timm.create_model('sharesnet.untrained', device='meta').pretrained_cfg['tag'] == 'untrained'

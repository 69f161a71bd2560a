"""From a shared net to the plain one."""

import copy

import torch.nn as nn
from timm.models import is_model
from timm.models.resnet import ResNet

from .resnet import ShaResNet
from .stage import SharedStage, SharingBlock

__all__ = ['unshare']

_SOURCES = 'file', 'hf_hub_id', 'hf_hub_filename', 'source', 'state_dict', 'url'


def unshare(model: nn.Module) -> nn.Module:
    """Make the plain twin that computes the same: each block has a copy of the convolution that it shared.

        >>> import timm, timm_sharesnet
        >>> plain = timm_sharesnet.unshare(timm.create_model('sharesnet50'))
        >>> timm.create_model('resnet50').load_state_dict(plain.state_dict(), strict=True)
        <All keys matched successfully>

    It is for tools that cannot handle a convolution that is used several times. Classes, names and `pretrained_cfg` are
    the twin's: of timm's ResNet for the ImageNet nets, of this package's unshared nets for the others.

    Args:
        model: Net of this package, or a model that contains one (`features_only`, a detector). It is not changed.

    Returns:
        The plain net, in the model's mode. In float64 it agrees with the model to a relative error of 1e-12.

    Raises:
        TypeError: If there is no net of this package in the model.
        ValueError: If the net is folded.
    """
    if not any(isinstance(m, SharedStage) for m in model.modules()):
        raise TypeError(f'{type(model).__name__} has no stage of timm_sharesnet, there is nothing to unshare.')
    if any(isinstance(m, SharingBlock) and m.folded for m in model.modules()):
        raise ValueError('A folded net has no twin: unshare the net that it was folded from, and fold the result.')
    model = copy.deepcopy(model)
    for m in list(model.modules()):
        stages = {name: child for name, child in m.named_children() if isinstance(child, SharedStage)}
        for name, stage in stages.items():
            setattr(m, name, _plain_stage(stage))
        if type(m) is ShaResNet:
            m.grad_checkpointing = any(stage.grad_checkpointing for stage in stages.values())
            m.__class__ = ResNet  # it adds no attribute to timm's, and so everything done to the model stays
        if stages:
            for cfg in getattr(m, 'pretrained_cfg', None), getattr(m, 'default_cfg', None):
                if isinstance(cfg, dict):
                    _name_twin(cfg)
    return model


def _plain_stage(stage: SharedStage) -> nn.Module:
    for block in stage.blocks:
        if block.conv2 is None:
            block.take_conv2(copy.deepcopy(stage.conv))
        if block.plain is not None:
            block.__class__ = block.plain
    if any(isinstance(block, SharingBlock) for block in stage.blocks):
        del stage.conv
        stage.conv = None
        return stage
    plain = nn.Sequential(*stage.blocks)
    plain.training = stage.training  # `train()` would set it for the layers, too
    return plain


def _name_twin(cfg: dict) -> None:
    name = cfg.get('architecture', '')
    twin = name.removeprefix('sha')  # sharesnet50 -> resnet50, shawrn40_4 -> wrn40_4
    if twin != name and is_model(twin):
        cfg['architecture'] = twin
        for key in _SOURCES:
            cfg.pop(key, None)

"""The model `sharesnet`: any plain ResNet of timm (basic or bottleneck blocks) or of this package, made to share."""

from functools import partial
from typing import Any, Dict

import torch.nn as nn
from timm.models import generate_default_cfgs, get_pretrained_cfg, is_model_in_modules, register_model

from . import resnetv2
from .share_rate import ShareRate
from .weights import create, unknown_model

__all__ = []  # register_model adds the entrypoint fn to this


def _cfg(base: str) -> Dict[str, Any]:
    """The default cfg of a model, without its weights."""
    cfg = get_pretrained_cfg(base)
    if cfg is None:
        raise ValueError(f'sharesnet: {base} has no cfg.')
    return {**cfg.to_dict(remove_source=True), 'architecture': 'sharesnet', 'tag': 'untrained'}


default_cfgs = generate_default_cfgs({'sharesnet.untrained': _cfg('resnet50')})  # of another base that base's


def _base_cfg(base: str) -> Dict[str, Any]:
    """The default cfg of what is said to be a plain model."""
    if not isinstance(base, str):
        raise TypeError(f"sharesnet: base must be the name of a model such as 'resnet50', got {base!r}.")
    unknown = unknown_model(base)
    if unknown:
        raise ValueError(f'sharesnet: {unknown}')
    arch = base.partition('.')[0]
    if arch.startswith('sha') and is_model_in_modules(arch, ['resnet', 'resnetv2', 'sharesnet']):
        raise ValueError(f'sharesnet: base must be a plain model, and {base} shares: create it by its own name.')
    return _cfg(base)


@register_model
def sharesnet(
    pretrained: bool = False, base: str = 'resnet50', share_rate: ShareRate = 1.0, **kwargs: Any
) -> nn.Module:
    """Any of timm's ResNets of basic or bottleneck blocks (`base`, such as 'seresnet50'), with shared convolutions."""
    from .sharing import create_shared  # late, as it needs all of timm.models

    cfg, base_cfg = kwargs.pop('pretrained_cfg', None), _base_cfg(base)
    if base.partition('.')[0] in resnetv2.default_cfgs:
        kwargs.setdefault('feature_cfg', dict(out_indices=(0, 1, 2, 3)))
    if isinstance(cfg, str) and cfg != base_cfg['tag']:
        raise RuntimeError(f'Invalid pretrained tag ({cfg}) for sharesnet.')  # timm's error
    if not cfg or isinstance(cfg, str):
        cfg = base_cfg
    model = create(partial(create_shared, base, share_rate), 'sharesnet', pretrained, pretrained_cfg=cfg, **kwargs)
    model._model_args = {**getattr(model, '_model_args', {}), 'base': base, 'share_rate': share_rate}
    return model

"""ShaResNet for timm: residual networks whose 3x3 convolutions are shared by all blocks of a stage.

    >>> import timm
    >>> import timm_sharesnet  # only needed where TIMM_SHARESNET_AUTOLOAD=0
    >>> model = timm.create_model('sharesnet50')

torch imports this file at the end of `import torch`, so it must stay light: it imports neither timm nor torch, and
offers its names lazily (PEP 562).
"""

from . import _autoload

__version__ = '0.1.0'
__all__ = [
    'CifarResNetV2',
    'PreActBottleneck',
    'PreActWideBasic',
    'ShaBasicBlock',
    'ShaBottleneck',
    'ShaResNet',
    'SharedStage',
    'SharingBlock',
    'fold',
    'load_torch7',
    'share',
    'unshare',
]

_MODULES = {
    'CifarResNetV2': 'resnetv2',
    'PreActBottleneck': 'resnetv2',
    'PreActWideBasic': 'resnetv2',
    'ShaBasicBlock': 'resnet',
    'ShaBottleneck': 'resnet',
    'ShaResNet': 'resnet',
    'SharedStage': 'stage',
    'SharingBlock': 'stage',
    'fold': 'folding',
    'load_torch7': 'torch7',
    'share': 'sharing',
    'unshare': 'sharing',
}


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module

    return getattr(import_module(f'.{_MODULES[name]}', __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])


if not _autoload.importing_torch():
    _autoload.install()

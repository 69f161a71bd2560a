"""ShaResNet for timm: residual networks whose 3x3 convolutions are shared by all blocks of a stage.

    >>> import timm
    >>> import timm_sharesnet  # only needed where TIMM_SHARESNET_AUTOLOAD=0
    >>> model = timm.create_model('sharesnet50')

torch imports this file at the end of `import torch`, so it must stay light: it imports neither timm nor torch, and
offers its names lazily (PEP 562).
"""

from typing import TYPE_CHECKING

from . import _autoload

if TYPE_CHECKING:  # what type checkers and editors see
    from .folding import fold
    from .resnet import ShaBasicBlock, ShaBottleneck, ShaResNet
    from .resnetv2 import CifarResNetV2, PreActBottleneck, PreActWideBasic
    from .sharing import share, unshare
    from .stage import SharedStage, SharingBlock
    from .torch7 import load_torch7

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

_FILES = {
    'folding': ['fold'],
    'resnet': ['ShaBasicBlock', 'ShaBottleneck', 'ShaResNet'],
    'resnetv2': ['CifarResNetV2', 'PreActBottleneck', 'PreActWideBasic'],
    'sharing': ['share', 'unshare'],
    'stage': ['SharedStage', 'SharingBlock'],
    'torch7': ['load_torch7'],
}


def __getattr__(name):
    for file, names in _FILES.items():
        if name in names:
            from importlib import import_module

            return getattr(import_module(f'.{file}', __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
    return sorted([*globals(), *__all__])


if not _autoload.importing_torch():
    _autoload.install()

"""Checks of a training config and of what it names, before timm's train.py starts: the command and its parts.

`check.py` says what is checked, and in which order: the options and the config (`options.py`), their values
(`values.py`), what train.py makes of them (`training.py`), weights (`checkpoints.py`) and data (`data.py`). Each check
raises a `CommandError` at the first fault, which begins with a key of the config or a file.
"""

from ..cli import CommandError as PreflightError
from .check import main, preflight
from .options import check_config, parse_train_args, train_options, train_parser
from .training import build_model

__all__ = [
    'PreflightError',
    'build_model',
    'check_config',
    'main',
    'parse_train_args',
    'preflight',
    'train_options',
    'train_parser',
]

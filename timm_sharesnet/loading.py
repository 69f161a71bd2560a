"""Models with weights as the commands take them: by name, by name and checkpoint, or from a folder or the Hub."""

import argparse
import os
import re
from pathlib import Path
from typing import Any, Dict, Optional, Union

import timm
import torch
import torch.nn as nn
from timm.models import load_state_dict
from timm.utils import ParseKwargs

from .cli import CommandError, reason
from .model_args import other_net_beside, record_args
from .weights import first_of, mismatches, unknown_model

_NO_STATE_DICT = 'is no checkpoint: it does not hold a state_dict, names with tensors.'


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `load_model` takes."""
    parser.add_argument('model', metavar='MODEL')
    parser.add_argument('--checkpoint', metavar='FILE', help='weights to take in place of the pretrained ones')
    parser.add_argument('--num-classes', type=int, metavar='N', help="the checkpoint's classes, if not the default")
    parser.add_argument('--in-chans', type=int, metavar='N', help="the checkpoint's input channels, likewise")
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE')


def load_model(
    name: str,
    checkpoint: Optional[Union[str, Path]] = None,
    num_classes: Optional[int] = None,
    in_chans: Optional[int] = None,
    model_kwargs: Optional[Dict[str, Any]] = None,
) -> nn.Module:
    """Create a model with weights: those of a checkpoint, averaged if it has them, or the pretrained ones.

    Raises:
        CommandError: If there is no such model, or the weights are not its own.
    """
    if ':' not in name and (unknown := unknown_model(name)):
        raise CommandError(unknown)
    kwargs = {'num_classes': num_classes, 'in_chans': in_chans, **(model_kwargs or {})}
    kwargs = {k: v for k, v in kwargs.items() if v is not None}
    state_dict = None if checkpoint is None else read_checkpoint(checkpoint)
    try:
        model: Any = timm.create_model(name, pretrained=checkpoint is None, **kwargs)
    except Exception as e:  # whatever a model's constructor raises at arguments that it does not take
        raise CommandError(f'{name} cannot be created: {reason(e)}') from e
    record_args(model, name, kwargs)
    if state_dict is not None:
        if faults := mismatches(model.state_dict(), state_dict):
            raise CommandError(
                f'{checkpoint} is no checkpoint of {name} with these arguments (--num-classes, --in-chans, '
                f'--model-kwargs): {first_of(faults)}'
            )
        model.load_state_dict(state_dict)
        if other := other_net_beside(str(checkpoint), model):
            raise CommandError(f'{checkpoint} {other}')
    return model.eval()


def read_checkpoint(path: Union[str, Path], use_ema: bool = True) -> Dict[str, torch.Tensor]:
    """Read the weights of a file as timm does, without running code in it.

    Raises:
        CommandError: If it is not there, or not such a file.
    """
    if not os.path.isfile(path):
        raise CommandError(f'there is no file {path}.')
    try:
        state_dict = load_state_dict(str(path), use_ema=use_ema)
    except Exception as e:  # torch.load raises many kinds at a damaged file
        raise CommandError(f'{path} {unreadable(e)}') from e
    if not all(isinstance(tensor, torch.Tensor) for tensor in state_dict.values()):
        raise CommandError(f'{path} {_NO_STATE_DICT}')
    return state_dict


def unreadable(error: Exception) -> str:
    """What to say of a file that timm's loader cannot read, without torch's advice to load it unsafely."""
    text = f'{error} {error.__cause__ or ""}'
    if re.search(r'GLOBAL|[Uu]nsupported (global|class)|unrecognized function|TorchScript', text):
        return (
            'is a pickled model or holds other objects than tensors, which could run any code when loaded: save '
            'model.state_dict() in its place, where the file comes from.'
        )
    if isinstance(error, OSError) and error.strerror:
        return f'cannot be read: {error.strerror}.'
    if isinstance(error, AttributeError):  # of what is loaded, and is no mapping of names
        return _NO_STATE_DICT
    return 'is damaged or no checkpoint, torch cannot read it.'

"""The weights that a training run starts from, and its teacher, as timm's train.py would load them."""

import argparse
import os
import re
from typing import Any, Dict, Tuple

import timm
import torch
from timm.models import get_pretrained_cfg, load_state_dict

from ..model_args import other_net
from ..weights import unknown_model
from .values import PreflightError, reason


def check_checkpoint(args: argparse.Namespace, key: str, model: Any, epochs: int) -> str:
    """Check that the file of an option, `resume` or `initial_checkpoint`, holds exactly the model's tensors.

    Raises:
        PreflightError: If it cannot be read, holds others, or is to be resumed and has no epoch left of `epochs`.
    """
    path, name = getattr(args, key), args.model
    if key == 'resume' and path.endswith('.safetensors'):
        raise PreflightError(f'{key}: {path} has weights only, start from it with initial_checkpoint.')
    try:
        state_dict = load_state_dict(path, use_ema=key != 'resume')
        found = {k: tuple(v.shape) for k, v in state_dict.items()}
    except Exception as e:  # torch.load raises many kinds at a damaged file
        raise PreflightError(f'{key}: {path} {unreadable(e)}') from e
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    wrong = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
    classifier = _classifier(model)
    if wrong and found.keys() <= expected.keys() and all(k.rpartition('.')[0] in classifier for k in wrong):
        raise PreflightError(
            f'{key}: {path} has another classifier than the model with its {model.num_classes} classes. To start from '
            f'the rest of it, in place of {key}: --pretrained --pretrained-path {path} --num-classes '
            f'{model.num_classes} (weights that timm has: --pretrained --num-classes {model.num_classes}).'
        )
    if wrong:
        raise PreflightError(
            f'{key}: {path} is not a checkpoint of {name}: {len(wrong)} tensors differ, {wrong[0]} has shape '
            f'{found.get(wrong[0], "none")} instead of {expected.get(wrong[0], "none")}.'
        )
    other = other_net(path, model)
    if other:
        raise PreflightError(f'{key}: {path} {other}.')
    if key == 'resume' and args.start_epoch is None:
        with torch.serialization.safe_globals([argparse.Namespace]):  # as timm
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        epoch, version = checkpoint.get('epoch'), checkpoint.get('version')
        if not (isinstance(epoch, (int, type(None))) and isinstance(version, (int, type(None)))):
            raise PreflightError(f'resume: {path} is no checkpoint of train.py: its epoch or version is no number.')
        done = -1 if epoch is None else epoch + (version is not None and version > 1)
        if done >= epochs:
            raise PreflightError(f'resume: {path} has {done} epochs of {epochs}, train.py would do nothing.')
    return f'{path}: all {len(expected)} tensors of the model'


def check_pretrained(args: argparse.Namespace, model: Any) -> str:
    """Check the weights of `pretrained`, which timm adapts to the model's classes and channels.

    Raises:
        PreflightError: If there are none, they cannot be read, or tensors other than the classifier's are missing.
    """
    name, path = args.model, args.pretrained_path
    if path:
        try:
            found = {k: tuple(v.shape) for k, v in load_state_dict(path).items()}
        except Exception as e:
            raise PreflightError(f'pretrained_path: {path} {unreadable(e)}') from e
    elif name.startswith(('hf-hub:', 'hf_hub:')) or 'pretrained_cfg' in args.model_kwargs:
        return f'of {name}: NOT CHECKED'
    elif not name.startswith('local-dir:'):
        cfg: Any = get_pretrained_cfg(name)
        if cfg is None or not cfg.has_weights:
            raise PreflightError(
                f'pretrained: timm has no weights for {name}, name a file with pretrained_path or leave pretrained out.'
            )
        if not cfg.file:
            return f'of {name}: NOT CHECKED, they are downloaded'
    overlay: Dict[str, Any] = {'pretrained_cfg_overlay': dict(file=path, num_classes=-1)} if path else {}
    try:
        timm.create_model(
            name,
            pretrained=True,
            num_classes=args.num_classes,
            in_chans=resolve_in_chans(args),
            **overlay,
            **args.model_kwargs,
        )
    except Exception as e:
        key = 'pretrained_path' if path else 'pretrained'
        raise PreflightError(f'{key}: {path or name} {_unloadable(e)}') from e
    if not path:
        return f'of {name}: load'
    classifier = _classifier(model)
    # train.py makes a new classifier, and timm adapts the first convolution
    other = other_net(path, model, ignored=['global_pool', *classifier, model.pretrained_cfg.get('first_conv')])
    if other:
        raise PreflightError(f'pretrained_path: {path} {other}.')
    expected = [k for k in model.state_dict() if k.rpartition('.')[0] not in classifier]
    missing = [k for k in expected if k not in found]
    if len(missing) == len(expected):
        return f'{path}: loads, its names are not those of the model and were NOT CHECKED'  # a filter of timm's
    if missing:  # timm would leave them at random
        raise PreflightError(f'pretrained_path: {path} lacks {len(missing)} tensors of {name}, {missing[0]} is one.')
    return f'{path}: all {len(expected)} tensors of the model but the classifier'


def resolve_in_chans(args: argparse.Namespace) -> int:
    """The model's input channels, as train.py takes them from the options."""
    return args.input_size[0] if args.in_chans is None and args.input_size else args.in_chans or 3


def check_local_dir(key: str, folder: str) -> None:
    """Check that a model's folder of `local-dir:` has a config, which timm opens, be it a file or a pipe.

    Raises:
        PreflightError: If not.
    """
    if not os.path.isdir(folder):
        raise PreflightError(f'{key}: there is no folder {folder}.')
    if not os.path.isfile(os.path.join(folder, 'config.json')):
        raise PreflightError(f'{key}: {folder} has no file config.json, as timm.models.save_for_hf writes it.')


def _classifier(model: Any) -> Tuple[str, ...]:
    names = model.pretrained_cfg.get('classifier') or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _unloadable(error: Exception) -> str:
    """What to say of a folder or file that timm cannot load into a model."""
    fault = unreadable(error)
    if fault.startswith('is a pickled'):
        return fault
    # Of torch's unpickler, or no such key in config.json
    if isinstance(error, (LookupError, EOFError)) or 'weights_only' in str(error):
        return 'cannot be loaded: its weights or its config.json are damaged or something else.'
    return f'cannot be loaded: {reason(error)}'


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
    if isinstance(error, AttributeError):  # of what is loaded, and is no mapping of names to tensors
        return 'is no checkpoint: it does not hold a state_dict, names with tensors.'
    return 'is damaged or no checkpoint, torch cannot read it.'


def check_teacher(args: argparse.Namespace, num_classes: int) -> str:
    """Check that the teacher of a distillation has weights and the student's classes.

    Raises:
        PreflightError: If not.
    """
    name = args.kd_model_name
    source, _, path = name.partition(':')
    if source in ('hf-hub', 'hf_hub'):
        return f'{name}: NOT CHECKED, it comes from the Hub'
    if source == 'local-dir':
        check_local_dir('kd_model_name', path)
    unknown = '' if source == 'local-dir' else unknown_model(name)
    if unknown:
        raise PreflightError(f'kd_model_name: {unknown}')
    try:
        # A teacher by name is a download, which is left to train.py
        known: Any = timm.create_model(name, pretrained=True) if source == 'local-dir' else get_pretrained_cfg(name)
    except Exception as e:  # no config.json, no weights, weights of another model, no such tag
        raise PreflightError(f'kd_model_name: {name} {_unloadable(e)}') from e
    if known is None or not (source == 'local-dir' or known.has_weights):
        raise PreflightError(f'kd_model_name: timm has no weights for {name}, name a folder that has: local-dir:DIR.')
    if known.num_classes != num_classes:  # timm would replace the teacher's classifier by a random one
        raise PreflightError(f'kd_model_name: {name} has {known.num_classes} classes, the student {num_classes}.')
    return f'{name}: {num_classes} classes, ' + ('loads' if source == 'local-dir' else 'weights NOT CHECKED')

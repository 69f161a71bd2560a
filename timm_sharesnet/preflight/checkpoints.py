"""The weights that a training run starts from, and its teacher, as timm's train.py would load them."""

import argparse
import os
from typing import Any, Dict, Tuple

import timm
import torch
from timm.models import get_pretrained_cfg

from ..cli import CommandError, concerning, headline
from ..loading import read_checkpoint, unreadable
from ..model_args import other_net_beside, resolve_in_chans
from ..weights import first_of, mismatches, unknown_model

_HUB = 'hf-hub', 'hf_hub'


def check_checkpoint(args: argparse.Namespace, key: str, model: Any, epochs: int) -> str:
    """Check that the file of an option, `resume` or `initial_checkpoint`, holds exactly the model's tensors."""
    path, name = getattr(args, key), args.model
    if key == 'resume' and path.endswith('.safetensors'):
        raise CommandError(f'{key}: {path} has weights only, start from it with initial_checkpoint.')
    with concerning(key, CommandError):
        found = read_checkpoint(path, use_ema=key != 'resume')
    expected, classifier = model.state_dict(), _classifier(model)

    def of_another_size(name: str) -> bool:
        is_known = name in expected and name.rpartition('.')[0] in classifier
        return is_known and (name not in found or found[name].shape != expected[name].shape)

    faults = mismatches(expected, found)
    if faults and all(map(of_another_size, faults)):
        raise CommandError(
            f'{key}: {path} has another classifier than the model with its {model.num_classes} classes. To start from '
            f'the rest of it, in place of {key}: --pretrained --pretrained-path {path} --num-classes '
            f'{model.num_classes} (weights that timm has: --pretrained --num-classes {model.num_classes}).'
        )
    if faults:
        raise CommandError(f'{key}: {path} is not a checkpoint of {name}: {first_of(faults)}.')
    if other := other_net_beside(path, model):
        raise CommandError(f'{key}: {path} {other}.')
    if key == 'resume' and args.start_epoch is None:
        with torch.serialization.safe_globals([argparse.Namespace]):  # as timm
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        epoch, version = checkpoint.get('epoch'), checkpoint.get('version')
        if not (isinstance(epoch, (int, type(None))) and isinstance(version, (int, type(None)))):
            raise CommandError(f'resume: {path} is no checkpoint of train.py: its epoch or version is no number.')
        done = -1 if epoch is None else epoch + (version is not None and version > 1)
        if done >= epochs:
            raise CommandError(f'resume: {path} has {done} epochs of {epochs}, train.py would do nothing.')
    return f'{path}: all {len(expected)} tensors of the model'


def check_pretrained(args: argparse.Namespace, model: Any) -> str:
    """Check the weights of `pretrained`, which timm adapts to the model's classes and channels."""
    name, path = args.model, args.pretrained_path
    if path:
        with concerning('pretrained_path', CommandError):
            found = read_checkpoint(path)
    elif name.partition(':')[0] in _HUB or 'pretrained_cfg' in args.model_kwargs:
        return f'of {name}: NOT CHECKED'
    elif not name.startswith('local-dir:'):
        cfg: Any = get_pretrained_cfg(name)
        if cfg is None or not cfg.has_weights:
            raise CommandError(
                f'pretrained: timm has no weights for {name}, name a file with pretrained_path or leave pretrained out.'
            )
        if not cfg.file:
            return f'of {name}: NOT CHECKED, they are downloaded'
    overlay: Dict[str, Any] = {'pretrained_cfg_overlay': dict(file=path, num_classes=-1)} if path else {}
    try:
        sizes = {'num_classes': args.num_classes, 'in_chans': resolve_in_chans(vars(args))}
        timm.create_model(name, pretrained=True, **sizes, **overlay, **args.model_kwargs)
    except Exception as e:
        key = 'pretrained_path' if path else 'pretrained'
        raise CommandError(f'{key}: {path or name} {_unloadable(e)}') from e
    if not path:
        return f'of {name}: load'
    classifier = _classifier(model)
    # train.py makes a new classifier, and timm adapts the first convolution
    ignored = ['global_pool', *classifier, model.pretrained_cfg.get('first_conv')]
    if other := other_net_beside(path, model, ignored):
        raise CommandError(f'pretrained_path: {path} {other}.')
    expected = [k for k in model.state_dict() if k.rpartition('.')[0] not in classifier]
    missing = [k for k in expected if k not in found]
    if len(missing) == len(expected):
        return f'{path}: loads, its names are not those of the model and were NOT CHECKED'  # a filter of timm's
    if missing:  # timm would leave them at random
        raise CommandError(f'pretrained_path: {path} lacks {len(missing)} tensors of {name}, {missing[0]} is one.')
    return f'{path}: all {len(expected)} tensors of the model but the classifier'


def check_name(key: str, name: str) -> str:
    """Check that timm knows a model, or that its folder has a config, which timm opens, be it a file or a pipe.

    Returns:
        Where it comes from: 'local-dir', 'hf-hub', 'hf_hub', or something else.
    """
    source, _, folder = name.partition(':')
    if source == 'local-dir':
        if not os.path.isdir(folder):
            raise CommandError(f'{key}: there is no folder {folder}.')
        if not os.path.isfile(os.path.join(folder, 'config.json')):
            raise CommandError(f'{key}: {folder} has no file config.json, as timm.models.save_for_hf writes it.')
    elif source not in _HUB and (unknown := unknown_model(name)):
        raise CommandError(f'{key}: {unknown}')
    return source


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
    return f'cannot be loaded: {headline(error)}'


def check_teacher(args: argparse.Namespace, num_classes: int) -> str:
    """Check that the teacher of a distillation has weights and the student's classes."""
    name = args.kd_model_name
    source = check_name('kd_model_name', name)
    if source in _HUB:
        return f'{name}: NOT CHECKED, it comes from the Hub'
    try:
        # A teacher by name is a download, which is left to train.py
        known: Any = timm.create_model(name, pretrained=True) if source == 'local-dir' else get_pretrained_cfg(name)
    except Exception as e:  # no config.json, no weights, weights of another model, no such tag
        raise CommandError(f'kd_model_name: {name} {_unloadable(e)}') from e
    if known is None or not (source == 'local-dir' or known.has_weights):
        raise CommandError(f'kd_model_name: timm has no weights for {name}, name a folder that has: local-dir:DIR.')
    if known.num_classes != num_classes:  # timm would replace the teacher's classifier by a random one
        raise CommandError(f'kd_model_name: {name} has {known.num_classes} classes, the student {num_classes}.')
    return f'{name}: {num_classes} classes, ' + ('loads' if source == 'local-dir' else 'weights NOT CHECKED')

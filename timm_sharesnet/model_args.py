"""What a model was built with, so that what is saved, printed or checked builds that model and no other.

Names and shapes of tensors do not tell what a net computes: with another activation, pooling or stride, or other runs
of blocks that share, the same weights load strictly.
"""

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple, Union

import timm
import torch.nn as nn
import yaml
from timm.data import resolve_data_config
from timm.models import create_model, is_model, load_model_config_from_hf, parse_model_name
from timm.models._hub import load_model_config_from_path

from .cli import headline, reason
from .conv_bn import does_nothing

TRAIN_OPTIONS: Dict[str, Any] = json.loads((Path(__file__).parent / 'train_options.json').read_text())
# What train.py passes to create_model, and from which option
TRAIN_ARGS = {
    'pretrained': 'pretrained',
    'checkpoint_path': 'initial_checkpoint',
    'in_chans': 'in_chans',
    'num_classes': 'num_classes',
    'drop_rate': 'drop',
    'drop_path_rate': 'drop_path',
    'drop_block_rate': 'drop_block',
    'global_pool': 'gp',
    'bn_momentum': 'bn_momentum',
    'bn_eps': 'bn_eps',
    'scriptable': 'torchscript',
}
_NO_ARGS = 'pretrained', 'checkpoint_path', 'scriptable'  # of a net
_DATA_OPTIONS = 'input_size', 'interpolation', 'mean', 'std', 'crop_pct'
_RECORDS = hasattr(timm.models, 'get_model_args')  # whether timm records the arguments of create_model


def args_from_options(options: Mapping[str, Any]) -> Dict[str, Any]:
    """What train.py passes to create_model of its options, beside `model_kwargs` and what is not the net's."""
    args = {key: options.get(option) for key, option in TRAIN_ARGS.items() if key not in _NO_ARGS}
    return {**args, 'in_chans': resolve_in_chans(options)}


def resolve_in_chans(options: Mapping[str, Any]) -> int:
    """The model's input channels, as train.py takes them from its options."""
    return options.get('in_chans') or (options.get('input_size') or [3])[0]


def record_args(model: Any, name: str, kwargs: Dict[str, Any]) -> None:
    """Record the arguments that `timm.create_model` built a model by, where timm does not (1.0.28)."""
    if not _RECORDS:
        source, folder = parse_model_name(name)
        load = load_model_config_from_path if source == 'local-dir' else load_model_config_from_hf
        saved = load(folder)[2] if source else {}
        model._model_args = {**getattr(model, '_model_args', {}), **(saved or {}), **kwargs}


def build_again(model: Any, **changed: Any) -> Any:
    """The model that its name and recorded arguments build, without values."""
    args = {**getattr(model, '_model_args', {}), **changed}
    return create_model(model.pretrained_cfg['architecture'], **args, device='meta')


def unlike_its_name(model: Any) -> str:
    """What a model has that is not built again by what `save_for_hf` saves of it. Empty if all is."""
    try:
        # timm saves what a model has now (1.0.28 of these the classes alone)
        changed = current_args(model) if _RECORDS else {'num_classes': model.num_classes}
        return difference(model, build_again(model, **changed))
    except (RuntimeError, TypeError, ValueError) as e:  # of a model's constructor
        return reason(e)


def model_args(model: Any) -> Dict[str, Any]:
    """Arguments with which `timm.create_model` builds a model again, beside its name.

    They are those that timm recorded (since 1.0.29), and what was changed since (`reset_classifier`).
    """
    built = current_args(build_again(model))
    changed = {key: value for key, value in current_args(model).items() if value != built[key]}
    return {**getattr(model, '_model_args', {}), **changed}


def current_args(model: Any) -> Dict[str, Any]:
    """The arguments that can be read off a model, as they can be changed."""
    pool = getattr(model.global_pool, 'pool_type', model.global_pool)
    return {'in_chans': model.in_chans, 'num_classes': model.num_classes, 'global_pool': pool}


def difference(model: nn.Module, expected: nn.Module, ignored: Iterable[str] = ()) -> str:
    """The first layer that computes something else, empty if none does, whatever the values of parameters are.

    Dropout and the momentum of batch norms, which are for training, make no difference.

    `ignored` are names of layers that need not be alike, nor what they consist of.
    """
    found, wanted = _layers(model), _layers(expected)
    ignored = tuple(f'{name}.' for name in ignored)
    for name in {**wanted, **found}:
        if not f'{name}.'.startswith(ignored) and found.get(name) != wanted.get(name):
            return f'{name or "the net"} is {found.get(name, "missing")} in place of {wanted.get(name, "none")}'
    return ''


def _layers(model: nn.Module) -> Dict[str, str]:
    layers = {}
    for name, m in model.named_modules():
        if not does_nothing(m):
            container = isinstance(m, nn.ModuleList) or type(m).__repr__ is nn.Module.__repr__  # else it has its own
            text = f'{type(m).__name__}({m.extra_repr()})' if container else repr(m)
            text = text.replace('SyncBatchNorm', 'BatchNorm2d')  # in evaluation
            layers[name] = re.sub(r', momentum=[^,)]*|, inplace=\w+|inplace=\w+', '', ' '.join(text.split()))
    return layers


def net_beside(weights: Union[str, Path]) -> Optional[Tuple[str, nn.Module]]:
    """The net that a file beside weights describes: config.json of `timm.models.save_for_hf`, args.yaml of train.py.

    Returns:
        The name of that file, and the net without values. None if there is no such file, or it is something else.

    Raises:
        Exception: Of many kinds, if timm cannot build the net.
    """
    folder = Path(weights).absolute().parent
    config, options = _read(folder / 'config.json'), _read(folder / 'args.yaml')
    kwargs: Dict[str, Any] = {}
    if _is_arch(config.get('architecture')):
        file, name = 'config.json', f'local-dir:{folder}'
    elif _is_arch(options.get('model')):
        file, name = 'args.yaml', options['model']
        kwargs = {**args_from_options(options), **(options.get('model_kwargs') or {})}
        kwargs = {k: v for k, v in kwargs.items() if v is not None}
    else:
        return None
    model = create_model(name, **kwargs, device='meta')
    record_args(model, name, kwargs)
    return file, model


def _read(path: Path) -> Dict[str, Any]:
    """The content of a file of JSON or YAML, empty if it is not there or another."""
    try:
        content = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_arch(name: Any) -> bool:
    return isinstance(name, str) and ':' not in name and is_model(name)


def other_net_beside(weights: Union[str, Path], model: Any, ignored: Iterable[str] = ()) -> str:
    """What to say if weights whose tensors fit a model are those of another one, by what is saved beside them.

    For `ignored` see `difference`.
    """
    try:
        saved = net_beside(weights)
    except Exception as e:  # whatever a model's constructor raises
        return f'lies beside a config that builds no model: {headline(e)}'
    if saved is None or not (where := difference(model, saved[1], ignored)):
        return ''
    return (
        f'has the weights of a net that computes something else, by {saved[0]} beside it: {where}. The options for it '
        f'are {shlex.join(options_for_train(saved[1]))}'
    )


def options_for_train(model: Any) -> List[str]:
    """Options of timm's train.py that build a model and prepare its images, without what is the default."""
    args, name = model_args(model), model.pretrained_cfg['architecture']
    default = create_model(name, **{k: v for k, v in args.items() if k == 'base'}, device='meta')
    flags = {option['name']: option['flags'][-1] for option in TRAIN_OPTIONS['options'] if option['flags']}
    options = ['--model', name]
    data, known = (resolve_data_config({}, model=m) for m in (model, default))
    data['input_size'] = (model.in_chans, *data['input_size'][1:])  # from which train.py takes in_chans, too
    kwargs, usual = [], current_args(default)
    for key, value in args.items():
        if value == usual.get(key):
            continue
        if key not in TRAIN_ARGS:
            kwargs.append(f'{key}={_literal(value)}')
        elif key != 'in_chans':
            options += [flags[TRAIN_ARGS[key]], str(value)]
    for key in _DATA_OPTIONS:
        if _list(data[key]) != _list(known[key]):
            options += [flags[key], *map(str, _list(data[key]))]
    return [*options, *(['--model-kwargs', *kwargs] if kwargs else [])]


def _list(value: Any) -> List[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _literal(value: Any) -> str:
    """The text that `timm.utils.ParseKwargs` reads as a value: a literal of Python, or else text."""
    if isinstance(value, str):
        try:
            ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value
    return repr(value)

"""All that is checked."""

import argparse
import difflib
import importlib
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, NoReturn, Optional, Sequence, TextIO, Tuple

import timm
import torch
import yaml
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ParseKwargs

from ..cli import one_line
from ..model_args import TRAIN_ARGS, TRAIN_OPTIONS
from ..weights import unknown_model
from .checkpoints import check_checkpoint, check_local_dir, check_pretrained, check_teacher, resolve_in_chans
from .data import check_data
from .values import PreflightError, check_values, reason, shown

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

VERSIONS: List[str] = list(TRAIN_OPTIONS['versions'])  # timm versions whose train.py the table knows, the newest last
_TYPES = {'int': int, 'float': float, 'str': str}
_MEANT = {'int': 'an integer', 'float': 'a number', 'str': 'text', 'bool': 'true or false', 'dict': 'a mapping'}
_CONFIG_BYTES = 100_000  # the args.yaml that train.py writes has 5,000
_CONFIG_DEPTH = 32


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise PreflightError(message)


def train_options(version: str = VERSIONS[-1]) -> Dict[str, Dict[str, Any]]:
    """The options of train.py by key, for one of `VERSIONS`: `flags`, `type`, `nargs`, `choices`, `default`."""
    return {row['name']: row for row in TRAIN_OPTIONS['options'] if version in row.get('versions', VERSIONS)}


def train_parser() -> argparse.ArgumentParser:
    """The argument parser of the newest train.py in the table. Its errors are `PreflightError`s."""
    parser = _Parser(prog='preflight', usage='python -m timm_sharesnet.preflight CONFIG [options of train.py]')
    group = parser.add_mutually_exclusive_group()
    for name, option in train_options().items():
        kwargs: Dict[str, Any] = {k: option[k] for k in ('nargs', 'const', 'default', 'choices') if k in option}
        if option['type'] == 'bool':
            kwargs = {'action': 'store_true'}
        elif option['type'] == 'dict':
            kwargs.update(action=ParseKwargs, nargs='*')
        else:
            kwargs.update(type=_TYPES[option['type']])
        if option['flags']:
            (group if 'exclusive' in option else parser).add_argument(*option['flags'], dest=name, **kwargs)
        else:
            parser.add_argument(name, **kwargs)
    return parser


def check_config(config: Any, version: str = VERSIONS[-1]) -> None:
    """Check the keys and values of a config against the options of train.py.

    Args:
        config: What the YAML file holds.
        version: One of `VERSIONS`.

    Raises:
        PreflightError: If a key is not an option, or its value is not what the option takes.
    """
    if not isinstance(config, dict):
        raise PreflightError('not a mapping of train.py options to values.')
    options = train_options(version)
    for key, value in config.items():
        if key not in options:
            key = key if isinstance(key, str) else shown(key)
            raise PreflightError(f'{key}: not an option of train.py (timm {version}).{_hint(str(key), options)}')
        fault = _fault(options[key], value)
        if fault:
            raise PreflightError(f'{key}: {fault}')


def _hint(name: str, options: Dict[str, Dict[str, Any]]) -> str:
    keys = {flag.lstrip('-').replace('-', '_'): key for key, o in options.items() for flag in [key, *o['flags']]}
    nearest = difflib.get_close_matches(name.lstrip('-').replace('-', '_'), keys, 1)
    if not nearest:
        return ''
    key = keys[nearest[0]]
    return f' Did you mean {options[key]["flags"][-1] if name.startswith("-") else key}?'


def _fault(option: Dict[str, Any], value: Any) -> str:
    """Why train.py cannot use this value of a YAML file; empty if it can."""
    kind, nargs, choices = option['type'], option.get('nargs'), option.get('choices')
    if kind != 'bool' and value == option.get('default'):
        return ''  # null, too, where it is the default, as in the args.yaml that train.py writes
    if nargs == '+' or isinstance(nargs, int):
        if not isinstance(value, list) or not value or (nargs != '+' and len(value) != nargs):
            return f'must be a list{"" if nargs == "+" else f" of {nargs}"}, not {shown(value)}.'
        wrong = [v for v in value if not _is(kind, v)]
        return f'must be a list with {_MEANT[kind]} in each place, not {shown(wrong[0])}.' if wrong else ''
    if not (_is(kind, value) or isinstance(value, str) and _converts(kind, value)):
        return f'must be {_MEANT[kind]}, not {shown(value)}.'
    if choices and value not in choices:
        return f'must be one of {", ".join(choices)}, not {shown(value)}.'
    if kind == 'dict':
        for k, v in value.items():
            if isinstance(v, str) and _converts('float', v):
                return f'{k} is the text {shown(v)} to YAML, which needs a point in 1.0e-6.'
    return ''


def _is(kind: str, value: Any) -> bool:
    if kind in ('int', 'float'):
        return isinstance(value, (int, float) if kind == 'float' else int) and not isinstance(value, bool)
    return isinstance(value, {'str': str, 'bool': bool, 'dict': dict}[kind])


def _converts(kind: str, text: str) -> bool:
    """Whether argparse will convert a text, which it does for defaults outside of lists (5e-3 is text to YAML)."""
    try:
        return kind in ('int', 'float') and _TYPES[kind](text) is not None
    except ValueError:
        return False


def parse_train_args(path: str, options: Sequence[str]) -> argparse.Namespace:
    """The arguments that train.py would see.

    Args:
        path: Path of the YAML file.
        options: Command line of train.py without `--config`.

    Raises:
        PreflightError: If the file is no config, or a key, a value or an option is not train.py's.
    """
    try:
        config = _read_config(path)
        check_config(config)
    except PreflightError as e:
        raise PreflightError(f'{path}: {e}') from e
    parser = train_parser()
    parser.set_defaults(**config)
    try:
        args, unknown = parser.parse_known_args(options)
    except (ValueError, TypeError, MemoryError, RecursionError) as e:  # of ParseKwargs, the later ones of literal_eval
        raise PreflightError('--model-kwargs, --opt-kwargs: must be KEY=VALUE.') from e
    if unknown:
        raise PreflightError(f'{unknown[0]}: not an option of train.py.{_hint(unknown[0], train_options())}')
    check_values(args)
    return args


class _ConfigLoader(yaml.SafeLoader):
    """YAML without what may be endless (aliases, deep nesting), and with each key once: YAML takes the last."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise PreflightError(f'line {line}: write the value in place of the alias.')
        self._depth += 1
        if self._depth > _CONFIG_DEPTH:
            raise PreflightError(f'nested more than {_CONFIG_DEPTH} deep.')
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        lines: Dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    raise PreflightError(f'{key.value}: given twice, in lines {lines[key.value]} and {line}.')
                lines[key.value] = line
        return super().construct_mapping(node, deep)


def _read_config(path: str) -> Any:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise PreflightError('not a file.')
    with open(path, 'rb') as f:
        text = f.read(_CONFIG_BYTES + 1)
    if len(text) > _CONFIG_BYTES:
        raise PreflightError(f'not a config of train.py, it has more than {_CONFIG_BYTES:,} bytes.')
    try:
        return yaml.load(text, _ConfigLoader)
    except (yaml.YAMLError, ValueError) as e:  # ValueError: a date that there is not
        raise PreflightError(f'not YAML: {" ".join(str(e).split())}') from e


def build_model(args: argparse.Namespace) -> Any:
    """The model as train.py builds it, without weights. (To mypy every attribute of an nn.Module is a tensor: Any.)

    Raises:
        PreflightError: If there is no such model, or it does not take the arguments.
    """
    source, _, folder = args.model.partition(':')
    if source == 'local-dir':
        check_local_dir('model', folder)
    unknown = '' if source in ('local-dir', 'hf-hub', 'hf_hub') else unknown_model(args.model)
    if unknown:
        raise PreflightError(f'model: {unknown}')
    kwargs = {key: getattr(args, option) for key, option in TRAIN_ARGS.items()}
    kwargs.update(pretrained=False, checkpoint_path='', in_chans=resolve_in_chans(args))
    for key in args.model_kwargs:
        if key in kwargs:
            raise PreflightError(f"model_kwargs: {key} is train.py's own, by the option {TRAIN_ARGS[key]}.")
    try:
        model: Any = timm.create_model(args.model, **kwargs, **args.model_kwargs)
        if args.grad_checkpointing:
            model.set_grad_checkpointing(True)
    except Exception as e:  # whatever a model's constructor raises at arguments that it does not take
        raise PreflightError(f'model: {args.model} cannot be built: {reason(e)}') from e
    return model


def _check_machine(args: argparse.Namespace) -> str:
    """Modules, device and output folder."""
    for module in args.device_modules or ():
        try:
            importlib.import_module(module)  # as train.py: it may bring the device, or models
        except Exception as e:
            raise PreflightError(f'device_modules: {module} cannot be imported: {reason(e)}') from e
    try:
        torch.zeros(1, device=torch.device(args.device)).item()  # not on meta, whose tensors have no values
    except Exception as e:  # each backend has its own
        raise PreflightError(
            f'device: {shown(args.device)} cannot be used here ({reason(e).split(". ")[0]}). --device cpu trains on '
            f'the CPU, and lets a config for another machine be checked.'
        ) from e
    output = Path(args.output or 'output/train') / args.experiment
    folder = os.path.abspath(output)
    while not os.path.lexists(folder):
        if len(os.path.basename(os.fsencode(folder))) > 255:
            raise PreflightError(f'output, experiment: {shown(os.path.basename(folder))} is too long for a name.')
        folder = os.path.dirname(folder)
    try:
        tempfile.TemporaryFile(dir=folder).close()  # leaves nothing behind
    except OSError as e:
        raise PreflightError(f'output: {output} cannot be written: {folder}: {e.strerror}.') from e
    return f'{args.device}, writes to {output}'


def _check_training(args: argparse.Namespace, model: Any, data: Dict[str, Any]) -> Tuple[str, int]:
    """Make what train.py makes from the options, as it does, and return what that is and the number of epochs."""
    _check_transforms(args, data)
    known = list_optimizers()
    name = args.opt.lower().removeprefix('lookahead_')
    if name not in known:  # timm takes x_sgd for sgd
        close = difflib.get_close_matches(name, known, 3)
        meant = f', did you mean {" or ".join(close)}?' if close else '. timm.optim.list_optimizers() has the names.'
        raise PreflightError(f'opt: timm knows no optimizer {args.opt}{meant}')
    try:
        kwargs = {**optimizer_kwargs(cfg=args), 'lr': args.lr or args.lr_base}
        optimizer = create_optimizer_v2(model, **kwargs, **args.opt_kwargs)
    except Exception as e:  # each optimizer has its own
        raise PreflightError(f'opt, opt_kwargs: {args.opt} cannot be made: {reason(e)}') from e
    try:
        scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=1)
    except Exception as e:
        raise PreflightError(f'sched: {args.sched} cannot be made: {reason(e)}') from e
    if scheduler is None:  # an unknown name, and none, which train.py does not survive
        raise PreflightError(
            f'sched: {args.sched} is no schedule, take cosine, tanh, step, multistep, poly, plateau or another of timm.'
        )
    if epochs <= (args.start_epoch or 0):
        raise PreflightError(f'start_epoch: {args.start_epoch} of {epochs} epochs, train.py would do nothing.')
    if args.torchcompile:
        try:
            torch.compile(torch.nn.Identity(), backend=args.torchcompile, mode=args.torchcompile_mode)
        except Exception as e:
            raise PreflightError(f'torchcompile, torchcompile_mode: {reason(e)}') from e
    return f'{type(optimizer).__name__}, {type(scheduler).__name__}, {epochs} epochs', epochs


def _check_transforms(args: argparse.Namespace, data: Dict[str, Any]) -> None:
    channels, height, width = data['input_size']
    mode = args.input_img_mode or ('RGB' if channels == 3 else 'L')
    try:
        image = Image.new('RGB', (width, height)).convert(mode)
    except Exception as e:
        raise PreflightError(f'input_img_mode: PIL has no mode {shown(mode)}.') from e
    if len(image.getbands()) != resolve_in_chans(args):
        raise PreflightError(
            f'in_chans: {resolve_in_chans(args)}, but train.py would read images of mode {mode} with '
            f'{len(image.getbands())} channels: set input_size and input_img_mode, too.'
        )
    if args.naflex_loader:
        return
    kwargs = {key: getattr(args, key) for key in _TRANSFORM_OPTIONS}
    kwargs.update(
        is_training=True,
        auto_augment=args.aa,
        interpolation=data['interpolation'] if args.no_aug else args.train_interpolation or data['interpolation'],
        mean=data['mean'],
        std=data['std'],
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        use_prefetcher=not args.no_prefetcher,
    )
    try:
        create_transform(data['input_size'], **kwargs)(image)
    except Exception as e:
        raise PreflightError(f'the augmentation for training cannot be made: {reason(e)}') from e


_TRANSFORM_OPTIONS = (
    'no_aug train_crop_mode scale ratio hflip vflip color_jitter color_jitter_prob grayscale_prob gaussian_blur_prob'
).split()


def _data_config(args: argparse.Namespace, model: Any) -> Dict[str, Any]:
    try:
        return resolve_data_config(vars(args), model=model)
    except AssertionError as e:
        raise PreflightError('mean, std: must have one number for each input channel.') from e


def _check_size(args: argparse.Namespace, model: Any, size: Sequence[int]) -> str:
    cfg = model.pretrained_cfg
    if cfg.get('pool_size') and getattr(model, 'feature_info', None):  # a convolutional net
        if args.naflex_loader:
            raise PreflightError(f'naflex_loader: makes patches for a vision transformer, {args.model} takes images.')
        reduction = model.feature_info[-1]['reduction']
        for side in {*size, *(args.train_img_sizes or ())}:
            cells = -(-side // reduction)
            if not 2 <= cells <= 32:
                raise PreflightError(
                    f'img_size: {side} px does not fit {cfg["architecture"]}, whose last feature map would be '
                    f'{cells} x {cells}; it was made for {cfg["input_size"][-1]} px.'
                )
    return ' x '.join(map(str, size)) + ' px'


def preflight(config: str, options: Sequence[str] = ()) -> List[str]:
    """Check a config with the options that train.py will get beside it.

    Args:
        config: Path of the YAML file.
        options: Command line of train.py without `--config`.

    Returns:
        Lines that say what was checked and found.

    Raises:
        PreflightError: At the first fault.
    """
    args = parse_train_args(config, options)
    machine = _check_machine(args)
    checkpoints = [key for key in ('pretrained_path', 'initial_checkpoint', 'resume') if getattr(args, key)]
    for key in checkpoints:
        if not os.path.isfile(getattr(args, key)):
            raise PreflightError(f'{key}: there is no file {getattr(args, key)}.')
    model = build_model(args)
    num_classes = model.num_classes
    data_config = _data_config(args, model)
    size = _check_size(args, model, data_config['input_size'][1:])
    training, epochs = _check_training(args, model, data_config)
    lines = [f'config  {config}: all keys and values are options of train.py']
    options_now, options_before = train_options(), train_options(VERSIONS[0])
    newer = [key for key in options_now if key not in options_before]
    newer = [key for key in newer if getattr(args, key) != options_now[key].get('default')]
    if newer:
        lines.append(f'        {", ".join(newer)}: only in a train.py newer than timm {VERSIONS[0]}')
    if args.aug_repeats:
        lines.append('        aug_repeats: only with several processes (torchrun)')
    lines.append(f'device  {machine}')
    parameters = sum(p.numel() for p in model.parameters())
    lines.append(f'model   {args.model}: {parameters:,} parameters, {num_classes} classes, {size}')
    lines.append(f'train   {training}')
    if args.pretrained:
        lines.append(f'weights {check_pretrained(args, model)}')
    for key in checkpoints:
        if key != 'pretrained_path':
            lines.append(f'weights {check_checkpoint(args, key, model, epochs)}')
    if args.kd_model_name:
        lines.append(f'teacher {check_teacher(args, num_classes)}')
    lines.append(f'data    {check_data(args, num_classes)}')  # last: it may take longest
    return lines


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command line, see the module. Returns the exit code, 0 or 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not {'-h', '--help'}.isdisjoint(argv):
            _say((sys.modules[__package__].__doc__ or '').strip().splitlines(), sys.stdout)
            return 0
        if not argv or argv[0].startswith('-'):
            raise PreflightError('usage: python -m timm_sharesnet.preflight CONFIG [options of train.py]')
        _say(preflight(argv[0], argv[1:]), sys.stdout)
    except PreflightError as e:
        _say([f'preflight: {e}'], sys.stderr)
        return 2
    except OSError as e:
        _say([f'preflight: {one_line(e, argv[0])}'], sys.stderr)
        return 2
    return 0


def _say(lines: Sequence[str], stream: TextIO) -> None:
    """Print lines in which a user's path may have characters that the stream's encoding, or a terminal, has not."""
    for line in lines:
        line = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in line[:2000])
        encoding = stream.encoding or 'utf-8'
        print(line.encode(encoding, 'backslashreplace').decode(encoding), file=stream)

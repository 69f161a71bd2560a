"""Check a training config and what it names, in seconds, before timm's train.py starts.

    python -m timm_sharesnet.preflight CONFIG [options of train.py]

with the options that train.py will get beside `--config CONFIG`. Exit code 0 and a summary of what was checked, or 2
and one line that names the file or key. train.py reports these faults badly or not at all:

  * Keys of the config that are not train.py's (it ignores them), values of the wrong type or not among the choices.
  * `data_dir` and both splits are there and hold images. Where the folder of a split is missing, train.py trains or
    validates on everything in `data_dir`.
  * The data has `num_classes` classes (the model's, where that is not set), in both splits the same. With fewer,
    train.py trains; with other folders in the validation split, it compares with shifted labels.
  * The image size fits a convolutional model: its last feature map is at least 2 x 2 and at most 32 x 32. This refuses
    32 px on an ImageNet net (1 x 1) and 224 px on a CIFAR net (56 x 56), which cannot be meant, and allows what may be:
    Tiny-ImageNet's 64 px on an ImageNet net, 64 or 96 px on a CIFAR net.
  * `resume` and `initial_checkpoint` can be read (without running code in them) and hold exactly the model's tensors.
  * The teacher of a distillation has weights and the student's classes; a `local-dir:` folder loads.

Datasets that are streamed or looked up while training (`hfds/`, `hfids/`, `tfds/`, `wds/`) are not checked, and the
summary says so. The options are those of train.py at the versions in `train_options.json`.
"""

import argparse
import difflib
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any, Dict, List, NoReturn, Optional, Sequence

import timm
import yaml
from timm.data import create_dataset, resolve_data_config
from timm.data.dataset_factory import _search_split  # which folder train.py takes for a split
from timm.data.readers.img_extensions import get_img_extensions
from timm.models import get_pretrained_cfg, load_state_dict
from timm.utils import ParseKwargs

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

_TABLE: Dict[str, Any] = json.loads((Path(__file__).parent / 'train_options.json').read_text())
VERSIONS: List[str] = list(_TABLE['versions'])  # timm versions whose train.py the table knows, the newest last
_TYPES = {'int': int, 'float': float, 'str': str}
_MEANT = {'int': 'an integer', 'float': 'a number', 'str': 'text', 'bool': 'true or false', 'dict': 'a mapping'}
_TORCH_CLASSES = {'cifar10': 10, 'cifar100': 100, 'mnist': 10, 'kmnist': 10, 'fashion_mnist': 10, 'qmnist': 10}


class PreflightError(Exception):
    """What is wrong, in one line that starts with the file or key."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise PreflightError(message)


def train_options(version: str = VERSIONS[-1]) -> Dict[str, Dict[str, Any]]:
    """The options of train.py by key, for one of `VERSIONS`: `flags`, `type`, `nargs`, `choices`, `default`."""
    return {row['name']: row for row in _TABLE['options'] if version in row.get('versions', VERSIONS)}


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
            return f'must be a list{"" if nargs == "+" else f" of {nargs}"}, not {value!r}.'
        wrong = [v for v in value if not _is(kind, v)]
        return f'must be a list with {_MEANT[kind]} in each place, not {wrong[0]!r}.' if wrong else ''
    if not (_is(kind, value) or isinstance(value, str) and _converts(kind, value)):
        return f'must be {_MEANT[kind]}, not {value!r}.'
    if choices and value not in choices:
        return f'must be one of {", ".join(choices)}, not {value!r}.'
    if kind == 'dict':
        for k, v in value.items():
            if isinstance(v, str) and _converts('float', v):
                return f'{k} is the text {v!r} to YAML, which needs a point in 1.0e-6.'
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
        config = yaml.safe_load(Path(path).read_bytes())
    except (yaml.YAMLError, ValueError) as e:  # ValueError: a date that there is not
        raise PreflightError(f'{path}: not YAML: {e}') from e
    try:
        check_config(config)
    except PreflightError as e:
        raise PreflightError(f'{path}: {e}') from e
    parser = train_parser()
    parser.set_defaults(**config)
    try:
        args, unknown = parser.parse_known_args(options)
    except ValueError as e:  # of ParseKwargs
        raise PreflightError('--model-kwargs, --opt-kwargs: must be KEY=VALUE.') from e
    if unknown:
        raise PreflightError(f'{unknown[0]}: not an option of train.py.{_hint(unknown[0], train_options())}')
    return args


def build_model(args: argparse.Namespace) -> Any:
    """The model as train.py builds it, without weights. (To mypy every attribute of an nn.Module is a tensor: Any.)

    Raises:
        PreflightError: If there is no such model, or it does not take the arguments.
    """
    try:
        return timm.create_model(
            args.model,
            in_chans=args.input_size[0] if args.in_chans is None and args.input_size else args.in_chans or 3,
            num_classes=args.num_classes,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            drop_block_rate=args.drop_block,
            global_pool=args.gp,
            bn_momentum=args.bn_momentum,
            bn_eps=args.bn_eps,
            scriptable=args.torchscript,
            **args.model_kwargs,
        )
    except Exception as e:  # whatever a model's constructor raises at arguments that it does not take
        raise PreflightError(f'model: {args.model} cannot be built: {_reason(e)}') from e


def _check_data(args: argparse.Namespace, num_classes: int) -> str:
    prefix, _, rest = args.dataset.partition('/')
    prefix, name = (prefix.lower(), rest.split('/')[-1].lower()) if rest else ('', '')
    if prefix in ('hfds', 'hfids', 'tfds', 'wds'):
        return f'{args.dataset}: splits, classes and access NOT CHECKED, it is read while training'
    root = args.data_dir or args.data
    if not root:
        raise PreflightError('data_dir: not set, the folder of the data is needed.')
    splits = {key: getattr(args, key) for key in ('train_split', 'val_split') if key == 'train_split' or args.val_split}
    if prefix != 'torch' or name in ('folder', 'image_folder'):
        return _check_folder(args, root, splits, num_classes)
    if name in _TORCH_CLASSES:
        return _check_torch(args, root, splits, name, num_classes)
    return f'{args.dataset} in {root} NOT CHECKED'


def _check_torch(args: argparse.Namespace, root: str, splits: Dict[str, str], name: str, num_classes: int) -> str:
    for key, split in splits.items():
        # timm takes the test set for every name but these two, for training as well
        if (split in ('train', 'training')) != (key == 'train_split'):
            raise PreflightError(
                f'{key}: timm takes {split!r} for the {"test" if key == "train_split" else "training"} set of '
                f'{args.dataset}, write {"train" if key == "train_split" else "test"}.'
            )
    _check_num_classes(args, num_classes, _TORCH_CLASSES[name], args.dataset)
    if os.path.exists(root) and not os.path.isdir(root):
        raise PreflightError(f'data_dir: {root} is not a folder.')
    sizes = []
    for key, split in splits.items():
        try:
            sizes.append(f'{split} {len(create_dataset(args.dataset, root=root, split=split)):,} images')
        except RuntimeError as e:
            if args.dataset_download:
                return f'{args.dataset}: {num_classes} classes, not complete in {root}, train.py will download it'
            raise PreflightError(
                f'data_dir: {root} has no complete {args.dataset} ({key}), --dataset-download fetches it.'
            ) from e
    return f'{args.dataset} in {root}: {", ".join(sizes)}, {num_classes} classes'


def _check_folder(args: argparse.Namespace, root: str, splits: Dict[str, str], num_classes: int) -> str:
    if os.path.isfile(root) and root.endswith('.tar'):
        return f'{root}: a tar file, NOT CHECKED'
    if not os.path.isdir(root):
        raise PreflightError(f'data_dir: there is no folder {root}.')
    found: Dict[str, Dict[str, int]] = {}
    for key, split in splits.items():
        folder = _search_split(root, split)
        if os.path.samefile(folder, root):
            there = ', '.join(sorted(entry.name for entry in os.scandir(root) if entry.is_dir())[:5])
            raise PreflightError(
                f'{key}: there is no folder {split!r} in {root} (but {there or "nothing"}), and train.py would '
                f'silently take all images in {root}.'
            )
        found[folder] = _count_images(folder)
        if not found[folder]:
            raise PreflightError(f'{key}: there are no images in {folder}.')
    sizes = ', '.join(f'{folder} {sum(classes.values()):,} images' for folder, classes in found.items())
    train = next(iter(found))
    if sum(found[train].values()) < args.batch_size:
        raise PreflightError(
            f'batch_size: {args.batch_size}, but {train} has {sum(found[train].values())} images: train.py leaves out '
            f'an incomplete batch and would train on none.'
        )
    if args.class_map:
        return f'{sizes}, class_map {args.class_map} NOT CHECKED'
    for folder, classes in found.items():
        for name in sorted(classes.keys() ^ found[train].keys()):
            where, lacks = (folder, train) if name in classes else (train, folder)
            raise PreflightError(
                f'{folder}: its classes are not those of {train}, labels would be shifted: {name!r} is in {where}, '
                f'not in {lacks}.'
            )
    _check_num_classes(args, num_classes, len(found[train]), train)
    return f'{sizes}, {num_classes} classes'


def _count_images(folder: str) -> Dict[str, int]:
    """Number of images of each class, by the name of the folder that they lie in, as timm reads it."""
    extensions = get_img_extensions(as_set=True)
    counts: Dict[str, int] = {}
    for path, _, files in os.walk(folder, followlinks=True):
        number = sum(os.path.splitext(file)[1].lower() in extensions for file in files)
        if number:
            name = os.path.basename(path) if path != folder else ''
            counts[name] = counts.get(name, 0) + number
    return counts


def _check_num_classes(args: argparse.Namespace, num_classes: int, found: int, where: str) -> None:
    if found != num_classes:
        origin = f"{args.model}'s default, " if args.num_classes is None else ''
        raise PreflightError(f'num_classes: {num_classes} ({origin}but {where} has {found} classes).')


def _check_size(args: argparse.Namespace, model: Any) -> str:
    try:
        size = resolve_data_config(vars(args), model=model)['input_size'][1:]
    except AssertionError as e:
        raise PreflightError('mean, std: must have one number for each input channel.') from e
    cfg = model.pretrained_cfg
    if cfg.get('pool_size') and getattr(model, 'feature_info', None):  # a convolutional net
        reduction = model.feature_info[-1]['reduction']
        for side in {*size, *(args.train_img_sizes or ())}:
            cells = -(-side // reduction)
            if not 2 <= cells <= 32:
                raise PreflightError(
                    f'img_size: {side} px does not fit {cfg["architecture"]}, whose last feature map would be '
                    f'{cells} x {cells}; it was made for {cfg["input_size"][-1]} px.'
                )
    return ' x '.join(map(str, size)) + ' px'


def _check_checkpoint(key: str, path: str, model: Any, name: str) -> str:
    if not os.path.isfile(path):
        raise PreflightError(f'{key}: there is no file {path}.')
    if key == 'resume' and path.endswith('.safetensors'):
        raise PreflightError(f'{key}: {path} has weights only, start from it with initial_checkpoint.')
    try:
        state_dict = load_state_dict(path, use_ema=key != 'resume')
        found = {k: tuple(v.shape) for k, v in state_dict.items()}
    except Exception as e:  # torch.load raises many kinds at a damaged file
        raise PreflightError(f'{key}: {path} cannot be read as a checkpoint: {_reason(e)}') from e
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    wrong = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
    if wrong:
        raise PreflightError(
            f'{key}: {path} is not a checkpoint of {name}: {len(wrong)} tensors differ, {wrong[0]} has shape '
            f'{found.get(wrong[0], "none")} instead of {expected.get(wrong[0], "none")}.'
        )
    return f'{path}: all {len(expected)} tensors of the model'


def _check_teacher(args: argparse.Namespace, num_classes: int) -> str:
    name = args.kd_model_name
    source, _, path = name.partition(':')
    if source in ('hf-hub', 'hf_hub'):
        return f'{name}: NOT CHECKED, it comes from the Hub'
    if source == 'local-dir' and not os.path.isdir(path):
        raise PreflightError(f'kd_model_name: there is no folder {path}.')
    try:
        # A teacher by name is a download, which is left to train.py
        known: Any = timm.create_model(name, pretrained=True) if source == 'local-dir' else get_pretrained_cfg(name)
    except Exception as e:  # no config.json, no weights, weights of another model, no such tag
        raise PreflightError(f'kd_model_name: {name} cannot be loaded: {_reason(e)}') from e
    if known is None or not (source == 'local-dir' or known.has_weights):
        raise PreflightError(f'kd_model_name: timm has no weights for {name}, name a folder that has: local-dir:DIR.')
    if known.num_classes != num_classes:  # timm would replace the teacher's classifier by a random one
        raise PreflightError(f'kd_model_name: {name} has {known.num_classes} classes, the student {num_classes}.')
    return f'{name}: {num_classes} classes, ' + ('loads' if source == 'local-dir' else 'weights NOT CHECKED')


def _reason(error: Exception) -> str:
    return f'{type(error).__name__}: {next(iter(str(error).strip().splitlines()), "")}'


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
    model = build_model(args)
    num_classes = model.num_classes
    lines = [f'config  {config}: all keys and values are options of train.py']
    options_now, options_before = train_options(), train_options(VERSIONS[0])
    newer = [key for key in options_now if key not in options_before]
    newer = [key for key in newer if getattr(args, key) != options_now[key].get('default')]
    if newer:
        lines.append(f'        {", ".join(newer)}: only in a train.py newer than timm {VERSIONS[0]}')
    parameters = sum(p.numel() for p in model.parameters())
    lines.append(f'model   {args.model}: {parameters:,} parameters, {num_classes} classes, {_check_size(args, model)}')
    lines.append(f'data    {_check_data(args, num_classes)}')
    for key in ('initial_checkpoint', 'resume'):
        if getattr(args, key):
            lines.append(f'weights {_check_checkpoint(key, getattr(args, key), model, args.model)}')
    if args.kd_model_name:
        lines.append(f'teacher {_check_teacher(args, num_classes)}')
    return lines


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command line, see the module. Returns the exit code, 0 or 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] in (['-h'], ['--help']):
            print((__doc__ or '').strip())
            return 0
        if not argv or argv[0].startswith('-'):
            raise PreflightError('usage: python -m timm_sharesnet.preflight CONFIG [options of train.py]')
        print('\n'.join(preflight(argv[0], argv[1:])))
    except PreflightError as e:
        print('preflight:', ' '.join(str(e).split()), file=sys.stderr)
        return 2
    except OSError as e:
        print(f'preflight: {e.filename}: {e.strerror}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    logging.disable()  # timm's and torch's own remarks are train.py's to make
    warnings.simplefilter('ignore')
    sys.exit(main())

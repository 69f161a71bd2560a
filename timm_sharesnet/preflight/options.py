"""The options of train.py, in a config file and on its command line."""

import argparse
import os
import stat
from typing import Any, Dict, List, Sequence

import yaml
from timm.utils import ParseKwargs

from ..cli import CommandError, Parser, concerning, did_you_mean, reason
from ..model_args import TRAIN_OPTIONS
from .values import check_values, shown

USAGE = 'python -m timm_sharesnet.preflight CONFIG [options of train.py]'
VERSIONS: List[str] = list(TRAIN_OPTIONS['versions'])  # timm versions whose train.py the table knows, the newest last
_TYPES: Dict[str, Any] = {'int': int, 'float': float, 'str': str, 'bool': bool, 'dict': dict}
_MEANT = {'int': 'an integer', 'float': 'a number', 'str': 'text', 'bool': 'true or false', 'dict': 'a mapping'}
_CONFIG_BYTES = 100_000  # the args.yaml that train.py writes has 5,000
_CONFIG_DEPTH = 32


def train_options(version: str = VERSIONS[-1]) -> Dict[str, Dict[str, Any]]:
    """The options of train.py by key, for one of `VERSIONS`: `flags`, `type`, `nargs`, `choices`, `default`."""
    return {row['name']: row for row in TRAIN_OPTIONS['options'] if version in row.get('versions', VERSIONS)}


def train_parser() -> argparse.ArgumentParser:
    """The argument parser of the newest train.py in the table. Its errors are `CommandError`s."""
    parser = Parser(prog='preflight', usage=USAGE, allow_abbrev=True)
    group = parser.add_mutually_exclusive_group()
    for name, option in train_options().items():
        kwargs: Dict[str, Any] = {k: option[k] for k in ('nargs', 'const', 'default', 'choices') if k in option}
        if option['type'] == 'bool':
            kwargs = {'action': 'store_true'}
        elif option['type'] == 'dict':
            kwargs.update(action=ParseKwargs, nargs='*', metavar='KEY=VALUE')
        else:
            kwargs.update(type=_TYPES[option['type']])
        if option['flags']:
            kwargs.update(dest=name)
        (group if 'exclusive' in option else parser).add_argument(*(option['flags'] or [name]), **kwargs)
    return parser


def check_config(config: Any, version: str = VERSIONS[-1]) -> None:
    """Check what a YAML file holds, keys and values, against the options of train.py at one of `VERSIONS`.

    Raises:
        CommandError: If a key is not an option, or its value is not what the option takes.
    """
    if not isinstance(config, dict):
        raise CommandError('not a mapping of train.py options to values.')
    options = train_options(version)
    for key, value in config.items():
        if key not in options:
            key = key if isinstance(key, str) else shown(key)
            raise CommandError(f'{key}: not an option of train.py (timm {version}){_near(key, options)}')
        if fault := _fault(options[key], value):
            raise CommandError(f'{key}: {fault}')


def _near(name: str, options: Dict[str, Dict[str, Any]]) -> str:
    """What to say of a name that is no key or flag: those that are near, in its own form."""
    known = {}
    for key, option in options.items():
        for flag in key, *option['flags']:
            known[_plain(flag)] = option['flags'][-1] if name.startswith('-') and option['flags'] else key
    return did_you_mean(_plain(name), known, '.')


def _plain(flag: str) -> str:
    return flag.lstrip('-').replace('-', '_')


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
    if not (_is(kind, value) or type(value) is str and _converts(kind, value)):
        return f'must be {_MEANT[kind]}, not {shown(value)}.'
    if choices and value not in choices:
        return f'must be one of {", ".join(choices)}, not {shown(value)}.'
    if kind == 'dict':
        for k, v in value.items():
            if isinstance(v, str) and _converts('float', v):
                return f'{k} is the text {shown(v)} to YAML, which needs a point in 1.0e-6.'
    return ''


def _is(kind: str, value: Any) -> bool:
    return type(value) is _TYPES[kind] or kind == 'float' and type(value) is int


def _converts(kind: str, text: str) -> bool:
    """Whether argparse will convert a text, which it does for defaults outside of lists (5e-3 is text to YAML)."""
    try:
        _TYPES[kind](text)
    except ValueError:
        return False
    return kind in ('int', 'float')


def parse_train_args(path: str, options: Sequence[str]) -> argparse.Namespace:
    """The arguments that train.py would see for a YAML file and the rest of its command line.

    Raises:
        CommandError: If the file is no config, or a key, a value or an option is not train.py's.
    """
    with concerning(path, CommandError):
        config = _read_config(path)
        check_config(config)
    parser = train_parser()
    parser.set_defaults(**config)
    args, unknown = parser.parse_known_args(options)
    if unknown:
        raise CommandError(f'{unknown[0]}: not an option of train.py{_near(unknown[0], train_options())}')
    check_values(args)
    return args


class _ConfigLoader(yaml.SafeLoader):
    """YAML without what may be endless (aliases, deep nesting), and with each key once: YAML takes the last."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise CommandError(f'line {line}: write the value in place of the alias.')
        self._depth += 1
        if self._depth > _CONFIG_DEPTH:
            raise CommandError(f'nested more than {_CONFIG_DEPTH} deep.')
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        lines: Dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    raise CommandError(f'{key.value}: given twice, in lines {lines[key.value]} and {line}.')
                lines[key.value] = line
        return super().construct_mapping(node, deep)


def _read_config(path: str) -> Any:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise CommandError('not a file.')
    with open(path, 'rb') as f:
        text = f.read(_CONFIG_BYTES + 1)
    if len(text) > _CONFIG_BYTES:
        raise CommandError(f'not a config of train.py, it has more than {_CONFIG_BYTES:,} bytes.')
    try:
        return yaml.load(text, _ConfigLoader)
    except (yaml.YAMLError, ValueError) as e:  # ValueError: a date that there is not
        raise CommandError(f'not YAML: {reason(e)}') from e

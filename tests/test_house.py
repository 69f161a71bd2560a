"""The house stands: imports go down its floors and never round, and what begins with an underscore stays in its file.

Imports inside functions and for type checkers count. Only `timm_sharesnet/__init__.py` is not read: its names are lazy.
"""

import ast
import re
from collections import deque
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = 'timm_sharesnet'
FLOORS = [
    ['_autoload', 'cli', 'conv_bn', 'share_rate', 'tracing'],
    ['images', 'loading', 'model_args', 'net', 'stage', 'weights'],
    ['resnet', 'resnetv2'],
    ['folding', 'sharing', 'torch7'],
    ['export', 'preflight', 'sharesnet'],
]
FLOOR = {f'{PACKAGE}.{room}': floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ROOF = len(FLOORS)  # the package's public names
HUB = ROOF + 1


def room_of(module: str) -> str:
    """A wing is one room, whatever its files."""
    return '.'.join(module.split('.')[:2]) if module.startswith(PACKAGE) else module


def floor_of(module: str) -> Optional[int]:
    if module == PACKAGE:
        return ROOF
    return FLOOR.get(room_of(module)) if module.startswith(f'{PACKAGE}.') else HUB


class Arrow(NamedTuple):
    """What a line of one file uses of another."""

    source: str
    target: str
    name: str  # what is imported from the target, or an attribute of it: '' for the file as a whole
    where: str

    @property
    def is_private(self) -> bool:
        return self.name.startswith('_') and not self.name.startswith('__')


def modules_of(root: Path) -> Dict[str, Path]:
    """Name, as an import has it, and file of each module. Those of the hub are imported from their own folder."""
    modules = {}
    for path in sorted([*root.glob(f'{PACKAGE}/**/*.py'), *root.glob('hub/**/*.py')]):
        parts = list(path.relative_to(root).with_suffix('').parts)
        parts = parts[1:] if parts[0] == 'hub' else parts
        modules['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return modules


def dotted(node: ast.expr) -> str:
    """The text of `a.b.c`, '' of what is no such name."""
    if isinstance(node, ast.Name):
        return node.id
    before = dotted(node.value) if isinstance(node, ast.Attribute) else ''
    return before and f'{before}.{node.attr}'


def arrows_of(module: str, modules: Dict[str, Path], root: Path) -> Iterator[Arrow]:
    path = modules[module]
    package = module if path.name == '__init__.py' else module.rpartition('.')[0]
    bound: Dict[str, str] = {}  # name in this file -> module
    nodes = list(ast.walk(ast.parse(path.read_text())))

    def arrow(target: str, name: str, node: ast.AST) -> Arrow:
        return Arrow(module, target, name, f'{path.relative_to(root)}:{node.lineno}')

    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound[alias.asname or alias.name.split('.')[0]] = (
                    alias.name if alias.asname else alias.name.split('.')[0]
                )
                if alias.name in modules:
                    yield arrow(alias.name, '', node)
        elif isinstance(node, ast.ImportFrom):
            ancestors = package.split('.')[: len(package.split('.')) - node.level + 1] if node.level else []
            base = '.'.join([*ancestors, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f'{base}.{alias.name}' if base else alias.name
                if whole in modules:
                    bound[alias.asname or alias.name] = whole
                    yield arrow(whole, '', node)
                elif base in modules:
                    yield arrow(base, alias.name, node)
    for node in nodes:
        if isinstance(node, ast.Attribute):
            first, _, rest = dotted(node.value).partition('.')
            used = '.'.join(filter(None, [bound.get(first), rest]))
            if first in bound and used in modules and used != module and f'{used}.{node.attr}' not in modules:
                yield arrow(used, node.attr, node)


def circles(arrows: List[Arrow]) -> Iterator[List[Arrow]]:
    """The shortest way round from each module or room, each circle once."""
    out: Dict[str, Dict[str, Arrow]] = {}
    for arrow in arrows:
        if arrow.source != arrow.target:
            out.setdefault(arrow.source, {}).setdefault(arrow.target, arrow)
    found = set()
    for start in out:
        ways = deque([[arrow] for arrow in out[start].values()])
        been = set()
        while ways:
            way = ways.popleft()
            if way[-1].target == start:
                if frozenset(arrow.source for arrow in way) not in found:
                    yield way
                found.add(frozenset(arrow.source for arrow in way))
                break
            if way[-1].target not in been:
                been.add(way[-1].target)
                ways.extend([*way, arrow] for arrow in out.get(way[-1].target, {}).values())


def faults(root: Path, kind: str) -> List[str]:
    modules = modules_of(root)
    arrows = [a for m in modules if m != PACKAGE for a in arrows_of(m, modules, root)]
    if kind == 'room without a floor':
        return [
            f'{path.relative_to(root)}: no floor is said for it' for m, path in modules.items() if floor_of(m) is None
        ]
    if kind == 'private name':
        return [f'{a.where}: {a.name} belongs to {a.target} alone' for a in arrows if a.is_private]
    if kind == 'arrow up':
        levels = [(a, floor_of(a.source), floor_of(a.target)) for a in arrows]
        return [
            f'{a.where}: {a.source} on floor {low} knows {a.target} on floor {high}'
            for a, low, high in levels
            if low is not None and high is not None and low < high
        ]
    rooms = [a._replace(source=room_of(a.source), target=room_of(a.target)) for a in arrows]
    ways = [*circles(arrows), *(way for way in circles(rooms) if len({a.where.split(':')[0] for a in way}) > 1)]
    return sorted({', '.join(f'{a.where}: {a.source} knows {a.target}' for a in way) for way in ways})


KINDS = ['circle', 'arrow up', 'private name', 'room without a floor']


@pytest.mark.parametrize('kind', KINDS)
def test_house_has_no(kind: str) -> None:
    assert not faults(ROOT, kind), '\n'.join(faults(ROOT, kind))


# A small house; `P` is the package
SOUND = {
    'P/__init__.py': 'from . import _autoload\nfrom .sharesnet import sharesnet',
    'P/_autoload.py': 'import os\nos._exit',
    'P/stage.py': '_private = 1\n_private',
    'P/weights.py': 'from .stage import __doc__\nfrom . import stage\nstage.SharedStage',
    'P/resnet.py': '',
    'P/folding.py': '',
    'P/export.py': '',
    'P/sharing/__init__.py': 'from .convert import share',
    'P/sharing/__main__.py': 'from . import __doc__\nfrom .convert import share',
    'P/sharing/convert.py': 'from ..folding import fold\nfrom .refit import calibrate',
    'P/sharing/refit.py': 'import torch',
    'P/sharesnet.py': 'from .sharing import share',
    'hub/folder.py': 'import P\nP.__version__',
    'hub/build.py': 'import folder\nfrom P import fold, sharesnet\nfrom P.stage import SharedStage',
}
AWRY = {
    'circle': [
        ('P/stage.py', 'from .weights import a', 'P/stage.py:1: P.stage knows P.weights, P/weights.py:1: P.weights'),
        ('P/stage.py', 'def f():\n    from . import weights', 'P/stage.py:2: P.stage knows P.weights'),
        ('P/sharing/refit.py', 'from .convert import share', 'P.sharing.refit knows P.sharing.convert'),
        ('P/sharing/refit.py', 'from . import share', 'P.sharing.refit knows P.sharing'),
        ('P/folding.py', 'from .sharing.refit import a', 'P.folding knows P.sharing, '),  # by way of two files
    ],
    'arrow up': [
        ('P/stage.py', 'import P.sharesnet', 'P/stage.py:1: P.stage on floor 1 knows P.sharesnet on floor 4'),
        (
            'P/stage.py',
            'if TYPE_CHECKING:\n    from . import resnet',
            'P/stage.py:2: P.stage on floor 1 knows P.resnet',
        ),
        ('P/sharing/__main__.py', 'from ..export import a', 'P.sharing.__main__ on floor 3 knows P.export on floor 4'),
        ('P/resnet.py', 'from . import fold', 'P/resnet.py:1: P.resnet on floor 2 knows P on floor 5'),
        ('P/resnet.py', 'import folder', 'P/resnet.py:1: P.resnet on floor 2 knows folder on floor 6'),
    ],
    'private name': [
        ('P/resnet.py', 'from .stage import A, _b', 'P/resnet.py:1: _b belongs to P.stage alone'),
        ('P/resnet.py', 'from . import stage as s\ns._b()', 'P/resnet.py:2: _b belongs to P.stage alone'),
        ('P/resnet.py', 'import P.stage\nP.stage._b', 'P/resnet.py:2: _b belongs to P.stage alone'),
        ('hub/check.py', 'import build\nbuild._b', 'hub/check.py:2: _b belongs to build alone'),
    ],
    'room without a floor': [('P/cellar.py', '', 'P/cellar.py: no floor is said for it')],
}


def build(root: Path, files: Dict[str, str]) -> None:
    for name, code in files.items():
        path = root / re.sub(r'\bP\b', PACKAGE, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(re.sub(r'\bP\b', PACKAGE, code))


@pytest.mark.parametrize('kind', KINDS)
def test_sound_house_has_no_fault(kind: str, tmp_path: Path) -> None:
    build(tmp_path, SOUND)
    assert not faults(tmp_path, kind)


@pytest.mark.parametrize('kind,file,code,said', [(kind, *case) for kind, cases in AWRY.items() for case in cases])
def test_fault_is_found_and_named(kind: str, file: str, code: str, said: str, tmp_path: Path) -> None:
    build(tmp_path, {**SOUND, file: code})
    (fault,) = faults(tmp_path, kind)
    assert said in fault.replace(PACKAGE, 'P')

"""Write timm_sharesnet/train_options.json, the options of timm's train.py, from a clone of timm's repository.

    python tests/train_options.py ../pytorch-image-models v1.0.28 aa4b5850

takes commits (tags or hashes) in order of age, the newest last. Nothing of the clone is imported: only those statements
of its train.py that build the argument parser are run, and argparse then says what it built. What argparse has by
default is left out. An option that is not the same at all commits names those where it is (`versions`).
"""

import argparse
import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from timm.utils import ParseKwargs

TABLE = Path(__file__).parents[1] / 'timm_sharesnet' / 'train_options.json'
BUILDERS = {'ArgumentParser', 'add_argument', 'add_argument_group', 'add_mutually_exclusive_group'}


def options(source):
    """The options of the last parser that the text of a train.py builds: a list of dicts."""
    statements = [s for s in ast.parse(source).body if _called(s) in BUILDERS]
    scope = {'argparse': argparse, 'utils': SimpleNamespace(ParseKwargs=ParseKwargs)}
    exec(compile(ast.Module(statements, type_ignores=[]), 'train.py', 'exec'), scope)
    parser = scope['parser']
    exclusive = {action for group in parser._mutually_exclusive_groups for action in group._group_actions}
    return [_row(a, a in exclusive) for a in parser._actions if not isinstance(a, argparse._HelpAction)]


def _called(statement):
    """Name of the method that a statement `a.b(...)`, `c = a.b(...)` or `a.b(...),` calls."""
    call = getattr(statement, 'value', None)
    if isinstance(call, ast.Tuple):
        call = call.elts[0]
    return getattr(getattr(call, 'func', None), 'attr', None)


def _row(action, exclusive):
    row = {'name': action.dest, 'flags': action.option_strings}
    if isinstance(action, argparse._StoreTrueAction):
        row['type'] = 'bool'
    elif isinstance(action, ParseKwargs):
        row['type'] = 'dict'
    elif type(action) is argparse._StoreAction:
        row['type'] = (action.type or str).__name__
    else:
        raise TypeError(f'{action.dest}: the table has no name for {type(action).__name__}.')
    nargs = None if row['type'] in ('bool', 'dict') else action.nargs
    const = None if row['type'] == 'bool' else action.const
    row.update(nargs=nargs, const=const, default=action.default, choices=action.choices, exclusive=exclusive)
    return {k: v for k, v in row.items() if v is not None and v is not False}


def table(clone, commits):
    """The text of the table, for commits of a clone in order of age."""

    def git(*command):
        return subprocess.run(['git', '-C', clone, *command], check=True, capture_output=True, text=True).stdout.strip()

    versions, tables = {}, {}
    for commit in commits:
        version = re.search(r"'(.+)'", git('show', f'{commit}:timm/version.py'))[1]
        versions[version] = git('rev-parse', f'{commit}^{{commit}}')
        tables[version] = [json.dumps(row) for row in options(git('show', f'{commit}:train.py'))]
    rows = []
    for row in dict.fromkeys(row for found in reversed(tables.values()) for row in found):
        holders = [version for version, found in tables.items() if row in found]
        rows.append(row if len(holders) == len(tables) else json.dumps({**json.loads(row), 'versions': holders}))
    body = ',\n  '.join(rows)
    return f'{{"versions": {json.dumps(versions)},\n "options": [\n  {body}\n ]}}\n'


if __name__ == '__main__':
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    TABLE.write_text(table(sys.argv[1], sys.argv[2:]))
    print(f'wrote {TABLE}')

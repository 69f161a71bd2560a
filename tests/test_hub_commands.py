"""What all commands of hub/ have in common: their help, and that they run anywhere and however Python is started."""

import os
import subprocess
import sys

import pytest
from hub_project import NAME, copy_project

COMMANDS = ('build', 'check', 'publish', 'serve', 'import_torch7')


@pytest.mark.parametrize('command', COMMANDS)
def test_help_says_what_is_written_and_what_exit_codes_mean(scripts, command, run):
    code, out, _ = run(command, '--help')
    assert code == 0 and 'Exit code 0, or 2 and a line' in out.replace('Exit code\n', 'Exit code ')
    assert ('Nothing is written' if command == 'check' else 'written') in out.replace('Written', 'written')


# Without any network, and with what else people set
ENVIRONMENT = os.environ | {'PYTHONIOENCODING': 'ascii', 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'}


def start(cwd, script, *arguments):
    """A script in a process of its own: without asserts, warnings are errors, and standard output is ASCII."""
    command = [sys.executable, '-O', '-W', 'error', str(script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)


def test_publish_runs_under_any_path_and_however_python_is_started(tmp_path):
    project = copy_project(tmp_path / 'été à la mer')
    (tmp_path / 'là').mkdir()
    result = start(tmp_path / 'là', project / 'hub' / 'publish.py')
    assert (result.returncode, result.stderr) == (0, '')
    assert result.stdout.startswith(f'../\\xe9t\\xe9 \\xe0 la mer/hub/{NAME} -> ')


@pytest.mark.slow
def test_build_and_check_run_under_any_path_and_however_python_is_started(tmp_path):
    project = copy_project(tmp_path / 'été à la mer')
    path = project / 'hub' / NAME
    for script, arguments in {'build': [path, '--model', NAME], 'check': []}.items():
        result = start(tmp_path, project / 'hub' / f'{script}.py', *arguments)
        assert (result.returncode, result.stderr) == (0, '')

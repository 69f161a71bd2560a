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
# A script where the extra [test] is not installed but [onnx] is
PLAIN = """
import runpy, sys
sys.modules.update(dict.fromkeys(('matplotlib', 'mypy', 'pytest', 'torchfile'), None))
sys.argv, sys.path[0] = sys.argv[1:], sys.argv[1].rpartition('/')[0]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def start(cwd, *arguments):
    """A script in a process of its own: warnings are errors, and standard output is ASCII."""
    command = [sys.executable, '-W', 'error', *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.fixture
def elsewhere(tmp_path):
    """A copy of the project under a path of letters that are not ASCII."""
    return copy_project(tmp_path / 'été à la mer')


@pytest.mark.slow
def test_folders_of_the_project_pass_on_a_plain_install_under_any_path(tmp_path, elsewhere):
    """With everything that is verified: here 1,000 images are classified."""
    result = start(tmp_path, '-c', PLAIN, elsewhere / 'hub' / 'check.py')
    assert (result.returncode, result.stderr) == (0, '')
    assert f'{NAME}: ok\n' in result.stdout


@pytest.mark.slow
def test_commands_run_under_any_path_and_without_asserts(tmp_path, elsewhere):
    path = elsewhere / 'hub' / NAME
    (tmp_path / 'là').mkdir()
    for script, arguments in {'build': [path, '--model', NAME], 'check': [], 'publish': []}.items():
        result = start(tmp_path / 'là', '-O', elsewhere / 'hub' / f'{script}.py', *arguments)
        assert (result.returncode, result.stderr) == (0, '')
    assert result.stdout.startswith(f'../\\xe9t\\xe9 \\xe0 la mer/hub/{NAME} -> ')

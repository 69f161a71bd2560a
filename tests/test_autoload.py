"""The models are there after `import timm` alone. Each case runs in an interpreter of its own.

A fork finds torch imported, and the hook as the end of `import torch` leaves it. A real interpreter imports torch
within timm or our package, or not at all.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import timm

SWITCHES = ('TIMM_SHARESNET_AUTOLOAD', 'TORCH_DEVICE_BACKEND_AUTOLOAD')
CREATE = "print(type(timm.create_model('sharesnet50', device='meta')).__name__)"


def run(code, *options, real=False, **env):
    """Run `code` in an interpreter of its own, return its standard output and standard error."""
    env = {k: v for k, v in os.environ.items() if k not in SWITCHES} | env
    if real:
        result = subprocess.run([sys.executable, *options, '-c', code], env=env, capture_output=True, text=True)
    else:
        result = forks.run(['-c', code], env)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip(), result.stderr


@pytest.mark.parametrize(
    'imports,real',
    [
        ('import timm', True),
        ('import timm', False),
        ('import timm_sharesnet, timm', True),
        ('import timm_sharesnet, timm', False),
        ('import timm, timm_sharesnet', False),
        ('from timm_sharesnet import SharedStage; import timm', False),
        ('from timm_sharesnet import CifarResNetV2, ShaResNet; import timm', False),
        ('import timm_sharesnet.weights, timm_sharesnet.preflight, timm', False),
    ],
)
def test_models_are_registered_after(imports, real):
    assert run(f'{imports}; {CREATE}', real=real)[0] == 'ShaResNet'


@pytest.mark.parametrize('switch', SWITCHES)
def test_switch_turns_the_hook_off_and_explicit_import_registers(switch):
    code = f"import timm; assert not timm.is_model('sharesnet50'); import timm_sharesnet; {CREATE}"
    assert run(code, **{switch: '0'})[0] == 'ShaResNet'


def test_explicit_import_before_timm_registers_with_the_hook_off():
    assert run(f'import timm_sharesnet, timm; {CREATE}', real=True, TIMM_SHARESNET_AUTOLOAD='0')[0] == 'ShaResNet'


def test_import_torch_loads_neither_timm_nor_the_models():
    code = "import sys, torch; print(sorted(m for m in sys.modules if m.split('.')[0] in ('timm', 'timm_sharesnet')))"
    assert run(code, real=True)[0] == '[]'


def test_hook_imports_the_standard_library_only():
    code = """
import sys
before = set(sys.modules)
import timm_sharesnet
timm_sharesnet._autoload.autoload()
print(sorted(m for m in set(sys.modules) - before if m.split('.')[0] not in sys.stdlib_module_names))
"""
    assert run(code, real=True)[0] == "['timm_sharesnet', 'timm_sharesnet._autoload']"


@pytest.mark.parametrize(
    'imports,options,real',
    [
        ('import timm', (), False),
        pytest.param('import timm', ('-W', 'error'), True, marks=pytest.mark.slow),
        pytest.param('import timm, timm_sharesnet', (), True, marks=pytest.mark.slow),
        ('import timm, timm_sharesnet', ('-W', 'error'), True),
        ('import torch, timm_sharesnet, timm', (), False),
        pytest.param('import torch, timm_sharesnet, timm', ('-W', 'error'), True, marks=pytest.mark.slow),
    ],
)
def test_broken_plugin_leaves_timm_working_and_warns(imports, options, real):
    code = f"import sys; sys.modules['timm_sharesnet.resnet'] = None; {imports}; print(timm.is_model('resnet50'))"
    out, err = run(code, *options, real=real)
    assert out == 'True'
    assert err.count('RuntimeWarning: timm-sharesnet could not register its models') == 1 + ('timm, ' in imports)
    assert 'timm_sharesnet.resnet' in err  # why


@pytest.mark.parametrize(
    'code',
    [
        # a stand-in for timm, as builds of documentation have it
        "import types; sys.modules['timm'] = sys.modules['timm.models'] = types.SimpleNamespace(); import torch",
        # a finder that Python itself skips
        "sys.meta_path.insert(0, type('Old', (), {'find_module': lambda *_: None})()); import timm",
        # a folder of that name that is not timm's
        'import torch; sys.path.insert(0, sys.argv[1]); import timm.models; assert timm.models.__file__ is None',
    ],
    ids=['replaced timm', 'old finder', 'namespace package'],
)
def test_imports_that_work_without_the_hook_work_with_it(code, tmp_path):
    (tmp_path / 'timm' / 'models').mkdir(parents=True)
    (tmp_path / 'timm' / '__init__.py').touch()
    assert run(f"import sys; sys.argv = ['', {str(tmp_path)!r}]; {code}; print('ok')")[0] == 'ok'


def test_models_are_registered_in_spawned_processes():
    # A child of `spawn` imports what it needs to unpickle the function: here timm's, not ours.
    code = """
import multiprocessing, timm
if __name__ == '__main__':
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        print(pool.apply(timm.list_models, ('sharesnet50',)))
"""
    assert run(code, real=True)[0] == "['sharesnet50']"


def test_hook_leaves_the_module_as_it_was():
    code = """
import inspect, timm.models
print(type(timm.models.__loader__).__name__, 'create_model' in inspect.getsource(timm.models))
"""
    assert run(code)[0] == 'SourceFileLoader True'


SINGLETON = """
class Singleton:
    loaders = {}
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'timm':
            spec = PathFinder.find_spec(name, path, target)
            self.loaders[name], spec.loader = spec.loader, self
            return spec
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        self.loaders[module.__name__].exec_module(module)
sys.meta_path.insert(0, Singleton())
"""
LAZY = """
class Lazy:
    def find_spec(self, name, path=None, target=None):
        if name == 'timm.models':
            spec = PathFinder.find_spec(name, path, target)
            spec.loader = LazyLoader(spec.loader)
            return spec
sys.meta_path.insert(0, Lazy())
"""


@pytest.mark.parametrize(
    'loader',
    ['sys.path.insert(0, sys.argv[1])', SINGLETON, LAZY],
    ids=['zip file', 'finder that loads all of timm itself', 'lazy loader'],
)
def test_loader_of_timm_is_used_and_left_as_it_was(loader, tmp_path):
    if loader.startswith('sys.path'):
        shutil.make_archive(tmp_path / 'timm', 'zip', Path(timm.__file__).parents[1], 'timm')
    code = f"""
import sys
from importlib.machinery import PathFinder
from importlib.util import LazyLoader
sys.argv = ['', {str(tmp_path / 'timm.zip')!r}]
{loader}
import timm.models
loader = timm.models.__loader__
assert loader is timm.models.__spec__.loader and 'timm_sharesnet' not in type(loader).__module__
assert 'exec_module' not in vars(loader)
{CREATE}
"""
    out, err = run(code)
    assert out == 'ShaResNet' and 'Warning' not in err


def test_finder_that_asks_ours_gets_what_the_loader_of_timm_offers():
    code = """
import os, sys, torch
from importlib.machinery import PathFinder
folders = PathFinder.find_spec('timm').submodule_search_locations
finder = next(f for f in sys.meta_path if type(f).__module__ == 'timm_sharesnet._autoload')
print('def ' in finder.find_spec('timm.models', folders).loader.get_source('timm.models'), 'timm' in sys.modules)
"""
    assert run(code)[0] == 'False False'


FORGET = 'for name in [name for name in sys.modules if name.split(".")[0] == {!r}]: del sys.modules[name]\n'
OTHER_PLUGIN = """
class Other:
    def find_spec(self, name, path=None, target=None):
        if name == 'timm.models':
            return next(filter(None, (f.find_spec(name, path, target) for f in sys.meta_path if f is not self)))
"""
INSTRUMENTATION = """
class Instrumentation:  # of jaxtyping and typeguard
    def find_spec(self, name, path=None, target=None):
        from importlib.machinery import PathFinder
        return PathFinder.find_spec(name, path, target) if name.split('.')[0] in {} else None
"""


@pytest.mark.parametrize(
    'code',
    [
        'import timm_sharesnet\n' + FORGET.format('timm_sharesnet') + 'import timm_sharesnet',
        'import importlib, timm_sharesnet\n'
        'importlib.reload(timm_sharesnet._autoload); importlib.reload(timm_sharesnet)',
        'import timm\n' + FORGET.format('timm'),
        'import timm, timm_sharesnet.folding\n' + FORGET.format('timm') + 'import timm\n' + FORGET.format('timm'),
        f'{OTHER_PLUGIN}\nsys.meta_path.insert(0, Other())',
        f'{OTHER_PLUGIN}\nsys.meta_path.append(Other())',
        f'{INSTRUMENTATION.format(["timm"])}\nsys.meta_path.insert(0, Instrumentation())',
        f'{INSTRUMENTATION.format(["timm", "apex", "torchvision"])}\nsys.meta_path.insert(0, Instrumentation())\n'
        'import timm, timm_sharesnet',
    ],
    ids=[
        'the package was imported twice',
        'the package was reloaded',
        'timm was dropped',
        'timm was dropped twice',
        'another plugin is in front',
        'another plugin is behind',
        'another finder takes timm',
        'another finder takes everything',
    ],
)
def test_models_are_registered_once_where(code):
    check = "print(timm.list_models('sharesnet50'), isinstance(model, timm_sharesnet.ShaResNet))"
    create = "import timm, timm_sharesnet; model = timm.create_model('sharesnet50', device='meta')"
    out, err = run(f'import sys, torch\n{code}\n{create}; {check}')
    assert out == "['sharesnet50'] True"
    assert 'Overwriting' not in err and 'Warning' not in err


def test_explicit_import_registers_with_the_timm_that_is_there_with_the_hook_off():
    code = f'import sys, timm, timm_sharesnet\n{FORGET.format("timm")}import timm; {CREATE}'
    assert run(code, TIMM_SHARESNET_AUTOLOAD='0')[0] == 'ShaResNet'


def test_public_names_are_lazy_and_complete():
    code = """
import sys, timm_sharesnet
assert 'timm' not in sys.modules
for name in timm_sharesnet.__all__:
    assert name in dir(timm_sharesnet) and callable(getattr(timm_sharesnet, name)), name
try:
    timm_sharesnet.nothing
except AttributeError as e:
    print(e)
"""
    assert run(code)[0] == "module 'timm_sharesnet' has no attribute 'nothing'"

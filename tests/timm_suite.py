"""Run timm's own, unmodified tests/test_models.py on our models, and make sure that it leaves no kind of test out.

    python tests/timm_suite.py                       all models
    python tests/timm_suite.py sharesnet50 wrn28_10  some

The file is in timm's sdist only, which pip downloads (the version that is installed; `.pytest_cache` keeps the file).
timm selects models for some of its tests by the name of the defining module, so a model can be left out silently: each
of ours must pass every kind of test that timm's own net of that kind gets, with none skipped.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from pathlib import Path
from unittest import mock

os.environ['HF_HUB_OFFLINE'] = '1'  # read at import

import pytest  # noqa: E402
import timm  # noqa: E402

CACHE = Path(__file__).parents[1] / '.pytest_cache'
# For the nets of each module, one of timm's that has no test of its own
REFERENCES = {'timm_sharesnet.resnet': 'resnet101', 'timm_sharesnet.resnetv2': 'resnetv2_101'}
PRETRAINED_KINDS = {'test_model_load_pretrained', 'test_model_features_pretrained'}


class Selection:
    """Pytest plugin: keeps the tests of some models and notes what became of them."""

    def __init__(self, references):
        self.references = references  # model -> timm's net of that kind
        self.expected = {}  # model -> kinds of test
        self.passed = defaultdict(set)

    @staticmethod
    def _model(item):
        return str(item.callspec.params.get('model_name', '')).split('.')[0] if hasattr(item, 'callspec') else ''

    def pytest_collection_modifyitems(self, config, items):
        kinds = defaultdict(set)
        for item in items:
            kinds[self._model(item)].add(item.originalname)
        for model, reference in self.references.items():
            pretrained = timm.list_pretrained(model)
            self.expected[model] = kinds[reference] - (set() if pretrained else PRETRAINED_KINDS)
        selected = [item for item in items if self._model(item) in self.references]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(selected)])
        items[:] = selected

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.when == 'call' and report.passed:
            self.passed[self._model(item)].add(item.originalname)
        return report

    def missing(self):
        return {m: sorted(kinds - self.passed[m]) for m, kinds in self.expected.items() if kinds - self.passed[m]}


def test_file():
    """timm's file, of the version that is installed."""
    path = CACHE / f'timm-{timm.__version__}' / 'test_models.py'
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        (CACHE / '.gitignore').write_text('*\n')  # pytest writes its own only where it makes the folder itself
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            command = ['pip', 'download', '-q', '--no-binary=:all:', '--no-deps', '-d', folder]
            subprocess.run([sys.executable, '-m', *command, f'timm=={timm.__version__}'], check=True)
            with tarfile.open(next(Path(folder).glob('timm-*.tar.gz'))) as sdist:
                member = next(m for m in sdist.getmembers() if m.name.endswith('/tests/test_models.py'))
                Path(folder, path.name).write_bytes(sdist.extractfile(member).read())
            os.replace(Path(folder, path.name), path)  # whole, whoever else does the same
    return path


def main(names):
    modules = {name: timm.model_entrypoint(name).__module__ for name in timm.list_models()}
    ours = {name: REFERENCES[module] for name, module in modules.items() if module in REFERENCES}
    unknown = set(names) - set(ours)
    if unknown:
        return f'unknown: {", ".join(sorted(unknown))}. Choose from {", ".join(ours)}.'
    selection = Selection({name: ours[name] for name in names or ours})
    wanted, list_models = {*selection.references, *selection.references.values()}, timm.list_models

    def list_wanted(*args, **kwargs):
        """Those of all models from which timm's file makes its tests that we select from, which saves half a minute."""
        return [name for name in list_models(*args, **kwargs) if name.split('.')[0] in wanted]

    path = test_file()
    options = [
        '-q',
        '-p',
        'no:cacheprovider',
        '-p',
        'no:xdist',
        '-W',
        'ignore',
        '-o',
        'addopts=',
        '--rootdir',
        str(path.parent),
    ]
    with mock.patch.object(timm, 'list_models', list_wanted):
        code = pytest.main([*options, '--rootdir', str(path.parent), str(path)], plugins=[selection])
    missing = selection.missing()
    if missing or not all(selection.expected.values()):
        return f'kinds of test that did not pass: {missing or selection.expected}'
    print(f'timm {timm.__version__}: {len(selection.expected)} models pass every kind of test, none skipped')
    return code


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

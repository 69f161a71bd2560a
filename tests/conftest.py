"""One thread for each process: the nets here are so small that threads wait for one another, on a busy machine long."""

import os
import shutil
from pathlib import Path
from typing import Any, Iterator

os.environ.setdefault('OMP_NUM_THREADS', '1')  # read when torch is imported, here and in the processes that tests start

import pytest  # noqa: E402
from hub_project import any_onnx, built, no_memory, project, refused, run, run_imported, scripts  # noqa: E402,F401  # for tests of hub/

# What starts servers or processes, or builds a net, for all its tests is done once, by one process
IN_ONE_PROCESS = {
    'test_distributed',
    'test_export',
    'test_hub_build',
    'test_hub_check',
    'test_hub_own',
    'test_hub_publish',
    'test_weights',
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: Any, log: Any) -> Any:
    """Deal out files that are for one process as they are, and all other tests one by one.

    xdist's own groups (`--dist=loadgroup` of 3.8) do nothing with pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition('::')[0]
            return file if Path(file).stem in IN_ONE_PROCESS else nodeid

    return Scheduling(config, log)


@pytest.fixture(scope='session')
def node_modules() -> Path:
    """The folder of the packages in tests/javascript, for scripts beside it that Node.js runs."""
    path = Path(__file__).parent / 'javascript' / 'node_modules'
    if not shutil.which('node') or not path.is_dir():
        pytest.skip('needs Node.js and its packages (make javascript)')
    return path


@pytest.fixture(scope='session')
def browser() -> Iterator[Any]:
    """A headless Chromium, as playwright's Browser."""
    executable = shutil.which('chromium') or shutil.which('google-chrome')
    if not executable:
        pytest.skip('needs a browser (chromium)')
    playwright = pytest.importorskip('playwright.sync_api')
    flags = ['--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream']  # a camera, that may be used
    flags += ['--no-sandbox', '--disable-quic', '--disable-background-networking', '--disable-component-update']
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=executable, args=flags)
        yield browser
        browser.close()

"""One thread for each process: the nets here are so small that threads wait for one another, on a busy machine long."""

import os

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


@pytest.hookimpl(tryfirst=True)  # xdist's reads the marks
def pytest_collection_modifyitems(items: 'list[pytest.Item]') -> None:
    for item in items:
        if item.path.stem in IN_ONE_PROCESS:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))

"""One thread for each process: the nets here are so small that threads wait for one another, on a busy machine long."""

import os

os.environ.setdefault('OMP_NUM_THREADS', '1')  # read when torch is imported, here and in the processes that tests start

from hub_project import any_onnx, no_memory, project, run, run_imported, scripts  # noqa: E402,F401  # for tests of hub/

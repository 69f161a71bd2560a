"""Run timm's train.py in several processes on the CPU and print a hash of each process's weights.

    torchrun --nproc_per_node=2 tests/train_launcher.py train.py --device cpu ...

train.py names its device to DistributedDataParallel, which refuses that for a CPU. The argument is dropped here and
nothing else is changed; on GPUs train.py is started directly.
"""

import functools
import hashlib
import os
import runpy
import sys

from torch.nn.parallel import DistributedDataParallel

wrapped = []
init = DistributedDataParallel.__init__


@functools.wraps(init)
def init_without_devices(self, module, device_ids=None, **kwargs):
    init(self, module, **kwargs)
    wrapped.append(module)
    report('before')


def report(when):
    """One line: when, rank, hash of all parameters."""
    digest = hashlib.sha256()
    for parameter in wrapped[0].parameters():
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    os.write(1, f'weights {when} {os.environ["RANK"]} {digest.hexdigest()}\n'.encode())  # one write: ranks share stdout


if __name__ == '__main__':
    DistributedDataParallel.__init__ = init_without_devices
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name='__main__')
    report('after')

"""Two processes that each have half of the batch give the gradients of one process, averaged over the halves.

Not those of one process with the whole batch: each rank's batch norm normalizes its own half. The two processes (gloo,
on the CPU) are started once and compute all cases that are asked for.
"""

import json
import os
import sys
from functools import lru_cache
from typing import Any, Callable, Dict, List

import forks
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from models import RUNS, SMALL, images, slow_but_for, small
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from timm_sharesnet import SharedStage, SharingBlock

BATCH = 8


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def ddp_checkpointing(model: nn.Module) -> nn.Module:
    model.set_grad_checkpointing()
    return DistributedDataParallel(model)


def ddp_compiled(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(torch.compile(model, backend='aot_eager', fullgraph=True))  # train.py's order


def fsdp_blocks(model: nn.Module) -> nn.Module:
    return _fully_shard(model, SharingBlock)


def fsdp_stages(model: nn.Module) -> nn.Module:
    return _fully_shard(model, SharedStage)


def fsdp_blocks_checkpointing(model: nn.Module) -> nn.Module:
    model.set_grad_checkpointing()
    return _fully_shard(model, SharingBlock)


def _fully_shard(model: nn.Module, unit: type) -> nn.Module:
    mesh = init_device_mesh('cpu', (2,))
    for m in model.modules():
        if isinstance(m, unit):
            fully_shard(m, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS: Dict[str, Callable[[nn.Module], nn.Module]] = {
    f.__name__: f for f in (ddp, ddp_checkpointing, ddp_compiled, fsdp_blocks, fsdp_stages, fsdp_blocks_checkpointing)
}
FSDP_NEEDS_A_GPU = torch.__version__ < '2.7'  # it records events of a stream, which a CPU's has not


def gradients(kind: str, half: int, wrap: Callable[[nn.Module], nn.Module] = lambda model: model) -> Any:
    """Name -> gradient of the loss of one half of the batch, or of what the wrapped model makes of both."""
    model = small(kind).double().train()
    x = images(model, BATCH)[half * BATCH // 2 :][: BATCH // 2]
    wrapped = wrap(model)
    F.cross_entropy(wrapped(x), torch.arange(BATCH // 2)).backward()
    return {k: getattr(p.grad, 'full_tensor', lambda p=p: p.grad)() for k, p in model.named_parameters()}


def worker(rank: int, folder: str, cases: List[List[str]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    for kind, name in cases:
        if not (name.startswith('fsdp') and FSDP_NEEDS_A_GPU):
            torch.save(gradients(kind, rank, WRAPPERS[name]), f'{folder}/{kind}-{name}-{rank}.pt')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp('distributed')
    params = [item.callspec.params for item in request.session.items if item.path == request.path]
    cases = json.dumps([(p['kind'], p['wrapper']) for p in params])
    with (folder / 'log').open('w') as log, open(os.devnull) as nothing:
        ranks = [forks.Program([__file__, str(rank), folder, cases], [nothing, log, log]) for rank in (0, 1)]
        codes = [rank.wait() for rank in ranks]
    assert codes == [0, 0], (folder / 'log').read_text()
    return folder


@lru_cache
def averaged_gradients(kind: str) -> Dict[str, torch.Tensor]:
    first, second = gradients(kind, 0), gradients(kind, 1)
    return {k: (first[k] + second[k]) / 2 for k in first}


@pytest.mark.parametrize('wrapper', WRAPPERS)
@slow_but_for('basic', 'preact-half', of=[*SMALL, *RUNS])
def test_both_ranks_have_the_gradients_of_one_process(kind, wrapper, results):
    if wrapper.startswith('fsdp') and FSDP_NEEDS_A_GPU:
        pytest.skip('FSDP2 of torch 2.6 does not run on a CPU')
    for rank in 0, 1:
        found = torch.load(results / f'{kind}-{wrapper}-{rank}.pt')
        torch.testing.assert_close(found, averaged_gradients(kind), rtol=1e-9, atol=1e-12)


if __name__ == '__main__':
    worker(int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))

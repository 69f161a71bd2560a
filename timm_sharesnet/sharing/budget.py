"""A budget in place of a rate: which blocks share, so that enough is saved at the least harm.

Parameters and harm are not spread alike over a net. Two neighbouring runs are merged after the other, each time those
that cost the least harm for what they save. The harm of a run is what one kernel W in place of its kernels W[k] changes
in the outputs of its blocks. With M[k], the covariance of the inputs of the 3x3 of block k, it is

    sum over k of a[k] tr((W - W[k]) M[k] (W - W[k])^T)

where a[k] is the variance of the block's branch, in parts of that of its stage's output, for each unit of variance that
the 3x3 gives. The best W has a closed form (see `refit`), and so has its harm, from sums over the blocks.
"""

import itertools
import math
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from ..conv_bn import as_float64
from ..share_rate import Rate
from .align import align
from .refit import RIDGE_KERNEL, conv_inputs, evaluation_mode, ridge
from .run import normalize_kernel

_TINY = 1e-30  # variance, to divide by
_OFF = 1e-12  # weight of a block whose branch adds nothing


class Step(NamedTuple):
    """The merge of two neighbouring runs.

    Args:
        stage: Name of the stage.
        blocks: Indices of the blocks that share from then on.
        saved: Parameters that this step saves.
        harm: What it changes in the outputs of blocks, relative to the variance of the stage's output. None if no
            images told.
    """

    stage: str
    blocks: Tuple[int, ...]
    saved: int
    harm: Optional[float] = None


class Budget(NamedTuple):
    """What a budget was spent on, and what more would have bought.

    Args:
        steps: All merges that there can be, in their order.
        taken: How many of them were made.
        parameters: Of the plain net.
    """

    steps: Tuple[Step, ...]
    taken: int
    parameters: int

    def __str__(self) -> str:
        """The frontier: saved against harm."""
        lines = []
        for i in range(len(self.steps)):
            step, before = self.steps[i], self.steps[: i + 1]
            saved = sum(s.saved for s in before) / self.parameters
            harm = '' if step.harm is None else f', harm {step.harm:.4f}, {sum(s.harm or 0 for s in before):.4f} in all'
            made = 'merged' if i < self.taken else 'next  ' if i == self.taken else '      '
            lines.append(f'{made} {saved:6.1%} saved{harm}: {step.stage} blocks {", ".join(map(str, step.blocks))}')
        return '\n'.join(lines)


class _Candidate(NamedTuple):
    """A run, with the sums over its blocks that its harm is computed from: of a M, a W M and a tr(W M W^T)."""

    blocks: Tuple[int, ...]
    kernel: torch.Tensor  # (C_out, C_in / groups, 3, 3), the best for all of them
    moments: torch.Tensor  # (groups, 9 C_in / groups, 9 C_in / groups)
    products: torch.Tensor  # (groups, C_out / groups, 9 C_in / groups)
    energy: float
    harm: float = 0.0


def spend(steps: Sequence[Step], save: float, parameters: int) -> Budget:
    """Take as many steps as save a part of the parameters.

    Raises:
        ValueError: If all of them do not, or the part is no number from 0.
    """
    saved = [0, *itertools.accumulate(step.saved for step in steps)]
    most = saved[-1] / parameters
    if not 0 <= save <= most:
        most = math.floor(1e4 * most) / 1e4  # rounded up, it would be refused
        raise ValueError(f'save must be a part of all parameters, from 0 to the {most} that rate 1 saves, got {save}.')
    taken = next(i for i, n in enumerate(saved) if n >= save * parameters)
    return Budget(tuple(steps), taken, parameters)


def runs_after(steps: Sequence[Step], stages: Iterable[str]) -> List[Rate]:
    """The rate of each stage after some steps: its runs of several blocks, 0 if it has none."""
    runs: Dict[str, List[List[int]]] = {name: [] for name in stages}
    for step in steps:
        apart = [run for run in runs[step.stage] if not set(run) & set(step.blocks)]
        runs[step.stage] = [*apart, list(step.blocks)]
    return [runs[name] or 0.0 for name in runs]


def steps_by_parameters(stages: Dict[str, Any], first: Dict[str, int]) -> List[Step]:
    """The merges of all blocks that can share, the last stages first: there, a kernel has most parameters."""
    steps = []
    for name, stage in reversed(stages.items()):
        for end in range(first[name] + 2, len(stage) + 1):
            blocks = tuple(range(first[name], end))
            steps.append(Step(name, blocks, stage[end - 1].conv2.weight.numel()))
    return steps


@torch.no_grad()
def steps_by_harm(
    model: nn.Module, stages: Dict[str, Any], first: Dict[str, int], batches: Iterable[torch.Tensor]
) -> List[Step]:
    """The merges of all blocks that can share, each time the one of the least harm for what it saves.

    Args:
        model: The plain net, of blocks that can share. Its batch norms and kernels are changed, not what it computes.
        stages: Its stages by name.
        first: Index of the first block of each that can share.
        batches: Images of shape (B, C, H, W).
    """
    runs = _measure(model, stages, first, batches)
    reorder = {name: stages[name][0].layers().last != 'conv2' for name in stages}
    merged = {name: [_merge(a, b, reorder[name]) for a, b in itertools.pairwise(runs[name])] for name in stages}

    def harm(name: str, i: int) -> float:
        return max(0.0, merged[name][i].harm - runs[name][i].harm - runs[name][i + 1].harm)

    steps: List[Step] = []
    while any(merged.values()):
        places = [(name, i) for name in stages for i in range(len(merged[name]))]
        name, i = min(places, key=lambda place: harm(*place) / merged[place[0]][place[1]].kernel.numel())
        run = merged[name][i]
        steps.append(Step(name, run.blocks, run.kernel.numel(), harm(name, i)))
        runs[name][i : i + 2] = [run]
        around = runs[name][max(0, i - 1) : i + 2]
        merged[name][max(0, i - 1) : i + 2] = [_merge(a, b, reorder[name]) for a, b in itertools.pairwise(around)]
    return steps


def _merge(a: _Candidate, b: _Candidate, reorder: bool) -> _Candidate:
    """Two runs as one, with the best kernel for both, the channels of the second brought to the order of the first."""
    moments, products = b.moments, b.products
    if len(b.moments) == 1:
        (a_ins, a_outs), (b_ins, b_outs) = align([a.kernel, b.kernel], reorder)
        ins, outs = b_ins[a_ins.argsort()], b_outs[a_outs.argsort()]
        index = (9 * ins[:, None] + torch.arange(9)).flatten()
        moments, products = moments[:, index][:, :, index], products[:, outs][:, :, index]
    moments, products, energy = a.moments + moments, a.products + products, a.energy + b.energy
    kernel = torch.linalg.solve(moments, products, left=False)
    harm = max(0.0, energy - (kernel * products).sum().item())
    return _Candidate(a.blocks + b.blocks, kernel.flatten().view_as(a.kernel), moments, products, energy, harm)


def _measure(
    model: nn.Module, stages: Dict[str, Any], first: Dict[str, int], batches: Iterable[torch.Tensor]
) -> Dict[str, List[_Candidate]]:
    """Each block that can share as a run of its own."""
    blocks = {(name, i): stage[i] for name, stage in stages.items() for i in range(first[name], len(stage))}
    for block in blocks.values():
        block.conv2.weight.copy_(normalize_kernel(block, as_float64(block.conv2.weight)))
    inputs = {place: _Covariance(block.conv2) for place, block in blocks.items()}
    outputs = {place: _Variance(block.conv2) for place, block in blocks.items()}
    branches = {place: _Variance(getattr(block, block.layers().names[-1])) for place, block in blocks.items()}
    streams = {name: _Variance(stage) for name, stage in stages.items()}
    try:
        with evaluation_mode(model):
            for batch in batches:
                model(batch)
    finally:
        for sums in (*inputs.values(), *outputs.values(), *branches.values(), *streams.values()):
            sums.hook.remove()
    runs: Dict[str, List[_Candidate]] = {name: [] for name in stages}
    for (name, i), block in blocks.items():
        place = name, i
        weight = branches[place].total() / max(_TINY, outputs[place].total() * streams[name].total())
        weight = max(weight, _OFF)  # a branch that adds nothing may take any kernel, but it must be computed
        moments = weight * torch.stack([ridge(m, RIDGE_KERNEL) for m in inputs[place].covariance()])
        kernel = as_float64(block.conv2.weight)
        products = kernel.view(len(moments), -1, moments.shape[1]) @ moments
        energy = (kernel.view_as(products) * products).sum().item()
        runs[name].append(_Candidate((i,), kernel, moments, products, energy))
    return runs


class _Variance:
    """Sums over what a layer gives, of which the variance is computed."""

    def __init__(self, layer: nn.Module) -> None:
        self.count, self.sum, self.squares = 0, torch.zeros(()), torch.zeros(())
        self.hook = layer.register_forward_hook(self.add)

    def add(self, _: nn.Module, __: Any, y: torch.Tensor) -> None:
        self.sum = self.sum + as_float64(y.sum((0, 2, 3), dtype=torch.float32))
        self.squares = self.squares + as_float64(y.square().sum((0, 2, 3), dtype=torch.float32))
        self.count += y.numel() // y.shape[1]

    def total(self) -> float:
        """The variance, summed over the channels."""
        return (self.squares / self.count - (self.sum / self.count) ** 2).sum().item()


class _Covariance:
    """Sums over the inputs of a 3x3, of which the covariance (groups, 9 C_in / groups, the same) is computed."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self.count, self.sum, self.products = 0, torch.zeros(()), torch.zeros(())
        self.hook = conv.register_forward_hook(self.add)

    def add(self, conv: Any, x: Tuple[torch.Tensor], _: torch.Tensor) -> None:
        x_ = conv_inputs(x[0], conv)
        x_ = x_.view(conv.groups, -1, x_.shape[1])
        self.sum, self.products = self.sum + as_float64(x_.sum(2)), self.products + as_float64(x_ @ x_.mT)
        self.count += x_.shape[2]

    def covariance(self) -> torch.Tensor:
        mean = self.sum / self.count
        return self.products / self.count - mean[:, :, None] * mean[:, None]

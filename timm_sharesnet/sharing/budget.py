"""A budget in place of a rate: which blocks share, so that enough is saved at the least harm.

Parameters and harm are not spread alike over a net. Two neighbouring runs are merged after the other, each time those
that cost the least harm for what they save. The harm of a run is what one kernel W in place of its kernels W[k] changes
in the outputs of its blocks. With M[k], the covariance of the inputs of the 3x3 of block k, it is

    sum over k of a[k] tr((W - W[k]) M[k] (W - W[k])^T)

where a[k] is the variance of the block's branch, in parts of that of its stage's output, for each unit of variance that
the 3x3 gives. The best W has a closed form (see `Run.fit`), and so has its harm, from sums over the blocks.
"""

import itertools
import math
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch

from ..conv_bn import as_float64
from ..share_rate import Rate
from .align import align
from .calibration import RIDGE_KERNEL, Measurement, Place, kernel_columns, ridge, solve
from .run import input_rms, output_std

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


def steps_by_parameters(blocks: Dict[Place, Any]) -> List[Step]:
    """The merges of all blocks that can share, the last stages first: there, a kernel has most parameters."""
    steps = []
    for name in reversed(dict.fromkeys(name for name, _ in blocks)):
        indices = [i for stage, i in blocks if stage == name]
        for end in range(2, len(indices) + 1):
            steps.append(Step(name, tuple(indices[:end]), blocks[name, indices[0]].conv2.weight.numel()))
    return steps


def steps_by_harm(blocks: Dict[Place, Any], measured: Measurement) -> List[Step]:
    """The merges of all blocks that can share, each time the one of the least harm for what it saves."""
    seen = {place: _Seen(block, place, measured) for place, block in blocks.items()}
    runs: Dict[str, List[_Candidate]] = {name: [] for name, _ in blocks}
    for (name, i), one in seen.items():
        order = torch.arange(one.kernel.shape[1])
        runs[name].append(_Candidate((i,), (order,), one.kernel, one.products, one.energy))

    def merge(name: str, a: _Candidate, b: _Candidate) -> _Candidate:
        return _merge(a, b, [seen[name, i] for i in a.blocks + b.blocks])

    def harm(name: str, i: int) -> float:
        return max(0.0, merged[name][i].harm - runs[name][i].harm - runs[name][i + 1].harm)

    merged = {name: [merge(name, a, b) for a, b in itertools.pairwise(runs[name])] for name in runs}
    steps: List[Step] = []
    while any(merged.values()):
        places = [(name, i) for name in runs for i in range(len(merged[name]))]
        name, i = min(places, key=lambda place: harm(*place) / merged[place[0]][place[1]].kernel.numel())
        run = merged[name][i]
        steps.append(Step(name, run.blocks, run.kernel.numel(), harm(name, i)))
        runs[name][i : i + 2] = [run]
        around = runs[name][max(0, i - 1) : i + 2]
        merged[name][max(0, i - 1) : i + 2] = [merge(name, a, b) for a, b in itertools.pairwise(around)]
    return steps


class _Seen:
    """A block in units in which its inputs have an RMS of 1, and its outputs a variance of 1.

    Attributes:
        kernel: Its own W, (C_out, C_in / groups, 3, 3).
        products: a W M, (groups, C_out / groups, 9 C_in / groups).
        energy: a tr(W M W^T).
        reorders: Whether the outputs can be reordered. None if no channel can.
    """

    def __init__(self, block: Any, place: Place, measured: Measurement) -> None:
        conv, self.inputs = block.conv2, measured.inputs[place]
        grouped, std = conv.groups > 1, output_std(block, conv)
        rms = None if grouped else input_rms(block, conv)
        self.scale = None if rms is None else 1 / rms
        self.reorders = None if grouped else block.layers().last != 'conv2'
        self.kernel = as_float64(conv.weight) / std[:, None, None, None]
        if rms is not None:
            self.kernel = self.kernel * rms[:, None, None]
        outputs = (measured.outputs[place].of_channels() / std**2).sum().item()
        branch, stage = (v.of_channels().sum().item() for v in (measured.branches[place], measured.stages[place[0]]))
        # a branch that adds nothing may take any kernel, but it must be computed
        self.weight = max(_OFF, branch / max(_TINY, outputs * stage))
        moments = self.moments()
        kernel = self.kernel.reshape(len(moments), -1, moments.shape[1])
        self.products = kernel @ moments
        self.energy = (kernel * self.products).sum().item()

    def moments(self, order: Optional[torch.Tensor] = None) -> torch.Tensor:
        """a M, (groups, 9 C_in / groups, 9 C_in / groups), of the inputs in this order."""
        covariance = self.inputs.second(self.scale, order, centred=True)
        return self.weight * torch.stack([ridge(m, RIDGE_KERNEL) for m in covariance])


class _Candidate(NamedTuple):
    """A run, its best kernel, and sums over its blocks.

    Args:
        blocks: Indices.
        orders: Of the inputs of each block.
        kernel: In the order of the first block's.
        products: Sum of a W M.
        energy: Sum of a tr(W M W^T).
        harm: Of the kernel.
    """

    blocks: Tuple[int, ...]
    orders: Tuple[torch.Tensor, ...]
    kernel: torch.Tensor
    products: torch.Tensor
    energy: float
    harm: float = 0.0


def _merge(a: _Candidate, b: _Candidate, seen: Sequence[_Seen]) -> _Candidate:
    """Two runs as one, with the best kernel for both, the channels of the second brought to the order of the first."""
    orders, products = a.orders + b.orders, b.products
    if seen[0].reorders is not None:
        (a_ins, a_outs), (b_ins, b_outs) = align([a.kernel, b.kernel], seen[0].reorders)
        ins, outs = b_ins[a_ins.argsort()], b_outs[a_outs.argsort()]
        orders = a.orders + tuple(order[ins] for order in b.orders)
        products = products[:, outs][:, :, kernel_columns(ins)]
    products, energy = a.products + products, a.energy + b.energy
    moments: torch.Tensor = torch.zeros((), dtype=torch.float64)
    for one, order in zip(seen, orders, strict=True):
        moments = moments + one.moments(None if one.reorders is None else order)
    kernel = solve(moments, products)
    harm = max(0.0, energy - (kernel * products).sum().item())
    return _Candidate(a.blocks + b.blocks, orders, kernel.reshape(a.kernel.shape), products, energy, harm)

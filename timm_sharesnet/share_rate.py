"""Which blocks of a stage use one convolution, given how much is to be shared."""

import itertools
from typing import Any, List, Sequence, Tuple, TypeGuard, Union

__all__ = ['Rate', 'Run', 'ShareRate', 'as_python', 'split_runs', 'stage_rates']

Run = Sequence[int]
Rate = Union[float, Sequence[Run]]
"""How much of a stage is shared: 0 to 1, or its runs of blocks, by index."""


ShareRate = Union[float, Sequence[Rate]]
"""The same of all stages, or of each."""


def split_runs(first: int, end: int, rate: Rate) -> List[Tuple[int, ...]]:
    """Split the blocks first to end - 1 of a stage into runs, each of which uses one convolution.

    Of the m blocks that can share, `m - round(rate * (m - 1))` distinct convolutions remain. The runs are consecutive
    and as equal as possible, the longer ones last. At rate 1 there is one run, which is the paper.

        >>> split_runs(1, 7, 0.5)
        [(1,), (2,), (3, 4), (5, 6)]
        >>> split_runs(1, 7, [[3, 1], [2, 5]])
        [(1, 3), (2, 5), (4,), (6,)]

    Args:
        first: Index of the first block that can share.
        end: Number of blocks.
        rate: From 0, where no two blocks share, to 1, or the runs of blocks that share, in any order.

    Returns:
        The runs, each in the order of its blocks, in the order of their first blocks.

    Raises:
        ValueError: If the rate is no number from 0 to 1, or a run has a block that cannot share, or that is in two.
    """
    rate = as_python(rate)
    if _is_number(rate):
        if not 0 <= rate <= 1:
            raise ValueError(f'share_rate must be from 0 to 1, or the runs of blocks that share, got {rate}.')
        m = end - first
        if not m:
            return []
        number = m - round(rate * (m - 1))
        length, longer = divmod(m, number)
        starts = [first]
        for i in range(number):
            starts.append(starts[-1] + length + (i >= number - longer))
        return [tuple(range(*pair)) for pair in itertools.pairwise(starts)]
    if not (isinstance(rate, list) and all(isinstance(run, list) and all(map(_is_index, run)) for run in rate)):
        raise ValueError(
            f'share_rate must be a number from 0 to 1, or lists of blocks that share, such as [[1, 2], [3, 4]], got '
            f'{rate!r}.'
        )
    indices = [i for run in rate for i in run]
    if not all(rate) or len(set(indices)) < len(indices) or not set(indices) <= set(range(first, end)):
        raise ValueError(
            f'share_rate: runs must be lists of blocks from {first} to {end - 1}, none of them twice, got {rate}.'
        )
    return sorted([*(tuple(sorted(run)) for run in rate), *((i,) for i in range(first, end) if i not in indices)])


def stage_rates(share_rate: ShareRate, stages: int) -> List[Rate]:
    """The rate of each stage, given one for all or one for each.

    Raises:
        ValueError: If it is no number, and no list with as many as there are stages.
    """
    rates = as_python(share_rate)
    if _is_number(rates):
        return [rates] * stages
    if not (isinstance(rates, list) and len(rates) == stages):
        raise ValueError(f'share_rate must be one number, or one for each of the {stages} stages, got {rates!r}.')
    return rates


def as_python(value: Any) -> Any:
    """Turn a rate given as tuples, ranges, or scalars and arrays of numpy or torch into numbers and lists."""
    if hasattr(value, 'tolist'):
        value = value.tolist()
    return [as_python(v) for v in value] if isinstance(value, (list, tuple, range)) else value


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

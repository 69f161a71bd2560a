"""Alignment: the orders of the channels of several kernels in which they are nearest to one another.

Kernels of different blocks have no order of channels in common. Permuting a block's inner channels leaves its function
as it is. The best orders of inputs and outputs together are a quadratic assignment problem. Given one side, those of
the other are a linear one, so the sides are assigned in turn, as in `Git Re-Basin: Merging Models modulo Permutation
Symmetries` - https://arxiv.org/abs/2209.04836
"""

from typing import List, Sequence, Tuple

import torch

Order = Tuple[torch.Tensor, torch.Tensor]
"""Orders of the inputs and of the outputs of a kernel."""

_ROUNDS = 3  # in which each kernel is brought to the mean of the others: the second already moves hardly any
_STARTS = 3  # for each kernel, as turns end in the optimum next to their start: ten hardly find a better one
_GAIN = 1e-3  # relative, below which the turns end: far below what another start makes


def align(kernels: Sequence[torch.Tensor], outputs: bool) -> List[Order]:
    """Find the orders that bring each kernel near to the mean of the others.

    Args:
        kernels: Kernels of shape (C_out, C_in, 3, 3).
        outputs: Whether the outputs may be reordered, too.

    Raises:
        ImportError: If scipy is not installed.
    """
    generator = torch.Generator().manual_seed(0)
    orders = [(torch.arange(kernels[0].shape[1]), torch.arange(kernels[0].shape[0]))]
    for k, kernel in enumerate(kernels[1:], start=1):
        target = sum(_ordered(kernels[i], orders[i]) for i in range(k))
        orders.append(_match(target, kernel, outputs, _starts(target, kernel, outputs, generator)))
    for _ in range(_ROUNDS):
        total = sum(_ordered(kernel, order) for kernel, order in zip(kernels, orders, strict=True))
        for k, kernel in enumerate(kernels):
            total = total - _ordered(kernel, orders[k])
            orders[k] = _match(total, kernel, outputs, [orders[k]])
            total = total + _ordered(kernel, orders[k])
    return orders


def mean_cosine(kernels: Sequence[torch.Tensor]) -> float:
    """The mean cosine of two of the kernels."""
    units = torch.stack([kernel.flatten() / norm(kernel) for kernel in kernels])
    n = len(kernels)
    return ((units @ units.T).sum().item() - n) / (n * (n - 1))


def norm(kernel: torch.Tensor) -> torch.Tensor:
    """The norm of a kernel, to divide by even if all of it is zero."""
    return kernel.norm().clamp(min=torch.finfo(kernel.dtype).tiny)


def _ordered(kernel: torch.Tensor, order: Order) -> torch.Tensor:
    ins, outs = order
    return kernel[outs][:, ins]


def _starts(target: torch.Tensor, kernel: torch.Tensor, outputs: bool, generator: torch.Generator) -> List[Order]:
    """Orders to start from: the best by what does not depend on the inputs' order (sorted values), and random ones."""
    o, i = kernel.shape[:2]
    if not outputs:
        return [(torch.arange(i), torch.arange(o))]
    signatures = [k.flatten(2).permute(0, 2, 1).sort(dim=2).values.flatten(1) for k in (target, kernel)]
    outs = _assign(-torch.cdist(*(signature / norm(signature) for signature in signatures)))
    random = [torch.randperm(o, generator=generator) for _ in range(_STARTS - 1)]
    return [(_best_inputs(target, kernel[order]), order) for order in (outs, *random)]


def _match(target: torch.Tensor, kernel: torch.Tensor, outputs: bool, starts: Sequence[Order]) -> Order:
    """The orders with the largest product of kernel and target, one side assigned after the other."""
    best, best_score = starts[0], 0.0  # an order with a positive product there always is
    for ins, outs in starts:
        score = 0.0
        while True:
            ins = _best_inputs(target, kernel[outs])
            if outputs:
                outs = _assign(target.flatten(1) @ kernel[:, ins].flatten(1).T)
            new = (target * _ordered(kernel, (ins, outs))).sum().item()
            if new <= score * (1 + _GAIN):
                break
            score = new
        if score > best_score:
            best, best_score = (ins, outs), score
    return best


def _best_inputs(target: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    return _assign(target.transpose(0, 1).flatten(1) @ kernel.transpose(0, 1).flatten(1).T)


def _assign(gain: torch.Tensor) -> torch.Tensor:
    """Which column goes to each row, for the largest sum (linear sum assignment)."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as e:
        raise ImportError("init='align' needs scipy: pip install 'timm-sharesnet[share]', or take init='mean'") from e
    return torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1])

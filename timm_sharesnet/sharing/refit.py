"""What a shared net is given by images without labels: kernels, the last 1x1 of its blocks, batch norm statistics.

* A shared kernel is the one whose outputs are nearest to those of the kernels that it stands for, each on its block's
  inputs in the plain net: their mean, weighted by the inputs' second moments (RegMean of `Dataless Knowledge Fusion by
  Merging Weights of Language Models` - https://arxiv.org/abs/2212.09849).
* The last 1x1 of each bottleneck is refitted by ridge regression, in a basic block the last batch norm, one block after
  the other.
"""

import contextlib
import copy
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from timm.layers import DropPath
from timm.models.resnet import ResNet

from ..folding import double
from ..stage import is_plain

_RIDGE_KERNEL, _RIDGE = 0.1, 0.01  # relative to the mean second moment of an input
_TINY = 1e-30  # above the square of what float32 tells from zero
_POSITIONS = 8  # of a kernel, along each side of an image: all would say little more


class Fit(NamedTuple):
    """What is fitted for blocks that share a kernel.

    Args:
        stage: Name of the stage.
        blocks: Indices of the blocks.
        kernels: The kernel (C, C, 3, 3) that each would have for itself, None if the shared one is to stay.
        scaled: Whether a batch norm after it makes the kernel's scale free.
    """

    stage: str
    blocks: Tuple[int, ...]
    kernels: Optional[List[torch.Tensor]]
    scaled: bool


Pair = Tuple[torch.Tensor, torch.Tensor]


class _Place(NamedTuple):
    """A block of the plain net, that of the shared one, its stage's 3x3 if it has none of its own, and what is fitted.

    `kernel` is the one that the block would have for itself, `last` whether the block is the last that uses `conv`.
    """

    plain: Any
    block: Any
    conv: Optional[nn.Module] = None
    fit: Optional[Fit] = None
    kernel: Optional[torch.Tensor] = None
    last: bool = False


@torch.no_grad()
def calibrate(
    model: nn.Module,
    plain: nn.Module,
    stages: Iterable[str],
    fits: Sequence[Fit],
    images: Iterable[Any],
    progress: bool,
) -> None:
    """Fit what blocks share and their last 1x1, and estimate the statistics of all batch norms anew.

    Args:
        model: Shared net, changed in place. It has the plain net's statistics.
        plain: Net that it was made of.
        stages: Names of the stages.
        fits: What to fit. If empty, images are taken one batch after the other.
        images: As for `share`.
        progress: Show progress bars.

    Raises:
        TypeError: If a batch of images is no tensor of floats.
        ValueError: If there are no images, their shape is not the net's, or they have values that are not finite.
    """
    batches: Iterable[torch.Tensor] = _batches(model, images, progress)
    if fits and (batches := list(batches)):
        plain = copy.deepcopy(plain)
        with _evaluating(model), _evaluating(plain):
            places = [place for name in stages for place in _places(model, plain, name, fits)]
            inputs = [_stem(plain, x) for x in batches]
            _fit_kernels(tqdm(places, 'kernels', unit='block', disable=not progress), inputs)
            _fit_last(tqdm(places, 'last 1x1', unit='block', disable=not progress), inputs)
    count = 0
    with _estimating(model) as estimate:
        for batch in batches:
            estimate(batch)
            count += len(batch)
    if not count:
        raise ValueError('images is empty, and the statistics of the batch norms cannot be estimated.')


def _batches(model: Any, images: Any, progress: bool) -> Iterator[torch.Tensor]:
    """The batches of images that are not empty, as tensors where the model is."""
    parameter = next(model.parameters())
    expected = f'batches of preprocessed images, tensors of shape (B, {model.in_chans}, H, W), or tuples that begin so'
    one = isinstance(images, torch.Tensor) and images.ndim < 5
    if one or isinstance(images, dict) or not isinstance(images, Iterable):
        got = f'one of shape {tuple(images.shape)}' if one else type(images).__name__
        raise TypeError(f'images must be several {expected}, got {got}: put a single batch into a list.')
    for i, item in enumerate(tqdm(images, 'images', unit='batch', disable=not progress)):
        x = item[0] if isinstance(item, (list, tuple)) and len(item) else item
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            got = str(x.dtype) if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f'images must be {expected}, and number {i} is of {got}.')
        if x.ndim != 4 or x.shape[1] != model.in_chans:
            raise ValueError(f'images must be {expected}, and number {i} has shape {tuple(x.shape)}.')
        if not x.isfinite().all():
            raise ValueError(f'images: batch {i} has values that are not finite.')
        if len(x):
            yield x.to(parameter)


def _places(model: Any, plain: Any, name: str, fits: Sequence[Fit]) -> Iterator[_Place]:
    stage = model.get_submodule(name)
    fits = [fit for fit in fits if fit.stage == name]
    for i, (original, block) in enumerate(zip(plain.get_submodule(name), stage, strict=True)):
        fit = next((fit for fit in fits if i in fit.blocks), None)
        if fit is None:
            yield _Place(original, block, stage.conv_of(i))
        else:
            kernel = None if fit.kernels is None else fit.kernels[fit.blocks.index(i)]
            yield _Place(original, block, stage.conv_of(i), fit, kernel, i == fit.blocks[-1])


def _stem(model: Any, x: torch.Tensor) -> torch.Tensor:
    x = model.conv1(x)
    return model.maxpool(model.act1(model.bn1(x))) if isinstance(model, ResNet) else x


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


@contextlib.contextmanager
def _estimating(module: nn.Module) -> Iterator[Callable[..., Any]]:
    """Gives what to call a module with, whose batch norms meanwhile collect new statistics, the mean over the images of
    all calls: a last batch of few images counts as few."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = {norm: norm.momentum for norm in norms}
    count = 0

    def estimate(x: torch.Tensor, *args: Any) -> Any:
        nonlocal count
        count += len(x)
        for norm in norms:
            norm.momentum = len(x) / count
        try:
            return module(x, *args)
        except ValueError as e:  # of torch's batch norm
            raise ValueError(f'images: {e}: give batches of at least two images, or larger ones.') from e

    with _evaluating(module):
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        try:
            yield estimate
        finally:
            for norm, momentum in momenta.items():
                norm.momentum = momentum


@contextlib.contextmanager
def _seen(module: nn.Module, output: bool = False) -> Iterator[List[torch.Tensor]]:
    """The inputs or outputs of a module, call by call."""
    seen: List[torch.Tensor] = []
    # an output is copied, as the shortcut may be added to it in place
    hook = module.register_forward_hook(lambda _, x, y: seen.append(y.clone() if output else x[0]))
    try:
        yield seen
    finally:
        hook.remove()


def _ridge(moments: torch.Tensor, strength: float) -> torch.Tensor:
    mean = moments.diagonal().mean().clamp(min=_TINY)  # of inputs that are all zero, too
    return moments + strength * mean * torch.eye(len(moments), dtype=moments.dtype)


# ---- The shared kernels


def _fit_kernels(places: Iterable[_Place], inputs: Sequence[torch.Tensor]) -> None:
    """Set the kernels that blocks share, given the inputs of the first block.

    The blocks still compute, up to their 3x3, what the plain net's do.
    """
    inputs = list(inputs)
    sums: Dict[nn.Module, Pair] = {}  # of the runs whose last block is still to come
    for place in places:
        if place.conv is not None and place.fit is not None and place.kernel is not None:
            moments = _ridge(_second_moments(place, inputs), _RIDGE_KERNEL)
            product = place.kernel.flatten(1) @ moments
            if place.conv in sums:
                sums[place.conv][0].add_(moments)
                sums[place.conv][1].add_(product)
            else:
                sums[place.conv] = moments, product
            if place.last:
                total, products = sums.pop(place.conv)
                weight: Any = place.conv.weight
                kernel = torch.linalg.solve(total, products.T).T.reshape(weight.shape)
                if place.fit.scaled and kernel.any():  # it stays as large as it was, as its learning rate is
                    kernel = kernel * (double(weight).norm() / kernel.norm())
                weight.copy_(kernel)
        for i, x in enumerate(inputs):
            inputs[i] = place.plain(x)


def _second_moments(place: _Place, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Second moments (9 C, 9 C) of the inputs of a block's 3x3 in the plain net."""
    conv: Any = place.conv
    total, count = torch.zeros((), dtype=torch.float64), 0
    for x in inputs:
        with _seen(conv) as seen:
            place.block(x, conv)
        x = seen[0]
        stride = max(1, x.shape[-2] // _POSITIONS), max(1, x.shape[-1] // _POSITIONS)
        x = F.unfold(x.float(), 3, conv.dilation, conv.padding, stride).transpose(0, 1).flatten(1)
        total = total + double(x @ x.T)
        count += x.shape[1]
    return total / count


# ---- The last 1x1


def _fit_last(places: Iterable[_Place], inputs: Sequence[torch.Tensor]) -> None:
    """Fit the last 1x1 of blocks that share, or the batch norm after the 3x3, one block after the other, each so that
    the sum of branch and shortcut is that of the plain net: what went wrong before is made good as far as it can be."""
    pairs = [(x, x) for x in inputs]
    for place in places:
        _estimate(place, pairs)
        if place.fit is not None and can_fit(place.block):
            if 'conv3' in place.block.branch:
                _fit_conv3(place, pairs)
            else:
                _fit_norm(place, pairs)
        for i, (a, b) in enumerate(pairs):
            pairs[i] = place.plain(a), place.block(b, place.conv)


def _estimate(place: _Place, pairs: Sequence[Pair]) -> None:
    with _estimating(place.block) as estimate:
        for _, x in pairs:
            estimate(x, place.conv)


def _after(block: Any) -> List[str]:
    """Names of the layers of the branch after the last convolution."""
    names = block.branch[block.branch.index('conv3' if 'conv3' in block.branch else 'conv2') + 1 :]
    return [n for n in names if not isinstance(getattr(block, n), (nn.Identity, DropPath, type(None)))]


def can_fit(block: Any) -> bool:
    """Whether a block has a last 1x1 with a batch norm or nothing after it, or else a batch norm after its 3x3."""
    norms = [getattr(block, name) for name in _after(block)[:1]]
    if not all(type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats for norm in norms):
        return False
    return is_plain(block.conv3) if 'conv3' in block.branch else bool(norms)


def why_not_fitted(block: Any) -> str:
    """What to say of a block of which nothing is fitted though there is something to fit. Empty if that is not so."""
    if can_fit(block) or 'conv3' not in block.branch and not _after(block):
        return ''
    if 'conv3' in block.branch:
        return 'the last 1x1 is not refitted, as it is not followed by a BatchNorm2d'
    return 'the last batch norm is not refitted, as it is no BatchNorm2d with weights and statistics'


def _samples(place: _Place, pairs: Sequence[Pair], name: str) -> Iterator[Pair]:
    """The inputs (C_in, N) of a layer, and what the branch's last batch norm (or else convolution) should give
    (C_out, N), a batch each."""
    names = _after(place.block)
    for a, b in pairs:
        with _seen(getattr(place.plain, names[0] if names else name), output=True) as outputs:
            place.plain(a)
        with _seen(getattr(place.block, name)) as inputs:
            place.block(b, place.conv)
        y = outputs[0]
        if len(names) < 2:  # else there is an attention that the difference would have to come through
            y = y + _shortcut(place.plain, a) - _shortcut(place.block, b)
        yield inputs[0].float().transpose(0, 1).flatten(1), y.float().transpose(0, 1).flatten(1)


def _shortcut(block: Any, x: torch.Tensor) -> torch.Tensor:
    return x if block.downsample is None else block.downsample(x)


def _fit_conv3(place: _Place, pairs: Sequence[Pair]) -> None:
    conv3, names = place.block.conv3, _after(place.block)
    count, xx, yx, x_sum, y_sum = 0, *[torch.zeros((), dtype=torch.float64)] * 4
    for x, y in _samples(place, pairs, 'conv3'):
        xx, yx = xx + double(x @ x.T), yx + double(y @ x.T)
        x_sum, y_sum = x_sum + double(x.sum(1)), y_sum + double(y.sum(1))
        count += x.shape[1]
    x_mean, y_mean = x_sum / count, y_sum / count
    cov = xx / count - torch.outer(x_mean, x_mean)
    weight = torch.linalg.solve(_ridge(cov, _RIDGE), (yx / count - torch.outer(y_mean, x_mean)).T).T
    if names:  # the scale is the norm's, and the weight stays as large as it was, as its learning rate is
        norm, old = getattr(place.block, names[0]), double(conv3.weight).flatten(1)
        scale = old.norm(dim=1) / weight.norm(dim=1)
        dead = ~scale.isfinite() | (scale == 0)  # the plain net's output is constant
        weight = torch.where(dead[:, None], old, weight * scale[:, None])
        std = (((weight @ cov) * weight).sum(1) + norm.eps).sqrt()
        norm.weight.copy_(torch.where(dead, 0.0, std / scale))
        norm.bias.copy_(y_mean)
    conv3.weight.copy_(weight[:, :, None, None])
    if names:
        _estimate(place, pairs)


def _fit_norm(place: _Place, pairs: Sequence[Pair]) -> None:
    name = _after(place.block)[0]
    norm = getattr(place.block, name)
    count, xx, xy, x_sum, y_sum = 0, *[torch.zeros((), dtype=torch.float64)] * 4
    for x, y in _samples(place, pairs, name):
        xx, xy = xx + double((x * x).sum(1)), xy + double((x * y).sum(1))
        x_sum, y_sum = x_sum + double(x.sum(1)), y_sum + double(y.sum(1))
        count += x.shape[1]
    x_mean, y_mean = x_sum / count, y_sum / count
    norm.weight.copy_((xy / count - x_mean * y_mean) / ((xx / count - x_mean**2).clamp(min=0) + norm.eps).sqrt())
    norm.bias.copy_(y_mean)

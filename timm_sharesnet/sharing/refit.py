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
from timm.models.resnet import ResNet

from ..conv_bn import as_float64, is_plain
from .run import Run

# Ridges, relative to the mean second moment of an input. They only keep what is hardly seen from growing: of the 9 C
# inputs of a kernel, neighbours in the image, that is more than of the C of a 1x1.
RIDGE_KERNEL, _RIDGE = 0.1, 0.01
_TINY = 1e-30  # above the square of what float32 tells from zero
_POSITIONS = 8  # of a kernel, along each side of an image: neighbours see nearly the same

Tensors = Tuple[torch.Tensor, torch.Tensor]


class BlockPair(NamedTuple):
    """A block of the plain net, and the one of the shared net that stands for it.

    Args:
        plain: The plain net's.
        shared: The shared net's.
        conv: The convolution of its stage that the shared one uses, None if it has its own.
        run: The run that it is in, None if in none.
        kernel: The kernel that it had for itself, None if the run's is not fitted.
        ends: Whether it is the last block of its run.
    """

    plain: Any
    shared: Any
    conv: Optional[nn.Module] = None
    run: Optional[Run] = None
    kernel: Optional[torch.Tensor] = None
    ends: bool = False


@torch.no_grad()
def calibrate(
    model: nn.Module,
    plain: nn.Module,
    stages: Iterable[str],
    runs: Sequence[Run],
    images: Iterable[Any],
    progress: bool,
) -> None:
    """Fit what blocks share and their last 1x1, and estimate the statistics of all batch norms anew.

    Args:
        model: Shared net, changed in place. It has the plain net's statistics.
        plain: Net that it was made of.
        stages: Names of the stages.
        runs: What to fit. If empty, images are taken one batch after the other.
        images: As for `share`.
        progress: Show progress bars.

    Raises:
        TypeError: If a batch of images is no tensor of floats.
        ValueError: If there are no images, their shape is not the net's, or they have values that are not finite.
    """
    batches: Iterable[torch.Tensor] = checked_batches(model, images, progress)
    if runs and (batches := list(batches)):
        plain = copy.deepcopy(plain)
        with evaluation_mode(model), evaluation_mode(plain):
            pairs = [pair for name in stages for pair in _block_pairs(model, plain, name, runs)]
            inputs = [_stem(plain, x) for x in batches]
            _fit_kernels(tqdm(pairs, 'kernels', unit='block', disable=not progress), inputs)
            _fit_last(tqdm(pairs, 'last 1x1', unit='block', disable=not progress), inputs)
    count = 0
    with _collecting_statistics(model) as forward:
        for batch in batches:
            forward(batch)
            count += len(batch)
    if not count:
        raise ValueError('images is empty, and the statistics of the batch norms cannot be estimated.')


def checked_batches(model: Any, images: Any, progress: bool) -> Iterator[torch.Tensor]:
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


def _block_pairs(model: Any, plain: Any, name: str, runs: Sequence[Run]) -> Iterator[BlockPair]:
    stage = model.get_submodule(name)
    of_block = {i: run for run in runs if run.stage == name for i in run.indices}
    for i, (original, block) in enumerate(zip(plain.get_submodule(name), stage, strict=True)):
        run = of_block.get(i)
        if run is None:
            yield BlockPair(original, block, stage.conv_of(i))
        else:
            kernel = run.kernels[run.indices.index(i)] if run.fits else None
            yield BlockPair(original, block, stage.conv_of(i), run, kernel, i == run.indices[-1])


def _stem(model: Any, x: torch.Tensor) -> torch.Tensor:
    x = model.conv1(x)
    return model.maxpool(model.act1(model.bn1(x))) if isinstance(model, ResNet) else x


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


@contextlib.contextmanager
def _collecting_statistics(module: nn.Module) -> Iterator[Callable[..., Any]]:
    """Gives the function to call the module by. Its batch norms meanwhile collect new statistics.

    They are the mean over the images of all calls: a last batch of few images counts as few.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = {norm: norm.momentum for norm in norms}
    count = 0

    def forward(x: torch.Tensor, *args: Any) -> Any:
        nonlocal count
        count += len(x)
        for norm in norms:
            norm.momentum = len(x) / count
        try:
            return module(x, *args)
        except ValueError as e:  # of torch's batch norm
            raise ValueError(f'images: {e}: give batches of at least two images, or larger ones.') from e

    with evaluation_mode(module):
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        try:
            yield forward
        finally:
            for norm, momentum in momenta.items():
                norm.momentum = momentum


@contextlib.contextmanager
def _captured(module: nn.Module, output: bool = False) -> Iterator[List[torch.Tensor]]:
    """Gives a list that gets the input, or the output, of each call of the module."""
    tensors: List[torch.Tensor] = []
    # an output is copied, as the shortcut may be added to it in place
    hook = module.register_forward_hook(lambda _, x, y: tensors.append(y.clone() if output else x[0]))
    try:
        yield tensors
    finally:
        hook.remove()


# ---- The shared kernels


def _fit_kernels(pairs: Iterable[BlockPair], inputs: Sequence[torch.Tensor]) -> None:
    """Set the kernels that blocks share, given the inputs of the first block.

    The blocks still compute, up to their 3x3, what the plain net's do.
    """
    inputs = list(inputs)
    sums: Dict[Run, Tensors] = {}  # of the runs whose last block is still to come
    for pair in pairs:
        if pair.run is not None and pair.kernel is not None:
            moments = ridge(_second_moments(pair, inputs), RIDGE_KERNEL)
            product = pair.kernel.flatten(1) @ moments
            if pair.run in sums:
                sums[pair.run][0].add_(moments)
                sums[pair.run][1].add_(product)
            else:
                sums[pair.run] = moments, product
            if pair.ends:
                total, products = sums.pop(pair.run)
                weight = pair.run.conv.weight
                kernel = torch.linalg.solve(total, products.T).T.reshape(weight.shape)
                if pair.run.has_free_scale and kernel.any():  # it stays as large as it was, as its learning rate is
                    kernel = kernel * (as_float64(weight).norm() / kernel.norm())
                weight.copy_(kernel)
        for i, x in enumerate(inputs):
            inputs[i] = pair.plain(x)


def _second_moments(pair: BlockPair, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Second moments (9 C, 9 C) of the inputs of a block's 3x3 in the plain net."""
    conv: Any = pair.conv
    total, count = torch.zeros((), dtype=torch.float64), 0
    for x in inputs:
        with _captured(conv) as captured:
            pair.shared(x, conv)
        x = conv_inputs(captured[0], conv)
        total = total + as_float64(x @ x.T)
        count += x.shape[1]
    return total / count


def conv_inputs(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """What a 3x3 sees of its input (B, C, H, W) at some positions: (9 C, positions)."""
    stride = max(1, x.shape[-2] // _POSITIONS), max(1, x.shape[-1] // _POSITIONS)
    return F.unfold(x.float(), 3, conv.dilation, conv.padding, stride).transpose(0, 1).flatten(1)


def ridge(moments: torch.Tensor, strength: float) -> torch.Tensor:
    mean = moments.diagonal().mean().clamp(min=_TINY)  # of inputs that are all zero, too
    return moments + strength * mean * torch.eye(len(moments), dtype=moments.dtype)


# ---- The last layer of a block


def can_fit(block: Any) -> bool:
    """Whether a block has a last 1x1 with a batch norm or nothing after it, or else a batch norm after its 3x3."""
    layers = block.layers()
    norms = [getattr(block, name) for name in layers.after_last[:1]]
    if not all(type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats for norm in norms):
        return False
    return bool(norms) if layers.last == 'conv2' else is_plain(getattr(block, layers.last))


def why_not_fitted(block: Any) -> str:
    """What to say of a block of which nothing is fitted though there is something to fit. Empty if that is not so."""
    layers = block.layers()
    if can_fit(block) or layers.last == 'conv2' and not layers.after_last:
        return ''
    if layers.last == 'conv2':
        return 'the last batch norm is not refitted, as it is no BatchNorm2d with weights and statistics'
    return 'the last 1x1 is not refitted, as it is not followed by a BatchNorm2d'


def _fit_last(pairs: Iterable[BlockPair], inputs: Sequence[torch.Tensor]) -> None:
    """Fit the last 1x1 of blocks that share, or the batch norm after the 3x3, one block after the other.

    Each is fitted so that the sum of branch and shortcut is that of the plain net: what went wrong before is made good
    as far as it can be.
    """
    streams = [(x, x) for x in inputs]  # of the plain net and of the shared one
    for pair in pairs:
        _update_statistics(pair, streams)
        if pair.run is not None and can_fit(pair.shared):
            if pair.shared.layers().last == 'conv2':
                _fit_norm(pair, streams)
            else:
                _fit_1x1(pair, streams)
        for i, (a, b) in enumerate(streams):
            streams[i] = pair.plain(a), pair.shared(b, pair.conv)


def _update_statistics(pair: BlockPair, streams: Sequence[Tensors]) -> None:
    with _collecting_statistics(pair.shared) as forward:
        for _, x in streams:
            forward(x, pair.conv)


class _Moments:
    """Means, and second moments about them, of what goes into a layer and what should come out of the branch."""

    def __init__(self, pair: BlockPair, streams: Sequence[Tensors], name: str, channelwise: bool) -> None:
        zero = torch.zeros((), dtype=torch.float64)
        count, x_sum, y_sum, xx, yx = 0, zero, zero, zero, zero
        for x, y in _regression_data(pair, streams, name):
            x_sum, y_sum = x_sum + as_float64(x.sum(1)), y_sum + as_float64(y.sum(1))
            xx = xx + as_float64((x * x).sum(1) if channelwise else x @ x.T)
            yx = yx + as_float64((y * x).sum(1) if channelwise else y @ x.T)
            count += x.shape[1]
        product = torch.mul if channelwise else torch.outer
        self.x_mean, self.y_mean = x_sum / count, y_sum / count
        self.xx = xx / count - product(self.x_mean, self.x_mean)
        self.yx = yx / count - product(self.y_mean, self.x_mean)


def _regression_data(pair: BlockPair, streams: Sequence[Tensors], name: str) -> Iterator[Tensors]:
    """The inputs (C_in, N) of a layer, and what the branch's last batch norm (or else convolution) should give.

    That is of shape (C_out, N). There is one of each for a batch.
    """
    names = pair.shared.layers().after_last
    for a, b in streams:
        with _captured(getattr(pair.plain, names[0] if names else name), output=True) as outputs:
            pair.plain(a)
        with _captured(getattr(pair.shared, name)) as inputs:
            pair.shared(b, pair.conv)
        y = outputs[0]
        if len(names) < 2:  # else there is an attention that the difference would have to come through
            y = y + _shortcut(pair.plain, a) - _shortcut(pair.shared, b)
        yield inputs[0].float().transpose(0, 1).flatten(1), y.float().transpose(0, 1).flatten(1)


def _shortcut(block: Any, x: torch.Tensor) -> torch.Tensor:
    return x if block.downsample is None else block.downsample(x)


def _fit_1x1(pair: BlockPair, streams: Sequence[Tensors]) -> None:
    layers = pair.shared.layers()
    conv, names = getattr(pair.shared, layers.last), layers.after_last
    moments = _Moments(pair, streams, layers.last, channelwise=False)
    weight = torch.linalg.solve(ridge(moments.xx, _RIDGE), moments.yx.T).T
    if names:  # the scale is the norm's, and the weight stays as large as it was, as its learning rate is
        norm, old = getattr(pair.shared, names[0]), as_float64(conv.weight).flatten(1)
        scale = old.norm(dim=1) / weight.norm(dim=1)
        dead = ~scale.isfinite() | (scale == 0)  # the plain net's output is constant
        weight = torch.where(dead[:, None], old, weight * scale[:, None])
        std = (((weight @ moments.xx) * weight).sum(1) + norm.eps).sqrt()
        norm.weight.copy_(torch.where(dead, 0.0, std / scale))
        norm.bias.copy_(moments.y_mean)
    conv.weight.copy_(weight[:, :, None, None])
    if names:
        _update_statistics(pair, streams)


def _fit_norm(pair: BlockPair, streams: Sequence[Tensors]) -> None:
    name = pair.shared.layers().after_last[0]
    norm = getattr(pair.shared, name)
    moments = _Moments(pair, streams, name, channelwise=True)
    norm.weight.copy_(moments.yx / (moments.xx.clamp(min=0) + norm.eps).sqrt())
    norm.bias.copy_(moments.y_mean)

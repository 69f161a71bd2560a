"""What images without labels make good in a net that shares.

The last 1x1 of each bottleneck is refitted by ridge regression, in a basic block the last batch norm, one block after
the other, and the statistics of all batch norms are estimated anew on the way.
"""

import contextlib
from typing import Any, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from huggingface_hub.utils import tqdm
from timm.models.resnet import ResNet

from ..conv_bn import as_float64, is_plain
from ..resnetv2 import CifarResNetV2
from .calibration import Batches, captured, collecting_statistics, evaluation_mode, ridge, solve
from .run import Run

_RIDGE = 0.01  # of a 1x1, as `calibration.RIDGE_KERNEL`
_ROOM = 2.5e8  # bytes for the images between two blocks, in both nets
# At least so many images, and positions in them, go through a block together: while the statistics of a batch norm are
# estimated, it takes those of the images that come together
_IMAGES, _POSITIONS = 16, 8192


Tensors = Tuple[torch.Tensor, torch.Tensor]


class BlockPair(NamedTuple):
    """A block of the plain net, and the one of the shared net that stands for it.

    Args:
        plain: The plain net's.
        shared: The shared net's.
        conv: The convolution of its stage that the shared one uses, None if it has its own.
        run: The run that it is in, None if in none.
    """

    plain: Any
    shared: Any
    conv: Optional[nn.Module] = None
    run: Optional[Run] = None


@torch.no_grad()
def calibrate(
    model: nn.Module, plain: nn.Module, stages: Iterable[str], runs: Sequence[Run], batches: Batches, progress: bool
) -> None:
    """Fit the last 1x1 of blocks that share, and estimate the statistics of all batch norms anew.

    Args:
        model: Shared net, changed in place. It has the plain net's statistics.
        plain: Net that it was made of, at rate 0.
        stages: Names of the stages.
        runs: Blocks to fit. If empty, images are gone through once, else several times.
        batches: Images.
        progress: Show a progress bar of the blocks.

    Raises:
        TypeError: If a batch of images is no tensor of floats.
        ValueError: If there are no images, their shape is not the net's, or they have values that are not finite.
    """
    if not runs:
        with collecting_statistics(model) as forward:
            for batch in batches.run('statistics'):
                forward(batch)
        return
    batches.keep()
    pairs = [pair for name in stages for pair in _block_pairs(model, plain, name, runs)]
    with evaluation_mode(model), evaluation_mode(plain):
        streams = _Streams(model, plain, pairs, batches)
        for i, pair in enumerate(tqdm(pairs, 'last 1x1', unit='block', disable=not progress)):
            streams.make_room(i)
            _fit_block(pair, streams.parts)
        if isinstance(model, CifarResNetV2):
            with collecting_statistics(model.norm) as forward:
                for part in streams.parts:
                    forward(part.shared)


def _block_pairs(model: Any, plain: Any, name: str, runs: Sequence[Run]) -> Iterator[BlockPair]:
    stage = model.get_submodule(name)
    of_block = {i: run for run in runs if run.stage == name for i in run.indices}
    for i, (original, block) in enumerate(zip(plain.get_submodule(name), stage, strict=True)):
        yield BlockPair(original, block, stage.conv_of(i), of_block.get(i))


def _stem(model: Any) -> nn.Sequential:
    layers = [model.conv1, model.bn1, model.act1, model.maxpool] if isinstance(model, ResNet) else [model.conv1]
    return nn.Sequential(*layers)


class _Streams:
    """Images between two blocks, as they are in the plain net and in the shared one.

    Of all images there is every n-th, n a power of 2, and as many as there is room for: where their maps are large, few
    of them have many positions.

    Attributes:
        parts: The images, several together.
    """

    def __init__(self, model: nn.Module, plain: nn.Module, pairs: Sequence[BlockPair], batches: Batches) -> None:
        """Take images through the stems, and estimate the statistics of the shared net's on all of them."""
        self.stems, self.pairs, self.batches = (_stem(plain), _stem(model)), pairs, batches
        self.sizes: List[int] = []
        self.every = 0  # none is there yet
        chosen = []
        with collecting_statistics(self.stems[1]) as forward:
            for indices, batch in self._numbered('stem'):
                if not self.sizes:
                    self.sizes = self._sizes(batch[:1])
                    every = self._every(0)
                forward(batch)
                chosen += self._wanted(indices, batch, every)
        self.parts = [self._after_stems(part) for part in _together(chosen)]
        self.every = every

    def make_room(self, i: int) -> None:
        """Have as many images before block i as there is room for."""
        every = self._every(i)
        if every > self.every:
            parts = [part.chosen(part.indices % every == 0) for part in self.parts]
            self.parts = [part for part in parts if len(part.indices)]
        elif every < self.every:
            new = (part for batch in self._numbered('images') for part in self._wanted(*batch, every))
            for part in map(self._after_stems, _together(new)):
                for pair in self.pairs[:i]:
                    part = _Part(part.indices, pair.plain(part.plain), pair.shared(part.shared, pair.conv))
                self.parts.append(part)
        self.every = every
        old = self.parts[::-1]
        self.parts = []
        self.parts = list(_together(old.pop() for _ in range(len(old))))

    def _sizes(self, x: torch.Tensor) -> List[int]:
        """Bytes of an image at each block, in both nets."""
        x, sizes = self.stems[0](x), []
        for pair in self.pairs:
            y = pair.plain(x)
            sizes.append(2 * x.element_size() * max(x.numel(), y.numel()))
            x = y
        return sizes

    def _every(self, i: int) -> int:
        every, count = 1, self.batches.count
        while every < count and -(-count // every) * self.sizes[i] > _ROOM:
            every *= 2
        return every

    def _numbered(self, what: str) -> Iterator[Tensors]:
        start = 0
        for batch in self.batches.run(what):
            yield torch.arange(start, start + len(batch)), batch
            start += len(batch)

    def _wanted(self, indices: torch.Tensor, batch: torch.Tensor, every: int) -> List['_Part']:
        """Those of some images that are to be there and are not."""
        wanted = indices % every == 0
        if self.every:
            wanted &= indices % self.every != 0
        return [_Part(indices, batch, batch).chosen(wanted)] if wanted.any() else []

    def _after_stems(self, part: '_Part') -> '_Part':
        return _Part(part.indices, self.stems[0](part.plain), self.stems[1](part.shared))


class _Part(NamedTuple):
    """Some images between two blocks.

    Args:
        indices: Which of all images they are.
        plain: As they are in the plain net.
        shared: As they are in the shared net.
    """

    indices: torch.Tensor
    plain: torch.Tensor
    shared: torch.Tensor

    def chosen(self, which: torch.Tensor) -> '_Part':
        on_device = which.to(self.plain.device)
        return _Part(self.indices[which], self.plain[on_device], self.shared[on_device])


def _joined(parts: Sequence[_Part]) -> _Part:
    return parts[0] if len(parts) == 1 else _Part(*map(torch.cat, zip(*parts, strict=True)))


def _together(parts: Iterable[_Part]) -> Iterator[_Part]:
    """Join parts, as the statistics of few images are not those of all."""
    waiting: List[_Part] = []
    for part in parts:
        if waiting and waiting[0].plain.shape[1:] != part.plain.shape[1:]:
            yield _joined(waiting)
            waiting = []
        waiting.append(part)
        images = sum(len(one.indices) for one in waiting)
        if images >= _IMAGES and images * part.plain[0, 0].numel() >= _POSITIONS:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


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


def _fit_block(pair: BlockPair, parts: List[_Part]) -> None:
    """Fit the last 1x1 of a block that shares, or the batch norm after the 3x3, and take the images behind the block.

    It is fitted so that the sum of branch and shortcut is that of the plain net: what went wrong before is made good as
    far as it can be. The block's other batch norms get the statistics of the images.
    """
    layers = pair.shared.layers()
    fits = pair.run is not None and can_fit(pair.shared)
    norms = layers.after_last[:1]
    of_1x1 = layers.last != 'conv2'
    moments = _Moments(channelwise=not of_1x1)
    with contextlib.ExitStack() as stack:
        forward = stack.enter_context(collecting_statistics(pair.shared))
        if fits:
            name = layers.last if of_1x1 else norms[0]
            inputs = stack.enter_context(captured(getattr(pair.shared, name)))
            outputs = stack.enter_context(captured(getattr(pair.plain, norms[0] if norms else name), output=True))
            shortcuts = [
                stack.enter_context(captured(block.downsample, output=True)) if block.downsample is not None else None
                for block in (pair.plain, pair.shared)
            ]
        for i, (indices, a, b) in enumerate(parts):
            forward(b, pair.conv)
            parts[i] = _Part(indices, pair.plain(a), b)
            if fits:
                x, y = inputs.pop(), outputs.pop()
                ours, theirs = (x if of is None else of.pop() for x, of in zip((a, b), shortcuts, strict=True))
                if len(layers.after_last) < 2:  # else an attention is between, for the difference to come through
                    y = y + ours - theirs
                moments.add(x.float().transpose(0, 1).flatten(1), y.float().transpose(0, 1).flatten(1))
    if fits and of_1x1:
        _fit_1x1(getattr(pair.shared, layers.last), getattr(pair.shared, norms[0]) if norms else None, moments)
    elif fits:
        _fit_norm(getattr(pair.shared, norms[0]), moments)
    for i, (indices, a, b) in enumerate(parts):
        parts[i] = _Part(indices, a, pair.shared(b, pair.conv))


class _Moments:
    """Means, and second moments about them, of what goes into a layer (C_in, N) and what should come out (C_out, N)."""

    def __init__(self, channelwise: bool) -> None:
        """
        Args:
            channelwise: Whether each output has one input of its own.
        """
        self.channelwise, self.count = channelwise, 0
        self.sums = [torch.zeros((), dtype=torch.float64) for _ in range(4)]

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        products = [(z * x).sum(1) if self.channelwise else z @ x.T for z in (x, y)]
        new = x.sum(1), y.sum(1), *products
        self.sums = [old + as_float64(sum_) for old, sum_ in zip(self.sums, new, strict=True)]
        self.count += x.shape[1]

    def means(self) -> Tensors:
        """Of x (C_in) and y (C_out)."""
        return self.sums[0] / self.count, self.sums[1] / self.count

    def products(self) -> Tensors:
        """Of x and x (C_in, C_in), and of y and x (C_out, C_in), or one for each channel."""
        product = torch.mul if self.channelwise else torch.outer
        x, y = self.means()
        return self.sums[2] / self.count - product(x, x), self.sums[3] / self.count - product(y, x)


def _fit_1x1(conv: nn.Conv2d, norm: Optional[nn.BatchNorm2d], moments: _Moments) -> None:
    (x_mean, y_mean), (xx, yx) = moments.means(), moments.products()
    weight = solve(ridge(xx.clone(), _RIDGE), yx)
    if norm is not None:  # the scale is the norm's, and the weight stays as large as it was, as its learning rate is
        old = as_float64(conv.weight).flatten(1)
        scale = old.norm(dim=1) / weight.norm(dim=1)
        dead = ~scale.isfinite() | (scale == 0)  # the plain net's output is constant
        weight = torch.where(dead[:, None], old, weight * scale[:, None])
        var = ((weight @ xx) * weight).sum(1)
        norm.running_mean.copy_(weight @ x_mean)
        norm.running_var.copy_(var)
        norm.weight.copy_(torch.where(dead, 0.0, (var + norm.eps).sqrt() / scale))
        norm.bias.copy_(y_mean)
    conv.weight.copy_(weight[:, :, None, None])


def _fit_norm(norm: nn.BatchNorm2d, moments: _Moments) -> None:
    (_, y_mean), (xx, yx) = moments.means(), moments.products()
    norm.weight.copy_(yx / (xx.clamp(min=0) + norm.eps).sqrt())
    norm.bias.copy_(y_mean)

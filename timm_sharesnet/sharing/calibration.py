"""Images without labels on their way through nets: what they are checked for, what layers see of them, statistics."""

import contextlib
import itertools
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub.utils import tqdm

from ..conv_bn import as_float64

RIDGE_KERNEL = 0.1
"""Ridge of a kernel, relative to the mean second moment of an input. It only keeps what is hardly seen from growing: of
the 9 C inputs of a kernel, neighbours in the image, that is more than of the C of a 1x1."""

_TINY = 1e-30  # above the square of what float32 tells from zero
_POSITIONS = 8  # of a kernel, along each side of an image: neighbours see nearly the same
_POSITIONS_WIDE, _WIDE = 4, 256  # the same from so many channels on, where products cost most
_AT_ONCE = 16  # images, for memory

Place = Tuple[str, int]
"""A block: name of its stage, and index."""


class Batches:
    """The batches of images that are not empty, as tensors where the model is, as often as one goes through them."""

    def __init__(self, model: Any, images: Any, progress: bool = False) -> None:
        """See `timm_sharesnet.share` for `images`.

        Raises:
            TypeError: If they are not several batches.
        """
        self.parameter, self.in_chans, self.progress = next(model.parameters()), model.in_chans, progress
        self.expected = f'batches of preprocessed images, tensors of shape (B, {self.in_chans}, H, W)'
        self.expected += ', or tuples that begin so'
        one = isinstance(images, torch.Tensor) and images.ndim < 5
        if one or isinstance(images, dict) or not isinstance(images, Iterable):
            got = f'one of shape {tuple(images.shape)}' if one else type(images).__name__
            raise TypeError(f'images must be several {self.expected}, got {got}: put a single batch into a list.')
        self.images = images
        self._count: Optional[int] = None

    @property
    def count(self) -> int:
        """Number of images."""
        if self._count is None:
            self._count = sum(map(len, self.run('images')))
        return self._count

    def keep(self) -> None:
        """Be ready for several times: what can be gone through once only is kept."""
        if iter(self.images) is self.images:
            self.images = list(self.images)

    def run(self, what: str) -> Iterator[torch.Tensor]:
        """Go through them once.

        Args:
            what: Name of the progress bar.

        Raises:
            TypeError: If one is no tensor of floats.
            ValueError: If there are none, the shape of one is not the net's, or it has values that are not finite.
        """
        count = 0
        for i, item in enumerate(tqdm(self.images, what, unit='batch', disable=not self.progress)):
            x = item[0] if isinstance(item, (list, tuple)) and len(item) else item
            if not isinstance(x, torch.Tensor) or not x.is_floating_point():
                got = str(x.dtype) if isinstance(x, torch.Tensor) else type(x).__name__
                raise TypeError(f'images must be {self.expected}, and number {i} is of {got}.')
            if x.ndim != 4 or x.shape[1] != self.in_chans:
                raise ValueError(f'images must be {self.expected}, and number {i} has shape {tuple(x.shape)}.')
            if not x.isfinite().all():
                raise ValueError(f'images: batch {i} has values that are not finite.')
            if len(x):
                count += len(x)
                yield x.to(self.parameter).contiguous(
                    memory_format=torch.channels_last
                )  # on a CPU, two thirds the time
        self._count = count
        if not count:
            raise ValueError('images is empty: nothing can be measured on them.')


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
def collecting_statistics(module: nn.Module) -> Iterator[Callable[..., Any]]:
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
def captured(module: nn.Module, output: bool = False) -> Iterator[List[torch.Tensor]]:
    """Gives a list that gets the input, or the output, of each call of the module."""
    tensors: List[torch.Tensor] = []
    # an output is copied, as the shortcut may be added to it in place
    hook = module.register_forward_hook(lambda _, x, y: tensors.append(y.clone() if output else x[0]))
    try:
        yield tensors
    finally:
        hook.remove()


# ---- What layers see


class InputMoments:
    """Sums over what a 3x3 sees of its inputs, at some positions of each image."""

    def __init__(self, conv: nn.Conv2d) -> None:
        """Watch a convolution, until `hook` is removed."""
        number = conv.groups, conv.weight[0].numel()
        self.count, device = 0, conv.weight.device
        self.sum = torch.zeros(number, device=device)
        self.products = torch.zeros((*number, number[1]), device=device)
        self.hook = conv.register_forward_hook(self.add)

    def add(self, conv: Any, x: Tuple[torch.Tensor], _: torch.Tensor) -> None:
        x_ = conv_inputs(x[0], conv)
        x_ = x_.view(conv.groups, -1, x_.shape[1])
        self.sum += x_.sum(2)
        self.products.baddbmm_(x_, x_.mT)
        self.count += x_.shape[2]

    def second(
        self, scale: Optional[torch.Tensor] = None, order: Optional[torch.Tensor] = None, centred: bool = False
    ) -> torch.Tensor:
        """Second moments (groups, 9 C / groups, 9 C / groups) in float64.

        Args:
            scale: To multiply each of the C inputs by.
            order: The inputs' order after that.
            centred: Whether they are about the mean.
        """
        sum_, products = self.sum, self.products
        if order is not None:
            index = kernel_columns(order).to(products.device)
            sum_, products = sum_[:, index], products[:, index[:, None], index]
            scale = None if scale is None else scale[order]
        moments = as_float64(products).div_(self.count)
        if centred:
            mean = as_float64(sum_) / self.count
            moments.baddbmm_(mean[:, :, None], mean[:, None], alpha=-1)
        if scale is not None:
            of_each = scale.repeat_interleave(9)
            moments.mul_(of_each[:, None]).mul_(of_each)
        return moments


class Variance:
    """Sums over what a layer gives, of which the variance of each channel is computed."""

    def __init__(self, layer: nn.Module) -> None:
        """Watch a layer, until `hook` is removed."""
        self.count, self.sum, self.squares = 0, torch.zeros(()), torch.zeros(())
        self.hook = layer.register_forward_hook(self.add)

    def add(self, _: nn.Module, __: Any, y: torch.Tensor) -> None:
        self.sum = self.sum + as_float64(y.sum((0, 2, 3), dtype=torch.float32))
        self.squares = self.squares + as_float64(y.square().sum((0, 2, 3), dtype=torch.float32))
        self.count += y.numel() // y.shape[1]

    def of_channels(self) -> torch.Tensor:
        return self.squares / self.count - (self.sum / self.count) ** 2


class Measurement:
    """What images show of the blocks of a plain net that can share.

    Attributes:
        inputs: Of the 3x3 of each block, by name of the stage and index.
        outputs, branches: Of each 3x3, and of each residual branch.
        stages: Of each stage, by name.
    """

    def __init__(self, plain: nn.Module, blocks: Dict[Place, Any], batches: Batches, variances: bool) -> None:
        """
        Args:
            plain: The net.
            blocks: Its blocks that can share.
            batches: Images.
            variances: Whether to measure more than `inputs`.
        """
        self.inputs = {place: InputMoments(block.conv2) for place, block in blocks.items()}
        self.outputs, self.branches, self.stages = {}, {}, {}
        if variances:
            self.outputs = {place: Variance(block.conv2) for place, block in blocks.items()}
            last = {place: getattr(block, block.layers().names[-1]) for place, block in blocks.items()}
            self.branches = {place: Variance(layer) for place, layer in last.items()}
            self.stages = {
                name: Variance(plain.get_submodule(name)) for name in dict.fromkeys(name for name, _ in blocks)
            }
        sums = self.inputs, self.outputs, self.branches, self.stages
        try:
            with torch.no_grad(), evaluation_mode(plain):
                for batch in batches.run('kernels'):
                    for part in batch.split(_AT_ONCE):
                        plain(part)
        finally:
            for one in itertools.chain(*(of_each.values() for of_each in sums)):
                one.hook.remove()


def conv_inputs(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """What a 3x3 sees of its input (B, C, H, W) at some positions: (9 C, positions)."""
    (h, w), padding, dilation = x.shape[2:], *map(_pair, (conv.padding, conv.dilation))
    strides = [-(-size // (_POSITIONS_WIDE if x.shape[1] >= _WIDE else _POSITIONS)) for size in (h, w)]
    x = F.pad(x.float(), (padding[1], padding[1], padding[0], padding[0]))
    x = x[:, :, strides[0] // 2 :, strides[1] // 2 :]  # not the border alone
    return F.unfold(x, 3, dilation, 0, strides).transpose(0, 1).flatten(1)


def kernel_columns(order: torch.Tensor) -> torch.Tensor:
    """The columns (9 C) of a flat kernel, for an order of its C inputs."""
    return (9 * order[:, None] + torch.arange(9)).flatten()


def _pair(value: Any) -> Tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def ridge(moments: torch.Tensor, strength: float) -> torch.Tensor:
    """Second moments (N, N), to whose diagonal a part of its mean is added, in place."""
    diagonal = moments.diagonal()
    diagonal += strength * diagonal.mean().clamp(min=_TINY)  # of inputs that are all zero, too
    return moments


def solve(moments: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """The x for which x times the moments (..., N, N), symmetric, is the products (..., M, N)."""
    factor, fault = torch.linalg.cholesky_ex(moments)
    if fault.any():  # not positive, by rounding
        return torch.linalg.solve(moments, products, left=False)
    return torch.cholesky_solve(products.mT, factor).mT

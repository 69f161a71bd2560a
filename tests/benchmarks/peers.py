"""What a user could do in place of sharing, given the same images: low-rank 3x3, or inner channels pruned.

* low-rank: a 3x3 becomes one into r channels, and a 1x1: the r principal components of its outputs (the singular
  vectors of the kernel times the square root of its inputs' covariance).
* pruned: channels between the convolutions of a block are removed, by torch-pruning. The next to go is the one that
  costs its next layer the least if the others make good for it (optimal brain surgeon, `Second order derivatives for
  network pruning` - https://proceedings.neurips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html),
  and so do the others of a 3x3. The last 1x1 is left to the refit.

Both take any 3x3 of a block. Statistics are estimated, and the last 1x1 or batch norm of the changed blocks is
refitted, by `share`'s own code.
"""

import itertools
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch_pruning as tp

from timm_sharesnet import share
from timm_sharesnet.conv_bn import as_float64, conv_args
from timm_sharesnet.sharing.calibration import Batches, conv_inputs, ridge
from timm_sharesnet.sharing.refit import calibrate

RIDGE = 0.01  # of covariances that are inverted, relative to the mean variance
LAST = 0.75  # of a stage's ranks or channels that go before any of the stage before, where the last comes first


def peer(kind, plain, moments, save, spread, images):
    """A plain net without a part of its parameters.

    Args:
        kind: 'low-rank' or 'pruned'.
        plain: The trained net.
        moments: The net's `Moments`.
        save: Part of all parameters that is saved at least.
        spread: Where: everywhere the same part of the ranks or channels ('uniform'), where it does the least harm for
            what it saves ('harm'), or in the last stages first ('last').
        images: Batches of images.
    """
    model = share(plain, 0.0)  # blocks whose layers `calibrate` knows
    places = {'low-rank': _low_rank_places, 'pruned': _pruned_places}[kind](model, moments)
    spend(places, save * sum(p.numel() for p in model.parameters()), spread)
    places = [place for place in places if place.taken]
    if kind == 'low-rank':
        for place in places:
            setattr(place.block, place.name, place.factors())
    else:
        _prune(model, places, images[0][:1])
    names = [info['module'] for info in model.feature_info[1:]]
    changed = sorted({(names.index(place.stage), place.index) for place in places})
    runs = [SimpleNamespace(stage=names[i], indices=(k,)) for i, k in changed]
    calibrate(model, plain, names, runs, Batches(model, images), False)
    return model


class Moments:
    """Covariances (of what a kernel sees) of the inputs of a net's convolutions, variances of branches and stages.

    Attributes:
        inputs: By stage, block and layer.
        branches: Total variance by stage and block.
        streams: Total variance by stage.
    """

    def __init__(self, plain, images):
        model = share(plain, 0.0).eval()
        inputs, outputs = {}, {}
        for name, stage in _stages(model).items():
            outputs[name] = _Covariance(stage)
            for i, block in enumerate(stage):
                outputs[name, i] = _Covariance(getattr(block, block.layers().names[-1]))
                for layer in _convs(block):
                    inputs[name, i, layer] = _Covariance(getattr(block, layer), inputs=True)
        with torch.no_grad():
            for batch in images:
                model(batch)
        self.inputs = {key: covariance.value() for key, covariance in inputs.items()}
        variances = {key: covariance.value().sum().item() for key, covariance in outputs.items()}
        self.branches = {key: value for key, value in variances.items() if key[0] in variances and len(key) == 2}
        self.streams = {key: value for key, value in variances.items() if key not in self.branches}

    def weight(self, stage, index, layer, kernel):
        """What a unit of variance in a layer's output is to its stage's: it gets as far as all its variance does."""
        kernel = as_float64(kernel).flatten(1)
        variance = ((kernel @ self.inputs[stage, index, layer]) * kernel).sum().item()
        return self.branches[stage, index] / variance / self.streams[stage]


class _Covariance:
    """Sums over the inputs of a convolution, or the outputs of a layer, of which the (co)variance is computed."""

    def __init__(self, layer, inputs=False):
        self.count, self.sum, self.products = 0, 0, 0
        layer.register_forward_hook(self.add_inputs if inputs else self.add_outputs)

    def add_inputs(self, conv, x, _):
        rows = conv_inputs(x[0], conv) if conv.kernel_size == (3, 3) else x[0].transpose(0, 1).flatten(1)
        self.add(rows, rows @ rows.T)

    def add_outputs(self, _, __, y):
        rows = y.transpose(0, 1).flatten(1)
        self.add(rows, rows.square().sum(1))

    def add(self, rows, products):
        self.sum, self.products = self.sum + as_float64(rows.sum(1)), self.products + as_float64(products)
        self.count += rows.shape[1]

    def value(self):
        mean = self.sum / self.count
        return self.products / self.count - (mean**2 if self.products.ndim == 1 else mean.outer(mean))


def _stages(model):
    return {info['module']: model.get_submodule(info['module']) for info in model.feature_info[1:]}


def _convs(block):
    return [name for name in ('conv1', 'conv2', 'conv3') if getattr(block, name, None) is not None]


# ---- Where how much


def spend(places, parameters, spread):
    """Go on at one place after the other until enough parameters are saved.

    Each place has `stage` (its name, in order), `taken` (its steps so far), `harms` (of each step), and tells what the
    next step saves by `next_saved()`.
    """

    def order(place):
        part = (place.taken + 1) / len(place.harms)
        if spread == 'harm':
            return place.harms[place.taken] / place.next_saved()
        return (part > LAST, stages.index(place.stage), part) if spread == 'last' else part

    stages = sorted({place.stage for place in places}, reverse=True)
    if spread == 'harm':
        for place in places:
            place.start_at_best()
    saved = 0
    while saved < parameters:
        left = [place for place in places if place.taken < len(place.harms)]
        if not left:
            raise ValueError(f'{parameters:,.0f} parameters cannot be saved, but {saved:,}.')
        place = min(left, key=order)
        saved += place.next_saved()
        place.taken += 1
    place.give_back(saved - parameters)


# ---- Low rank


class _Ranks:
    """A 3x3 in the basis of its outputs' principal components. The first step is the largest rank that saves."""

    def __init__(self, stage, index, block, name, moments):
        self.stage, self.index, self.block, self.name, self.taken = stage, index, block, name, 0
        self.conv = getattr(block, name)
        self.kernel = as_float64(self.conv.weight).flatten(1)
        covariance = moments.inputs[stage, index, name]
        energies, vectors = torch.linalg.eigh(self.kernel @ covariance @ self.kernel.T)  # the least first
        self.basis = vectors.flip(1)
        energies = energies.clamp(min=0) * moments.weight(stage, index, name, self.kernel)
        self.lost = [0.0, *energies.cumsum(0).tolist()]  # without so many components
        n_out, n_in = self.kernel.shape
        self.whole, self.each = n_out * n_in, n_out + n_in
        self.start((self.whole - 1) // self.each)

    def start(self, rank):
        """Let the first step be to a rank."""
        self.ranks = range(rank, 0, -1)
        lost = [0.0, *(self.lost[len(self.kernel) - r] for r in self.ranks)]
        self.harms = [b - a for a, b in itertools.pairwise(lost)]

    def start_at_best(self):
        """Let the first step be to the rank that harms least for what it saves: from there on each step harms more."""
        n = len(self.kernel)
        self.start(min(self.ranks, key=lambda rank: self.lost[n - rank] / (self.whole - rank * self.each)))

    def next_saved(self):
        return self.each if self.taken else self.whole - self.ranks[0] * self.each

    def give_back(self, parameters):
        """Take a larger rank if it, too, is small enough."""
        if self.taken == 1:
            self.start(self.ranks[0] + int(parameters / self.each))

    def factors(self):
        """The two convolutions that take the 3x3's place."""
        rank, conv = self.ranks[self.taken - 1], self.conv
        first = nn.Conv2d(conv.in_channels, rank, 3, *conv_args(conv), bias=False)
        second = nn.Conv2d(rank, conv.out_channels, 1, bias=False)
        basis = self.basis[:, :rank]
        with torch.no_grad():
            first.weight.copy_((basis.T @ self.kernel).view_as(first.weight))
            second.weight.copy_(basis[:, :, None, None])
        return nn.Sequential(first, second)


def _low_rank_places(model, moments):
    return [
        _Ranks(stage, i, block, name, moments)
        for stage, blocks in _stages(model).items()
        for i, block in enumerate(blocks)
        for name in _convs(block)
        if getattr(block, name).kernel_size == (3, 3)
    ]


# ---- Pruned


class _Channels:
    """The channels between two convolutions of a block, in the order in which they go."""

    def __init__(self, stage, index, block, names, moments):
        self.stage, self.index, self.block, self.taken = stage, index, block, 0
        self.before, self.after = (getattr(block, name) for name in names)
        self.kernel = as_float64(self.after.weight).flatten(1)
        self.moments = ridge(moments.inputs[stage, index, names[1]].clone(), RIDGE)
        self.order, lost = eliminate(self.kernel, self.moments, self.after.weight[0, 0].numel())
        weight = moments.weight(stage, index, names[1], self.kernel)
        self.harms = [weight * value for value in lost][:-1]  # one channel stays
        self.inputs_from = self.outputs_to = None  # the places before and behind, in the same block

    def start_at_best(self):
        pass

    def give_back(self, parameters):
        pass

    def next_saved(self):
        """Parameters of a channel: its kernels in the layer before and behind, and a batch norm's."""
        ins = self.inputs_from.left() if self.inputs_from else self.before.in_channels
        outs = self.outputs_to.left() if self.outputs_to else self.after.out_channels
        return ins * self.before.weight[0, 0].numel() + 2 + outs * self.after.weight[0, 0].numel()

    def left(self):
        return len(self.order) - self.taken

    def refit(self):
        """Let the channels that stay make good for those that go, in the next layer."""
        size = self.after.weight[0, 0].numel()
        kept = sorted(self.order[self.taken :])
        index = torch.tensor([size * channel + i for channel in kept for i in range(size)])
        kernel = torch.zeros_like(self.kernel)
        kernel[:, index] = torch.linalg.solve(
            self.moments[index][:, index], self.kernel @ self.moments[:, index], left=False
        )
        with torch.no_grad():
            self.after.weight.copy_(kernel.view_as(self.after.weight))


def eliminate(kernel, moments, size):
    """Remove inputs (`size` columns each) one after the other, each time the one that the others replace best.

    Args:
        kernel: (C_out, C_in * size).
        moments: Covariance of the inputs (C_in * size, C_in * size).

    Returns:
        The order of the inputs, and the variance of the outputs that each removal costs.
    """
    kernel, inverse = kernel.clone(), torch.linalg.inv(moments)
    n = len(inverse) // size
    left, order, lost = torch.ones(n, dtype=torch.bool), [], []
    for _ in range(n):
        blocks = inverse.view(n, size, n, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)[left]  # (n left, size, size)
        parts = kernel.view(-1, n, size).permute(1, 2, 0)[left]  # (n left, size, C_out)
        costs = (torch.linalg.solve(blocks, parts) * parts).sum((1, 2))
        best = costs.argmin().item()
        channel = left.nonzero()[best].item()
        order.append(channel)
        lost.append(max(0.0, costs[best].item()))
        columns = slice(size * channel, size * (channel + 1))
        rows = torch.linalg.solve(blocks[best], inverse[columns])
        kernel -= kernel[:, columns] @ rows
        inverse -= inverse[:, columns] @ rows
        left[channel] = False
    return order, lost


def _pruned_places(model, moments):
    places = []
    for stage, blocks in _stages(model).items():
        for i, block in enumerate(blocks):
            found = [_Channels(stage, i, block, names, moments) for names in itertools.pairwise(_convs(block))]
            for a, b in itertools.pairwise(found):
                a.outputs_to, b.inputs_from = b, a
            places += found
    return places


def _prune(model, places, image):
    for place in places:
        if place.after.kernel_size == (3, 3):
            place.refit()
    graph = tp.DependencyGraph().build_dependency(model, image)
    for place in places:
        group = graph.get_pruning_group(place.before, tp.prune_conv_out_channels, place.order[: place.taken])
        group.prune()

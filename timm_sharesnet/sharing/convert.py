"""Plain nets to shared ones, with or without their weights, and back."""

import copy
import itertools
import math
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.models import create_model, is_model
from timm.models.resnet import ResNet

from ..folding import double
from ..model_args import unlike_its_name
from ..resnet import ShaResNet
from ..resnetv2 import CifarResNetV2
from ..stage import SharedStage, ShareRate, SharingBlock, as_python, is_plain, split_runs, stage_rates
from .refit import Fit, calibrate, why_not_fitted

__all__ = ['share', 'unshare']

INITS = 'align', 'mean', 'first', 'random'
_SOURCES = 'file', 'hf_hub_id', 'hf_hub_filename', 'source', 'state_dict', 'url'
_ROUNDS, _STARTS = 3, 3
_GAIN = 1e-3  # relative, below which an alignment is done
_SMALLEST = 0.1  # RMS of a channel / mean of all, below which it is not brought to 1: it is off, and would come on
_OFF = 1e-6  # mean RMS of all channels below which none is: batch norm gives values near 1


class Merge(NamedTuple):
    """What became of a run of blocks.

    Args:
        stage: Name of the stage.
        blocks: Indices of the blocks of the run.
        saved: Parameters that it has less.
        before: Mean cosine of two kernels of the run.
        after: The same after alignment.
    """

    stage: str
    blocks: Tuple[int, ...]
    saved: int
    before: float
    after: float


class Report(NamedTuple):
    """What `share` did, a line a run."""

    merges: Tuple[Merge, ...]
    notes: Tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f'{m.stage} blocks {m.blocks[0]} to {m.blocks[-1]}: {len(m.blocks)} kernels to 1, {m.saved:,} parameters '
            f'saved, cosine of two kernels {m.before:.2f}, aligned {m.after:.2f}'
            for m in self.merges
        ]
        total = sum(m.saved for m in self.merges)
        return '\n'.join([*lines, *self.notes, f'{total:,} parameters saved'])


def share(
    model: nn.Module,
    rate: ShareRate = 1.0,
    init: str = 'align',
    images: Optional[Iterable[Any]] = None,
    refit: bool = True,
    progress: bool = False,
) -> nn.Module:
    """Make a shared net of a plain one, to be trained on. At low rates, and with `images`, it is near to the plain one.

        >>> import timm, timm_sharesnet
        >>> plain = timm.create_model('resnet50')
        >>> shared = timm_sharesnet.share(plain, rate=0.5)
        >>> print(shared.share_report.merges[0].blocks, sum(p.numel() for p in shared.parameters()))
        (1, 2) 24193064

    Everything but the 3x3 that are shared is copied. At rate 0 and without images, the result computes what the model
    does; with images, it has their statistics.

    Args:
        model: timm's ResNet of BasicBlock or Bottleneck (any depth, width, stem, attention, classes and channels), or
            an unshared net of this package (also one of a shared net's class, at rate 0). It is not changed.
        rate: How much a stage shares, for all stages or for each: see `split_runs`. 1 is the paper.
        init: The kernel that the blocks of a run share, in units in which each input has an RMS of 1 and each output a
            variance of 1: 'align' is the mean after the blocks' inner channels were permuted to bring the kernels near
            to each other, 'mean' the mean without, 'first' the first block's, 'random' a new one.
        images: Batches of unlabelled images, preprocessed, of shape (B, C, H, W), or tuples that begin with one. A
            thousand images will do. The statistics of all batch norms are estimated anew, each image counting the same;
            without, any merged net is near chance until it is trained. Frozen batch norms keep theirs.
        refit: Before that, given `images`, set each shared kernel (of 'align' and 'mean') to the one whose outputs are
            nearest to those that it stands for, and refit the last 1x1 of a bottleneck, or the last batch norm of a
            basic block, one after the other, so that its output is the plain net's again, by ridge regression. It keeps
            all images and twice one block's outputs for them: 7 MB an image of 224 x 224 with ResNet-50.
        progress: Show progress bars.

    Returns:
        A net of this package in the model's mode, of a registered model: saved, it loads by name. Its `share_report`
        says and prints what was merged, and whether its name and arguments do not build it again.

    Raises:
        TypeError: If the model is no such net, or `images` are none.
        ValueError: If its blocks cannot share, its weights are not there or not finite, or an argument is not as above.
    """
    if init not in INITS:
        raise ValueError(f'init must be one of {", ".join(INITS)}, got {init!r}.')
    blocks = {name: list(stage) for name, stage in _plain_stages(model).items()}
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError('The model is on the meta device and has no values to share: load its weights first.')
    infinite = _not_finite(model)
    if infinite:
        raise ValueError(f'{infinite} has values that are not finite, nothing can be made of them.')
    shared = copy.deepcopy(model)
    synchronised = [m for m in shared.modules() if type(m) is nn.SyncBatchNorm]
    for m in synchronised:  # each process has all images
        m.__class__ = nn.BatchNorm2d
    runs = _share_stages(shared, rate)
    merges: List[Merge] = []
    fits: List[Fit] = []
    notes: List[str] = []
    with torch.no_grad():
        for name, stage_runs in runs.items():
            stage = shared.get_submodule(name)
            for run in stage_runs:
                kernels = [blocks[name][i].conv2 for i in run]
                merge, fit = _merge(stage, name, run, kernels, init, notes)
                merges.append(merge)
                fits.append(fit)
                if images is not None and refit and why_not_fitted(stage[run[0]]):
                    notes.append(f'{name}: {why_not_fitted(stage[run[0]])}')
        if images is not None:
            calibrate(shared, model, runs, fits if refit else [], images, progress)
            frozen = sum(type(m).__name__.startswith('FrozenBatchNorm') for m in shared.modules())
            if frozen:
                notes.append(f'{frozen} batch norms are frozen and keep their statistics, which may not fit')
        elif merges:
            notes.append('no images were given: the statistics of batch norms do not fit, and nothing is refitted')
    infinite = _not_finite(shared)
    if infinite:
        raise ValueError(f'{infinite} got values that are not finite: those of the model or the images are too large.')
    for m in synchronised:
        m.__class__ = nn.SyncBatchNorm
    notes.append(_name_shared(shared, rate))
    shared.share_report = Report(tuple(merges), tuple(filter(None, dict.fromkeys(notes))))
    return shared


def _not_finite(model: nn.Module) -> str:
    """The first tensor with values that are not finite. Empty if there is none."""
    return next((name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()), '')


def _name_shared(model: nn.Module, rate: ShareRate) -> str:
    """Let a model's config tell by what registered model, with which arguments, it is built again.

    Returns:
        What to say if it cannot.
    """
    if not getattr(model, 'pretrained_cfg', None):
        return 'the net was made from its class and not by timm.create_model, so there is no name to load it by'
    cfg, args = model.pretrained_cfg, dict(getattr(model, '_model_args', {}))
    base = args.pop('base', cfg['architecture']).partition('.')[0]  # a tag is one of weights
    plain = base.removeprefix('sha')
    base = plain if is_model(plain) else base
    name = f'sha{base}' if is_model(f'sha{base}') else 'sharesnet'
    cfg.update(architecture=name)
    for key in (*_SOURCES, 'tag'):
        cfg.pop(key, None)
    base_args = {'base': base} if name == 'sharesnet' else {}
    model._model_args = {**args, **base_args, 'share_rate': as_python(rate)}  # timm's, for save_for_hf
    fault = unlike_its_name(model)
    if not fault:
        return ''
    return (
        f'timm.create_model does not build it again by name and recorded arguments ({fault}): give all that it was '
        f'built with to timm.models.save_for_hf(..., model_args=dict(...))'
    )


def _plain_stages(model: nn.Module) -> Dict[str, nn.Module]:
    """The stages of a net that can be shared, by name, without those that were pruned.

    Raises:
        TypeError: If it is none.
        ValueError: If it is shared or folded already, or a 3x3 is no plain convolution.
    """
    if type(model) not in (ResNet, ShaResNet, CifarResNetV2):
        raise TypeError(
            f'{type(model).__name__} cannot be shared: it takes a timm.models.ResNet (resnet18 to resnet152, their '
            f'wide, -d, -t, SE, ECA and ResNeXt variants), or an unshared net of timm_sharesnet.'
        )
    stages = {name: model.get_submodule(name) for name in _stage_names(model)}
    stages = {name: stage for name, stage in stages.items() if any(stage.children())}
    if not stages:
        raise TypeError(f'{type(model).__name__} has no stage left to be shared.')
    for name, stage in stages.items():
        if isinstance(stage, SharedStage) and (stage.conv is not None or any(block.folded for block in stage)):
            raise ValueError(f'{name} is shared or folded already: share the net that it was made of, or unshare it.')
        for i, block in enumerate(stage):
            if not isinstance(block, SharingBlock) and type(block) not in _SHARING:
                raise TypeError(f'{name}.{i} is a {type(block).__name__}, only BasicBlock and Bottleneck can share.')
            if not is_plain(block.conv2):
                raise ValueError(
                    f'{name}.{i}.conv2 is no plain convolution, or is folded, or has a hook or a parametrization: '
                    f'{block.conv2}'
                )
    return stages


def _stage_names(model: nn.Module) -> List[str]:
    return [info['module'] for info in model.feature_info[1:]]


_SHARING = {kind.plain: kind for kind in SharingBlock.__subclasses__() if kind.plain}


def _share_stages(model: nn.Module, rate: ShareRate) -> Dict[str, List[Tuple[int, ...]]]:
    """Turn the stages of a plain net into shared ones, in place. Returns the runs that share, by stage."""
    stages = _plain_stages(model)
    names = _stage_names(model)
    rates = stage_rates(rate, len(names))
    runs = {}
    for name, stage in stages.items():
        i, blocks = names.index(name), list(stage)
        for block in blocks:
            block.__class__ = _SHARING.get(type(block), type(block))  # they add no attribute to timm's
        first = blocks[0].first_shared(i)
        runs[name] = [run for run in split_runs(first, len(blocks), rates[i]) if len(run) > 1]
        shared = SharedStage(blocks, first, rates[i])
        for m in (shared, shared.blocks, *([shared.conv] if shared.several else [])):
            m.training = stage.training  # `train()` would set it for the layers, too
        shared.grad_checkpointing = getattr(model, 'grad_checkpointing', getattr(stage, 'grad_checkpointing', False))
        setattr(model, name, shared)
    if type(model) is ResNet:
        model.grad_checkpointing = False  # the stages do it
        model.__class__ = ShaResNet
    return runs


def create_shared(base: str, rate: ShareRate, **kwargs: Any) -> nn.Module:
    """Build a net that timm or this package has unshared, with its convolutions shared."""
    model = create_model(base, **kwargs)
    _share_stages(model, rate)
    return model


# ---- The kernel of a run


def _merge(
    stage: SharedStage,
    name: str,
    run: Sequence[int],
    convs: Sequence[nn.Conv2d],
    init: str,
    notes: List[str],
) -> Tuple[Merge, Fit]:
    """Set the convolution that the blocks of a run share, given those that they had. The blocks are adapted to it."""
    blocks = [stage[i] for i in run]
    kernels = [_normalize(block, double(conv.weight)) for block, conv in zip(blocks, convs, strict=True)]
    before = after = _mean_cosine(kernels)
    if init == 'align' and convs[0].groups == 1:
        outputs = 'conv3' in blocks[0].branch  # else they are added to the stream, whose channels have their order
        for i, (ins, outs) in enumerate(_align(kernels, outputs)):
            kernels[i] = kernels[i][outs][:, ins]
            _permute(blocks[i], ins, outs)
        after = _mean_cosine(kernels)
    elif init == 'align':
        notes.append(f'{name}: grouped convolutions are not aligned, their mean was taken')
    norms = [_norm(kernel) for kernel in kernels]
    if init == 'first':
        kernel = kernels[0]
    elif init == 'random':
        kernel = torch.randn_like(kernels[0]) / math.sqrt(kernels[0][0].numel())
    else:
        kernel = sum(kernels) / len(kernels)  # type: ignore[assignment]
        kernel = kernel * (sum(norms) / len(norms) / _norm(kernel))
    for i, (block, norm) in enumerate(zip(blocks, norms, strict=True)):
        if _norm_after(block) is None and kernel.any():  # its scale would be lost
            scale = kernels[i].norm() / _norm(kernel)
            _scale_input(block, scale.expand(kernel.shape[1]))
            kernels[i] = kernels[i] * (_norm(kernel) / norm)
    conv = stage.conv_of(run[0])
    conv.weight.copy_(kernel)
    saved = (len(run) - 1) * conv.weight.numel()
    merge = Merge(name, tuple(run), saved, before, after)
    fitted = init in ('align', 'mean') and convs[0].groups == 1
    return merge, Fit(name, tuple(run), kernels if fitted else None, _norm_after(blocks[0]) is not None)


def _norm(kernel: torch.Tensor) -> torch.Tensor:
    """To divide by, also that of a kernel of zeros."""
    return kernel.norm().clamp(min=torch.finfo(kernel.dtype).tiny)


def _layers(block: SharingBlock) -> Tuple[List[str], List[str]]:
    """Names of the layers between the block's first convolution and its 3x3, and after the 3x3."""
    names = [name for name in block.branch if name == 'conv2' or getattr(block, name) is not None]
    i = names.index('conv2')
    return names[names.index('conv1') + 1 : i], names[i + 1 :]


def _norm_before(block: SharingBlock) -> Optional[nn.BatchNorm2d]:
    """The batch norm that scales the inputs of the 3x3, if what lies between passes a scale on."""
    layers = [getattr(block, name) for name in _layers(block)[0]]
    norms = [layer for layer in layers if type(layer) is nn.BatchNorm2d and layer.affine]
    acts = [layer for layer in layers if isinstance(layer, (nn.ReLU, nn.LeakyReLU))]
    return norms[0] if len(norms) == 1 and len(acts) == 1 else None


def _norm_after(block: SharingBlock) -> Optional[nn.BatchNorm2d]:
    names = _layers(block)[1]
    norm = getattr(block, names[0]) if names else None
    return norm if type(norm) is nn.BatchNorm2d and norm.track_running_stats else None


def _scale_input(block: SharingBlock, scale: torch.Tensor) -> None:
    """Multiply the inputs of the 3x3, one factor a channel, where a batch norm can do it."""
    norm = _norm_before(block)
    if norm is not None:
        norm.weight.mul_(scale.to(norm.weight))
        norm.bias.mul_(scale.to(norm.bias))


def _normalize(block: SharingBlock, kernel: torch.Tensor) -> torch.Tensor:
    """The kernel in units in which its inputs have an RMS of 1 and its outputs a variance of 1. The block computes the
    same with it: its batch norms are adapted."""
    norm = _norm_before(block)
    if norm is not None and kernel.shape[1] == norm.num_features:
        rms = _rms_after_relu(double(norm.weight), double(norm.bias))
        if rms.mean() > _OFF:
            rms = rms.clamp(min=_SMALLEST * rms.mean().item())
            kernel = kernel * rms[None, :, None, None]
            _scale_input(block, 1 / rms)
    norm = _norm_after(block)
    if norm is not None:
        std = (double(norm.running_var) + norm.eps).sqrt()
        kernel = kernel / std[:, None, None, None]
        norm.running_mean.div_(std.to(norm.running_mean))
        norm.running_var.fill_(1 - norm.eps)
    return kernel


def _rms_after_relu(scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """RMS of relu(z) for z normally distributed with the mean and standard deviation that batch norm gives."""
    scale = scale.abs().clamp(min=1e-12)
    ratio = shift / scale
    density = torch.exp(-0.5 * ratio**2) / math.sqrt(2 * math.pi)
    moment = (shift**2 + scale**2) * torch.special.ndtr(ratio) + shift * scale * density
    return moment.clamp(min=0).sqrt()


def _permute(block: SharingBlock, ins: torch.Tensor, outs: torch.Tensor) -> None:
    """Reorder the channels into and out of the block's 3x3. What the block computes stays the same."""
    before, after = _layers(block)
    _reorder(block.conv1, ins)
    for name in before:
        _reorder(getattr(block, name), ins)
    if 'conv3' in after:
        for name in after[: after.index('conv3')]:
            _reorder(getattr(block, name), outs)
        block.conv3.weight.copy_(block.conv3.weight[:, outs])


def _reorder(layer: nn.Module, order: torch.Tensor) -> None:
    """Reorder the outputs of a layer: what it has one of for each channel."""
    for tensor in itertools.chain(layer.parameters(), layer.buffers()):
        if tensor.ndim and len(tensor) == len(order):
            tensor.copy_(tensor[order])


def _mean_cosine(kernels: Sequence[torch.Tensor]) -> float:
    units = torch.stack([kernel.flatten() / _norm(kernel) for kernel in kernels])
    n = len(kernels)
    return ((units @ units.T).sum().item() - n) / (n * (n - 1))


# ---- Alignment


def _align(kernels: Sequence[torch.Tensor], outputs: bool) -> List[Tuple[torch.Tensor, torch.Tensor]]:
    """Orders of the inputs and outputs of each kernel that bring it near to the mean of the others."""
    generator = torch.Generator().manual_seed(0)
    identity = torch.arange(kernels[0].shape[1]), torch.arange(kernels[0].shape[0])
    orders = [identity]
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


def _ordered(kernel: torch.Tensor, order: Tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    ins, outs = order
    return kernel[outs][:, ins]


def _starts(
    target: torch.Tensor, kernel: torch.Tensor, outputs: bool, generator: torch.Generator
) -> List[Tuple[torch.Tensor, torch.Tensor]]:
    """Where to start: an order by what does not depend on the other side's (sorted values), and random ones."""
    o, i = kernel.shape[:2]
    if not outputs:
        return [(torch.arange(i), torch.arange(o))]
    signatures = [k.flatten(2).permute(0, 2, 1).sort(dim=2).values.flatten(1) for k in (target, kernel)]
    outs = _assign(-torch.cdist(*(signature / _norm(signature) for signature in signatures)))
    random = [torch.randperm(o, generator=generator) for _ in range(_STARTS - 1)]
    return [(_best_inputs(target, kernel[order]), order) for order in (outs, *random)]


def _match(
    target: torch.Tensor, kernel: torch.Tensor, outputs: bool, starts: Sequence[Tuple[torch.Tensor, torch.Tensor]]
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The orders of inputs and outputs with the largest product of kernel and target, one side after the other."""
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


# ---- Back


def unshare(model: nn.Module) -> nn.Module:
    """Make the plain twin that computes the same: each block has a copy of the convolution that it shared.

        >>> import timm, timm_sharesnet
        >>> plain = timm_sharesnet.unshare(timm.create_model('sharesnet50'))
        >>> timm.create_model('resnet50').load_state_dict(plain.state_dict(), strict=True)
        <All keys matched successfully>

    It is for tools that cannot handle a convolution that is used several times. Classes, names and `pretrained_cfg` are
    the twin's: of timm's ResNet for the ImageNet nets, of this package's unshared nets for the others.

    Args:
        model: Net of this package, or a model that contains one (`features_only`, a detector). It is not changed.

    Returns:
        The plain net, in the model's mode. In float64 it agrees with the model to a relative error of 1e-12.

    Raises:
        TypeError: If there is no net of this package in the model.
        ValueError: If the net is folded.
    """
    if not any(isinstance(m, SharedStage) for m in model.modules()):
        raise TypeError(f'{type(model).__name__} has no stage of timm_sharesnet, there is nothing to unshare.')
    if any(isinstance(m, SharingBlock) and m.folded for m in model.modules()):
        raise ValueError('A folded net has no twin: unshare the net that it was folded from, and fold the result.')
    model = copy.deepcopy(model)
    for m in list(model.modules()):
        stages = {name: child for name, child in m.named_children() if isinstance(child, SharedStage)}
        for name, stage in stages.items():
            setattr(m, name, _plain_stage(stage))
        if type(m) is ShaResNet:
            m.grad_checkpointing = any(stage.grad_checkpointing for stage in stages.values())
            m.__class__ = ResNet  # it adds no attribute to timm's, and so everything done to the model stays
        if stages:
            args = getattr(m, '_model_args', {})  # timm's
            base = args.pop('base', None)
            args.pop('share_rate', None)
            for cfg in getattr(m, 'pretrained_cfg', None), getattr(m, 'default_cfg', None):
                if isinstance(cfg, dict):
                    _name_twin(cfg, base)
    return model


def _plain_stage(stage: SharedStage) -> nn.Module:
    for i, block in enumerate(stage.blocks):
        conv = stage.conv_of(i)
        if conv is not None:
            block.take_conv2(copy.deepcopy(conv))
        if block.plain is not None:
            block.__class__ = block.plain
    if any(isinstance(block, SharingBlock) for block in stage.blocks):
        del stage.conv
        stage.conv, stage.several = None, False
        return stage
    plain = nn.Sequential(*stage.blocks)
    plain.training = stage.training  # `train()` would set it for the layers, too
    return plain


def _name_twin(cfg: dict, base: Optional[str]) -> None:
    name = cfg.get('architecture', '')
    twin = (base or name.removeprefix('sha')).partition('.')[0]  # sharesnet50 -> resnet50, shawrn40_4 -> wrn40_4
    if twin != name and is_model(twin):
        cfg['architecture'] = twin
        for key in _SOURCES:
            cfg.pop(key, None)

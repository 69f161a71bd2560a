"""Plain nets to shared ones, with or without their weights, and back."""

import copy
import itertools
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
from timm.models import create_model, is_model
from timm.models.resnet import ResNet

from ..conv_bn import is_plain
from ..model_args import unlike_its_name
from ..resnet import SHARING_BLOCKS, ShaResNet
from ..resnetv2 import CifarResNetV2
from ..share_rate import ShareRate, as_python, split_runs, stage_rates
from ..stage import SharedStage, SharingBlock
from .budget import Budget, runs_after, spend, steps_by_harm, steps_by_parameters
from .calibration import Batches, Measurement, Place
from .refit import calibrate, why_not_fitted
from .run import INITS, Merge, Run

__all__ = ['create_shared', 'share', 'unshare']

_SOURCES = 'file', 'hf_hub_id', 'hf_hub_filename', 'source', 'state_dict', 'url'


class Report(NamedTuple):
    """What `share` did, a line a run."""

    merges: Tuple[Merge, ...]
    notes: Tuple[str, ...]
    budget: Optional[Budget] = None

    def __str__(self) -> str:
        total = sum(m.saved for m in self.merges)
        frontier = [] if self.budget is None else [str(self.budget)]
        return '\n'.join([*frontier, *map(str, self.merges), *self.notes, f'{total:,} parameters saved'])


def share(
    model: nn.Module,
    rate: Optional[ShareRate] = None,
    init: str = 'align',
    images: Optional[Iterable[Any]] = None,
    refit: bool = True,
    progress: bool = False,
    save: Optional[float] = None,
) -> nn.Module:
    """Make a shared net of a plain one, to be trained on. At low rates, and with `images`, it is near to the plain one.

        >>> import timm, timm_sharesnet
        >>> plain = timm.create_model('resnet164_cifar')
        >>> shared = timm_sharesnet.share(plain, rate=0.5)
        >>> print(shared.share_report.merges[0].blocks, sum(p.numel() for p in shared.parameters()))
        (2, 3) 1316186

    Everything but the 3x3 that are shared is copied. Where nothing is, as at rate 0, the result computes what the model
    does.

    Args:
        model: timm's ResNet of BasicBlock or Bottleneck (any depth, width, stem, attention, classes and channels), or
            an unshared net of this package (also one of a shared net's class, at rate 0). It is not changed.
        rate: How much a stage shares, for all stages or for each: see `split_runs`. 1 is the paper.
        init: The kernel that the blocks of a run share, in units in which each input has an RMS of 1 and each output a
            variance of 1: 'align' is the mean after the blocks' inner channels were permuted to bring the kernels near
            to each other, 'mean' the mean without, 'first' the first block's, 'random' a new one.
        images: Batches of unlabelled images, preprocessed, of shape (B, C, H, W), or tuples that begin with one. A
            thousand images will do. The statistics of all batch norms are estimated anew; without, any merged net is
            near chance until it is trained. Frozen batch norms keep theirs.
        refit: Before that, given `images`, set each shared kernel (of 'align' and 'mean') to the one whose outputs are
            nearest to those that it stands for, and refit the last 1x1 of a bottleneck, or the last batch norm of a
            basic block, one after the other, so that its output is the plain net's again, by ridge regression. It goes
            through the images several times (what can be gone through once only is kept), and keeps at most 0.25 GB of
            them and the second moments of the kernels' inputs: 0.3 GB for ResNet-50, 0.9 GB for ResNet-152.
        progress: Show progress bars.
        save: In place of a rate, the part of all parameters to save at least. Blocks share where it costs least for
            what it saves: given `images`, by what the merge of two neighbouring runs changes in the outputs of blocks,
            else by parameters alone, the last stages first.

    Returns:
        A net of this package in the model's mode, of a registered model: saved, it loads by name. Its `share_report`
        says and prints what was merged, and whether its name and arguments do not build it again.

    Raises:
        TypeError: If the model is no such net, or `images` are none.
        ValueError: If its blocks cannot share, its weights are not there or not finite, or an argument is not as above.
    """
    if rate is not None and save is not None:
        raise ValueError('rate and save both say how much is shared: give one of them.')
    if save is not None and (isinstance(save, bool) or not isinstance(save, (int, float))):
        raise ValueError(f'save must be a number, the part of all parameters to save, got {save!r}.')
    if init not in INITS:
        raise ValueError(f'init must be one of {", ".join(INITS)}, got {init!r}.')
    _plain_stages(model)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError('The model is on the meta device and has no values to share: load its weights first.')
    infinite = _not_finite(model)
    if infinite:
        raise ValueError(f'{infinite} has values that are not finite, nothing can be made of them.')
    shared = copy.deepcopy(model)
    tensors = itertools.chain(model.parameters(), model.buffers())
    plain = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})  # which nothing changes
    synchronised = [m for m in shared.modules() if type(m) is nn.SyncBatchNorm]
    for m in (*synchronised, *plain.modules()):  # each process has all images
        if type(m) is nn.SyncBatchNorm:
            m.__class__ = nn.BatchNorm2d
    _share_stages(plain, 0.0)
    able = _blocks_that_can_share(plain)
    batches = None if images is None else Batches(model, images, progress)
    measured = None
    if batches is not None and (refit and init in ('align', 'mean') or save is not None):
        batches.keep()
        measured = Measurement(plain, able, batches, save is not None)
    budget = None
    if save is not None:
        steps = steps_by_harm(able, measured) if measured else steps_by_parameters(able)
        budget = spend(steps, save, sum(p.numel() for p in model.parameters()))
        rate = runs_after(budget.steps[: budget.taken], _stage_names(model))
    rate = 1.0 if rate is None else rate
    stage_runs = _share_stages(shared, rate)
    batches = batches if any(stage_runs.values()) else None  # else the net stays as it is
    runs: List[Run] = []
    notes: List[str] = []
    with torch.no_grad():
        for name, indices_of_runs in stage_runs.items():
            stage, blocks = shared.get_submodule(name), list(plain.get_submodule(name))
            for indices in indices_of_runs:
                run = Run(name, stage, indices, [blocks[i].conv2.weight for i in indices])
                used = refit and measured is not None  # each of the moments once, as they are large
                run.merge(init, (measured.inputs.pop((name, i)) for i in indices) if used else None)
                runs.append(run)
                if init == 'align' and run.conv.groups > 1:
                    notes.append(f'{name}: grouped convolutions are not aligned, their mean was taken')
                why = why_not_fitted(run.blocks[0])
                if batches is not None and refit and why:
                    notes.append(f'{name}: {why}')
        if batches is not None:
            measured = None  # it is large
            calibrate(shared, plain, stage_runs, runs if refit else [], batches, progress)
            frozen = sum(type(m).__name__.startswith('FrozenBatchNorm') for m in shared.modules())
            if frozen:
                notes.append(f'{frozen} batch norms are frozen and keep their statistics, which may not fit')
        elif runs:
            notes.append('no images were given: the statistics of batch norms do not fit, and nothing is refitted')
    infinite = _not_finite(shared)
    if infinite:
        raise ValueError(f'{infinite} got values that are not finite: those of the model or the images are too large.')
    for m in synchronised:
        m.__class__ = nn.SyncBatchNorm
    notes.append(_name_shared(shared, rate))
    merges, told = tuple(run.report() for run in runs), tuple(filter(None, dict.fromkeys(notes)))
    shared.share_report = Report(merges, told, budget)
    return shared


def _blocks_that_can_share(plain: nn.Module) -> Dict[Place, SharingBlock]:
    """The blocks of a net at rate 0 that can share, in stages where there are two."""
    names, blocks = _stage_names(plain), {}
    for name, stage in _plain_stages(plain).items():
        first = stage[0].first_shared(names.index(name))
        if first + 1 < len(stage):
            blocks |= {(name, i): stage[i] for i in range(first, len(stage))}
    return blocks


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
            if not isinstance(block, SharingBlock) and type(block) not in SHARING_BLOCKS:
                raise TypeError(f'{name}.{i} is a {type(block).__name__}, only BasicBlock and Bottleneck can share.')
            if not is_plain(block.conv2):
                raise ValueError(
                    f'{name}.{i}.conv2 is no plain convolution, or is folded, or has a hook or a parametrization: '
                    f'{block.conv2}'
                )
    return stages


def _stage_names(model: nn.Module) -> List[str]:
    return [info['module'] for info in model.feature_info[1:]]


def _share_stages(model: nn.Module, rate: ShareRate) -> Dict[str, List[Tuple[int, ...]]]:
    """Turn the stages of a plain net into shared ones, in place. Returns the runs that share, by stage."""
    stages = _plain_stages(model)
    names = _stage_names(model)
    rates = stage_rates(rate, len(names))
    runs = {}
    for name, stage in stages.items():
        i, blocks = names.index(name), list(stage)
        for block in blocks:
            block.__class__ = SHARING_BLOCKS.get(type(block), type(block))  # they add no attribute to timm's
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
    plain_blocks = {shared: plain for plain, shared in SHARING_BLOCKS.items()}
    for i, block in enumerate(stage.blocks):
        conv = stage.conv_of(i)
        if conv is not None:
            block.take_conv2(copy.deepcopy(conv))
        block.__class__ = plain_blocks.get(type(block), type(block))
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

"""What train.py makes of the options: model, optimizer, schedule, augmentation, on a device."""

import argparse
import contextlib
import importlib
import os
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, Sequence, Tuple

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from ..cli import CommandError, did_you_mean, headline
from ..model_args import TRAIN_ARGS, args_from_options, resolve_in_chans
from .checkpoints import check_name
from .values import shown

_TRANSFORM_OPTIONS = (
    'no_aug train_crop_mode scale ratio hflip vflip color_jitter color_jitter_prob grayscale_prob gaussian_blur_prob'
).split()


@contextlib.contextmanager
def blame(what: str) -> Iterator[None]:
    """Begin an error of any kind with what it is about. What timm makes raises many kinds at what it does not take."""
    try:
        yield
    except Exception as e:
        raise CommandError(f'{what}: {headline(e)}') from e


def build_model(args: argparse.Namespace) -> Any:
    """The model as train.py builds it, without weights. (To mypy every attribute of an nn.Module is a tensor: Any.)

    Raises:
        CommandError: If there is no such model, or it does not take the arguments.
    """
    check_name('model', args.model)
    for key in args.model_kwargs:
        if key in TRAIN_ARGS:
            raise CommandError(f"model_kwargs: {key} is train.py's own, by the option {TRAIN_ARGS[key]}.")
    with blame(f'model: {args.model} cannot be built'):
        kwargs = {**args_from_options(vars(args)), 'scriptable': args.torchscript, **args.model_kwargs}
        model: Any = timm.create_model(args.model, **kwargs)
        if args.grad_checkpointing:
            model.set_grad_checkpointing(True)
    return model


def check_machine(args: argparse.Namespace) -> str:
    """Modules, device and output folder."""
    for module in args.device_modules or ():
        with blame(f'device_modules: {module} cannot be imported'):
            importlib.import_module(module)  # as train.py: it may bring the device, or models
    try:
        torch.zeros(1, device=torch.device(args.device)).item()  # not on meta, whose tensors have no values
    except Exception as e:  # each backend has its own
        raise CommandError(
            f'device: {shown(args.device)} cannot be used here ({headline(e).split(". ")[0]}). --device cpu trains on '
            f'the CPU, and lets a config for another machine be checked.'
        ) from e
    output = Path(args.output or 'output/train') / args.experiment
    folder = os.path.abspath(output)
    while not os.path.lexists(folder):
        if len(os.path.basename(os.fsencode(folder))) > 255:
            raise CommandError(f'output, experiment: {shown(os.path.basename(folder))} is too long for a name.')
        folder = os.path.dirname(folder)
    try:
        tempfile.TemporaryFile(dir=folder).close()  # leaves nothing behind
    except OSError as e:
        raise CommandError(f'output: {output} cannot be written: {folder}: {e.strerror}.') from e
    return f'{args.device}, writes to {output}'


def check_training(args: argparse.Namespace, model: Any, data: Dict[str, Any]) -> Tuple[str, int]:
    """Make what train.py makes from the options, as it does, and return what that is and the number of epochs."""
    _check_transforms(args, data)
    known = [str(name) for name in list_optimizers()]
    name = args.opt.lower().removeprefix('lookahead_')
    if name not in known:  # timm takes x_sgd for sgd
        near = did_you_mean(name, known, '. timm.optim.list_optimizers() has the names.')
        raise CommandError(f'opt: timm knows no optimizer {args.opt}{near}')
    with blame(f'opt, opt_kwargs: {args.opt} cannot be made'):
        kwargs = {**optimizer_kwargs(cfg=args), 'lr': args.lr or args.lr_base}
        optimizer = create_optimizer_v2(model, **kwargs, **args.opt_kwargs)
    with blame(f'sched: {args.sched} cannot be made'):
        scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=1)
    if scheduler is None:  # an unknown name, and none, which train.py does not survive
        raise CommandError(
            f'sched: {args.sched} is no schedule, take cosine, tanh, step, multistep, poly, plateau or another of timm.'
        )
    if epochs <= (args.start_epoch or 0):
        raise CommandError(f'start_epoch: {args.start_epoch} of {epochs} epochs, train.py would do nothing.')
    if args.torchcompile:
        with blame('torchcompile, torchcompile_mode'):
            torch.compile(torch.nn.Identity(), backend=args.torchcompile, mode=args.torchcompile_mode)
    return f'{type(optimizer).__name__}, {type(scheduler).__name__}, {epochs} epochs', epochs


def _check_transforms(args: argparse.Namespace, data: Dict[str, Any]) -> None:
    channels, height, width = data['input_size']
    mode = args.input_img_mode or ('RGB' if channels == 3 else 'L')
    try:
        image = Image.new('RGB', (width, height)).convert(mode)
    except Exception as e:
        raise CommandError(f'input_img_mode: PIL has no mode {shown(mode)}.') from e
    in_chans = resolve_in_chans(vars(args))
    if len(image.getbands()) != in_chans:
        raise CommandError(
            f'in_chans: {in_chans}, but train.py would read images of mode {mode} with '
            f'{len(image.getbands())} channels: set input_size and input_img_mode, too.'
        )
    if args.naflex_loader:
        return
    kwargs = {key: getattr(args, key) for key in _TRANSFORM_OPTIONS}
    kwargs.update(
        is_training=True,
        auto_augment=args.aa,
        interpolation=data['interpolation'] if args.no_aug else args.train_interpolation or data['interpolation'],
        mean=data['mean'],
        std=data['std'],
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        use_prefetcher=not args.no_prefetcher,
    )
    with blame('the augmentation for training cannot be made'):
        create_transform(data['input_size'], **kwargs)(image)


def data_config(args: argparse.Namespace, model: Any) -> Dict[str, Any]:
    try:
        return resolve_data_config(vars(args), model=model)
    except AssertionError as e:
        raise CommandError('mean, std: must have one number for each input channel.') from e


def check_size(args: argparse.Namespace, model: Any, size: Sequence[int]) -> str:
    cfg = model.pretrained_cfg
    if cfg.get('pool_size') and getattr(model, 'feature_info', None):  # a convolutional net
        if args.naflex_loader:
            raise CommandError(f'naflex_loader: makes patches for a vision transformer, {args.model} takes images.')
        reduction = model.feature_info[-1]['reduction']
        for side in {*size, *(args.train_img_sizes or ())}:
            cells = -(-side // reduction)
            if not 2 <= cells <= 32:
                raise CommandError(
                    f'img_size: {side} px does not fit {cfg["architecture"]}, whose last feature map would be '
                    f'{cells} x {cells}; it was made for {cfg["input_size"][-1]} px.'
                )
    return ' x '.join(map(str, size)) + ' px'

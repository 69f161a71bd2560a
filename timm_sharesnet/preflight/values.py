"""What the values of train.py's options must be, where its argument parser does not say so.

timm takes many of them without a word (an unknown `mixup_mode` is another one, an unknown `dist_bn` is none) or
stumbles over them after the first step or epoch. The lists are timm's, from where each comment says.
"""

import argparse
import re
from typing import Any, Callable, Dict, Iterator, Tuple

from ..cli import CommandError

_INTERPOLATIONS = ('', 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')  # data/transforms.py
VALUES: Dict[str, Tuple[str, ...]] = {
    'amp_dtype': ('float16', 'bfloat16'),  # train.py
    'clip_mode': ('norm', 'value', 'agc'),  # utils/clip_grad.py, at the first step
    'dist_bn': ('', 'broadcast', 'reduce'),  # train.py, others do nothing
    'eval_metric': ('top1', 'top5', 'loss'),  # train.py's validate(), after the first epoch
    'fuser': ('', 'te', 'old', 'legacy', 'nvfuser', 'nvf'),  # utils/jit.py
    'interpolation': _INTERPOLATIONS,
    'kd_loss_type': ('kl',),  # task/distillation.py
    'lr_base_scale': ('', 'linear', 'sqrt'),  # train.py, others are linear
    'mixup_mode': ('batch', 'pair', 'elem', 'half'),  # data/mixup.py, others are batch
    'model_dtype': ('', 'float32', 'float16', 'bfloat16'),  # train.py
    'naflex_loss_scale': ('none', 'sqrt', 'linear'),  # train.py, without choices before 1.0.29
    'remode': ('', 'const', 'rand', 'pixel'),  # data/random_erasing.py
    'train_crop_mode': ('', 'rrc', 'rkrc', 'rkrr'),  # data/transforms_factory.py
    'train_interpolation': (*_INTERPOLATIONS, 'random'),
    'worker_seeding': ('all', 'part'),  # data/loader.py, in the workers
}

# What the numbers mean. Lists: each of them.
RANGES: Dict[str, Tuple[Callable[[float], bool], str]] = {
    'at least 1': (
        lambda v: v >= 1,
        'batch_size validation_batch_size epochs num_classes img_size in_chans input_size grad_accum_steps '
        'lr_base_size lr_cycle_limit recount log_interval val_interval checkpoint_hist train_num_samples '
        'val_num_samples train_img_sizes train_batch_sizes train_batches_per_epoch naflex_train_seq_lens '
        'naflex_max_seq_len naflex_patch_sizes kd_student_feature_dim kd_teacher_feature_dim',
    ),
    'at least 0': (
        lambda v: v >= 0,
        'workers tta recovery_interval epoch_repeats start_epoch warmup_epochs cooldown_epochs patience_epochs '
        'decay_milestones warmup_lr min_lr weight_decay opt_eps layer_decay_min_scale layer_decay_no_opt_scale '
        'lr_noise lr_noise_pct lr_noise_std lr_cycle_decay color_jitter aug_repeats aug_splits mixup cutmix '
        'mixup_off_epoch train_size_probs naflex_patch_size_probs distill_loss_weight task_loss_weight',
    ),
    'above 0': (
        lambda v: v > 0,
        'lr lr_base decay_rate decay_epochs lr_cycle_mul lr_k_decay clip_grad layer_decay crop_pct scale ratio std '
        'bn_eps bce_pos_weight kd_temperature train_size_schedule_spread',
    ),
    'from 0 to 1': (
        lambda v: 0 <= v <= 1,
        'hflip vflip color_jitter_prob grayscale_prob gaussian_blur_prob reprob mixup_prob mixup_switch_prob '
        'cutmix_minmax bce_target_thresh bn_momentum train_size_random_mix',
    ),
    'at least 0 and below 1': (
        lambda v: 0 <= v < 1,
        'momentum opt_betas smoothing drop drop_connect drop_path drop_block model_ema_decay',
    ),
    'from 0 to 4294967295': (lambda v: 0 <= v < 2**32, 'seed'),  # NumPy's
}

_FLOAT = r'\d+(\.\d+)?'
# data/auto_augment.py. It skips sections that it cannot read, and an mmax above 10 crashes in posterize.
_AUTO_AUGMENT = re.compile(
    rf'rand(-[mn]\d+|-p{_FLOAT}|-mstd{_FLOAT}|-mmax([1-9]|10)|-inc[01]|-t(weights|3a|3aw))*'
    rf'|augmix(-[mwdb]\d+|-a{_FLOAT}|-mstd{_FLOAT})*'
    rf'|(v0|v0r|original|originalr|3a)(-mstd{_FLOAT})?'
)


def shown(value: Any) -> str:
    """A value for a message, not longer than a line."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return 'a number of thousands of digits'
    return text if len(text) <= 80 else f'{text[:77]}...'


def check_values(args: argparse.Namespace) -> None:
    """Check the values of parsed options, each and with one another."""
    fault = next(_faults(args), '')
    if fault:
        raise CommandError(fault)


def _faults(args: argparse.Namespace) -> Iterator[str]:
    for name, value in vars(args).items():
        for leaf in _leaves(value):
            if isinstance(leaf, (int, float)) and not -1e300 < leaf < 1e300:
                yield f'{name}: must be a finite number, not {shown(leaf)}.'
            if isinstance(leaf, str) and '\0' in leaf:
                yield f'{name}: must be text without a null character, not {shown(leaf)}.'
    for name, values in VALUES.items():
        value = getattr(args, name)
        if value is not None and value not in values:
            yield f'{name}: must be one of {", ".join(v or "(empty)" for v in values)}, not {shown(value)}.'
    for meaning, (holds, names) in RANGES.items():
        for name in names.split():
            for leaf in _leaves(getattr(args, name)):
                if leaf is not None and not holds(leaf):
                    yield f'{name}: must be {meaning}, not {shown(leaf)}.'
    if args.aa and not _AUTO_AUGMENT.fullmatch(args.aa):
        yield (
            f'aa: {shown(args.aa)} is not all read by timm. It knows v0, v0r, original, originalr and 3a, and the '
            f'forms rand-m9-mstd0.5-inc1 and augmix-m5-w4-d2 (mmax up to 10).'
        )
    yield from _conflicts(args)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple, dict)):
        for item in [*value.keys(), *value.values()] if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value


def _conflicts(args: argparse.Namespace) -> Iterator[str]:
    """Options that do not go together: train.py stops at them by an assertion, at the first batch, or goes on."""
    mixing = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixing and not args.naflex_loader:
        name = 'train_batch_sizes' if args.train_batch_sizes else 'batch_size'
        if odd := [v for v in _leaves(getattr(args, name)) if v % 2]:
            yield f'{name}: {odd[0]} is odd, and mixup and cutmix mix the images of a batch in pairs.'
        if args.aug_splits and not args.no_prefetcher:
            yield 'aug_splits: goes with mixup and cutmix only under no_prefetcher.'
    interpolation = args.train_interpolation or args.interpolation
    if args.aa and '3a' not in args.aa and not args.no_aug and interpolation in ('lanczos', 'box', 'hamming'):
        yield f'aa: rotates and shears, which PIL cannot do with {interpolation}: take bicubic, bilinear or random.'
    if args.mixup_mode == 'half' and args.no_prefetcher:
        yield 'mixup_mode: half needs the prefetcher, under no_prefetcher it would be batch.'
    for name in 'scale', 'ratio', 'cutmix_minmax':
        value = getattr(args, name)
        if value is not None and (len(value) != 2 or value[0] > value[1]):
            yield f'{name}: must be two numbers, the smaller first, not {shown(value)}.'
    if args.cutmix_minmax and args.cutmix_minmax[0] == args.cutmix_minmax[1]:
        yield f'cutmix_minmax: must be two different numbers, not {shown(args.cutmix_minmax)}.'
    if args.sched == 'multistep' and sorted(set(args.decay_milestones)) != args.decay_milestones:
        yield f'decay_milestones: must be increasing, not {shown(args.decay_milestones)}.'
    if args.sched == 'plateau' and args.sched_on_updates:
        yield 'sched_on_updates: plateau steps by epoch only.'
    if args.aug_splits == 1:
        yield 'aug_splits: must be 0 or at least 2, not 1.'
    if args.jsd_loss and args.aug_splits < 2:
        yield 'jsd_loss: needs aug_splits of at least 2.'
    if args.split_bn and args.aug_splits < 2 and not args.resplit:
        yield 'split_bn: needs aug_splits of at least 2, or resplit.'
    if args.bce_loss and not (mixing or args.smoothing or args.jsd_loss):
        yield 'bce_loss: is used only with mixup, cutmix or smoothing, train.py would train with cross entropy.'
    if args.amp and args.model_dtype not in (None, '', 'float32'):
        yield f'model_dtype: must be float32 with amp, not {args.model_dtype}.'
    if args.torchscript and (args.torchcompile or args.sync_bn):
        yield 'torchscript: goes with neither torchcompile nor sync_bn.'
    if args.naflex_loader and (args.train_img_sizes or args.use_multi_epochs_loader):
        yield 'naflex_loader: goes with neither train_img_sizes nor use_multi_epochs_loader.'
    if args.train_img_sizes and (args.aug_splits or args.use_multi_epochs_loader):
        yield 'train_img_sizes: goes with neither aug_splits nor use_multi_epochs_loader.'
    for name, of in (
        ('train_batch_sizes', 'train_img_sizes'),
        ('train_size_probs', 'train_img_sizes'),
        ('naflex_patch_size_probs', 'naflex_patch_sizes'),
    ):
        value = getattr(args, name)
        if value is not None and len(value) != len(getattr(args, of) or ()):
            yield f'{name}: must have one number for each of {of}, not {shown(value)}.'
        if value is not None and not any(value):
            yield f'{name}: must not be all 0.'
    if args.pretrained_path and not args.pretrained:
        yield 'pretrained_path: is not loaded without pretrained: true (--pretrained).'
    if args.log_wandb and args.wandb_resume_id and not args.resume:
        yield 'wandb_resume_id: needs resume.'

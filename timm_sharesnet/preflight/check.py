"""Check a training config and what it names, in seconds, before timm's train.py starts.

    python -m timm_sharesnet.preflight CONFIG [options of train.py]

with the options that train.py will get beside `--config CONFIG`. It writes nothing and downloads nothing. Exit code 0:
no fault was found, and a summary says what was checked and what was not. Exit code 2: train.py would fail or train
something else, and one line on stderr names the file or key. train.py reports these faults badly or not at all:

  * Keys of the config that are not train.py's (it ignores them) or stand there twice, values of the wrong type or not
    among the choices, names that timm does not know or silently takes for another, numbers that make no sense.
  * The device is there, and the output folder can be written. Give `--device cpu` to train on a CPU, and to check a
    config for another machine.
  * The model, optimizer, schedule, augmentation and compiler can be made from their options.
  * `data_dir` and both splits are there and hold images. Where the folder of a split is missing, train.py trains or
    validates on everything in `data_dir`.
  * The data has `num_classes` classes (the model's, where that is not set), in both splits the same. With fewer,
    train.py trains; with other folders in the validation split, it compares with shifted labels.
  * The image size fits a convolutional model: its last feature map is at least 2 x 2 and at most 32 x 32. This refuses
    32 px on an ImageNet net (1 x 1) and 224 px on a CIFAR net (56 x 56), which cannot be meant, and allows what may be:
    Tiny-ImageNet's 64 px on an ImageNet net, 64 or 96 px on a CIFAR net.
  * `resume` and `initial_checkpoint` can be read (without running code in them) and hold exactly the model's tensors,
    `pretrained_path` may have another classifier. A config.json or args.yaml beside the file describes the same net:
    with another activation or other blocks that share, the same tensors compute something else. With `pretrained`, timm
    has weights for the model.
  * The teacher of a distillation has weights and the student's classes; a `local-dir:` folder loads.

Datasets that are streamed or looked up while training (`hfds/`, `hfids/`, `tfds/`, `wds/`) are not checked, and the
summary says so. The options are those of train.py at the versions in `train_options.json`.
"""

from typing import List, Sequence

from ..cli import CommandError, command, concerning, printable
from .checkpoints import check_checkpoint, check_pretrained, check_teacher
from .data import check_data
from .options import USAGE, VERSIONS, parse_train_args, train_options
from .training import build_model, check_machine, check_size, check_training, data_config


def preflight(config: str, options: Sequence[str] = ()) -> List[str]:
    """Check the YAML file `config` with the options that train.py will get beside it.

    Returns:
        Lines that say what was checked and found.

    Raises:
        CommandError: At the first fault.
    """
    args = parse_train_args(config, options)
    machine = check_machine(args)
    model = build_model(args)
    num_classes = model.num_classes
    data = data_config(args, model)
    size = check_size(args, model, data['input_size'][1:])
    training, epochs = check_training(args, model, data)
    lines = [f'config  {config}: all keys and values are options of train.py']
    known = train_options(VERSIONS[0])
    newer = [k for k, option in train_options().items() if k not in known and getattr(args, k) != option.get('default')]
    if newer:
        lines.append(f'        {", ".join(newer)}: only in a train.py newer than timm {VERSIONS[0]}')
    if args.aug_repeats:
        lines.append('        aug_repeats: only with several processes (torchrun)')
    lines.append(f'device  {machine}')
    parameters = sum(p.numel() for p in model.parameters())
    lines.append(f'model   {args.model}: {parameters:,} parameters, {num_classes} classes, {size}')
    lines.append(f'train   {training}')
    if args.pretrained:
        lines.append(f'weights {check_pretrained(args, model)}')
    for key in 'initial_checkpoint', 'resume':
        if getattr(args, key):
            lines.append(f'weights {check_checkpoint(args, key, model, epochs)}')
    if args.kd_model_name:
        lines.append(f'teacher {check_teacher(args, num_classes)}')
    lines.append(f'data    {check_data(args, num_classes)}')  # last: it may take longest
    return lines


@command('preflight')
def main(argv: Sequence[str]) -> None:
    """The command line, see the module."""
    if not {'-h', '--help'}.isdisjoint(argv):
        print((__doc__ or '').strip())
        return
    if not argv or argv[0].startswith('-'):
        raise CommandError(f'usage: {USAGE}')
    with concerning(argv[0]):
        lines = preflight(argv[0], argv[1:])
    for line in lines:
        print(printable(line))

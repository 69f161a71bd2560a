"""What is published, and where: networks, data sets, and the directories that hold the folders.

`ARCH.TAG` is parsed once, into a Release. Ours lie in hub/, and the end of their tag names the data set. People's own
lie in a directory outside of hub/ with manifests of its own, and nothing of ours is written for them.
"""

import contextlib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from folder import HUB, LARGE, ONNX, SAMPLES, WEIGHTS, read_json

from timm_sharesnet.cli import CommandError, did_you_mean

PACKAGE = HUB.parent / 'timm_sharesnet'
NAMESPACE = 'timm-sharesnet'  # ours, once registered; TIMM_SHARESNET_NAMESPACE or --namespace for people's own
SPACE = 'sharesnet'  # the page's name there
TRACKED_BYTES = 80e6  # what all tracked weights together stay under


class Paper(NamedTuple):
    """What the paper says of a network: its accuracy (top-1, top-5 or None) and the table."""

    name: str
    top1: float
    top5: float | None
    table: str


class Net(NamedTuple):
    """A network: its unshared twin (or itself), parameters of both, the paper's accuracies, their data set."""

    twin: str
    parameters: int
    twin_parameters: int
    paper: tuple[Paper, ...]
    dataset: str


def _imagenet(depth, parameters, twin_parameters, shared, original):
    """A network of Table 2's ImageNet part, which gives errors."""
    rows = [(f'ResNet-{depth}, shared', shared), (f'ResNet-{depth}, unshared', original)]
    paper = tuple(Paper(name, *(round(100 - e, 2) for e in errors), 'Table 2') for name, errors in rows)
    return Net(f'resnet{depth}', parameters, twin_parameters, paper, 'in1k')


def _cifar(name, shared, unshared, smaller, like):
    """What Tables 2 and 3 have of a network of the CIFAR part, shared or not, and of one with as few parameters."""
    rows = [(f'{name}, shared', shared, 'Table 2'), (f'{name}, unshared', unshared, 'Table 2')]
    rows += [(f'{smaller}, unshared, of like size', like, 'Table 3')]
    return tuple(Paper(who, top1, None, table) for who, top1, table in rows)


_R164 = _cifar('ResNet-164', 93.8, 94.54, 'ResNet-92', 93.9)
_W40 = _cifar('WRN-40-4', 94.9, 95.83, 'WRN-28-4', 95.0)
_W28 = _cifar('WRN-28-10', 79.8, 80.0, 'WRN-22-10', 79.55)
NETS = {
    'sharesnet164_cifar': Net('resnet164_cifar', 929_114, 1_703_258, _R164, 'c10'),
    'resnet164_cifar': Net('resnet164_cifar', 1_703_258, 1_703_258, _R164, 'c10'),
    'shawrn40_4': Net('wrn40_4', 5_852_634, 8_949_210, _W40, 'c10'),
    'wrn40_4': Net('wrn40_4', 8_949_210, 8_949_210, _W40, 'c10'),
    'shawrn28_10': Net('wrn28_10', 26_860_084, 36_536_884, _W28, 'c100'),
    'wrn28_10': Net('wrn28_10', 36_536_884, 36_536_884, _W28, 'c100'),
    'resnet92_cifar': Net('resnet92_cifar', 961_370, 961_370, _R164, 'c10'),
    'wrn28_4': Net('wrn28_4', 5_849_050, 5_849_050, _W40, 'c10'),
    'wrn22_10': Net('wrn22_10', 26_855_604, 26_855_604, _W28, 'c100'),
    'sharesnet34': _imagenet(34, 13_613_864, 21_797_672, (28.25, 9.42), (26.73, 8.74)),
    'sharesnet50': _imagenet(50, 20_469_800, 25_557_032, (24.61, 7.41), (24.01, 7.02)),
    'sharesnet101': _imagenet(101, 29_434_920, 44_549_160, (22.91, 6.55), (22.44, 6.21)),
    'sharesnet152': _imagenet(152, 36_821_032, 60_192_808, (22.23, 6.14), (22.16, 6.16)),
}


class Dataset(NamedTuple):
    """A data set.

    Args:
        id: On the Hub, if it is there.
        name: As people know it.
        split: That measures.
        images: Of the split; None if nobody has counted them.
        classes: How many.
        sample: Our sample of it, which has the names of the classes.
        label_names: Of a user's, in the order of the classifier's outputs.
        license: Of a user's.
    """

    id: str | None
    name: str
    split: str
    images: int | None
    classes: int
    sample: str | None = None
    label_names: list[str] | None = None
    license: str | None = None

    @property
    def ours(self):
        return self in DATASETS.values()

    def names(self):
        """Names of the classes, None for ImageNet's, which timm knows. Where nobody told them they are numbers."""
        if self.sample:
            return read_json(SAMPLES / f'{self.sample}.json')['classes']
        return None if self.ours else self.label_names or [str(i) for i in range(self.classes)]


DROP_RATES = ('drop_rate', 'drop_path_rate', 'drop_block_rate', 'block_drop_rate')
# What a net is built with where nobody says otherwise
DEFAULT_ARGS = {'in_chans': 3, 'global_pool': 'avg', **dict.fromkeys(DROP_RATES, 0)}
# What changes how a net is trained, and not what the trained one computes
TRAINING_ARGS = (*DROP_RATES, 'zero_init_last')


def other_args(arch, model_args):
    """The arguments that make a net compute other than the paper's of this name."""
    default = {'share_rate': default_rate(arch)}
    return {k: v for k, v in model_args.items() if k not in TRAINING_ARGS and default.get(k) != v}


def default_rate(arch):
    return int(NETS[arch].twin != arch)


DATASETS = {
    'c10': Dataset('uoft-cs/cifar10', 'CIFAR-10', 'test', 10_000, 10, 'cifar10_test_1000'),
    'c100': Dataset('uoft-cs/cifar100', 'CIFAR-100', 'test', 10_000, 100, 'cifar100_test_1000'),
    'in1k': Dataset('ILSVRC/imagenet-1k', 'ImageNet-1k', 'validation', 50_000, 1000),
}


class Shelf(NamedTuple):
    """A directory that holds folders ARCH.TAG, and what is known of them.

    `manifest.json` has what was measured, `weights.json` hash, size and pin of the weights.

    Args:
        path: The directory.
        package: What has the weights.json of ours, and copies of some weights. None for a user's.
    """

    path: Path
    package: Path | None = None

    @property
    def manifest(self):
        return self.path / 'manifest.json'

    @property
    def pins(self):
        return (self.package or self.path) / 'weights.json'

    @property
    def ignored(self):
        """Names what of ours is too large to be tracked."""
        return self.path / '.gitignore'

    def read(self):
        """What was measured, and the pins."""
        return read_json(self.manifest), read_json(self.pins)

    def names(self):
        """Names of the folders that there are."""
        folders = [path for path in self.path.glob('[!._]*.*') if path.is_dir()]
        return sorted(path.name for path in folders if self.package or (path / 'config.json').is_file())

    def packaged(self, name):
        """Where a model's weights lie if they travel in the package."""
        return self.package / 'weights' / f'{name}.safetensors'

    def tracked(self, name, part=WEIGHTS):
        """Whether a model's weights, or its ONNX files, are in git. Otherwise only their hashes are."""
        return self.package is None or f'/{name}/{part}' not in self.ignored.read_text(encoding='utf-8').split()

    @contextlib.contextmanager
    def locked(self):
        """Keep other processes from writing to it meanwhile. The lock goes with the process that holds it."""
        import fcntl

        with open(self.path / '.lock', 'a') as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


OURS = Shelf(HUB, PACKAGE)


def tracked_bytes(manifest, pins, ignored):
    """Size of all weights and ONNX files but the ignored ones; weights in the package are there twice."""
    weights = sum(
        pin['size'] * (1 + pin['packaged']) for name, pin in pins.items() if f'/{name}/{WEIGHTS}' not in ignored
    )
    onnx = [entry.get('onnx', {}) for name, entry in manifest.items() if f'/{name}/{ONNX}/' not in ignored]
    return weights + sum(file['size'] for entry in onnx for file in entry.get('files', {}).values())


def ignore_too_large(name, manifest, pins, ignored):
    """What git must ignore of a model to stay under TRACKED_BYTES: lines to add to .gitignore."""
    added = []
    for part in LARGE:
        line = f'/{name}/{part}'
        total = tracked_bytes(manifest, pins, [*ignored, *added])
        if line not in ignored and total >= TRACKED_BYTES:
            added.append(line)
    return added


def open_shelf(output):
    """Where --output says, else hub/."""
    if output is None:
        return OURS
    path = Path(os.path.abspath(output))
    for ours in (OURS.path, OURS.package):
        if path.resolve().is_relative_to(ours.resolve()):
            raise CommandError(
                f'--output is for folders of your own, and {output} is in {ours}: give another directory'
            )
    return Shelf(path)


class Release(NamedTuple):
    """A published model.

    Args:
        arch: Its network.
        tag: What tells its weights.
        dataset: What it was trained on, None if that is still to be told.
        shelf: Where its folder lies.
        path: Its folder.
        model_args: What the network is built with, beside its name and `DEFAULT_ARGS`.
    """

    arch: str
    tag: str
    dataset: Dataset | None
    shelf: Shelf
    path: Path
    model_args: dict[str, Any]

    @property
    def name(self):
        return f'{self.arch}.{self.tag}'

    @property
    def net(self):
        return NETS[self.arch]

    @property
    def shared(self):
        """Whether it shares convolutions, so that it has a twin that does not."""
        return any(self.share_rate) if isinstance(self.share_rate, list) else self.share_rate > 0

    @property
    def share_rate(self):
        return self.model_args.get('share_rate', default_rate(self.arch))

    @property
    def in_chans(self):
        return self.model_args.get('in_chans', DEFAULT_ARGS['in_chans'])

    @property
    def other_args(self):
        return other_args(self.arch, self.model_args)

    @property
    def imported(self):
        """Whether it holds the author's weights."""
        return self.tag.startswith('torch7_')

    @property
    def in_paper(self):
        """Whether the paper has the network on this data set."""
        return self.dataset == DATASETS[self.net.dataset] and not self.other_args

    @property
    def told(self):
        """What the manifest has of it before anything is measured."""
        data = self.dataset.name if self.dataset.ours else self.dataset._asdict()
        return {'model_args': self.model_args, 'imported': self.imported, 'data': data}

    @property
    def shown(self):
        """The folder's path from here."""
        return os.path.relpath(self.path)


def parse(name, shelf):
    """The release that ARCH.TAG names."""
    arch, _, tag = name.partition('.')
    if not re.fullmatch(r'\w+\.\w+', name, re.ASCII):
        raise CommandError(f'{name!r} is not ARCH.TAG, two words of letters, digits and underscores')
    if arch not in NETS:
        meant = did_you_mean(arch, [*NETS], f', they are {", ".join(NETS)}')
        raise CommandError(f'{arch} is no architecture of this package{meant}')
    dataset = DATASETS.get(tag.rpartition('_')[2])
    entry = read_json(shelf.manifest).get(name, {})
    if shelf.package is None:
        data = entry.get('data')
        if isinstance(data, dict):
            if data.keys() != {*Dataset._fields}:
                raise CommandError(f'{shelf.manifest} is not valid: data of {name}')
            dataset = Dataset(**data)
    elif dataset is None:
        raise CommandError(
            f'{name!r} is not ARCH.TAG with a tag that ends in {" or ".join("_" + d for d in DATASETS)}; '
            'a net trained on other data is published from a directory of your own: --output DIR'
        )
    return Release(arch, tag, dataset, shelf, shelf.path / name, entry.get('model_args', {}))


def choose_namespace(argument, shelf):
    """The namespace to publish in: the argument, else the environment's, else ours for what is ours."""
    namespace = argument or os.environ.get('TIMM_SHARESNET_NAMESPACE')
    if shelf.package is None and namespace in (None, '', NAMESPACE):
        raise CommandError('--output needs the namespace of your own to publish in: --namespace NS')
    namespace = namespace or NAMESPACE
    if not re.fullmatch(r'[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?', namespace, re.ASCII):
        raise CommandError(f'{namespace!r} is not a name that the Hub accepts as a namespace')
    return namespace


def add_output(parser):
    parser.add_argument('--output', type=Path, metavar='DIR', help='directory of your own folders, in place of hub/')

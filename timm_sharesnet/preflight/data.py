"""The data of a training run, as timm's train.py would read them."""

import argparse
import os
from typing import Dict, Iterator, NoReturn

from timm.data import create_dataset
from timm.data.dataset_factory import _search_split  # which folder train.py takes for a split
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils import natural_key

from ..cli import CommandError

_TORCH_CLASSES = {'cifar10': 10, 'cifar100': 100, 'mnist': 10, 'kmnist': 10, 'fashion_mnist': 10, 'qmnist': 10}
_OTHER_TORCH = ('inaturalist', 'inat', 'places365', 'imagenet')


def check_data(args: argparse.Namespace, num_classes: int) -> str:
    """Check both splits, and return what was found."""
    prefix, _, rest = args.dataset.partition('/')
    prefix, name = (prefix.lower(), rest.split('/', 1)[-1].lower()) if rest else ('', '')
    if prefix in ('hfds', 'hfids', 'tfds', 'wds'):
        return f'{args.dataset}: splits, classes and access NOT CHECKED, it is read while training'
    root = args.data_dir or args.data
    if not root:
        raise CommandError('data_dir: not set, the folder of the data is needed.')
    splits = {'train_split': args.train_split, **({'val_split': args.val_split} if args.val_split else {})}
    if prefix != 'torch' or name in ('folder', 'image_folder'):
        return _check_folder(args, root, splits, num_classes)
    if name in _TORCH_CLASSES:
        return _check_torch(args, root, splits, name, num_classes)
    if name not in _OTHER_TORCH:
        raise CommandError(f'dataset: timm has no {args.dataset}, it knows {", ".join(_TORCH_CLASSES)}.')
    return f'{args.dataset} in {root} NOT CHECKED'


def _check_torch(args: argparse.Namespace, root: str, splits: Dict[str, str], name: str, num_classes: int) -> str:
    for key, split in splits.items():
        # timm takes the test set for every name but these two, for training as well
        taken, right = ('test', 'train') if key == 'train_split' else ('training', 'test')
        if (split in ('train', 'training')) != (key == 'train_split'):
            raise CommandError(f'{key}: timm takes {split!r} for the {taken} set of {args.dataset}, write {right}.')
    _check_num_classes(args, num_classes, _TORCH_CLASSES[name], args.dataset)
    if os.path.exists(root) and not os.path.isdir(root):
        raise CommandError(f'data_dir: {root} is not a folder.')
    sizes = []
    for key, split in splits.items():
        try:
            sizes.append(f'{split} {len(create_dataset(args.dataset, root=root, split=split)):,} images')
        except RuntimeError as e:
            folder = _search_split(root, split) if os.path.isdir(root) else root
            if folder != root and os.path.isdir(folder) and _count_images(folder):
                raise CommandError(
                    f"dataset: {root} has no {args.dataset}, but folders of images, for which write dataset: '' "
                    f"(--dataset '')."
                ) from e
            if args.dataset_download:
                return f'{args.dataset}: {num_classes} classes, not complete in {root}, train.py will download it'
            raise CommandError(
                f'data_dir: {root} has no complete {args.dataset} ({key}), --dataset-download fetches it.'
            ) from e
    return f'{args.dataset} in {root}: {", ".join(sizes)}, {num_classes} classes'


def _check_folder(args: argparse.Namespace, root: str, splits: Dict[str, str], num_classes: int) -> str:
    if os.path.isfile(root) and root.endswith('.tar'):
        return f'{root}: a tar file, NOT CHECKED'
    if not os.path.isdir(root):
        raise CommandError(f'data_dir: there is no folder {root}.')
    found: Dict[str, Dict[str, int]] = {}
    for key, split in splits.items():
        folder = _search_split(root, split)
        if not os.path.isdir(folder):
            raise CommandError(f'{key}: {folder} is not a folder.')
        if os.path.samefile(folder, root):
            there = ', '.join(sorted(entry.name for entry in os.scandir(root) if entry.is_dir())[:5])
            raise CommandError(
                f'{key}: there is no folder {split!r} in {root} (but {there or "nothing"}), and train.py would '
                f'silently take all images in {root}.'
            )
        found[folder] = _count_images(folder)
        if not found[folder]:
            raise CommandError(f'{key}: there are no images in {folder}.')
    sizes = ', '.join(f'{folder} {sum(classes.values()):,} images' for folder, classes in found.items())
    train = next(iter(found))
    number = sum(found[train].values())
    if number < args.batch_size:
        raise CommandError(
            f'batch_size: {args.batch_size}, but {train} has {number} images: train.py leaves out an incomplete batch '
            f'and would train on none.'
        )
    if args.class_map:
        if not any(os.path.isfile(path) for path in (args.class_map, os.path.join(root, args.class_map))):
            raise CommandError(f'class_map: there is no file {args.class_map}, neither here nor in {root}.')
        if not args.class_map.lower().endswith(('.txt', '.pkl')):
            raise CommandError(f'class_map: {args.class_map} must be a .txt or .pkl file.')
        return f'{sizes}, class_map {args.class_map} NOT CHECKED'
    for folder, classes in found.items():
        if not args.dataset.lower().startswith('torch/'):  # torchvision sorts the names as they are
            _check_order(folder, classes)
        for name in sorted(classes.keys() ^ found[train].keys()):
            where, lacks = (folder, train) if name in classes else (train, folder)
            raise CommandError(
                f'{folder}: its classes are not those of {train}, labels would be shifted: {name!r} is in {where}, '
                f'not in {lacks}.'
            )
    _check_num_classes(args, num_classes, len(found[train]), train)
    return f'{sizes}, {num_classes} classes'


def _check_order(folder: str, classes: Dict[str, int]) -> None:
    """timm numbers the classes by a key for which Cat is cat and 01 is 1, and equal ones in the order of a set of text,
    which is another one in each process."""
    keys: Dict[str, str] = {}
    for name in sorted(classes):
        try:
            key = repr(natural_key(name))
        except ValueError as e:  # a superscript, which is a digit and no number
            raise CommandError(f'{folder}: timm cannot sort the class folder {name!r}, rename it.') from e
        if keys.setdefault(key, name) != name:
            raise CommandError(
                f'{folder}: the class folders {keys[key]!r} and {name!r} are equal to timm, which numbers them in '
                f'another order in each process: rename one.'
            )


def _upwards(path: str, folder: str) -> Iterator[str]:
    while len(path) > len(folder):
        yield path
        path = os.path.dirname(path)


def _count_images(folder: str) -> Dict[str, int]:
    """Number of images of each class, by the name of the folder that they lie in, as timm reads it.

    Raises:
        CommandError: If a link leads to a folder that is in the tree already. timm follows it, for ever or counting
            the images twice.
        OSError: If a folder cannot be read. timm leaves it out.
    """

    def unreadable(error: OSError) -> NoReturn:
        raise error

    extensions = get_img_extensions(as_set=True)
    counts: Dict[str, int] = {}
    seen: Dict[str, str] = {}
    for path, _, files in os.walk(folder, followlinks=True, onerror=unreadable):
        other = seen.setdefault(os.path.realpath(path), path)
        if other != path:
            link = next(p for where in (path, other) for p in _upwards(where, folder) if os.path.islink(p))
            raise CommandError(
                f'{link}: this link leads to {os.path.realpath(link)}, whose images timm would read again by '
                f'another name ({path} is {other}), or without end.'
            )
        number = sum(os.path.splitext(file)[1].lower() in extensions for file in files)
        if number:
            name = os.path.basename(path) if path != folder else ''
            counts[name] = counts.get(name, 0) + number
    return counts


def _check_num_classes(args: argparse.Namespace, num_classes: int, found: int, where: str) -> None:
    if found != num_classes:
        origin = f"{args.model}'s default, " if args.num_classes is None else ''
        raise CommandError(f'num_classes: {num_classes} ({origin}but {where} has {found} classes).')

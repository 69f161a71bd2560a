"""Images of a folder, without labels, as a model takes them: what it is calibrated with."""

import argparse
import math
import os
from pathlib import Path
from typing import List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.data.readers import create_reader
from torch.utils.data import DataLoader, Dataset, Subset

from .cli import CommandError, positive, reason

_MODES = {1: 'L', 3: 'RGB'}  # that train.py reads images in, by the channels of a model
_TRAIN = 'train', 'training'  # timm's names of splits
_SPLITS = (*_TRAIN, 'val', 'valid', 'validation', 'eval', 'evaluation', 'test', 'testing')


def add_calibration_arguments(parser: argparse.ArgumentParser, count: int) -> None:
    """Add the arguments that name images to calibrate with."""
    parser.add_argument('--calibration-dir', metavar='DIR', help='folder of images, in subfolders or not')
    parser.add_argument(
        '--calibration-images', type=positive, default=count, metavar='N', help=f'how many of them ({count})'
    )


def image_size(model: nn.Module) -> Tuple[int, int, int]:
    """Channels, height and width of the images that a model takes. Its config keeps the default's channels."""
    channels, height, width = resolve_data_config({}, model=model)['input_size']
    return getattr(model, 'in_chans', channels), height, width


class FolderImages(Dataset[torch.Tensor]):
    """The images of a folder and of all below it, preprocessed for a model, (C, H, W) each.

    Of a folder of splits it takes `train` alone: the others hold the images that a model is evaluated with.

    Args:
        folder: Folder of images, in subfolders or not.
        model: Model with timm's `pretrained_cfg`.
        size: Channels, height and width, see `image_size`.
        mode: PIL's, in which images are read. By default grey for one channel, RGB for three.
        splits: Whether it may be a folder of splits.

    Raises:
        CommandError: If there are no images, or only those of other splits, or the model takes neither grey nor colour
            images; at the item, if an image cannot be read.
    """

    def __init__(
        self,
        folder: Union[str, Path],
        model: nn.Module,
        size: Optional[Tuple[int, int, int]] = None,
        mode: str = '',
        splits: bool = True,
    ) -> None:
        size = size or image_size(model)
        self.mode = mode or _MODES.get(size[0], '')
        if not self.mode:
            raise CommandError(
                f'images of a folder are grey or RGB, the net takes {size[0]} channels: give batches of your own to '
                f'timm_sharesnet.share or timm_sharesnet.export.quantize'
            )
        config = resolve_data_config({'input_size': size}, model=model)
        for key in 'mean', 'std':  # of a grey image the average of three, as timm's loader does it
            config[key] = adapt_to_chs(config[key], size[0])
        self.transform = create_transform(**config)
        try:
            self.reader = create_reader('', root=str(folder))
        except (AssertionError, RuntimeError) as e:  # there is no folder, or no image
            raise CommandError(f'there are no images in {folder}') from e
        except ValueError as e:  # timm sorts by numbers, and takes a superscript for one
            raise CommandError(f'timm cannot sort the names in {folder}: {reason(e)}') from e
        self.folder: str = str(folder)
        self.indices: Sequence[int] = range(len(self.reader))
        if splits:
            self.folder, self.indices = self._choose_split(self.folder)

    def _choose_split(self, folder: str) -> Tuple[str, Sequence[int]]:
        """The folder that images are taken from, and which of the reader's they are."""
        names = [Path(name.removeprefix(folder).lstrip(os.sep)).parts for name in self.reader.filenames(absolute=True)]
        folders = {parts[0] for parts in names if len(parts) > 1}
        splits = sorted(name for name in folders if name.lower() in _SPLITS)
        several = len(splits) > 1 or any(parts[0] in splits and len(parts) > 2 for parts in names)
        if not splits or (len(folders) > 1 and not several):  # one that has no folders beside others is a class's
            return folder, range(len(names))
        train = next((name for name in splits if name.lower() in _TRAIN), None)
        if train is None:
            raise CommandError(f'{folder} has {", ".join(splits)} and no train: name the folder whose images to take')
        return os.path.join(folder, train), [i for i, parts in enumerate(names) if parts[0] == train]

    def __len__(self) -> int:
        return len(self.indices)

    def __str__(self) -> str:
        return f'{len(self):,} images of {self.folder}'

    def __getitem__(self, i: int) -> torch.Tensor:
        # timm's ImageDataset takes the next image if one cannot be read
        index = self.indices[i]
        try:
            with self.reader[index][0] as file:
                return self.transform(Image.open(file).convert(self.mode))
        except Exception as e:  # PIL raises many kinds at a damaged file
            raise CommandError(f'{self.reader.filename(index, absolute=True)} cannot be read: {reason(e)}') from e

    def spread(self, count: int, leave: Sequence[int] = ()) -> List[int]:
        """Up to `count` images at equal distances, without those to leave."""
        chosen = sorted(set(range(len(self))) - set(leave))
        return [chosen[i * len(chosen) // count] for i in range(count)] if count < len(chosen) else chosen

    def batches(self, chosen: Sequence[int]) -> DataLoader:
        """Batches of the chosen images, at most 50 and about equally many, read when it is their turn."""
        number = math.ceil(len(chosen) / 50)
        return DataLoader(Subset(self, chosen), batch_size=math.ceil(len(chosen) / number))

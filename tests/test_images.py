"""Images of a folder: which they are, how they are read, and what the commands say of them."""

import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from demo import load_images
from models import save_folder
from PIL import Image
from safetensors import SafetensorError
from torch.utils.data import DataLoader

from timm_sharesnet.cli import CommandError
from timm_sharesnet.export import main as export_main
from timm_sharesnet.images import FolderImages
from timm_sharesnet.sharing.__main__ import main as share_main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(*names):
    """Write an image of our own to each file, the first to the first."""
    for name, image in zip(names, load_images()[0], strict=False):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        image.save(name)


def net(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('resnet164_cifar', layers=(2, 3, 3), **kwargs).eval()


# ---- Which images


@pytest.mark.parametrize(
    'names,taken',
    [
        (['x/a.png', 'x/b.png'], 'x'),
        (['x/cat/a.png', 'x/dog/b.png'], 'x'),
        (['x/train/cat/a.png', 'x/val/cat/b.png'], 'x/train'),
        (['x/train/cat/a.png', 'x/val/b.png', 'x/c.png'], 'x/train'),
        (['x/train/a.png', 'x/test/b.png', 'x/extra/c.png'], 'x/train'),
        (['x/train/a.png'], 'x/train'),
        (['x/training/cat/a.png', 'x/validation/cat/b.png'], 'x/training'),
        (['x/Train/a.png', 'x/Test/b.png'], 'x/Train'),
        (['x/train/cat/a.png', 'x/unlabelled/b.png'], 'x/train'),
        (['x/tank/a.png', 'x/train/b.png', 'x/tulip/c.png'], 'x'),  # classes of CIFAR-100
        (['x/invalid/a.png', 'x/valid/b.png'], 'x'),
        (['x/animals/test/a.png', 'x/things/b.png'], 'x'),
    ],
)
def test_images_are_those_of_the_folder_or_of_train_below_it(folder, names, taken):
    save(*names)
    images = FolderImages('x', net())
    expected = [name for name in names if name.startswith(f'{taken}/')]
    assert str(images) == f'{len(expected)} images of {taken}'
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=net()))
    expected_images = torch.stack([transform(Image.open(name)) for name in expected])
    assert torch.equal(torch.stack([images[i] for i in range(len(images))]), expected_images)


@pytest.mark.parametrize('named', ['imagenet/val', 'imagenet/val/', 'imagenet/./val', '{}/imagenet/val'])
def test_a_split_that_is_named_is_taken(folder, named):
    save('imagenet/train/cat/a.png', 'imagenet/val/cat/b.png', 'imagenet/val/dog/c.png')
    assert len(FolderImages(named.format(folder), net())) == 2


@pytest.mark.parametrize(
    'names,there',
    [
        (['x/val/cat/a.png'], 'val'),
        (['x/test/a.png', 'x/val/b.png'], 'test, val'),
        (['x/a.png', 'x/test/b.png'], 'test'),
        (['x/extra/a.png', 'x/validation/cat/b.png'], 'validation'),
    ],
)
def test_splits_without_train_are_not_taken_silently(folder, names, there):
    save(*names)
    Path('x/devkit').mkdir()
    with pytest.raises(CommandError, match=f'x has {there} and no train: name the folder whose images to take'):
        FolderImages('x', net())


def test_no_images_are_said_so(folder):
    Path('empty').mkdir()
    Path('file.png').touch()
    for name in 'empty', 'none', 'file.png', '':
        with pytest.raises(CommandError, match=f'there are no images in {name}$'):
            FolderImages(name, net())
    save('x/5²2.png')
    with pytest.raises(CommandError, match='timm cannot sort the names in x: .*²'):
        FolderImages('x', net())


def test_images_are_spread_at_equal_distances_and_none_is_taken_twice(folder):
    save(*(f'x/{i}.png' for i in range(10)))
    images = FolderImages('x', net())
    assert images.spread(4) == [0, 2, 5, 7]
    assert images.spread(3, leave=[0, 2, 5, 7]) == [1, 4, 8]
    assert images.spread(10) == images.spread(99) == list(range(10))


# ---- How they are read


def test_batches_are_read_when_it_is_their_turn_the_same_each_time(folder):
    save(*(f'x/{i}.png' for i in range(120)))
    images = FolderImages('x', net())
    batches = images.batches(range(110))
    assert isinstance(batches, DataLoader) and len(batches) == 3
    first, second = list(batches), list(batches)
    assert [len(batch) for batch in first] == [37, 37, 36]
    assert [len(batch) for batch in images.batches(range(51))] == [26, 25]  # none of one image, which has no variance
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    Path('x/70.png').write_bytes(b'no image')
    iterator = iter(batches)
    assert torch.equal(next(iterator), first[0])
    with pytest.raises(CommandError, match='x/70.png cannot be read'):
        next(iterator)


def test_a_net_of_one_channel_gets_grey_images_normalized_by_the_average(folder):
    save('x/a.png')
    model = net(in_chans=1)
    image = FolderImages('x', model)[0]
    grey = torch.from_numpy(np.array(Image.open('x/a.png').convert('L')))[None] / 255
    mean, std = (sum(model.pretrained_cfg[key]) / 3 for key in ('mean', 'std'))
    torch.testing.assert_close(image, (grey - mean) / std)
    assert model(image[None]).shape == (1, 10)


def test_grey_images_and_those_with_a_palette_fit_a_net_of_three_channels(folder):
    Path('x').mkdir()
    for mode in 'L', 'P', 'RGBA', '1', 'CMYK':
        load_images()[0][0].convert(mode).save(f'x/{mode}.{"jpg" if mode == "CMYK" else "png"}')
    batch = next(iter(FolderImages('x', net()).batches(range(5))))
    assert batch.shape == (5, 3, 32, 32)


@pytest.mark.parametrize('channels', [2, 4])
def test_other_channels_are_refused(folder, channels):
    save('x/a.png')
    with pytest.raises(CommandError, match=f'images of a folder are grey or RGB, the net takes {channels} channels'):
        FolderImages('x', net(in_chans=channels))


def test_size_replaces_the_model_s(folder):
    save('x/a.png')
    assert FolderImages('x', net(), (3, 48, 40))[0].shape == (3, 48, 40)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-60])


def claim_100_000_pixels_a_side(path):
    data = path.read_bytes()
    header = b'IHDR' + struct.pack('>II', 100_000, 100_000) + data[24:29]
    path.write_bytes(data[:12] + header + struct.pack('>I', zlib.crc32(header)) + data[33:])


def link_to_nothing(path):
    path.unlink()
    path.symlink_to('nothing')


DAMAGES = {
    'x/1.png': [lambda path: path.write_bytes(b'no image'), truncate, claim_100_000_pixels_a_side, link_to_nothing],
    'x/1.jpg': [truncate, lambda path: path.write_bytes(b'')],
}


@pytest.mark.parametrize('name,damage', [(name, damage) for name in DAMAGES for damage in DAMAGES[name]])
def test_an_image_that_cannot_be_read_is_named_and_not_skipped(folder, name, damage):
    save('x/0.png', name, 'x/2.png')
    damage(Path(name))
    with pytest.raises(CommandError) as error:
        next(iter(FolderImages('x', net()).batches(range(3))))
    assert str(error.value).startswith(f'{name} cannot be read: ')
    assert not {'None', 'Error'} & set(str(error.value).split()) and '\n' not in str(error.value)


# ---- The commands


@pytest.fixture(params=['share', 'export'])
def command(request, folder):
    """A command on a net with some arguments and the images of `x`."""

    def run(**kwargs):
        save_folder(net(**kwargs), 'net', layers=(2, 3, 3), **kwargs)
        options = ['local-dir:net', '--calibration-dir', 'x', '--calibration-images', '3']
        if request.param == 'share':
            return share_main([*options, '--output', 'out', '--init', 'mean'])
        return export_main([*options, '--output', 'out.onnx', '--int8'])

    return run


def test_commands_take_train_alone_and_say_so(command, capsys):
    save(*(f'x/train/{i}.png' for i in range(4)), 'x/val/a.png')
    Path('x/val/a.png').write_bytes(b'not to be read')
    assert command() == 0
    assert ' on 3 of 4 images of x/train\n' in capsys.readouterr().out


def test_commands_calibrate_nets_of_one_channel(command):
    save('x/a.png', 'x/b.png')
    assert command(in_chans=1) == 0


@pytest.mark.parametrize(
    'names,kwargs,message',
    [
        (['x/val/a.png', 'x/test/b.png'], {}, 'x has test, val and no train'),
        (['x/a.png'], {'in_chans': 4}, 'the net takes 4 channels'),
        (['x/a.png', 'x/damaged.png', 'x/truncated.jpg'], {}, 'x/damaged.png cannot be read: '),
        (['x/a.png', 'x/truncated.jpg'], {}, 'x/truncated.jpg cannot be read: image file is truncated'),
    ],
)
def test_commands_refuse_in_one_line_and_leave_nothing(folder, command, capsys, names, kwargs, message):
    save(*names)
    for path in folder.glob('x/damaged.png'):
        path.write_bytes(b'no image')
    for path in folder.glob('x/truncated.jpg'):
        truncate(path)
    assert command(**kwargs) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line and line.startswith(('share: ', 'export: '))
    assert {path.name for path in folder.iterdir()} == {'x', 'net'}


@pytest.mark.parametrize('error', [SafetensorError('I/O error: No space left on device'), OSError()])
def test_share_says_what_is_wrong_with_its_output(folder, capsys, monkeypatch, error):
    def save_nothing(*_, **__):
        raise error

    save_folder(net(), 'net', layers=(2, 3, 3))
    monkeypatch.setattr(sys.modules['timm_sharesnet.sharing.__main__'], 'save_folder', save_nothing)
    assert share_main(['local-dir:net', '--output', 'out', '--init', 'mean']) == 2
    assert capsys.readouterr().err == f'share: out: {str(error) or "OSError"}\n'
    assert {path.name for path in folder.iterdir()} == {'net'}

"""What a published folder is: its files, and what is measured on it.

`ARCH.TAG/` is exactly what the Hub repository NAMESPACE/ARCH.TAG holds.
"""

import contextlib
import functools
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

HUB = Path(__file__).resolve().parent
SAMPLES = HUB.parent / 'tests' / 'data'

WEIGHTS = 'model.safetensors'
REQUIRED = {WEIGHTS, 'config.json', 'README.md'}
# How the weights came about: by train.py, in another way, by import.
PROVENANCE = {'args.yaml', 'summary.csv', 'training.json', 'source.json'}
ALLOWED = REQUIRED | PROVENANCE | {'curves.png'}
ONNX = 'onnx'  # folder of the net as it is deployed, by the Hub's convention
KINDS = {'model.onnx': 'fp32', 'model_quantized.onnx': 'int8'}
MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}  # in which images are read, by the input channels of a net
ERROR = 1e-4  # largest difference between the fp32 file's and torch's outputs / largest output
LARGE = (f'{ONNX}/', WEIGHTS)  # what git ignores beyond TRACKED_BYTES; what can be made again goes first


class Fault(Exception):
    """What is wrong, one argument a fault."""


def run(main):
    """Run a script's `main`: exit with 0, or with 1 and a line for each fault."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors='backslashreplace')  # a terminal need not know the letters of a path
    try:
        main()
    except Fault as e:
        # Of a process that loads data it ends a traceback
        faults = [str(fault).strip().rpartition('folder.Fault: ')[2] for fault in e.args]
    except KeyboardInterrupt:
        faults = ('interrupted',)
    except Exception as e:
        faults = (f'{type(e).__name__}: {e}',)
    else:
        sys.exit(0)
    for fault in faults:
        print(f'{Path(sys.argv[0]).name}: {one_line(fault)}', file=sys.stderr)
    sys.exit(1)


def one_line(text):
    return ' '.join(str(text).split())


def refuse(message):
    """`ArgumentParser.error`, which would exit with 2."""
    raise Fault(message)


def require_onnx():
    """Raise unless the packages are there that make and open ONNX files."""
    from timm_sharesnet.cli import CommandError
    from timm_sharesnet.export import require

    try:
        require('onnx', 'onnxscript', 'onnxruntime')
    except CommandError as e:
        raise Fault(str(e)) from e


def files(path):
    """All files of a folder, by their paths in the repository."""
    return {file.relative_to(path).as_posix(): file for file in sorted(path.rglob('*')) if not file.is_dir()}


def onnx_size(files, name):
    """Size of an ONNX file and of the weights beside it, given the entries of the files."""
    return sum(files[n]['size'] for n in (name, f'{name}_data') if n in files)


def read_json(path):
    try:
        return json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
    except ValueError as e:
        raise Fault(f'{path.name} is not valid: {e}') from e


def to_json(data):
    """The text of a manifest, lists of numbers on one line."""
    return re.sub(r'\[[\d,\s]*\]', lambda match: ' '.join(match[0].split()), json.dumps(data, indent=2)) + '\n'


@contextlib.contextmanager
def staged(contents):
    """Write files beside their places, path -> bytes. Yields path -> written file, and deletes what was not moved."""
    written = {path: path.with_name(f'{path.name}.new') for path in contents}
    try:
        for path, file in written.items():
            file.write_bytes(contents[path])
        yield written
    finally:
        for file in written.values():
            file.unlink(missing_ok=True)


def replace(news):
    """Put finished files and folders in their places, path -> finished one: all of them, or none.

    Raises:
        OSError: Whatever went wrong, after what was there before was put back.
    """
    for new in news.values():
        new.stat()  # it is there, and gone only once it was moved
    try:
        for path in news:
            if path.is_file():
                shutil.copyfile(path, aside(path))  # a copy, so that others can read the file at any moment
        for path, new in news.items():
            if path.is_dir():
                path.rename(aside(path))
            new.rename(path)
    except BaseException:
        for path, new in news.items():
            if not new.exists():
                path.rename(new)
            if aside(path).exists() and not path.exists():
                aside(path).rename(path)
            remove(aside(path))
        raise
    for path in news:
        remove(aside(path))


def restore(path):
    """Put a folder back that was moved aside by what was then cut off, or delete it if the new one is there."""
    if path.exists():
        remove(aside(path))
    elif aside(path).exists():
        aside(path).rename(path)


def aside(path):
    return path.with_name(f'.{path.name}.old')


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load(folder):
    """The model of a folder as a user loads it from a clone. timm is strict, as the classes are the file's."""
    import timm

    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def measure(model):
    """Parameters, GMACs and activations (M) of a model for one image of its size.

    GMACs are the multiply-accumulates of convolutions and classifier (torch's FlopCounterMode), activations their
    outputs, as timm counts them. A shared convolution counts once a use.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    outputs = []
    hooks = [
        module.register_forward_hook(lambda _module, _args, output: outputs.append(output.numel()))
        for module in model.modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
    ]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *model.pretrained_cfg['input_size']))
    for hook in hooks:
        hook.remove()
    return {
        'parameters': sum(p.numel() for p in model.parameters()),
        'gmacs': round(counter.get_total_flops() / 2e9, 4),
        'activations': round(sum(outputs) / 1e6, 4),
    }


def count_kernels(model):
    """Different 3x3 kernels: one for each shared stage, and the blocks' own."""
    import torch

    return sum(isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3) for module in model.modules())


class Images:
    """(image, label) pairs of a reader of timm's, whose own data set takes the next pair if an image cannot be read."""

    def __init__(self, reader, mode):
        self.reader, self.mode = reader, mode

    def __len__(self):
        return len(self.reader)

    def __getitem__(self, i):
        from PIL import Image

        try:
            file, label = self.reader[i]
            with file:
                return Image.open(file).convert(self.mode), label
        except Exception as e:  # PIL raises many kinds at a damaged file
            raise Fault(f'{self.reader.filename(i, absolute=True)} cannot be read: {one_line(e)}') from e


def classify(model, images, workers=0, session=None):
    """Whether the label is the first of the model's classes, and among its first five, for (image, label) pairs.

    With a session of ONNX Runtime, that computes in place of the model.
    """
    import torch

    from timm_sharesnet import export

    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if session is None:
        model = model.to(device, memory_format=torch.channels_last)
    top1, top5 = [], []
    with torch.inference_mode():
        for batch, labels in preprocess(model, images, workers):
            logits = torch.from_numpy(export.run(session, batch.numpy())) if session else model(batch.to(device))
            best = logits.topk(min(5, logits.shape[1])).indices.cpu() == labels[:, None]
            top1 += best[:, 0].tolist()
            top5 += best.any(1).tolist()
    return top1, top5


def preprocess(model, images, workers=0):
    """Batches of images as the model takes them, and of their labels, for (image, label) pairs."""
    import timm
    import torch

    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    collate = functools.partial(_collate, transform, MODES[model.pretrained_cfg['input_size'][0]])
    return torch.utils.data.DataLoader(images, batch_size=100, collate_fn=collate, num_workers=workers)


def _collate(transform, mode, pairs):
    import torch

    images = torch.stack([transform(image.convert(mode)) for image, _ in pairs])
    return images, torch.tensor([label for _, label in pairs])


def load_sample(dataset):
    """Our sample of a data set, (image, label) pairs."""
    from PIL import Image

    labels = read_json(SAMPLES / f'{dataset.sample}.json')['labels']
    sheet = Image.open(SAMPLES / f'{dataset.sample}.webp').convert('RGB')
    boxes = [(x, y, x + 32, y + 32) for y in range(0, sheet.height, 32) for x in range(0, sheet.width, 32)]
    return [(sheet.crop(box), label) for box, label in zip(boxes, labels, strict=True)]


def wrong_in_sample(model, dataset, session=None):
    """Indices of the images of our sample that the model, or a session in its place, does not recognize."""
    top1, _ = classify(model, load_sample(dataset), session=session)
    return [i for i, right in enumerate(top1) if not right]


def output_error(model, session, dataset):
    """Largest difference between the outputs of model and session, relative, for images of our sample or noise."""
    import torch

    from timm_sharesnet.export import run

    if dataset.sample:
        images, _ = next(iter(preprocess(model, load_sample(dataset)[::100])))
    else:
        images = torch.randn(4, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model.cpu()(images)
    return ((torch.from_numpy(run(session, images.numpy())) - expected).abs().max() / expected.abs().max()).item()


def tensor_faults(tensors: dict[str, Any], model):
    """What is wrong with tensors that should be a model's: names, shapes, types, values."""
    import torch

    expected = model.state_dict()
    faults = [f'{k} is missing' for k in sorted(expected.keys() - tensors.keys())]
    faults += [f'{k} is not part of the model' for k in sorted(tensors.keys() - expected.keys())]
    for k in sorted(expected.keys() & tensors.keys()):
        a, b = expected[k], tensors[k]
        if a.shape != b.shape:
            faults.append(f'{k} has shape {tuple(b.shape)} instead of {tuple(a.shape)}')
        elif a.dtype != b.dtype and not (a.is_floating_point() and b.dtype in (torch.float16, torch.float32)):
            faults.append(f'{k} is {b.dtype} instead of {a.dtype}')
        elif not torch.isfinite(b).all():
            faults.append(f'{k} has values that are not finite')
    return faults

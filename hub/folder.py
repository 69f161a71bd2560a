"""What a published folder is: its files, and what is measured on it.

`ARCH.TAG/` is exactly what the Hub repository NAMESPACE/ARCH.TAG holds.
"""

import contextlib
import hashlib
import json
import re
import shutil
from pathlib import Path

import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from timm_sharesnet import export
from timm_sharesnet.cli import CommandError
from timm_sharesnet.images import FolderImages, image_size

HUB = Path(__file__).resolve().parent
SAMPLES = HUB.parent / 'tests' / 'data'

WEIGHTS = 'model.safetensors'
REQUIRED = {WEIGHTS, 'config.json', 'README.md'}
# How the weights came about: by train.py, in another way, by import.
PROVENANCE = {'args.yaml', 'summary.csv', 'training.json', 'source.json'}
ALLOWED = REQUIRED | PROVENANCE | {'curves.png', 'preprocessor_config.json'}
ONNX = 'onnx'  # folder of the net as it is deployed, by the Hub's convention
KINDS = {'model.onnx': 'fp32', 'model_quantized.onnx': 'int8'}
MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}  # in which images are read, by the input channels of a net
ERROR = 1e-4  # largest difference between the fp32 file's and torch's outputs / largest output
# What the manifest has of a net
ENTRY = (
    'model_args parameters gmacs activations twin_parameters dtype imported data accuracy sample onnx picked seed '
    'metadata date'
).split()
# What it has of an ONNX file of the unshared twin, and of the net's own
TWIN = {'size', 'kernels', 'session'}
RECORD = {'fp32': TWIN | {'sha256', 'accuracy'}, 'int8': TWIN | {'sha256', 'accuracy', 'calibration', 'sample'}}
LARGE = (f'{ONNX}/', WEIGHTS)  # what git ignores beyond TRACKED_BYTES; what can be made again goes first


def require_onnx():
    """Raise unless the packages are there that make and open ONNX files."""
    export.require('onnx', 'onnxscript', 'onnxruntime')


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
        raise CommandError(f'{path.name} is not valid: {e}') from e


def to_json(entries):
    """A manifest (name -> entry) as bytes, sorted, lists of numbers on one line."""
    text = json.dumps(dict(sorted(entries.items())), indent=2)
    return re.sub(r'\[[\d,\s]*\]', lambda match: ' '.join(match[0].split()), text).encode() + b'\n'


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
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def measure(model):
    """Parameters, GMACs and activations (M) of a model for one image of its size.

    GMACs are the multiply-accumulates of convolutions and classifier (torch's FlopCounterMode), activations their
    outputs, as timm counts them. A shared convolution counts once a use.
    """
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
    return sum(isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3) for module in model.modules())


class LabelledImages(FolderImages):
    """The images of a split, preprocessed for a model, each with its label.

    Labels are train.py's, whose classes are sorted as numbers are, or the places of the classes among given names.
    """

    def __init__(self, path, model, names=None):
        super().__init__(path, model, mode=MODES[image_size(model)[0]], splits=False)
        self.classes = list(self.reader.class_to_idx)
        self.names = names or self.classes

    def __getitem__(self, i):
        return super().__getitem__(i), self.names.index(self.classes[self.reader.samples[i][1]])


def classify(model, images, workers=0, session=None):
    """Whether the label is the first of the model's classes, and among its first five, for labelled images.

    With a session of ONNX Runtime, that computes in place of the model.
    """
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if session is None:
        model = model.to(device, memory_format=torch.channels_last)
    top1, top5 = [], []
    try:
        with torch.inference_mode():
            for batch, labels in DataLoader(images, batch_size=100, num_workers=workers):
                logits = torch.from_numpy(export.run(session, batch.numpy())) if session else model(batch.to(device))
                best = logits.topk(min(5, logits.shape[1])).indices.cpu() == labels[:, None]
                top1 += best[:, 0].tolist()
                top5 += best.any(1).tolist()
    except CommandError as e:  # of a process that loads images it ends a traceback
        raise CommandError(str(e).strip().rpartition('CommandError: ')[2]) from None
    return top1, top5


def load_sample(dataset):
    """Our sample of a data set, (image, label) pairs."""
    labels = read_json(SAMPLES / f'{dataset.sample}.json')['labels']
    sheet = Image.open(SAMPLES / f'{dataset.sample}.webp').convert('RGB')
    boxes = [(x, y, x + 32, y + 32) for y in range(0, sheet.height, 32) for x in range(0, sheet.width, 32)]
    return [(sheet.crop(box), label) for box, label in zip(boxes, labels, strict=True)]


def preprocess_sample(model, dataset, step=1):
    """The same, every `step` image of it, as a model takes them."""
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    mode = MODES[image_size(model)[0]]
    return [(transform(image.convert(mode)), label) for image, label in load_sample(dataset)[::step]]


def wrong_in_sample(model, dataset, session=None):
    """Indices of the images of our sample that the model, or a session in its place, does not recognize."""
    top1, _ = classify(model, preprocess_sample(model, dataset), session=session)
    return [i for i, right in enumerate(top1) if not right]


def output_error(model, session, dataset):
    """Largest difference between the outputs of model and session, relative, for images of our sample or noise."""
    if dataset.sample:
        images = torch.stack([image for image, _ in preprocess_sample(model, dataset, step=100)])
    else:
        images = torch.randn(4, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model.cpu()(images)
    found = torch.from_numpy(export.run(session, images.numpy()))
    return ((found - expected).abs().max() / expected.abs().max()).item()

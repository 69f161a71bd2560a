"""What a published folder is: its name and files, its entries in the manifests, and what is measured on it.

`hub/ARCH.TAG/` is exactly what the Hub repository NAMESPACE/ARCH.TAG holds. The end of TAG names the data set.
`hub/manifest.json` has what was measured, `timm_sharesnet/weights.json` the hash, size and pin of the weights.
"""

import functools
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

HUB = Path(__file__).resolve().parent
PACKAGE = HUB.parent / 'timm_sharesnet'
SAMPLES = HUB.parent / 'tests' / 'data'
MANIFEST = HUB / 'manifest.json'
PINS = PACKAGE / 'weights.json'
IGNORED = HUB / '.gitignore'  # names what is too large to be tracked
TRACKED_BYTES = 80e6  # what all tracked weights together stay under

NAMESPACE = 'timm-sharesnet'  # ours, once registered; TIMM_SHARESNET_NAMESPACE or --namespace for people's own
WEIGHTS = 'model.safetensors'
REQUIRED = {WEIGHTS, 'config.json', 'README.md'}
# How the weights came about: by train.py, in another way, by import.
PROVENANCE = {'args.yaml', 'summary.csv', 'training.json', 'source.json'}
ALLOWED = REQUIRED | PROVENANCE | {'curves.png'}
ONNX = 'onnx'  # folder of the net as it is deployed, by the Hub's convention
KINDS = {'model.onnx': 'fp32', 'model_quantized.onnx': 'int8'}
ERROR = 1e-4  # largest difference between the fp32 file's and torch's outputs / largest output
LARGE = (f'{ONNX}/', WEIGHTS)  # what git ignores beyond TRACKED_BYTES; what can be made again goes first


class Dataset(NamedTuple):
    """A data set: its id on the Hub and name, the split that measures and its images, classes, and our sample."""

    id: str
    name: str
    split: str
    images: int
    classes: int
    sample: str | None = None


DATASETS = {
    'c10': Dataset('uoft-cs/cifar10', 'CIFAR-10', 'test', 10_000, 10, 'cifar10_test_1000'),
    'c100': Dataset('uoft-cs/cifar100', 'CIFAR-100', 'test', 10_000, 100, 'cifar100_test_1000'),
    'in1k': Dataset('ILSVRC/imagenet-1k', 'ImageNet-1k', 'validation', 50_000, 1000),
}


class Fault(Exception):
    """What is wrong, one argument a fault."""


def run(main):
    """Run a script's `main`: exit with 0, or with 1 and a line for each fault."""
    try:
        main()
    except Fault as e:
        faults = e.args
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
    from timm_sharesnet.export import ExportError, require

    try:
        require('onnx', 'onnxscript', 'onnxruntime')
    except ExportError as e:
        raise Fault(str(e)) from e


def choose_namespace(argument):
    """The namespace to publish in: the argument, else the environment's, else ours."""
    namespace = argument or os.environ.get('TIMM_SHARESNET_NAMESPACE') or NAMESPACE
    if not re.fullmatch(r'[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?', namespace):
        raise Fault(f'{namespace!r} is not a name that the Hub accepts as a namespace')
    return namespace


def split_name(name):
    """'ARCH.TAG' -> architecture, tag, data set."""
    arch, _, tag = name.partition('.')
    dataset = DATASETS.get(tag.rpartition('_')[2])
    if not re.fullmatch(r'\w+\.\w+', name) or dataset is None:
        raise Fault(f'{name!r} is not ARCH.TAG with a tag that ends in {" or ".join("_" + d for d in DATASETS)}')
    return arch, tag, dataset


def published():
    """Names of the folders that there are."""
    return sorted(path.name for path in HUB.glob('[!._]*.*_*') if path.is_dir())


def packaged(name):
    """Where a model's weights lie if they travel in the package."""
    return PACKAGE / 'weights' / f'{name}.safetensors'


def files(path):
    """All files of a folder, by their paths in the repository."""
    return {file.relative_to(path).as_posix(): file for file in sorted(path.rglob('*')) if not file.is_dir()}


def onnx_size(files, name):
    """Size of an ONNX file and of the weights beside it, given the entries of the files."""
    return sum(files[n]['size'] for n in (name, f'{name}_data') if n in files)


def tracked(name, part=WEIGHTS):
    """Whether a model's weights, or its ONNX files, are in git. Otherwise only their hashes are."""
    return f'/{name}/{part}' not in IGNORED.read_text().split()


def tracked_bytes(pins):
    """Size of all tracked weights and ONNX files; weights in the package are there twice."""
    weights = sum(pin['size'] * (1 + pin['packaged']) for name, pin in pins.items() if tracked(name))
    onnx = [entry.get('onnx', {}) for name, entry in read_json(MANIFEST).items() if tracked(name, f'{ONNX}/')]
    return weights + sum(file['size'] for entry in onnx for file in entry.get('files', {}).values())


def read_json(path):
    try:
        return json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
    except ValueError as e:
        raise Fault(f'{path.name} is not valid: {e}') from e


def write_json(path, data):
    """Replace the file at once, lists of numbers on one line."""
    text = re.sub(r'\[[\d,\s]*\]', lambda match: ' '.join(match[0].split()), json.dumps(data, indent=2))
    temporary = path.with_name(path.name + '.new')
    temporary.write_text(text + '\n', encoding='utf-8')
    os.replace(temporary, path)


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
            best = logits.topk(5).indices.cpu() == labels[:, None]
            top1 += best[:, 0].tolist()
            top5 += best.any(1).tolist()
    return top1, top5


def preprocess(model, images, workers=0):
    """Batches of images as the model takes them, and of their labels, for (image, label) pairs."""
    import timm
    import torch

    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    collate = functools.partial(_collate, transform)
    return torch.utils.data.DataLoader(images, batch_size=100, collate_fn=collate, num_workers=workers)


def _collate(transform, pairs):
    import torch

    return torch.stack([transform(image) for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def class_names(dataset):
    """Names of a data set's classes, if we have a sample of it."""
    return read_json(SAMPLES / f'{dataset.sample}.json')['classes']


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

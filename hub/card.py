"""The model card: what the Hub shows of a published folder.

Every figure comes from the manifest or the paper: A. Boulch, ShaResNet, Pattern Recognition Letters 2018.
"""

import re
import textwrap
from typing import NamedTuple

from folder import KINDS, ONNX, WEIGHTS, onnx_size, split_name
from huggingface_hub import EvalResult, ModelCard, ModelCardData

NOT_MEASURED = 'not measured'
NOT_RECORDED = {'how': 'not recorded'}  # training.json where nothing is known
AUTHOR = 'https://github.com/aboulch/sharesnet'
PAPER = 'https://doi.org/10.1016/j.patrec.2018.01.006'


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


_R164 = (
    Paper('ResNet-164, shared', 93.8, None, 'Table 2'),
    Paper('ResNet-164, unshared', 94.54, None, 'Table 2'),
    Paper('ResNet-92, unshared, of like size', 93.9, None, 'Table 3'),
)
_W40 = (
    Paper('WRN-40-4, shared', 94.9, None, 'Table 2'),
    Paper('WRN-40-4, unshared', 95.83, None, 'Table 2'),
    Paper('WRN-28-4, unshared, of like size', 95.0, None, 'Table 3'),
)
_W28 = (
    Paper('WRN-28-10, shared', 79.8, None, 'Table 2'),
    Paper('WRN-28-10, unshared', 80.0, None, 'Table 2'),
    Paper('WRN-22-10, unshared, of like size', 79.55, None, 'Table 3'),
)
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
# What of timm's args.yaml makes a recipe
RECIPE = (
    'pretrained initial_checkpoint epochs batch_size grad_accum_steps opt lr lr_base sched decay_milestones '
    'decay_epochs decay_rate warmup_epochs warmup_lr min_lr momentum weight_decay opt_kwargs train_crop_mode scale '
    'ratio hflip color_jitter aa aug_repeats reprob remode mixup cutmix mixup_prob mixup_off_epoch smoothing bce_loss '
    'drop drop_path model_kwargs model_ema model_ema_decay kd_model_name amp amp_dtype channels_last torchcompile '
    'seed'
).split()

SNIPPETS = {
    'Classify an image': """
import timm
import torch
from PIL import Image

name = '{hub}'
model = timm.create_model(name, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
label_names = {label_names}

image = Image.open('image.png').convert('RGB')  # of one of the classes
with torch.inference_mode():
    probabilities = model(transform(image).unsqueeze(0)).softmax(dim=1)[0]
top5 = probabilities.topk(5)
for probability, index in zip(top5.values, top5.indices):
    print(f'{{probability:.1%}} {{label_names[index]}}')""",
    'Feature maps': """
import timm
import torch
from PIL import Image

name = '{hub}'
model = timm.create_model(name, pretrained=True, features_only=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))

image = Image.open('image.png').convert('RGB')
with torch.inference_mode():
    features = model(transform(image).unsqueeze(0))
for feature in features:
    print(tuple(feature.shape))  # {features}""",
    'Image embedding': """
import timm
import torch
from PIL import Image

name = '{hub}'
model = timm.create_model(name, pretrained=True, num_classes=0).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))

image = Image.open('image.png').convert('RGB')
with torch.inference_mode():
    embedding = model(transform(image).unsqueeze(0))
print(tuple(embedding.shape))  # (1, {width})""",
}

ONNX_SNIPPET = """
import json

import onnxruntime
import timm
from PIL import Image

config = json.load(open('config.json'))
transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config['pretrained_cfg']))
pixel_values = transform(Image.open('image.png').convert('RGB')).unsqueeze(0).numpy()

session = onnxruntime.InferenceSession('onnx/model.onnx')
(logits,) = session.run(['logits'], {{'pixel_values': pixel_values}})
print({label_name})"""

_IMAGENET_LABELS = 'timm.data.ImageNetInfo().label_descriptions()'

CITATION = """
@article{boulch2018sharesnet,
  title = {{ShaResNet}: Reducing residual network parameter number by sharing weights},
  author = {Boulch, Alexandre},
  journal = {Pattern Recognition Letters},
  year = {2018},
  doi = {10.1016/j.patrec.2018.01.006}
}
@misc{rw2019timm,
  author = {Ross Wightman},
  title = {PyTorch Image Models},
  year = {2019},
  publisher = {GitHub},
  doi = {10.5281/zenodo.4414861},
  howpublished = {\\url{https://github.com/huggingface/pytorch-image-models}}
}"""


def complete(entry, dataset):
    """Whether an entry's accuracy was measured on the whole split, so that it may stand in the model-index."""
    return bool(entry['accuracy']) and entry['accuracy']['images'] == dataset.images


def metadata(name, entry, namespace):
    """The card's metadata. Imported weights have the licence that a person found for them, not ours."""
    arch, _, dataset = split_name(name)
    results = {}
    if complete(entry, dataset):
        common = {
            'task_type': 'image-classification',
            'task_name': 'Image Classification',
            'dataset_type': dataset.id,
            'dataset_name': dataset.name,
            'dataset_split': dataset.split,
            'metric_type': 'accuracy',
            'source_url': f'https://huggingface.co/{namespace}/{name}/blob/main/README.md',
            'source_name': 'model card',
        }
        values = [('Top-1 accuracy', entry['accuracy']['top1']), ('Top-5 accuracy', entry['accuracy']['top5'])]
        evals = [EvalResult(metric_name=n, metric_value=round(v / 100, 6), **common) for n, v in values]
        results = {'model_name': name, 'eval_results': evals}
    license = {'license': 'apache-2.0'}
    if entry['imported']:
        license = {'license': 'other', 'license_name': 'not-stated-by-the-author', 'license_link': AUTHOR}
    sharing = ['weight-sharing'] if NETS[arch].twin != arch else []
    return ModelCardData(
        **license,
        library_name='timm',
        pipeline_tag='image-classification',
        datasets=[dataset.id],
        metrics=['accuracy'],
        tags=['image-classification', 'timm', 'timm-sharesnet', 'sharesnet', *sharing],
        **results,
    )


def model_rows(name, entry, pin):
    """The rows of the table of facts."""
    arch, _, dataset = split_name(name)
    net = NETS[arch]
    parameters = f'{entry["parameters"]:,} ({entry["parameters"] / 1e6:.2f} M)'
    if net.twin != arch:
        twin = net.twin_parameters + entry['parameters'] - net.parameters  # they differ alike for other classes
        saved = 1 - entry['parameters'] / twin
        parameters += f', {100 * saved:.0f} % fewer than the {twin:,} of its unshared twin `{net.twin}`'
    return [
        f'| Task | image classification, {dataset.name}, {dataset.classes} classes |',
        f'| Parameters | {parameters} |',
        f'| GMACs | {entry["gmacs"]:.4f} |',
        f'| Activations | {entry["activations"]:.4f} M |',
        f'| Weights | `{WEIGHTS}`, {entry["dtype"]}, {pin["size"]:,} bytes, SHA-256 `{pin["sha256"]}` |',
    ]


def accuracy_rows(name, entry, manifest):
    """The rows of the table of accuracies: this model's, its counterpart's in the same recipe, the paper's."""
    arch, tag, dataset = split_name(name)
    net = NETS[arch]
    own = entry['accuracy']
    how = f'measured from this file on {own["images"]:,} of {dataset.images:,} {dataset.split} images' if own else ''
    rows = [_row('**this model**', own and own['top1'], own and own['top5'], how)]
    if net.twin != arch:
        other = manifest.get(f'{net.twin}.{tag}', {}).get('accuracy')
        how = f'measured in the same way on {other["images"]:,} images' if other else ''
        rows.append(
            _row(f'its unshared twin `{net.twin}`, same recipe', other and other['top1'], other and other['top5'], how)
        )
    for paper in net.paper if net.dataset == tag.rpartition('_')[2] else ():
        rows.append(_row(paper.name, paper.top1, paper.top5, f'the paper, {paper.table}'))
    return rows


def _row(who, top1, top5, how):
    figures = [f'{top1:.2f} %' if top1 is not None else NOT_MEASURED, f'{top5:.2f} %' if top5 is not None else '-']
    return f'| {who} | {figures[0]} | {figures[1]} | {how} |'


def onnx_rows(name, entry):
    """The rows of the table of ONNX files: the folder's, and those of the unshared twin, which are not published."""
    arch, _, dataset = split_name(name)
    files, twin = entry['onnx']['files'], entry['onnx']['twin'] or {}
    rows = []
    for file, kind in KINDS.items():
        if file in files:
            own, how = files[file], [kind]
            if f'{file}_data' in files:
                how.append(f'weights in `{file}_data`')
            if kind == 'int8':
                how.append(f'calibrated on {own["calibration"]:,} training images')
            if own['accuracy']:
                how.append(f'measured on {own["accuracy"]["images"]:,} of {dataset.images:,} {dataset.split} images')
            top1 = f'{own["accuracy"]["top1"]:.2f} %' if own['accuracy'] else NOT_MEASURED
            rows.append(_onnx_row(f'`{ONNX}/{file}`', onnx_size(files, file), top1, own, ', '.join(how)))
        if file in twin:
            how = f'`{NETS[arch].twin}` that computes the same, folded and written alike, not published'
            rows.append(_onnx_row(f"its unshared twin's, {kind}", twin[file]['size'], '-', twin[file], how))
    return rows


def _onnx_row(what, size, top1, measured, how):
    return f'| {what} | {megabytes(size)} | {top1} | {measured["kernels"]} | {session(measured)} | {how} |'


def megabytes(size):
    return f'{size / 1e6:.2f} MB'


def session(measured):
    """The memory of a session as it was measured."""
    memory = measured['session']
    return f'{memory["loaded"]:.1f} MiB, {memory["held"]:.1f} held' if memory else NOT_MEASURED


def snippets(name, namespace, width, features):
    """The runnable examples: heading -> code."""
    _, _, dataset = split_name(name)
    values = {
        'hub': f'hf-hub:{namespace}/{name}',
        'label_names': "model.pretrained_cfg['label_names']" if dataset.sample else _IMAGENET_LABELS,
        'features': ', '.join(map(str, features)),
        'width': width,
    }
    return {heading: '# pip install timm-sharesnet' + code.format(**values) for heading, code in SNIPPETS.items()}


def compose(name, namespace, manifest, pin, facts, training, files):
    """The card's text.

    Args:
        name: 'arch.tag'.
        namespace: Where the folder will be published.
        manifest: hub/manifest.json with the entry of `name`.
        pin: The entry of `name` in weights.json.
        facts: What only the text shows of the model: `image_size`, `preprocessing`, `width`, `features`.
        training: What to tell of the training, label -> text.
        files: Names of the files of the folder.
    """
    arch, tag, dataset = split_name(name)
    entry, net = manifest[name], NETS[arch]
    if any(other.twin == arch for shared, other in NETS.items() if shared != arch):
        what = f'The unshared twin of a [ShaResNet]({AUTHOR}), a plain residual network to compare with'
    elif net.twin == arch:
        what = f'A plain residual network with about as many parameters as a [ShaResNet]({AUTHOR}), to compare with'
    else:
        what = (
            'A ShaResNet: a residual network in which all blocks of a stage use the same 3x3 convolution '
            '(`x + F(x, W_block, W_stage)`), while 1x1 convolutions and batch norms stay their own'
        )
    lines = [
        f'# {name}',
        '',
        f"`pip install timm-sharesnet`, then `timm.create_model('hf-hub:{namespace}/{name}', pretrained=True)`.",
        '',
        *_wrap(
            f'{what}. Trained on {dataset.name} for [timm](https://github.com/huggingface/pytorch-image-models), which '
            'knows the architecture once the plugin is installed; nothing needs to be imported for it.'
        ),
    ]
    if pin.get('packaged'):
        load = f"`timm.create_model('{name}', pretrained=True)`"
        lines += ['', f'These weights also travel in the package: {load} needs no network.']
    measured = (
        f'`python hub/build.py ... --data-dir DIR` measures it with the published `{WEIGHTS}`, without augmentation'
    )
    measured += ', and `python hub/check.py` on a sample of 1,000 images.' if dataset.sample else '.'
    lines += ['', '## Model', '', '| | |', '| --- | --- |', *model_rows(name, entry, pin)]
    lines += [
        f'| Image size | {facts["image_size"]} x {facts["image_size"]} |',
        f'| Paper | [Boulch 2018]({PAPER}), [arXiv:1702.08782](https://arxiv.org/abs/1702.08782) |',
        f'| Original code | [aboulch/sharesnet]({AUTHOR}) |',
        '',
        *_wrap(
            'GMACs are the multiply-accumulates of the convolutions and the classifier for one image, counted by '
            'torch, activations their outputs. Sharing saves parameters, not computation: a net and its twin are '
            'equal in both.'
        ),
        '',
        '## Accuracy',
        '',
        '| | top-1 | top-5 | |',
        '| --- | --- | --- | --- |',
        *accuracy_rows(name, entry, manifest),
        '',
        *_wrap(measured),
        '',
        f'Preprocessing: {facts["preprocessing"]}. `timm.data.resolve_data_config` gives it.',
        '',
        '## Training',
        '',
    ]
    if entry['imported']:
        lines += ["Trained by the paper's author in Torch7 and imported without change (`source.json`):", '']
    elif 'args.yaml' in files:
        lines += ["Trained by timm's `train.py`; `args.yaml` has every option, `summary.csv` the epochs:", '']
    elif training == NOT_RECORDED:
        lines += ['How these weights were trained was not recorded.', '']
    else:
        epochs = ', epoch by epoch' if 'curves.png' in files else ''
        lines += [f"Not trained by timm's `train.py`; `training.json` tells how{epochs}:", '']
    if training and training != NOT_RECORDED:
        lines += ['| | |', '| --- | --- |', *(f'| {label} | {_cell(text)} |' for label, text in training.items()), '']
    if entry['picked']:
        lines += [f'Published weights: {entry["picked"]}.', '']
    if 'curves.png' in files:
        lines += ['![training curves](curves.png)', '']
    lines += ['## Usage', '']
    for heading, code in snippets(name, namespace, facts['width'], facts['features']).items():
        lines += [f'### {heading}', '', '```python', code, '```', '']
    lines += onnx_section(name, namespace, entry, facts['image_size'])
    limits = [
        f'It knows the {dataset.classes} classes of {dataset.name} and takes any image for one of them. It was '
        f'made for research on weight sharing, at {facts["image_size"]} px, and tested on no other data.',
        "The data set's own biases and label errors are the model's, too.",
        'One training run, so differences of a few tenths of a percent between models mean little.',
        'The Hub page offers code without the plugin: it answers "Unknown model" until `timm-sharesnet` is installed.',
    ]
    if entry['imported']:
        limits += [f'The author states no licence for the weights; [his code]({AUTHOR}) is under the GPL. Ask him.']
    lines += ['## Limits', '', *(line for limit in limits for line in _wrap(limit, '- '))]
    lines += ['', '## Citation', '', '```bibtex' + CITATION, '```', '']
    text = '\n'.join(line.rstrip() for line in lines)
    card = f'---\n{metadata(name, entry, namespace).to_yaml()}\n---\n\n{text}'
    ModelCard(card)  # parses the metadata, raises if the model-index is not valid
    return card


def onnx_section(name, namespace, entry, px):
    """The lines of the section on the ONNX files."""
    arch, _, dataset = split_name(name)
    folded = ''
    if NETS[arch].twin != arch:
        folded = (
            ' in a way that leaves the shared kernels as they are. ONNX Runtime keeps one copy of each, where it would '
            'make one for each use of a net that is exported as it is'
        )
    paragraphs = [
        f'`{ONNX}/` has the net as it is deployed, as `python -m timm_sharesnet.export` writes it: with batch norms '
        f'folded{folded}. The input is `pixel_values`, images of shape (batch, 3, {px}, {px}) preprocessed as timm '
        f'does, see above; the output is `logits` of shape (batch, {dataset.classes}).',
        f'Session memory is by how much a process grows when it opens the file ({entry["onnx"]["runtime"]}), and how '
        'much of it is held once the allocator has given back what is free. It varies with machines and versions.',
    ]
    if 'model_quantized.onnx' in entry['onnx']['files']:
        paragraphs.append(
            'int8 is static QDQ with a scale for each channel of a kernel, calibrated on training images alone. It '
            'saves size first: for speed, ONNX Runtime packs int8 kernels anew for each use, unless the session option '
            '`session.disable_prepacking` is 1.'
        )
    label_name = "config['label_names'][logits[0].argmax()]" if dataset.sample else 'logits[0].argmax()'
    clone = f'In the folder (`hf download {namespace}/{name} --local-dir .`), without this package:'
    code = '# pip install onnxruntime timm' + ONNX_SNIPPET.format(label_name=label_name)
    return [
        '## ONNX',
        '',
        '| | size | top-1 | 3x3 kernels | session memory | |',
        '| --- | --- | --- | --- | --- | --- |',
        *onnx_rows(name, entry),
        '',
        *(line for paragraph in paragraphs for line in (*_wrap(paragraph), '')),
        clone,
        '',
        '```python',
        code,
        '```',
        '',
    ]


def _cell(text):
    return ' '.join(str(text).split()).replace('|', '\\|')


def _wrap(text, bullet=''):
    indent = ' ' * len(bullet)
    return textwrap.wrap(text, 120, initial_indent=bullet, subsequent_indent=indent, break_on_hyphens=False)


def card_faults(text, name, manifest, pin):
    """Where the figures of a card are not the manifest's. The prose is free."""
    entry = manifest[name]
    _, _, dataset = split_name(name)
    try:
        data = ModelCard(text).data
    except Exception as e:
        return [f'README.md: the metadata is not valid: {e}']
    faults = []
    lines = set(text.splitlines())
    rows = model_rows(name, entry, pin) + accuracy_rows(name, entry, manifest) + onnx_rows(name, entry)
    faults += [f'README.md does not have the row: {row}' for row in rows if row not in lines]
    labels = (f'| `{ONNX}/', *(row[: row.index('|', 2) + 1] for row in rows))
    faults += [f'README.md has a row too many: {row}' for row in sorted(lines - {*rows}) if row.startswith(labels)]
    expected = [entry['accuracy'][k] for k in ('top1', 'top5')] if complete(entry, dataset) else []
    found = [round(100 * result.metric_value, 4) for result in data.eval_results or []]
    if found != expected:
        faults.append(f'README.md: the model-index has the accuracies {found}, the manifest {expected}')
    written, wanted = data.to_dict(), metadata(name, entry, card_namespace(text, name) or 'any').to_dict()
    for key in sorted(written.keys() | wanted.keys()):
        if written.get(key) != wanted.get(key):
            faults.append(f'README.md: {key} of the metadata is {written.get(key)} instead of {wanted.get(key)}')
    return faults


def card_namespace(text, name):
    """The namespace that a card was written for, or None if it names none or several."""
    found = set(re.findall(rf'hf-hub:([\w.-]+)/{re.escape(name)}\b', text))
    return found.pop() if len(found) == 1 else None

"""The model card: what the Hub shows of a published folder.

Every figure comes from the manifest or the paper: A. Boulch, ShaResNet, Pattern Recognition Letters 2018.
"""

import re
import textwrap

from catalog import NETS, other_args
from folder import KINDS, MODES, ONNX, WEIGHTS, onnx_size
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from provenance import NOT_RECORDED

NOT_MEASURED = 'not measured'
ARGUMENTS = '| Arguments (`model_args`) |'
AUTHOR = 'https://github.com/aboulch/sharesnet'
PAPER = 'https://doi.org/10.1016/j.patrec.2018.01.006'

SNIPPETS = {
    'Classify an image': """
import timm
import torch
from PIL import Image

name = '{hub}'
model = timm.create_model(name, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
label_names = {label_names}

image = Image.open('image.png').convert('{mode}')  # of one of the classes
with torch.inference_mode():
    probabilities = model(transform(image).unsqueeze(0)).softmax(dim=1)[0]
best = probabilities.topk({shown})
for probability, index in zip(best.values, best.indices):
    print(f'{{probability:.1%}} {{label_names[index]}}')""",
    'Feature maps': """
import timm
import torch
from PIL import Image

name = '{hub}'
model = timm.create_model(name, pretrained=True, features_only=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))

image = Image.open('image.png').convert('{mode}')
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

image = Image.open('image.png').convert('{mode}')
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
pixel_values = transform(Image.open('image.png').convert('{mode}')).unsqueeze(0).numpy()

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


def metadata(release, entry, namespace):
    """The card's metadata. Weights that are not ours have the licence that a person states for them, or none."""
    dataset, results = release.dataset, {}
    if complete(entry, dataset):
        common = {
            'task_type': 'image-classification',
            'task_name': 'Image Classification',
            'dataset_type': dataset.id or 'imagefolder',  # the Hub's word for data that it does not have
            'dataset_name': dataset.name,
            'dataset_split': dataset.split,
            'metric_type': 'accuracy',
            'source_url': f'https://huggingface.co/{namespace}/{release.name}/blob/main/README.md',
            'source_name': 'model card',
        }
        values = [('Top-1 accuracy', entry['accuracy']['top1']), ('Top-5 accuracy', entry['accuracy']['top5'])]
        evals = [
            EvalResult(metric_name=n, metric_value=round(v / 100, 6), **common) for n, v in values if v is not None
        ]
        results = {'model_name': release.name, 'eval_results': evals}
    stated = dict(entry['metadata'])
    if entry['imported'] and 'license' not in stated:
        stated |= {'license': 'other', 'license_name': 'not-stated-by-the-author', 'license_link': AUTHOR}
    elif release.shelf.package:
        stated['license'] = 'apache-2.0'
    sharing = ['weight-sharing'] if release.shared else []
    return ModelCardData(
        **stated,
        library_name='timm',
        pipeline_tag='image-classification',
        datasets=[dataset.id] if dataset.id else None,
        metrics=['accuracy'],
        tags=['image-classification', 'timm', 'timm-sharesnet', 'sharesnet', *sharing],
        **results,
    )


def model_rows(release, entry, pin):
    """The rows of the table of facts."""
    dataset = release.dataset
    parameters = f'{entry["parameters"]:,} ({entry["parameters"] / 1e6:.2f} M)'
    if release.shared:
        twin = entry['twin_parameters']
        saved = 1 - entry['parameters'] / twin
        parameters += f', {100 * saved:.0f} % fewer than the {twin:,} of its unshared twin `{release.net.twin}`'
    data = _cell(dataset.name)
    if not dataset.ours:
        data = f'[{data}](https://huggingface.co/datasets/{dataset.id})' if dataset.id else data
        data += f' (licence: {_cell(dataset.license)})' if dataset.license else ''
    arguments = [f'{ARGUMENTS} {_cell(tell_args(release))} |'] if release.model_args else []
    return [
        f'| Task | image classification, {data}, {dataset.classes} classes |',
        *arguments,
        f'| Parameters | {parameters} |',
        f'| GMACs | {entry["gmacs"]:.4f} |',
        f'| Activations | {entry["activations"]:.4f} M |',
        f'| Weights | `{WEIGHTS}`, {entry["dtype"]}, {pin["size"]:,} bytes, SHA-256 `{pin["sha256"]}` |',
    ]


def tell_args(release):
    """What the network is built with, beside its name and the defaults."""
    return ', '.join(f'`{key}={value!r}`' for key, value in release.model_args.items())


def accuracy_rows(release, entry, manifest):
    """The rows of the table of accuracies: this model's, its counterpart's in the same recipe, the paper's."""
    net, dataset = release.net, release.dataset
    own = entry['accuracy']
    how = f'measured from this file on {own["images"]:,} of {dataset.images:,} {dataset.split} images' if own else ''
    rows = [_row('**this model**', own and own['top1'], own and own['top5'], how)]
    if release.shared:
        other = manifest.get(f'{net.twin}.{release.tag}')
        args = {key: value for key, value in release.other_args.items() if key != 'share_rate'}
        same = other and other_args(net.twin, other.get('model_args', {})) == args
        other = other['accuracy'] if same else None
        how = f'measured in the same way on {other["images"]:,} images' if other else ''
        rows.append(
            _row(f'its unshared twin `{net.twin}`, same recipe', other and other['top1'], other and other['top5'], how)
        )
    for paper in net.paper if release.in_paper else ():
        rows.append(_row(paper.name, paper.top1, paper.top5, f'the paper, {paper.table}'))
    return rows


def _row(who, top1, top5, how):
    figures = [f'{top1:.2f} %' if top1 is not None else NOT_MEASURED, f'{top5:.2f} %' if top5 is not None else '-']
    return f'| {who} | {figures[0]} | {figures[1]} | {how} |'


def onnx_rows(release, entry):
    """The rows of the table of ONNX files: the folder's, and those of the unshared twin, which are not published."""
    dataset = release.dataset
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
            how = f'`{release.net.twin}` that computes the same, folded and written alike, not published'
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


def snippets(release, namespace, width, features):
    """The runnable examples: heading -> code."""
    dataset = release.dataset
    values = {
        'hub': f'hf-hub:{namespace}/{release.name}',
        'label_names': "model.pretrained_cfg['label_names']" if dataset.names() else _IMAGENET_LABELS,
        'shown': min(5, dataset.classes),
        'mode': MODES[release.in_chans],
        'features': ', '.join(map(str, features)),
        'width': width,
    }
    return {heading: '# pip install timm-sharesnet' + code.format(**values) for heading, code in SNIPPETS.items()}


def compose(release, namespace, manifest, pin, facts, training, files):
    """The card's text.

    Args:
        release: What it is the card of.
        namespace: Where the folder will be published.
        manifest: manifest.json with the entry of the release.
        pin: The entry of the release in weights.json.
        facts: What only the text shows of the model: `image_size`, `preprocessing`, `width`, `features`.
        training: What to tell of the training, label -> text.
        files: Names of the files of the folder.
    """
    name, dataset = release.name, release.dataset
    entry = manifest[name]
    height, width = facts['image_size']
    if not release.shared and any(net.twin == release.net.twin for shared, net in NETS.items() if shared != net.twin):
        what = f'The unshared twin of a [ShaResNet]({AUTHOR}), a plain residual network to compare with'
    elif not release.shared:
        what = f'A plain residual network with about as many parameters as a [ShaResNet]({AUTHOR}), to compare with'
    else:
        whose = 'runs of blocks of a stage' if 'share_rate' in release.other_args else 'all blocks of a stage'
        what = (
            f'A ShaResNet: a residual network in which {whose} use the same 3x3 convolution '
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
    measured = f'Measured with the published `{WEIGHTS}`, without augmentation, by `hub/build.py --data-dir DIR`'
    measured += ', and on a sample of 1,000 images by `hub/check.py`,' if dataset.sample else ''
    measured += ' of the source code of timm-sharesnet.'
    lines += ['', '## Model', '', '| | |', '| --- | --- |', *model_rows(release, entry, pin)]
    lines += [
        f'| Image size | {height} x {width} |',
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
        *accuracy_rows(release, entry, manifest),
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
        epochs = ', `summary.csv` the epochs' if 'summary.csv' in files else ''
        lines += [f"Trained by timm's `train.py`; `args.yaml` has every option{epochs}:", '']
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
    for heading, code in snippets(release, namespace, facts['width'], facts['features']).items():
        lines += [f'### {heading}', '', '```python', code, '```', '']
    lines += onnx_section(release, namespace, entry, height, width)
    made = f'trained at {pixels(height, width)} px'
    if release.shelf.package:
        made = f'made for research on weight sharing, at {pixels(height, width)} px,'
    limits = [
        f'It knows the {dataset.classes} classes of {dataset.name} and takes any image for one of them. It was {made} '
        'and tested on no other data.',
        "The data set's own biases and label errors are the model's, too.",
        'One training run, so differences of a few tenths of a percent between models mean little.',
        'The Hub page offers code without the plugin: it answers "Unknown model" until `timm-sharesnet` is installed.',
    ]
    written = metadata(release, entry, namespace)
    if not written.license:
        limits += ['No licence is stated for the weights: ask whoever published them.']
    if written.license_link == AUTHOR:
        limits += [f'The author states no licence for the weights; [his code]({AUTHOR}) is under the GPL. Ask him.']
    lines += ['## Limits', '', *(line for limit in limits for line in _wrap(limit, '- '))]
    lines += ['', '## Citation', '', '```bibtex' + CITATION, '```', '']
    text = '\n'.join(line.rstrip() for line in lines)
    card = f'---\n{written.to_yaml()}\n---\n\n{text}'
    ModelCard(card)  # parses the metadata, raises if the model-index is not valid
    return card


def onnx_section(release, namespace, entry, height, width):
    """The lines of the section on the ONNX files."""
    dataset, folded = release.dataset, ''
    if release.shared:
        folded = (
            ' in a way that leaves the shared kernels as they are. ONNX Runtime keeps one copy of each, where it would '
            'make one for each use of a net that is exported as it is'
        )
    paragraphs = [
        f'`{ONNX}/` has the net as it is deployed, as `python -m timm_sharesnet.export` writes it: with batch norms '
        f'folded{folded}. The input is `pixel_values`, images of shape (batch, {release.in_chans}, {height}, {width}) '
        f'preprocessed as timm does, see above; the output is `logits` of shape (batch, {dataset.classes}).',
        f'Session memory is by how much a process grows when it opens the file ({entry["onnx"]["runtime"]}), and how '
        'much of it is held once the allocator has given back what is free. It varies with machines and versions.',
    ]
    if 'model_quantized.onnx' in entry['onnx']['files']:
        paragraphs.append(
            'int8 is static QDQ with a scale for each channel of a kernel, calibrated on training images alone. It '
            'saves size first: for speed, ONNX Runtime packs int8 kernels anew for each use, unless the session option '
            '`session.disable_prepacking` is 1.'
        )
    label_name = "config['label_names'][logits[0].argmax()]" if dataset.names() else 'logits[0].argmax()'
    clone = f'In the folder (`hf download {namespace}/{release.name} --local-dir .`), without this package:'
    mode = MODES[release.in_chans]
    code = '# pip install onnxruntime timm' + ONNX_SNIPPET.format(label_name=label_name, mode=mode)
    return [
        '## ONNX',
        '',
        '| | size | top-1 | 3x3 kernels | session memory | |',
        '| --- | --- | --- | --- | --- | --- |',
        *onnx_rows(release, entry),
        '',
        *(line for paragraph in paragraphs for line in (*_wrap(paragraph), '')),
        clone,
        '',
        '```python',
        code,
        '```',
        '',
    ]


def pixels(height, width):
    return f'{width}' if height == width else f'{height} x {width}'


def _cell(text):
    return ' '.join(str(text).split()).replace('|', '\\|')


def _wrap(text, bullet=''):
    indent = ' ' * len(bullet)
    return textwrap.wrap(text, 120, initial_indent=bullet, subsequent_indent=indent, break_on_hyphens=False)


def card_faults(text, release, manifest, pin):
    """Where the figures of a card are not the manifest's. The prose is free."""
    entry = manifest[release.name]
    try:
        data = ModelCard(text).data
    except Exception as e:
        return [f'README.md: the metadata is not valid: {e}']
    faults = []
    lines = set(text.splitlines())
    rows = model_rows(release, entry, pin) + accuracy_rows(release, entry, manifest) + onnx_rows(release, entry)
    faults += [f'README.md does not have the row: {row}' for row in rows if row not in lines]
    labels = (f'| `{ONNX}/', ARGUMENTS, *(row[: row.index('|', 2) + 1] for row in rows))
    faults += [f'README.md has a row too many: {row}' for row in sorted(lines - {*rows}) if row.startswith(labels)]
    expected = [entry['accuracy'][k] for k in ('top1', 'top5')] if complete(entry, release.dataset) else []
    expected = [value for value in expected if value is not None]
    found = [round(100 * result.metric_value, 4) for result in data.eval_results or []]
    if found != expected:
        faults.append(f'README.md: the model-index has the accuracies {found}, the manifest {expected}')
    written, wanted = data.to_dict(), metadata(release, entry, card_namespace(text, release.name) or 'any').to_dict()
    for key in sorted(written.keys() | wanted.keys()):
        if written.get(key) != wanted.get(key):
            faults.append(f'README.md: {key} of the metadata is {written.get(key)} instead of {wanted.get(key)}')
    return faults


def card_namespace(text, name):
    """The namespace that a card was written for, or None if it names none or several."""
    found = set(re.findall(rf'hf-hub:([\w.-]+)/{re.escape(name)}\b', text))
    return found.pop() if len(found) == 1 else None

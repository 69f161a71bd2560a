"""The model card: what the Hub shows of a published folder, card.md with what is known of it.

Every figure comes from the manifest or the paper: A. Boulch, ShaResNet, Pattern Recognition Letters 2018.
"""

import functools
import json
import re
import string
import textwrap

import javascript
import timm
import torch
from catalog import NETS, other_args
from folder import HUB, KINDS, MODES, ONNX, WEIGHTS, onnx_size, read_json
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from provenance import AUTHOR, NOT_RECORDED

NOT_MEASURED = 'not measured'
IMAGENET_LABELS = 'timm.data.ImageNetInfo().label_descriptions()'
PACKAGED = "These weights also travel in the package: `timm.create_model('{name}', pretrained=True)` needs no network."
FOLDED = (
    ' in a way that leaves the shared kernels as they are. ONNX Runtime keeps one copy of each, where it would make '
    'one for each use of a net that is exported as it is'
)
INT8 = (
    'int8 is static QDQ with a scale for each channel of a kernel, calibrated on training images alone. It saves size '
    'first: for speed, ONNX Runtime packs int8 kernels anew for each use, unless the session option '
    '`session.disable_prepacking` is 1.'
)

JAVASCRIPT = """In JavaScript, in a browser or Node.js:

```js
// npm install @huggingface/transformers
import {{ AutoImageProcessor, ImageClassificationPipeline, ResNetForImageClassification }}
  from '@huggingface/transformers';

const name = '{id}';
const classifier = new ImageClassificationPipeline({{
  task: 'image-classification',
  model: await ResNetForImageClassification.from_pretrained(name, {{ dtype: '{dtype}' }}),
  processor: await AutoImageProcessor.from_pretrained(name),
}});
console.log(await classifier('image.png'));
```

The net is that of the file, whatever the class is called; `pipeline('image-classification', name)` does not know it.
Images of another size are resized by another filter than timm's. A browser does not smooth: draw a large image on a
small canvas with `imageSmoothingQuality = 'high'`, and pass the canvas."""


def metadata(release, entry, namespace):
    """The card's metadata, with an accuracy that was measured on the whole split.

    Weights that are not ours have the licence that a person states for them, or none.
    """
    dataset, accuracy, results = release.dataset, entry['accuracy'], {}
    if accuracy and accuracy['images'] == dataset.images:
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
        values = [('Top-1 accuracy', accuracy['top1']), ('Top-5 accuracy', accuracy['top5'])]
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
    arguments = [f'| Arguments (`model_args`) | {_cell(tell_args(release))} |'] if release.model_args else []
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
    return f'| {who} | {percent(top1)} | {percent(top5, "-")} | {how} |'


def percent(value, otherwise=NOT_MEASURED):
    return otherwise if value is None else f'{value:.2f} %'


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
            top1 = percent(own['accuracy'] and own['accuracy']['top1'])
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


def describe_model(release, path):
    """What a card tells of a folder's net, as its config.json describes it, and no manifest has."""
    config = timm.data.resolve_data_config(pretrained_cfg=read_json(path / 'config.json')['pretrained_cfg'])
    args = json.dumps({'num_classes': release.dataset.classes, **release.model_args}, sort_keys=True)
    num_features, features = _count_features(release.arch, args, tuple(config['input_size']))
    _, height, width = config['input_size']
    crop = f'{config["interpolation"]}, centre crop {config["crop_pct"]:g}, ' if config['crop_pct'] < 1 else ''
    mean, std = (' '.join(f'{v:.4g}' for v in config[key]) for key in ('mean', 'std'))
    return {
        'height': height,
        'width': width,
        'preprocessing': f'{pixels(height, width)} px, {crop}mean {mean}, std {std}',
        'num_features': num_features,
        'features': ', '.join(map(str, features)),
    }


@functools.cache
def _count_features(arch, args, input_size):
    """What the classifier takes, and the shapes of the feature maps, of a net with these arguments (JSON)."""
    model = timm.create_model(arch, device='meta', **json.loads(args)).eval()
    last, features = model.forward_intermediates(torch.zeros(1, *input_size, device='meta'))
    return model.forward_head(last, pre_logits=True).shape[1], [tuple(f.shape) for f in features]


def compose(release, path, namespace, manifest, pin, training):
    """The card's text of a folder, with its pin of weights.json and what to tell of its training, label -> text."""
    name, dataset, entry = release.name, release.dataset, manifest[release.name]
    facts, stated = describe_model(release, path), metadata(release, entry, namespace)
    named, px = dataset.names(), pixels(facts['height'], facts['width'])
    table = ['| | |', '| --- | --- |', *(f'| {label} | {_cell(text)} |' for label, text in training.items())]
    values = facts | {
        'name': name,
        'namespace': namespace,
        'hub': f'hf-hub:{namespace}/{name}',
        'author': AUTHOR,
        'data': dataset.name,
        'classes': dataset.classes,
        'channels': release.in_chans,
        'mode': MODES[release.in_chans],
        'shown': min(5, dataset.classes),
        'what': tell_kind(release),
        'packaged': PACKAGED.format(name=name) if pin.get('packaged') else '',
        'model_rows': '\n'.join(model_rows(release, entry, pin)),
        'accuracy_rows': '\n'.join(accuracy_rows(release, entry, manifest)),
        'onnx_rows': '\n'.join(onnx_rows(release, entry)),
        'sampled': ', and on a sample of 1,000 images by `hub/check.py`,' if dataset.sample else '',
        'trained': tell_training(path, entry, training),
        'training': '\n'.join(table) if training and training != NOT_RECORDED else '',
        'picked': f'Published weights: {entry["picked"]}.' if entry['picked'] else '',
        'curves': '![training curves](curves.png)' if (path / 'curves.png').is_file() else '',
        'label_names': "model.pretrained_cfg['label_names']" if named else IMAGENET_LABELS,
        'label_name': "config['label_names'][logits[0].argmax()]" if named else 'logits[0].argmax()',
        'folded': FOLDED if release.shared else '',
        'runtime': entry['onnx']['runtime'],
        'javascript': tell_javascript(release, path, namespace, entry),
        'int8': INT8 if 'model_quantized.onnx' in entry['onnx']['files'] else '',
        'made': f'made for research on weight sharing, at {px} px,' if release.shelf.package else f'trained at {px} px',
        'license': '- No licence is stated for the weights: ask whoever published them.' if not stated.license else '',
    }
    if stated.license_link == AUTHOR:
        values['license'] = (
            f'- The author states no licence for the weights; [his code]({AUTHOR}) is under the GPL. Ask him.'
        )
    text = string.Template((HUB / 'card.md').read_text(encoding='utf-8')).substitute(values)
    card = f'---\n{stated.to_yaml()}\n---\n\n{_fill(text)}'
    ModelCard(card)  # parses the metadata, raises if the model-index is not valid
    return card


def tell_kind(release):
    """What the net is, beside the paper's."""
    if release.shared:
        whose = 'runs of blocks of a stage' if 'share_rate' in release.other_args else 'all blocks of a stage'
        return (
            f'A ShaResNet: a residual network in which {whose} use the same 3x3 convolution '
            '(`x + F(x, W_block, W_stage)`), while 1x1 convolutions and batch norms stay their own'
        )
    if any(net.twin == release.net.twin for shared, net in NETS.items() if shared != net.twin):
        return f'The unshared twin of a [ShaResNet]({AUTHOR}), a plain residual network to compare with'
    return f'A plain residual network with about as many parameters as a [ShaResNet]({AUTHOR}), to compare with'


def tell_training(path, entry, training):
    """Who trained the net, and which file tells more."""
    if entry['imported']:
        return "Trained by the paper's author in Torch7 and imported without change (`source.json`):"
    if (path / 'args.yaml').is_file():
        epochs = ', `summary.csv` the epochs' if (path / 'summary.csv').is_file() else ''
        return f"Trained by timm's `train.py`; `args.yaml` has the options of the recipe{epochs}:"
    if training == NOT_RECORDED:
        return 'How these weights were trained was not recorded.'
    epochs = ', epoch by epoch' if (path / 'curves.png').is_file() else ''
    return f"Not trained by timm's `train.py`; `training.json` tells how{epochs}:"


def tell_javascript(release, path, namespace, entry):
    """How transformers.js classifies an image, if it can preprocess it."""
    if javascript.describe_preprocessor(read_json(path / 'config.json')['pretrained_cfg']) is None:
        return ''
    dtype = 'q8' if 'model_quantized.onnx' in entry['onnx']['files'] else 'fp32'
    return JAVASCRIPT.format(id=f'{namespace}/{release.name}', dtype=dtype)


def pixels(height, width):
    return f'{width}' if height == width else f'{height} x {width}'


def _cell(text):
    return ' '.join(str(text).split()).replace('|', '\\|')


def _fill(text):
    """Paragraphs and items in lines of 120 characters, without those that are empty. Code and tables stay."""
    blocks = []
    for part in re.split(r'(```.*?```)', text, flags=re.S):
        lines = []
        for line in [part] if part.startswith('```') else re.sub(r'\n{3,}', '\n\n', part.strip()).split('\n'):
            indent = '  ' if line.startswith('- ') else ''
            keep = not line or line.startswith(('|', '#', '`'))
            lines += [line] if keep else textwrap.wrap(line, 120, subsequent_indent=indent, break_on_hyphens=False)
        blocks.append('\n'.join(lines))
    return '\n\n'.join(filter(None, blocks)) + '\n'


def card_namespace(text, name):
    """The namespace that a card was written for, or None if it names none or several."""
    found = set(re.findall(rf'hf-hub:([\w.-]+)/{re.escape(name)}\b', text))
    return found.pop() if len(found) == 1 else None

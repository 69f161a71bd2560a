#!/usr/bin/env python3
"""Make the folder of a published model, hub/ARCH.TAG, from trained or imported weights.

    python hub/build.py output/train/RUN --model shawrn40_4.modern_c10 --data-dir cifar10
    python hub/build.py IMPORTED --model sharesnet34.torch7_in1k --data-dir imagenet
    python hub/build.py hub/ARCH.TAG --model ARCH.TAG     the same weights again, a new card
    python hub/build.py RUN --model sharesnet50.x --data-dir birds --dataset-name Birds --output OWN --namespace ME

PATH is a checkpoint, an output directory of timm's train.py or of hub/import_torch7.py, or a folder made here or by
timm's save_for_hf. The last checkpoint is taken, not the best one, which was chosen on the test images, and the
averaged weights if they are better. The net is built as it was trained, by the options of train.py (model_kwargs, gp,
in_chans, mean, ...) and the config.json that are there. What a new config.json cannot tell is refused by its name.
The accuracy is measured with the written file on DIR/test (CIFAR), DIR/val or DIR/validation (ImageNet), one folder a
class in train.py's order; without --data-dir it is "not measured", unless the weights are the ones measured before.
onnx/ gets the net as it is deployed: fp32, and int8 if images of DIR/train are there to calibrate it with; both are
measured alike, and beside them the files that the unshared twin would have.

With --output OWN the net is your own, and all is written below OWN, nothing in hub/: OWN/ARCH.TAG, OWN/manifest.json
and OWN/weights.json. What the options tell of data and licence is kept there, so say it once. The names of the classes
are those of the image folders (test, else val or validation), or of --class-names.

Written are the folder, its entries in manifest.json and weights.json, and the copy in the package of weights that
travel in it; all of it, or nothing if anything is wrong. Exit code 0, or 2 and a line for each fault. It needs onnx,
onnxscript and onnxruntime (timm-sharesnet[onnx]), and matplotlib to draw curves.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from pathlib import Path

import card
import catalog
import folder
import javascript
import provenance
import timm
import torch
import yaml
from catalog import DEFAULT_ARGS, Dataset
from folder import KINDS, MODES, ONNX, WEIGHTS, LabelledImages
from safetensors.torch import load_file
from timm.data.readers import create_reader

import timm_sharesnet
from timm_sharesnet import fold, unshare
from timm_sharesnet.cli import CommandError, Parser, command, concerning
from timm_sharesnet.export import export_onnx, inspect, open_session, quantize, session_memory
from timm_sharesnet.model_args import TRAIN_ARGS, args_from_options
from timm_sharesnet.weights import mismatches, save_folder

HALF_ABOVE = 20e6  # bytes of fp32, above which our own weights are stored as fp16
CALIBRATION = 256  # training images that int8 is calibrated with
# What create_model takes and no net is built with, and what the weights tell
NO_MODEL_ARGS = set(
    'pretrained pretrained_cfg pretrained_cfg_overlay checkpoint_path cache_dir num_classes scriptable exportable '
    'no_jit'.split()
)
PREPROCESSING = 'input_size pool_size interpolation crop_pct crop_mode mean std test_input_size test_crop_pct'.split()
HUB_ID = r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*'
METADATA = {'license': r'[a-z0-9][a-z0-9.-]*', 'base_model': HUB_ID, 'new_version': HUB_ID}


@command('build.py')
def main(argv):
    args = parse_arguments(argv)
    shelf = catalog.open_shelf(args.output)
    namespace = catalog.choose_namespace(args.namespace, shelf)
    release = catalog.parse(args.model, shelf)
    metadata = describe_metadata(args, release)
    folder.require_onnx()
    if folder.aside(release.path).exists():
        with shelf.locked():
            folder.restore(release.path)
    candidates, config, options, files = read_path(args.path, release)
    release = release._replace(model_args=describe_args(config, options, release.arch))
    if release.other_args and shelf.read()[1].get(release.name, {}).get('packaged'):
        raise CommandError(
            f'{release.name} is "packaged" in weights.json: loaded by name it lacks {card.tell_args(release)}'
        )
    training, points, seed = provenance.describe(files)
    if points:
        require_matplotlib()
    release = release._replace(dataset=describe_dataset(args, release, candidates, options.get('class_map')))
    model = make_model(release, config, options)
    images, calibration = open_images(args.data_dir, release.dataset, model) if args.data_dir else (None, [])
    if images and not release.dataset.ours:
        release = release._replace(dataset=release.dataset._replace(images=len(images)))

    with work_in(shelf) as temporary:
        new = temporary / release.name
        new.mkdir()
        for name, content in files.items():
            (new / name).write_bytes(content)
        entry = build(new, release, model, candidates, images) | {'seed': seed, 'metadata': metadata}
        if points:
            draw_curves(points, release, new / 'curves.png')
        entry['onnx'] = build_onnx(new, release, images, calibration, entry['onnx'])
        javascript.write(new, release, entry['onnx']['files'])
        preprocessed = (new / javascript.PREPROCESSOR).is_file()
        with shelf.locked():  # two builds at once: the entries of both
            folder.restore(release.path)
            manifest, pins = shelf.read()
            manifest[release.name] = {key: entry[key] for key in folder.ENTRY}
            pin = pins[release.name] = make_pin(new, release, pins.get(release.name, {}))
            text = card.compose(release, new, namespace, manifest, pin, training)
            (new / 'README.md').write_text(text, encoding='utf-8')
            ignored = install(new, release, manifest, pins)
    picked = f', {entry["picked"]}' if entry['picked'] else ''
    print(f'{release.shown}: {pin["size"]:,} bytes, {entry["dtype"]}, {tell_accuracy(entry)}{picked}')
    tell_onnx(entry['onnx'], args.data_dir)
    if not preprocessed:
        print(f'no {javascript.PREPROCESSOR}: transformers.js only takes square crops from the centre of RGB images')
    for line in ignored:
        print(f'hub{line} goes beyond {catalog.TRACKED_BYTES / 1e6:.0f} MB in all, so git ignores it')


def parse_arguments(argv):
    parser = Parser(description=__doc__)
    parser.add_argument('path', type=Path, metavar='PATH', help='checkpoint or folder')
    parser.add_argument('--model', required=True, metavar='ARCH.TAG', help='architecture, and what tells its weights')
    parser.add_argument('--data-dir', type=Path, metavar='DIR', help='images to measure the accuracy with')
    parser.add_argument('--namespace', metavar='NS', help=f'where it will be published, {catalog.NAMESPACE} by default')
    parser.add_argument('--base-model', metavar='NS/NAME', help='what the weights were converted from or trained on')
    parser.add_argument('--new-version', metavar='NS/NAME', help='what supersedes the weights')
    own = parser.add_argument_group('a net of your own')
    catalog.add_output(own)
    own.add_argument('--license', metavar='ID', help="of the weights, by the Hub's identifiers; not stated by default")
    own.add_argument('--dataset-name', metavar='NAME', help='data that it was trained on, unless the tag names it')
    own.add_argument('--dataset-id', metavar='NS/NAME', help='of the data on the Hub, if they are there')
    own.add_argument('--dataset-license', metavar='ID', help='of the data')
    own.add_argument(
        '--class-names', type=Path, metavar='FILE', help="one a line in the order of the outputs, train.py's class_map"
    )
    return parser.parse_args(argv)


@contextlib.contextmanager
def work_in(shelf):
    """A temporary directory beside the folders. A shelf that is new goes again if nothing gets there."""
    new = not shelf.path.exists()
    shelf.path.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix='.build-', dir=shelf.path) as temporary:
            yield Path(temporary)
    finally:
        if new and not any(shelf.path.iterdir()):
            shelf.path.rmdir()


def make_pin(new, release, before):
    """The entry of weights.json. It keeps its commit as long as the weights are the same, and load by name."""
    digest = folder.sha256(new / WEIGHTS)
    same = before.get('sha256') == digest and not release.other_args
    return {
        'repo': before.get('repo') if same else None,
        'revision': before.get('revision') if same else None,
        'sha256': digest,
        'size': (new / WEIGHTS).stat().st_size,
        'packaged': release.shelf.package is not None and before.get('packaged', False),
    }


def install(new, release, manifest, pins):
    """Put the finished folder in its place, and what tells of it. Returns what was added to .gitignore."""
    shelf, ignored = release.shelf, []
    contents = {shelf.manifest: folder.to_json(manifest), shelf.pins: folder.to_json(pins)}
    if shelf.package:
        text = shelf.ignored.read_text(encoding='utf-8')
        ignored = catalog.ignore_too_large(release.name, manifest, pins, text.split())
        contents[shelf.ignored] = (text + ''.join(f'{line}\n' for line in ignored)).encode()
    if pins[release.name]['packaged']:
        contents[shelf.packaged(release.name)] = (new / WEIGHTS).read_bytes()
    contents = {path: new for path, new in contents.items() if not path.is_file() or path.read_bytes() != new}
    with folder.staged(contents) as written:
        folder.replace({release.path: new, **written})
    return ignored


def tell_accuracy(entry):
    return f'top-1 {card.percent(entry["accuracy"]["top1"])}' if entry['accuracy'] else 'accuracy not measured'


def tell_onnx(onnx, data_dir):
    """Print a line for each ONNX file, or why there is none."""
    for name in KINDS:
        if name in onnx['files']:
            own, twin = onnx['files'][name], (onnx['twin'] or {}).get(name)
            against = f"; its twin's {card.megabytes(twin['size'])}, {card.session(twin)}" if twin else ''
            size = card.megabytes(folder.onnx_size(onnx['files'], name))
            print(f'{ONNX}/{name}: {size}, {tell_accuracy(own)}, {card.session(own)}{against}')
        else:
            why = f'{data_dir} has no folder train' if data_dir else 'without --data-dir there are no images'
            print(f'no {ONNX}/{name}: {why} to calibrate it with')


# Reading


def read_path(path, release):
    """What a path has: sets of weights (label -> tensors), config.json, options of train.py, files to publish (bytes).

    Raises:
        CommandError: Also if the weights would change their architecture or origin by way of --model.
    """
    if path.is_dir():
        names = (WEIGHTS, 'last.pth.tar', 'model_best.pth.tar')
        weights = next((path / name for name in names if (path / name).is_file()), None)
        if weights is None:
            raise CommandError(f'{path} has none of {", ".join(names)}')
    elif path.is_file():
        weights = path
    else:
        raise CommandError(f'{path} does not exist')
    found = {}
    if weights.name == WEIGHTS or path.is_dir() or (weights.parent / 'args.yaml').is_file():
        found = {name: weights.parent / name for name in ('config.json', *sorted(folder.PROVENANCE))}
        found = {name: file for name, file in found.items() if file.is_file()}
    for file in (*found.values(), *([weights] if path.is_dir() else [])):
        if file.is_symlink():
            raise CommandError(f'{file} is a link, and what it points to would be published: copy the file there')
    candidates, options = read_weights(weights)
    files = {name: file.read_bytes() for name, file in found.items()}
    if options and 'args.yaml' not in files:
        files['args.yaml'] = yaml.safe_dump(options).encode()
    config, options = parse_records(files)
    check_origin(config, options, release)
    files.pop('config.json', None)
    if release.imported and 'source.json' not in files:  # its file and SHA-256
        source = {'source': card.AUTHOR, 'imported with': 'import_torch7.py of timm-sharesnet'}
        files['source.json'] = provenance.dump(source | config.get('torch7', {}))
    if not files:
        files['training.json'] = provenance.dump(provenance.NOT_RECORDED)
    if weights.name == 'model_best.pth.tar':
        candidates = {f'{label}, epoch with the best test accuracy': v for label, v in candidates.items()}
    return candidates, config, options, {name: provenance.clean(name, content) for name, content in files.items()}


def read_weights(path):
    """Tensors of a file, by what they are, and train.py's options if it has them. Nothing else is unpickled."""
    try:
        if path.suffix == '.safetensors':
            return {'weights': load_file(path)}, {}
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:
        raise CommandError(f'{path} cannot be read: {type(e).__name__}: {e}') from e
    if not isinstance(checkpoint, dict):
        raise CommandError(f'{path} holds no state dict but a {type(checkpoint).__name__}')
    keys = {'state_dict_ema': 'EMA', 'state_dict': 'not averaged'}
    clean = timm.models.clean_state_dict
    found = {label: clean(checkpoint[key]) for key, label in keys.items() if checkpoint.get(key)}
    options = vars(checkpoint['args']) if isinstance(checkpoint.get('args'), argparse.Namespace) else {}
    return found or {'weights': clean(checkpoint)}, options if 'model_kwargs' in options else {}


def check_origin(config, options, release):
    """Weights must not change their architecture or origin by way of --model."""
    for file, found in {'config.json': config.get('architecture'), 'args.yaml': options.get('model')}.items():
        if found and found.partition('.')[0] != release.arch:
            raise CommandError(f'{file} says {found}, --model says {release.arch}')
    imported = 'torch7' in str(config.get('pretrained_cfg', {}).get('tag'))
    if imported and not release.imported:
        raise CommandError(
            f'these weights were imported from Torch7: the tag must start with torch7_, found {release.tag}'
        )
    if release.imported and not imported:
        raise CommandError(f'{release.tag} is for weights that hub/import_torch7.py wrote: give its output directory')


def parse_records(files):
    """What config.json and train.py's args.yaml say, of files (name -> bytes) that need not have them."""
    options = yaml.safe_load(files.get('args.yaml', b'')) or {}
    if not isinstance(options, dict):
        raise CommandError(f'args.yaml holds no options but a {type(options).__name__}')
    return json.loads(files.get('config.json', '{}')), options


def read_records(path):
    """The same of a folder."""
    names = ('config.json', 'args.yaml')
    return parse_records({name: (path / name).read_bytes() for name in names if (path / name).is_file()})


def describe_args(config, options, arch):
    """What a net was built with, beside its name, its classes and `DEFAULT_ARGS`: argument -> value.

    The config.json that came with the weights and the options of train.py tell it.

    Raises:
        CommandError: By the name of the option, if the net does not take it, or it may not be published.
    """

    def option(arg):
        return TRAIN_ARGS.get(arg, f'model_kwargs: {arg}') if options else f'model_args: {arg}'

    if options.get('split_bn'):
        raise CommandError(
            'split_bn: timm builds no net with split batch norms by name, so nobody could load the weights'
        )
    trained = args_from_options(options) | (options.get('model_kwargs') or {}) if options else {}
    found, trained = (
        {arg: value for arg, value in args.items() if value is not None and arg not in NO_MODEL_ARGS}
        for args in (config.get('model_args') or {}, trained)
    )
    for arg, value in trained.items():
        if found.setdefault(arg, value) != value:
            raise CommandError(
                f'{option(arg)}: args.yaml says {value!r}, config.json {found[arg]!r}: correct the wrong one'
            )
    found = {arg: value for arg, value in found.items() if DEFAULT_ARGS.get(arg) != value}
    for arg, value in found.items():
        if not _survives_json(value):
            raise CommandError(f'{option(arg)}: config.json cannot hold {value!r}')
        if not provenance.is_plain(value):
            raise CommandError(f'{option(arg)} is more than numbers and short words, and would be published')
    channels, mode = found.get('in_chans', DEFAULT_ARGS['in_chans']), options.get('input_img_mode')
    if channels not in MODES:
        raise CommandError(f'{option("in_chans")}: images have 1 to {max(MODES)} channels, not {channels!r}')
    if mode not in (None, MODES[channels]):
        raise CommandError(
            f'input_img_mode: config.json has no place for {mode}, and images of {channels} channels are read as '
            f'{MODES[channels]}'
        )
    try:
        if found:
            timm.create_model(arch, device='meta', **found)
    except Exception as e:  # whatever a model's constructor raises
        given = ', '.join(f'{option(arg)} {value!r}' for arg, value in found.items())
        raise CommandError(f'{arch} cannot be built with {given}: {e}') from e
    return found


def _survives_json(value):
    try:
        return json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError):
        return False


def describe_metadata(args, release):
    """What the card's metadata get from a person: by the options, else as before. An empty option takes it out."""
    if args.license and release.shelf.package:
        raise CommandError('--license is for weights of your own: give --output DIR, too')
    found = dict(release.shelf.read()[0].get(release.name, {}).get('metadata', {}))
    for key, pattern in METADATA.items():
        value = getattr(args, key)
        if value and not re.fullmatch(pattern, value, re.ASCII):
            wanted = 'an identifier like cc-by-4.0' if key == 'license' else 'NS/NAME'
            raise CommandError(f'--{key.replace("_", "-")} must be {wanted}, found {value!r}')
        if value is not None:
            found[key] = value
    return {key: value for key, value in found.items() if value}


def describe_dataset(args, release, candidates, class_map):
    """What the weights were trained on: a data set of ours, or a user's as the options tell it, else as before."""
    options = {key: getattr(args, f'dataset_{key}') for key in ('name', 'id', 'license')}
    given = {key: ' '.join(value.split()) or None for key, value in options.items() if value is not None}
    before = release.dataset
    if before and before.ours and not given and not args.class_names:
        if args.data_dir and class_map:
            raise CommandError(
                f'the labels were given by class_map {class_map}, so they are not those of {before.name}'
            )
        return before
    if release.shelf.package:
        raise CommandError('data of your own are for folders of your own: give --output DIR, too')
    dataset = before if before and not before.ours else Dataset(None, '', 'test', None, 0)
    if not given.get('name', dataset.name):
        raise CommandError(f'what was {release.name} trained on? Say --dataset-name NAME')
    if given.get('id') and not re.fullmatch(HUB_ID, given['id'], re.ASCII):
        raise CommandError(f'--dataset-id must be NS/NAME, found {given["id"]!r}')
    names = read_class_names(args.class_names) if args.class_names else dataset.label_names
    if args.data_dir:
        split = find_split(args.data_dir, ('test', 'val', 'validation'))
        given['split'] = 'test' if split.name == 'test' else 'validation'
        if names is None and class_map:
            raise CommandError(
                f'the labels were given by class_map {class_map}: say --class-names, its names in their order'
            )
        names = names or read_classes(split)
    classes = count_classes(candidates, release)
    if names and len(names) != classes:
        shown = ', '.join(names[:3])
        raise CommandError(
            f'the weights have {classes} classes, and there are names for {len(names)} ({shown}, ...): '
            'say --class-names FILE with those of the weights'
        )
    return dataset._replace(**given, classes=classes, label_names=names)


def count_classes(candidates, release):
    """Outputs of the classifier."""
    label, tensors = next(iter(candidates.items()))
    weight = f'{timm.models.get_pretrained_cfg(release.arch).classifier}.weight'
    if weight not in tensors:
        raise CommandError(f'{label}: {weight} is missing')
    return len(tensors[weight])


def read_classes(path):
    """Names of classes of a folder of images, in train.py's order: names are sorted as numbers are."""
    with concerning(path, AssertionError, RuntimeError, ValueError):
        return list(create_reader('', root=str(path)).class_to_idx)


def read_class_names(path):
    """Names of classes, one a line."""
    names = [line.strip() for line in path.read_text(encoding='utf-8').splitlines()]
    if not all(names) or len({*names}) != len(names):
        raise CommandError(f'{path} must have a name for each class, one a line, none twice')
    return names


def find_split(root, names):
    """The folder of images of the first name that there is."""
    split = next((root / name for name in names if (root / name).is_dir()), None)
    if split is None:
        raise CommandError(f'{root} has no folder {" or ".join(names)}')
    return split


def open_images(root, dataset, model):
    """The labelled images of the split that measures, and training images at equal distances to calibrate with."""
    split = find_split(root, ('test',) if dataset.split == 'test' else ('val', 'validation'))
    images = open_folder(split, dataset, model)
    if not (root / 'train').is_dir():
        return images, []
    training = open_folder(root / 'train', dataset, model)
    if training.classes != images.classes:
        raise CommandError(f'{root / "train"} and {split} do not have the same classes')
    return images, [training[i][0] for i in training.spread(CALIBRATION)]


def open_folder(path, dataset, model):
    """The images of a folder, if they have the classes of the data set and no others."""
    names = dataset.names()
    images = LabelledImages(path, model, names)
    if len(images.classes) != dataset.classes:
        raise CommandError(f'{path} has {len(images.classes)} classes, {dataset.name} has {dataset.classes}')
    if names and {*images.classes} != {*names}:
        raise CommandError(f'{path} does not have the classes of {dataset.name}: {", ".join(images.classes[:3])}, ...')
    return images


# Building


def build(new, release, model, candidates, images):
    """Write weights and config.json of the best candidate. Returns the entry of manifest.json."""
    dataset = release.dataset
    for label, tensors in candidates.items():
        faults = mismatches(model.state_dict(), tensors)
        if faults and has_other_rate(tensors, model):
            raise CommandError(
                f'{label}: the 3x3 kernels are those of another share_rate than {release.share_rate}, all else is of '
                f'{release.arch}: give a folder whose args.yaml (model_kwargs) or config.json (model_args) has the rate'
            )
        if faults:
            lines = [f'{label}: {fault}' for fault in faults.values()]
            raise CommandError(*lines[:5], *([f'and {len(lines) - 5} more'] if len(lines) > 5 else []))
    counts = describe_net(release, model)
    if release.in_paper and counts['parameters'] != release.net.parameters:
        raise CommandError(
            f'{release.arch} has {counts["parameters"]:,} parameters, the original {release.net.parameters:,}'
        )
    half = not release.imported and sum(4 * t.numel() for t in model.state_dict().values()) > HALF_ABOVE
    dtype = torch.float16 if half else torch.float32

    written = {}
    for label, tensors in candidates.items():
        target = new.with_name(label)
        model.float().load_state_dict(tensors)
        write(model.to(dtype), release, target)
        try:
            loaded, expected = folder.load(target), model.state_dict()
        except RuntimeError:  # not finite
            loaded, expected = model.float(), {}
        found = loaded.state_dict()
        if not expected or any(not torch.equal(v, found[k].to(v.dtype)) for k, v in expected.items()):
            raise CommandError(f'{label}: the written file does not hold the same finite values as {dtype}')
        written[label] = measure_accuracy(loaded, images) if images else None
    best = max(written, key=lambda label: (written[label] or {}).get('top1', 0))  # the first, EMA, if equal
    for file in new.with_name(best).iterdir():
        file.rename(new / file.name)

    manifest, pins = release.shelf.read()
    same = pins.get(release.name, {}).get('sha256') == folder.sha256(new / WEIGHTS)
    before = manifest.get(release.name, {}) if same else {}
    measured = images or not before.get('date')
    return {
        **release.told,
        **counts,
        'dtype': str(dtype).removeprefix('torch.'),
        'accuracy': choose_accuracy(dataset, written[best], before.get('accuracy')),
        'sample': take_sample(folder.load(new), dataset),
        'onnx': before.get('onnx'),  # which `build_onnx` replaces
        'picked': tell_picked(best, written) or before.get('picked'),
        'date': datetime.date.today().isoformat() if measured else before['date'],
    }


def describe_net(release, model):
    """What can be counted of a net and its unshared twin."""
    twin = sum(p.numel() for p in unshare(model).parameters()) if release.shared else None
    return {**folder.measure(model), 'twin_parameters': twin}


def take_sample(model, dataset, session=None):
    """Which images of our sample the model does not recognize, or a session in its place."""
    wrong = folder.wrong_in_sample(model, dataset, session) if dataset.sample else None
    return {'images': dataset.sample, 'wrong': wrong} if dataset.sample else None


def has_other_rate(tensors, model):
    """Whether tensors are a model's but for the names of the 3x3 kernels, which tell what shares them."""
    kernel = re.compile(r'layer\d+\.(conv(\.\d+)?|blocks\.\d+\.conv2)\.weight')
    expected = model.state_dict()
    others = [{k: v.shape for k, v in t.items() if not kernel.fullmatch(k)} for t in (expected, tensors)]
    return tensors.keys() != expected.keys() and others[0] == others[1]


def make_model(release, config, options):
    """The network as it was trained, with a pretrained_cfg that says how its images are preprocessed."""
    # the names of the classes stand at the top level of config.json, see `describe_config`
    overlay = {'tag': release.tag, 'num_classes': release.dataset.classes, 'label_names': None}
    return timm.create_model(
        release.name if is_known(release) else release.arch,
        num_classes=release.dataset.classes,
        pretrained_cfg_overlay=overlay | describe_preprocessing(release, config, options),
        **release.model_args,
    ).eval()


def is_known(release):
    """Whether the package has a default cfg with this tag."""
    return release.name in timm.list_models(f'{release.arch}*', include_tags=True)


def describe_preprocessing(release, config, options):
    """How images are preprocessed: as the cfg of a known tag says, else train.py's options or config.json.

    Mean and std are made to fit the channels as timm's loader does in training.
    """
    known = is_known(release)
    cfg = timm.models.get_pretrained_cfg(release.name if known else release.arch).to_dict()
    found = {key: cfg.get(key) for key in PREPROCESSING}
    given = config.get('pretrained_cfg', {})
    if options and 'timm_sharesnet' not in config:  # not of a folder made here, whose options are those of the recipe
        kwargs, tag = options.get('model_kwargs') or {}, str(options.get('model')).partition('.')[2]
        given = timm.models.resolve_pretrained_cfg(
            release.arch, kwargs.get('pretrained_cfg') or tag, kwargs.get('pretrained_cfg_overlay')
        ).to_dict() | {'pool_size': None, 'test_input_size': None, 'test_crop_pct': None}
    if given.get('input_size') and not known:
        found = {key: given.get(key) for key in PREPROCESSING}
        found |= timm.data.resolve_data_config(options, pretrained_cfg=given)
    for key in ('input_size', 'test_input_size'):
        found[key] = found[key] and (release.in_chans, *found[key][1:])
    for key in ('mean', 'std'):
        if len(found[key]) != release.in_chans:
            found[key] = (sum(found[key]) / len(found[key]),) * release.in_chans
    return found


def write(model, release, target):
    """Write a folder that timm and transformers load. Keys of ours are at the top level, where timm ignores them."""
    args = config_args(release)
    own = {'timm_sharesnet': timm_sharesnet.__version__, 'global_pool': args['global_pool']}
    save_folder(model, target, args, own | ({'label_names': names} if (names := release.dataset.names()) else {}))
    config = folder.read_json(target / 'config.json') | {'sha256': folder.sha256(target / WEIGHTS)}
    (target / 'config.json').write_text(json.dumps(config, indent=2), encoding='utf-8')


def describe_config(release, sha256):
    """What config.json must have at its top level, None for what it must not have."""
    return {
        'architecture': release.arch,
        'num_classes': release.dataset.classes,
        'label_names': release.dataset.names(),
        'model_args': config_args(release),
        'sha256': sha256,
    }


def config_args(release):
    """The model_args of config.json."""
    return {'in_chans': release.in_chans, 'global_pool': DEFAULT_ARGS['global_pool']} | release.model_args


def measure_accuracy(model, images, session=None):
    """Of (image, label) pairs, %. Among fewer than five classes nothing is told by the top five."""
    top1, top5 = folder.classify(model, images, min(8, os.cpu_count() or 1), session)
    n = len(top1)
    five = round(100 * sum(top5) / n, 4) if model.num_classes >= 5 else None
    return {'top1': round(100 * sum(top1) / n, 4), 'top5': five, 'images': n}


def choose_accuracy(dataset, new, before):
    """The new accuracy if there is one. Of a data set that we know, the one that was measured on more images."""
    if new and before and dataset.ours:
        return max(new, before, key=lambda accuracy: accuracy['images'])
    return new or before


def build_onnx(new, release, images, calibration, before):
    """Write onnx/ from the written weights, or copy what was made of the same before. Returns its entry."""
    import onnxruntime

    dataset = release.dataset
    target, old = new / ONNX, release.path / ONNX
    target.mkdir()
    known = before['files'] if before else {}
    if known and images is None and all((old / name).is_file() and _is(old / name, known[name]) for name in known):
        for name in known:
            shutil.copyfile(old / name, target / name)
        return before
    model = folder.load(new)
    batches = [torch.stack(calibration[i : i + 100]).numpy() for i in range(0, len(calibration), 100)]
    write_onnx(model, dataset, target, batches)
    files = {}
    for file in sorted(target.iterdir()):
        files[file.name] = {'sha256': folder.sha256(file), 'size': file.stat().st_size}
        if file.name in KINDS:
            same = known[file.name] if file.name in known and _is(file, known[file.name]) else {}
            files[file.name] |= measure_file(file, model, dataset, images, same.get('accuracy'))
        if KINDS.get(file.name) == 'int8':
            files[file.name]['calibration'] = len(calibration)
    twin = measure_twin(model, dataset, batches) if release.shared else None
    return {'files': files, 'twin': twin, 'runtime': f'ONNX Runtime {onnxruntime.__version__}, {platform.machine()}'}


def _is(file, record):
    return folder.sha256(file) == record['sha256']


def write_onnx(model, dataset, target, batches):
    """Write the folded model, and with preprocessed images for the calibration its int8 file."""
    export_onnx(fold(model), target / 'model.onnx', tuple(model.pretrained_cfg['input_size']))
    if batches:
        quantize(target / 'model.onnx', target / 'model_quantized.onnx', batches)
    error = folder.output_error(model, open_session(target / 'model.onnx'), dataset)
    if not error <= folder.ERROR:
        raise CommandError(f'model.onnx differs from the model by {error:.1e} of the largest output')
    for file in target.iterdir():
        file.chmod(0o644)  # onnx lets nobody else read the weights beside a file


def measure_file(file, model, dataset, images, before):
    """Accuracy, kernels and session memory of an ONNX file, and of int8 what it takes of our sample for another."""
    session = open_session(file)
    new = measure_accuracy(model, images, session) if images else None
    found = {'accuracy': choose_accuracy(dataset, new, before)}
    if KINDS[file.name] == 'int8':
        found['sample'] = take_sample(model, dataset, session)
    return found | measure_session(file)


def measure_session(file):
    """Different 3x3 kernels that ONNX Runtime holds, and by how many MiB a process grows that opens the file."""
    memory = session_memory(file)
    session = memory and {'loaded': round(memory.loaded, 1), 'held': round(memory.held, 1)}
    return {'kernels': inspect(file).kernels, 'session': session}


def measure_twin(model, dataset, batches):
    """The same of the files that the unshared twin would have."""
    with tempfile.TemporaryDirectory() as temporary:
        write_onnx(unshare(model), dataset, Path(temporary), batches)
        sizes = {file.name: {'size': file.stat().st_size} for file in Path(temporary).iterdir()}
        names = [name for name in KINDS if name in sizes]
        return {n: {'size': folder.onnx_size(sizes, n), **measure_session(Path(temporary, n))} for n in names}


def tell_picked(best, written):
    """Which set of weights was taken, of several."""
    if len(written) == 1:
        return None if best == 'weights' else best
    other = next(label for label in written if label != best)
    if written[best] is None:
        return f'{best} (not compared with those {other}, for want of data)'
    return f'{best} (top-1 {card.percent(written[best]["top1"])}, {other} {card.percent(written[other]["top1"])})'


def require_matplotlib():
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as e:
        raise CommandError('drawing the curves needs matplotlib: pip install matplotlib') from e


def draw_curves(points, release, path):
    """Training loss, accuracy or image size, and learning rate over the epochs."""
    from matplotlib.figure import Figure

    panels = [('train_loss', 'training loss', 'log')]
    panels += (
        [('eval_top1', f'{release.dataset.split} top-1, %', 'linear')] if any('eval_top1' in p for p in points) else []
    )
    panels += [('px', 'image size, px', 'linear')] if any('px' in p for p in points) else []
    panels += [('lr', 'learning rate', 'linear')]
    figure = Figure(figsize=(4 * len(panels), 3), layout='constrained')
    for axes, (key, label, scale) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        known = [(p['epoch'], p[key]) for p in points if p.get(key) is not None]
        style = {'drawstyle': 'steps-mid'} if key == 'px' else {}
        axes.plot(*zip(*known, strict=True), color='tab:blue', marker='.' if len(known) < 3 else None, **style)
        axes.set(xlabel='epoch', title=label, yscale=scale)
        axes.grid(alpha=0.3, which='both')
    figure.suptitle(release.name)
    figure.savefig(path, dpi=100)


if __name__ == '__main__':
    sys.exit(main())

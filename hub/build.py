#!/usr/bin/env python3
"""Make the folder of a published model, hub/ARCH.TAG, from trained or imported weights.

    python hub/build.py output/train/RUN --model shawrn40_4.modern_c10 --data-dir cifar10
    python hub/build.py IMPORTED --model sharesnet34.torch7_in1k --data-dir imagenet
    python hub/build.py hub/ARCH.TAG --model ARCH.TAG     the same weights again, a new card

PATH is a checkpoint, an output directory of timm's train.py or of hub/import_torch7.py, or a folder made here. The last
checkpoint is taken, not the best one, which was chosen on the test images, and the averaged weights if they are better.
The accuracy is measured with the written file on DIR/test (CIFAR), DIR/val or DIR/validation (ImageNet), one folder a
class; without DIR it is "not measured", unless the weights are the ones measured before. onnx/ gets the net as it is
deployed: fp32, and int8 if images of DIR/train are there to calibrate it with; both are measured alike, and beside them
the files that the unshared twin would have. Nothing is written if anything is wrong. It needs onnx, onnxscript and
onnxruntime (timm-sharesnet[onnx]), and matplotlib to draw curves.
"""

import argparse
import csv
import datetime
import json
import logging
import os
import platform
import re
import shutil
import tempfile
import warnings
from pathlib import Path, PurePosixPath

import card
import folder
from folder import DATASETS, WEIGHTS, Fault

HALF_ABOVE = 20e6  # bytes of fp32, above which our own weights are stored as fp16
CALIBRATION = 256  # training images that int8 is calibrated with


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = folder.refuse
    parser.add_argument('path', type=Path, metavar='PATH')
    parser.add_argument('--model', required=True, metavar='ARCH.TAG')
    parser.add_argument('--data-dir', type=Path, metavar='DIR')
    parser.add_argument('--namespace', metavar='NS', help=f'where it will be published, {folder.NAMESPACE} by default')
    args = parser.parse_args()
    namespace = folder.choose_namespace(args.namespace)
    arch, tag, dataset = folder.split_name(args.model)
    if arch not in card.NETS:
        raise Fault(f'{arch} is no architecture of this package: {", ".join(card.NETS)}')
    folder.require_onnx()
    target = folder.HUB / args.model
    restore(target)
    images = open_images(args.data_dir, dataset) if args.data_dir else None
    calibration = open_calibration(args.data_dir) if args.data_dir else []
    candidates, files = read_path(args.path, tag)
    check_origin(files, args.model)
    files.pop('config.json', None)  # written anew

    with tempfile.TemporaryDirectory(prefix='.build-', dir=folder.HUB) as temporary:
        new = Path(temporary, args.model)
        new.mkdir()
        entry, pin = build(new, args.model, dataset, candidates, images)
        for name, content in files.items():
            Path(new, name).write_bytes(content)
        training, points = describe_training(new, entry)
        if points:
            draw_curves(points, args.model, new / 'curves.png')
        entry['onnx'] = build_onnx(new, images, calibration, entry['onnx'])
        manifest = folder.read_json(folder.MANIFEST) | {args.model: entry}
        pins = folder.read_json(folder.PINS) | {args.model: pin}
        names = {path.name for path in new.iterdir()}
        facts = describe_model(folder.load(new))
        text = card.compose(args.model, namespace, manifest, pin, facts, training, names)
        (new / 'README.md').write_text(text, encoding='utf-8')
        replace(new, target)
    if pin['packaged']:
        copy = folder.packaged(args.model)
        shutil.copyfile(target / WEIGHTS, copy.with_name(copy.name + '.new'))
        os.replace(copy.with_name(copy.name + '.new'), copy)
    folder.write_json(folder.MANIFEST, dict(sorted(manifest.items())))
    folder.write_json(folder.PINS, dict(sorted(pins.items())))
    picked = f', {entry["picked"]}' if entry['picked'] else ''
    print(f'hub/{args.model}: {pin["size"]:,} bytes, {entry["dtype"]}, {tell_accuracy(entry)}{picked}')
    tell_onnx(entry['onnx'], args.data_dir)
    for part in folder.LARGE:
        if folder.tracked(args.model, part) and folder.tracked_bytes(pins) >= folder.TRACKED_BYTES:
            with folder.IGNORED.open('a') as file:
                file.write(f'/{args.model}/{part}\n')
            limit = f'{folder.TRACKED_BYTES / 1e6:.0f} MB'
            print(f'hub/{args.model}/{part} goes beyond {limit} in all, so git ignores it')


def tell_accuracy(entry):
    return f'top-1 {entry["accuracy"]["top1"]:.2f} %' if entry['accuracy'] else 'accuracy not measured'


def tell_onnx(onnx, data_dir):
    """Print a line for each ONNX file, or why there is none."""
    for name in folder.KINDS:
        if name in onnx['files']:
            own, twin = onnx['files'][name], (onnx['twin'] or {}).get(name)
            against = f"; its twin's {card.megabytes(twin['size'])}, {card.session(twin)}" if twin else ''
            size = card.megabytes(folder.onnx_size(onnx['files'], name))
            print(f'{folder.ONNX}/{name}: {size}, {tell_accuracy(own)}, {card.session(own)}{against}')
        else:
            why = f'{data_dir} has no folder train' if data_dir else 'without --data-dir there are no images'
            print(f'no {folder.ONNX}/{name}: {why} to calibrate it with')


# Reading


def read_path(path, tag):
    """The sets of weights found (label -> tensors) and the other files to publish (name -> bytes, paths cut)."""
    if path.is_dir():
        names = (WEIGHTS, 'last.pth.tar', 'model_best.pth.tar')
        weights = next((path / name for name in names if (path / name).is_file()), None)
        if weights is None:
            raise Fault(f'{path} has none of {", ".join(names)}')
    elif path.is_file():
        weights = path
    else:
        raise Fault(f'{path} does not exist')
    candidates = read_weights(weights)
    if weights.name == 'model_best.pth.tar':
        candidates = {f'{label}, epoch with the best test accuracy': v for label, v in candidates.items()}
    files = {}
    for name in ('config.json', *sorted(folder.PROVENANCE)):
        source = weights.parent / name
        if source.is_file() and (weights.name == WEIGHTS or path.is_dir() or (weights.parent / 'args.yaml').is_file()):
            files[name] = cut_paths(name, source.read_bytes())
    if tag.startswith('torch7_') and 'source.json' not in files:
        imported = json.loads(files.get('config.json', '{}')).get('torch7', {})  # its file and SHA-256
        files['source.json'] = _dump(
            {'source': card.AUTHOR, 'imported with': 'import_torch7.py of timm-sharesnet', **imported}
        )
    if not folder.PROVENANCE & files.keys():
        files['training.json'] = _dump(card.NOT_RECORDED)
    return candidates, files


def read_weights(path):
    """Tensors of a file, by what they are. Nothing but tensors is unpickled, and train.py's options beside them."""
    import torch
    from safetensors.torch import load_file
    from timm.models import clean_state_dict

    try:
        if path.suffix == '.safetensors':
            return {'weights': load_file(path)}
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:
        raise Fault(f'{path} cannot be read: {type(e).__name__}: {e}') from e
    if not isinstance(checkpoint, dict):
        raise Fault(f'{path} holds no state dict but a {type(checkpoint).__name__}')
    keys = {'state_dict_ema': 'EMA', 'state_dict': 'not averaged'}
    found = {label: clean_state_dict(checkpoint[key]) for key, label in keys.items() if checkpoint.get(key)}
    return found or {'weights': clean_state_dict(checkpoint)}


def check_origin(files, name):
    """Weights must not change their architecture or origin by way of --model."""
    import yaml

    arch, tag, _ = folder.split_name(name)
    config = json.loads(files.get('config.json', '{}'))
    trained = (yaml.safe_load(files.get('args.yaml', '')) or {}).get('model')
    for file, found in {'config.json': config.get('architecture'), 'args.yaml': trained}.items():
        if found and found.partition('.')[0] != arch:
            raise Fault(f'{file} says {found}, --model says {arch}')
    imported = 'torch7' in str(config.get('pretrained_cfg', {}).get('tag'))
    if imported and not tag.startswith('torch7_'):
        raise Fault(f'these weights were imported from Torch7: the tag must start with torch7_, found {tag}')
    if tag.startswith('torch7_') and not imported:
        raise Fault(f'{tag} is for weights that hub/import_torch7.py wrote: give its output directory')


def cut_paths(name, content):
    """Cut every path of a provenance file to its last part: who trained, and where, is nobody's business."""
    if name == 'args.yaml':
        import yaml

        args = yaml.safe_load(content) or {}
        return yaml.safe_dump({k: v if k == 'dataset' else cut(v) for k, v in args.items()}, sort_keys=False).encode()
    if name.endswith('.json') and name != 'config.json':
        return _dump(cut(json.loads(content)))
    return content


def _dump(data):
    return json.dumps(data, indent=1, ensure_ascii=False).encode() + b'\n'


def cut(value):
    """Cut paths in strings at any depth: a text without blanks that has a slash, and absolute paths inside a text."""
    if isinstance(value, dict):
        return {k: cut(v) for k, v in value.items()}
    if isinstance(value, list):
        return [cut(v) for v in value]
    if not isinstance(value, str) or re.match(r'https?://|hf[-_]hub:', value):
        return value
    if re.match(r'(local-dir:)?(~|\.{0,2}[/\\]|[A-Za-z]:[/\\])', value) or not re.search(r'\s', value):
        prefix, path = re.fullmatch(r'(local-dir:)?(.*)', value, re.S).groups()
        return (prefix or '') + PurePosixPath(path.replace('\\', '/')).name if re.search(r'[/\\]', path) else value
    return re.sub(r'(?<![\w:/.])(?:~|\.{1,2}|[A-Za-z]:)?[/\\](?:[^\s/\\]+[/\\])+([^\s/\\]*)', r'\1', value)


def open_images(root, dataset):
    """The images of a data set's test split, which must have its classes."""
    from torchvision.datasets import ImageFolder

    names = ('test',) if dataset.split == 'test' else ('val', 'validation')
    split = next((root / name for name in names if (root / name).is_dir()), None)
    if split is None:
        raise Fault(f'{root} has no folder {" or ".join(names)}')
    images = ImageFolder(str(split))
    if len(images.classes) != dataset.classes:
        raise Fault(f'{split} has {len(images.classes)} classes, {dataset.name} has {dataset.classes}')
    if dataset.sample and images.classes != folder.class_names(dataset):
        raise Fault(f'{split} does not have the classes of {dataset.name}: {", ".join(images.classes[:3])}, ...')
    return images


def open_calibration(root):
    """Training images at equal distances, (image, label) pairs; none where there is no folder of them."""
    from torchvision.datasets import ImageFolder

    if not (root / 'train').is_dir():
        return []
    images = ImageFolder(str(root / 'train'))
    n = min(CALIBRATION, len(images))
    return [images[i * len(images) // n] for i in range(n)]


# Building


def build(new, name, dataset, candidates, images):
    """Write weights and config.json of the best candidate. Returns the entries of manifest.json and weights.json."""
    import torch
    from safetensors.torch import save_file

    arch, tag, _ = folder.split_name(name)
    model = make_model(name, dataset)
    imported = tag.startswith('torch7_')
    for label, tensors in candidates.items():
        faults = folder.tensor_faults(tensors, model)
        if faults:
            raise Fault(*(f'{label}: {fault}' for fault in faults[:5]), *_more(faults, 5))
    parameters = sum(p.numel() for p in model.parameters())
    if dataset is DATASETS[card.NETS[arch].dataset] and parameters != card.NETS[arch].parameters:
        raise Fault(f'{arch} has {parameters:,} parameters, the original {card.NETS[arch].parameters:,}')
    half = not imported and sum(4 * t.numel() for t in model.state_dict().values()) > HALF_ABOVE
    dtype = torch.float16 if half else torch.float32

    written = {}
    for label, tensors in candidates.items():
        tensors = {k: v.to(dtype).contiguous() if v.is_floating_point() else v for k, v in tensors.items()}
        target = new.with_name(label)
        target.mkdir()
        save_file(tensors, target / WEIGHTS, metadata={'format': 'pt'})
        (target / WEIGHTS).chmod(0o644)  # safetensors lets nobody else read it
        write_config(model, dataset, target)
        reloaded = folder.load(target).state_dict()
        if any(not torch.isfinite(v).all() or not torch.equal(v, reloaded[k].to(v.dtype)) for k, v in tensors.items()):
            raise Fault(f'{label}: the written file does not hold the same finite values as {dtype}')
        written[label] = measure_accuracy(folder.load(target), images) if images else None
    best = max(written, key=lambda label: (written[label] or {}).get('top1', 0))  # the first, EMA, if equal
    for file in new.with_name(best).iterdir():
        file.rename(new / file.name)

    digest, size = folder.sha256(new / WEIGHTS), (new / WEIGHTS).stat().st_size
    pin = folder.read_json(folder.PINS).get(name, {})
    same = pin.get('sha256') == digest
    before = folder.read_json(folder.MANIFEST).get(name, {}) if same else {}
    pin = {
        'repo': pin.get('repo') if same else None,
        'revision': pin.get('revision') if same else None,
        'sha256': digest,
        'size': size,
        'packaged': pin.get('packaged', False),
    }
    loaded = folder.load(new)
    sample = {'images': dataset.sample, 'wrong': folder.wrong_in_sample(loaded, dataset)} if dataset.sample else None
    measured = images or not before.get('date')
    entry = {
        **folder.measure(folder.load(new)),
        'dtype': str(dtype).removeprefix('torch.'),
        'imported': imported,
        'data': dataset.name,
        'accuracy': most_images(written[best], before.get('accuracy')),
        'sample': sample,
        'onnx': before.get('onnx'),  # which `build_onnx` replaces
        'picked': tell_picked(best, written) or before.get('picked'),
        'seed': before.get('seed'),
        'date': datetime.date.today().isoformat() if measured else before['date'],
    }
    return entry, pin


def _more(faults, shown):
    return [f'and {len(faults) - shown} more'] if len(faults) > shown else []


def make_model(name, dataset):
    """The architecture with its tag's default cfg, or for a tag that the package does not know with its first one."""
    import timm

    arch, tag, _ = folder.split_name(name)
    known = f'{arch}.{tag}' in timm.list_models(f'{arch}*', include_tags=True)
    overlay = {'tag': tag, 'num_classes': dataset.classes}
    return timm.create_model(
        name if known else arch, num_classes=dataset.classes, pretrained_cfg_overlay=overlay
    ).eval()


def write_config(model, dataset, target):
    """config.json as timm writes it. Keys of our own stand at the top level only, where timm ignores them."""
    from timm.models._hub import save_config_for_hf

    import timm_sharesnet

    own = {'timm_sharesnet': timm_sharesnet.__version__, 'sha256': folder.sha256(target / WEIGHTS)}
    if dataset.sample:
        own['label_names'] = folder.class_names(dataset)
    save_config_for_hf(model, target / 'config.json', model_config=own)


def measure_accuracy(model, images, session=None):
    top1, top5 = folder.classify(model, images, min(8, os.cpu_count() or 1), session)
    n = len(top1)
    return {'top1': round(100 * sum(top1) / n, 4), 'top5': round(100 * sum(top5) / n, 4), 'images': n}


def most_images(*accuracies):
    """The accuracy that was measured on most images, the first if several were. None if none was measured."""
    return max(filter(None, accuracies), key=lambda accuracy: accuracy['images'], default=None)


def build_onnx(new, images, calibration, before):
    """Write onnx/ from the written weights, or copy what was made of the same before. Returns its entry."""
    import onnxruntime

    arch, _, dataset = folder.split_name(new.name)
    target, old = new / folder.ONNX, folder.HUB / new.name / folder.ONNX
    target.mkdir()
    known = before['files'] if before else {}
    if known and images is None and all((old / name).is_file() and _is(old / name, known[name]) for name in known):
        for name in known:
            shutil.copyfile(old / name, target / name)
        return before
    model = folder.load(new)
    batches = [batch.numpy() for batch, _ in folder.preprocess(model, calibration)] if calibration else []
    write_onnx(model, dataset, target, batches)
    files = {}
    for file in sorted(target.iterdir()):
        files[file.name] = {'sha256': folder.sha256(file), 'size': file.stat().st_size}
        if file.name in folder.KINDS:
            same = known[file.name] if file.name in known and _is(file, known[file.name]) else {}
            files[file.name] |= measure_file(file, model, dataset, images, same.get('accuracy'))
        if folder.KINDS.get(file.name) == 'int8':
            files[file.name]['calibration'] = len(calibration)
    twin = measure_twin(model, dataset, batches) if card.NETS[arch].twin != arch else None
    return {'files': files, 'twin': twin, 'runtime': f'ONNX Runtime {onnxruntime.__version__}, {platform.machine()}'}


def _is(file, record):
    return folder.sha256(file) == record['sha256']


def write_onnx(model, dataset, target, batches):
    """Write the folded model, and with preprocessed images for the calibration its int8 file."""
    from timm_sharesnet import fold
    from timm_sharesnet.export import export_onnx, open_session, quantize

    logging.disable()  # the remarks of exporter and quantizer are not for the user
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        export_onnx(fold(model), target / 'model.onnx', tuple(model.pretrained_cfg['input_size']))
        if batches:
            quantize(target / 'model.onnx', target / 'model_quantized.onnx', batches)
    logging.disable(logging.NOTSET)
    error = folder.output_error(model, open_session(target / 'model.onnx'), dataset)
    if not error <= folder.ERROR:
        raise Fault(f'model.onnx differs from the model by {error:.1e} of the largest output')
    for file in target.iterdir():
        file.chmod(0o644)  # onnx lets nobody else read the weights beside a file


def measure_file(file, model, dataset, images, before):
    """Accuracy, kernels and session memory of an ONNX file, and of int8 what it takes of our sample for another."""
    from timm_sharesnet.export import open_session

    session = open_session(file)
    found = {'accuracy': most_images(measure_accuracy(model, images, session) if images else None, before)}
    if folder.KINDS[file.name] == 'int8':
        wrong = folder.wrong_in_sample(model, dataset, session) if dataset.sample else None
        found['sample'] = {'images': dataset.sample, 'wrong': wrong} if dataset.sample else None
    return found | measure_session(file)


def measure_session(file):
    """Different 3x3 kernels that ONNX Runtime holds, and by how many MiB a process grows that opens the file."""
    from timm_sharesnet.export import inspect, session_memory

    memory = session_memory(file)
    session = memory and {'loaded': round(memory.loaded, 1), 'held': round(memory.held, 1)}
    return {'kernels': inspect(file).kernels, 'session': session}


def measure_twin(model, dataset, batches):
    """The same of the files that the unshared twin would have."""
    from timm_sharesnet import unshare

    with tempfile.TemporaryDirectory() as temporary:
        write_onnx(unshare(model), dataset, Path(temporary), batches)
        sizes = {file.name: {'size': file.stat().st_size} for file in Path(temporary).iterdir()}
        names = [name for name in folder.KINDS if name in sizes]
        return {n: {'size': folder.onnx_size(sizes, n), **measure_session(Path(temporary, n))} for n in names}


def tell_picked(best, written):
    """Which set of weights was taken, of several."""
    if len(written) == 1:
        return None if best == 'weights' else best
    other = next(label for label in written if label != best)
    if written[best] is None:
        return f'{best} (not compared with those {other}, for want of data)'
    return f'{best} (top-1 {written[best]["top1"]:.2f} %, {other} {written[other]["top1"]:.2f} %)'


def describe_model(model):
    """What the card tells of a model and no manifest has."""
    import timm
    import torch

    config = timm.data.resolve_data_config(model=model)
    px = config['input_size'][-1]
    mean, std = (' '.join(f'{v:.4g}' for v in config[key]) for key in ('mean', 'std'))
    features = timm.create_model(model.pretrained_cfg['architecture'], features_only=True).eval()
    with torch.no_grad():
        shapes = [tuple(f.shape) for f in features(torch.zeros(1, *config['input_size']))]
    crop = f'{config["interpolation"]}, centre crop {config["crop_pct"]:g}, ' if config['crop_pct'] < 1 else ''
    return {
        'image_size': px,
        'preprocessing': f'{px} px, {crop}mean {mean}, std {std}',
        'width': model.num_features,
        'features': shapes,
    }


# The training


def describe_training(new, entry):
    """Label -> text for the card's table and points of the curves; sets the entry's seed."""
    if (new / 'args.yaml').is_file():
        import yaml

        args = yaml.safe_load((new / 'args.yaml').read_text())
        entry['seed'] = args.get('seed')
        return {f'`{k}`': args[k] for k in card.RECIPE if _counts(k, args)}, read_summary(new)
    if (new / 'training.json').is_file():
        training = folder.read_json(new / 'training.json')
        entry['seed'] = training.get('seed')
        flat = {k: v for k, v in training.items() if not isinstance(v, (list, dict))}
        flat |= {k: v for value in training.values() if isinstance(value, dict) for k, v in value.items()}
        return flat, training.get('epochs', [])
    if (new / 'source.json').is_file():
        return folder.read_json(new / 'source.json'), []
    return {}, []


def _counts(option, args):
    """Whether an option of train.py had an effect, as far as other options tell."""
    if args.get(option) is False or args.get(option) in (None, '', [], {}):
        return False
    mixing = args.get('mixup') or args.get('cutmix')
    effect = {
        **{k: args.get(k) for k in ('aug_repeats', 'reprob', 'mixup', 'cutmix', 'drop')},
        'amp_dtype': args.get('amp'),
        'decay_epochs': args.get('sched') == 'step',
        'decay_milestones': args.get('sched') == 'multistep',
        'decay_rate': args.get('sched') in ('step', 'multistep'),
        'lr_base': not args.get('lr'),
        'mixup_off_epoch': mixing and args.get('mixup_off_epoch'),
        'mixup_prob': mixing,
        'model_ema_decay': args.get('model_ema'),
        'remode': args.get('reprob'),
        'warmup_lr': args.get('warmup_epochs'),
    }
    return bool(effect.get(option, True))


def read_summary(new):
    """train.py's summary.csv. An epoch without validation has a shorter row, whatever the header says."""
    path = new / 'summary.csv'
    if not path.is_file():
        return []
    fields = {
        3: ('epoch', 'train_loss', 'lr'),
        6: ('epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr'),
    }
    points = []
    with path.open(newline='') as file:
        for row in csv.reader(file):
            if row and row[0] != 'epoch':  # a resumed run may write the header again
                if len(row) not in fields:
                    raise Fault(f'summary.csv: a row of {len(row)} values: {",".join(row)}')
                points.append(dict(zip(fields[len(row)], map(float, row), strict=True)))
    return points


def draw_curves(points, name, path):
    """Training loss, accuracy or image size, and learning rate over the epochs."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise Fault('drawing the curves needs matplotlib: pip install matplotlib') from e

    panels = [('train_loss', 'training loss', 'log')]
    split = folder.split_name(name)[2].split
    panels += [('eval_top1', f'{split} top-1, %', 'linear')] if any('eval_top1' in p for p in points) else []
    panels += [('px', 'image size, px', 'linear')] if any('px' in p for p in points) else []
    panels += [('lr', 'learning rate', 'linear')]
    figure = Figure(figsize=(4 * len(panels), 3), layout='constrained')
    for axes, (key, label, scale) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        known = [(p['epoch'], p[key]) for p in points if p.get(key) is not None]
        style = {'drawstyle': 'steps-mid'} if key == 'px' else {}
        axes.plot(*zip(*known, strict=True), color='tab:blue', marker='.' if len(known) < 3 else None, **style)
        axes.set(xlabel='epoch', title=label, yscale=scale)
        axes.grid(alpha=0.3, which='both')
    figure.suptitle(name)
    figure.savefig(path, dpi=100)


def replace(new, target):
    """Put the finished folder in its place. At any moment the old one or the new one is complete, here or aside."""
    aside = _aside(target)
    if target.exists():
        target.rename(aside)
    try:
        new.rename(target)
    except BaseException:
        restore(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def restore(target):
    """Put a folder back that a build moved aside before it was cut off, or delete it if the new one is there."""
    aside = _aside(target)
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
    elif aside.exists():
        aside.rename(target)


def _aside(target):
    return target.with_name(f'.{target.name}.old')


if __name__ == '__main__':
    folder.run(main)

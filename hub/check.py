#!/usr/bin/env python3
"""Verify published folders from scratch: files, hashes, weights, figures.

    python hub/check.py                 all folders of hub/, and what they have in common
    python hub/check.py clone/ARCH.TAG  one, wherever it lies; its name selects the entry of the manifest
    python hub/check.py --output DIR    the same for folders of your own, which hub/build.py --output DIR made

The weights are loaded strictly and classify our sample of the data set, where there is one. The ONNX files are opened
in ONNX Runtime (timm-sharesnet[onnx]) and compared with them. What is too large to be tracked need not be there; the
rest is verified all the same. Nothing is written. Exit code 0, or 2 and a line for each fault.
"""

import os
import re
import sys
from pathlib import Path

import build
import card
import catalog
import folder
import javascript
import provenance
from folder import KINDS, ONNX, WEIGHTS
from PIL import Image
from safetensors.torch import load_file

from timm_sharesnet import unshare
from timm_sharesnet.cli import CommandError, Parser, command, did_you_mean
from timm_sharesnet.export import INPUT, OUTPUT, inspect, open_session
from timm_sharesnet.weights import mismatches

TOLERANCE = 3  # images of the sample that another machine may see otherwise
POINTS = 0.1  # of top-1 by which the fp32 file may differ, whose outputs are the same
PATHS = rb'/(home|root|tmp|usr|opt|Users)/|[A-Za-z]:\\\\|site-packages|\.py\b'  # of the machine that wrote a file


@command('check.py')
def main(argv):
    parser = Parser(description=__doc__)
    parser.add_argument('folder', type=Path, nargs='?', metavar='FOLDER', help='the only one to verify')
    catalog.add_output(parser)
    args = parser.parse_args(argv)
    folder.require_onnx()
    shelf = catalog.open_shelf(args.output)
    if args.folder:
        paths, faults = [Path(os.path.abspath(args.folder))], []
    else:
        manifest, pins = shelf.read()
        paths = [shelf.path / name for name in sorted({*shelf.names(), *manifest, *pins})]
        faults = common_faults(shelf, manifest, pins)
        if not paths:
            raise CommandError(f'there is nothing to verify in {shelf.path}')
    for path in paths:
        try:
            found = check(catalog.parse(path.name, shelf)._replace(path=path))
        except CommandError as e:
            found = e.args
        faults += [f'{path.name}: {fault}' for fault in found]
        absent = ''.join(f', {part} not here' for part in folder.LARGE if not (path / part).exists())
        print(f'{path.name}: {"ok" if not found else f"{len(found)} wrong"}{absent}', flush=True)
    if faults:
        raise CommandError(*faults)


def common_faults(shelf, manifest, pins):
    """What is wrong with the folders as a whole: what builds left, the total size, and the copies in the package."""
    faults = [
        f'{path.name} is what a build left that was cut off: build.py puts it back'
        for path in shelf.path.glob('.*.old')
    ]
    if shelf.package is None:
        return faults
    total = catalog.tracked_bytes(manifest, pins, shelf.ignored.read_text(encoding='utf-8').split())
    if total >= catalog.TRACKED_BYTES:
        faults.append(f'the tracked weights have {total:,} bytes, {catalog.TRACKED_BYTES:,.0f} are the limit')
    packaged = {name for name, pin in pins.items() if pin['packaged']}
    for name in sorted(packaged | {path.stem for path in (shelf.package / 'weights').glob('*')}):
        path = shelf.packaged(name)
        if name not in packaged:
            faults.append(f'{path.name} in the package is not "packaged" in weights.json')
        elif not path.is_file():
            faults.append(f'{path.name} is missing in the package')
        elif folder.sha256(path) != pins[name]['sha256']:
            faults.append(f'{path.name} in the package does not have the SHA-256 of weights.json')
    return faults


def check(release, sample=True):
    """What is wrong with a folder, a line each."""
    path = release.path
    faults = _collect(static_faults, release)
    if (path / WEIGHTS).is_file() and not any(fault.startswith((WEIGHTS, 'config', 'no ')) for fault in faults):
        faults += _collect(trained_faults, release) + _collect(model_faults, release, sample)
        if (path / ONNX).is_dir() and not any(fault.startswith(ONNX) for fault in faults):
            faults += _collect(session_faults, release, sample)
    return faults


def static_faults(release):
    """What can be seen without torch: files, hash, config.json, provenance, card."""
    name, path = release.name, release.path
    manifest, pins = release.shelf.read()
    if not path.is_dir():
        return [f'no folder {path}{did_you_mean(name, release.shelf.names())}']
    absent = [f'no entry in {k}' for k, v in {'manifest.json': manifest, 'weights.json': pins}.items() if name not in v]
    if absent:
        return absent
    odd = manifest[name].keys() ^ {*folder.ENTRY}
    if odd:
        return [f'no valid entry in manifest.json: {", ".join(sorted(odd))} is missing or unknown, build.py renews it']
    faults = pin_faults(release, pins[name])
    for key, value in release.told.items():
        if manifest[name][key] != value:
            faults.append(f'{key}: the manifest says {manifest[name][key]}, the tag {value}')
    for key, value in manifest[name]['metadata'].items():
        if not re.fullmatch(build.METADATA.get(key, '(?!)'), str(value), re.ASCII):
            faults.append(f'metadata: the manifest has {key} {value!r}')
    for part in (file_faults, weights_faults, config_faults, provenance_faults, onnx_faults, card_faults):
        faults += _collect(part, release, manifest, pins[name])
    return faults


def pin_faults(release, pin):
    """What is wrong with an entry of weights.json, from which the package loads by name alone."""
    name = release.name
    if pin.keys() != {'repo', 'revision', 'sha256', 'size', 'packaged'}:
        return [f'no valid entry in weights.json: {", ".join(pin)}']
    if release.other_args and (pin['packaged'] or pin['revision']):
        return [f'weights.json has a pin or "packaged", by which they would load without {card.tell_args(release)}']
    if not pin['repo'] and not pin['revision']:
        return []
    if pin['repo'] != f'{catalog.NAMESPACE}/{name}' or not re.fullmatch(r'[0-9a-f]{40}', str(pin['revision'])):
        return [f'weights.json pins {pin["repo"]}@{pin["revision"]}, not {catalog.NAMESPACE}/{name} at a full commit']
    return []


def _collect(part, release, *args):
    try:
        return part(release, *args)
    except CommandError as e:
        return list(e.args)
    except Exception as e:
        return [f'{part.__name__.removesuffix("_faults")} cannot be verified: {type(e).__name__}: {e}']


def plain_files(path):
    return {file.name for file in path.iterdir() if file.is_file() and not file.is_symlink()}


def file_faults(release, _manifest, _pin):
    path = release.path
    found = plain_files(path)
    allowed = found & folder.ALLOWED | ({ONNX} if (path / ONNX).is_dir() and not (path / ONNX).is_symlink() else set())
    faults = [f'{file.name} does not belong there' for file in path.iterdir() if file.name not in allowed]
    required = folder.REQUIRED if release.shelf.tracked(release.name) else folder.REQUIRED - {WEIGHTS}
    faults += [f'{name} is missing' for name in sorted(required - found)]
    if not folder.PROVENANCE & found:
        faults.append(f'it does not tell how the weights came about: one of {", ".join(sorted(folder.PROVENANCE))}')
    return faults


def weights_faults(release, _manifest, pin):
    weights = release.path / WEIGHTS
    return recorded_faults(weights, WEIGHTS, pin, 'weights.json') if weights.is_file() else []


def recorded_faults(file, name, record, where):
    """Whether a file has the size and the SHA-256 that are recorded."""
    size, digest = file.stat().st_size, folder.sha256(file)
    if size != record['size']:
        return [f'{name} has {size:,} bytes, {where} says {record["size"]:,}']
    if digest != record['sha256']:
        return [f'{name} has the SHA-256 {digest}, {where} says {record["sha256"]}']
    return []


def config_faults(release, manifest, pin):
    config = folder.read_json(release.path / 'config.json')
    cfg = config.get('pretrained_cfg', {})
    expected, classes = build.describe_config(release, pin['sha256']), release.dataset.classes
    expected |= javascript.describe_config(release, manifest[release.name]['onnx']['files'])
    pairs = {key: (config.get(key), value) for key, value in expected.items()}
    pairs |= {'tag': (cfg.get('tag'), release.tag), 'num_classes of pretrained_cfg': (cfg.get('num_classes'), classes)}
    faults = [f'config.json has {k} {a!r} instead of {b!r}' for k, (a, b) in pairs.items() if a != b]
    sources = [k for k in ('url', 'file', 'hf_hub_id', 'hf_hub_filename', 'source') if cfg.get(k)]
    faults += [f'config.json must not name a source of weights: {k}' for k in sources]
    odd = config.keys() - expected.keys() - {'num_features', 'global_pool', 'pretrained_cfg', 'timm_sharesnet'}
    faults += [f'config.json has {len(odd)} keys that build.py does not write'] if odd else []
    return faults + javascript.preprocessor_faults(release.path)


def provenance_faults(release, manifest, _pin):
    files = provenance.read(release.path)
    faults = [
        f'{name} has more than makes the recipe, or is not as build.py writes it'
        for name, content in files.items()
        if (release.path / name).read_bytes() != content
    ]
    _, points, seed = provenance.describe(files)
    if seed != manifest[release.name]['seed']:
        faults.append(f'seed: the manifest says {manifest[release.name]["seed"]}, the record {seed}')
    curves = release.path / 'curves.png'
    if curves.is_file():
        with Image.open(curves) as image:
            image.verify()
    if bool(points) != curves.is_file():
        faults.append(f'curves.png {"is missing" if points else "shows nothing that is recorded"}')
    return faults


def onnx_faults(release, manifest, _pin):
    """What can be seen of the ONNX files without opening them: their entry, names, sizes and hashes."""
    entry, target = manifest[release.name], release.path / ONNX
    faults, files = record_faults(release, entry), entry['onnx']['files']
    if not target.is_dir():
        return faults + ([f'{ONNX}/ is missing'] if release.shelf.tracked(release.name, f'{ONNX}/') else [])
    found = plain_files(target)
    faults += [
        f'{ONNX}/{file.name} does not belong there'
        for file in target.iterdir()
        if file.name not in found & files.keys()
    ]
    for name, record in files.items():
        if name in found:
            faults += recorded_faults(target / name, f'{ONNX}/{name}', record, 'the manifest')
        else:
            faults.append(f'{ONNX}/{name} is missing')
    return faults


def record_faults(release, entry):
    """What is not complete or not plausible of the ONNX files' entry in the manifest."""
    files, twin = entry['onnx']['files'], entry['onnx']['twin'] or {}
    kinds = {file: kind for file, kind in KINDS.items() if file in files}
    records = [(f'{ONNX}/{file}', files[file], folder.RECORD[kind]) for file, kind in kinds.items()]
    records += [(f"{ONNX}, the twin's {file}", record, folder.TWIN) for file, record in twin.items()]
    if 'model.onnx' not in files or files.keys() - kinds - {f'{file}_data' for file in kinds}:
        return [f'{ONNX}: the manifest must have model.onnx and may have model_quantized.onnx, not {[*files]}']
    faults = []
    if twin.keys() != (kinds.keys() if release.shared else set()):
        faults.append(f"{ONNX}: the manifest has {[*twin]} of the twin's files, and {[*kinds]} of the net's")
    for label, record, keys in records:
        if record.keys() != keys:
            odd = ', '.join(sorted(record.keys() ^ keys))
            faults.append(f'{label}: {odd} is missing or unknown in the manifest')
        elif record['session'] and not 0 < record['session']['held'] <= record['session']['loaded']:
            faults.append(f'{label}: a session of {record["session"]} MiB is not plausible')
    measured, accuracy = files['model.onnx'].get('accuracy'), entry['accuracy']
    if measured and accuracy and measured['images'] == accuracy['images']:
        if abs(measured['top1'] - accuracy['top1']) > POINTS:
            faults.append(
                f'{ONNX}/model.onnx: the top-1 is {measured["top1"]} %, that of {WEIGHTS} {accuracy["top1"]} %'
            )
    return faults


def card_faults(release, manifest, pin):
    """Whether the card is the one that build.py writes. What else a line says is not told, as it may be a secret."""
    path = release.path
    text = (path / 'README.md').read_text(encoding='utf-8')
    try:
        training, _, _ = provenance.describe(provenance.read(path))
    except CommandError:  # `provenance_faults` tells it
        return []
    namespace = card.card_namespace(text, release.name)
    if namespace is None:
        return ['README.md names no namespace that it was written for, or several']
    lines = text.splitlines()
    expected = card.compose(release, path, namespace, manifest, pin, training).splitlines()
    faults = [f'README.md does not have the line: {line}' for line in expected if line not in lines]
    faults += [
        f'README.md: line {i} is not one that build.py writes'
        for i, line in enumerate(lines, 1)
        if line not in expected
    ]
    return faults or ([] if lines == expected else ['README.md has its lines in another order than build.py'])


def trained_faults(release):
    """Whether the arguments of the net are those that the records of its training tell."""
    trained = build.describe_args(*build.read_records(release.path), release.arch)
    if trained == release.model_args:
        return []
    return [f'model_args: the manifest says {release.model_args}, args.yaml and config.json {trained}']


def model_faults(release, sample=True):
    """What is wrong with the loaded model: tensors, counts, preprocessing, predictions."""
    path, dataset = release.path, release.dataset
    entry = release.shelf.read()[0][release.name]
    reference = build.make_model(release, *build.read_records(path))
    tensors = load_file(path / WEIGHTS)
    faults = [f'{WEIGHTS}: {fault}' for fault in mismatches(reference.state_dict(), tensors).values()]
    if faults:
        return faults
    dtypes = {str(tensor.dtype).removeprefix('torch.') for tensor in tensors.values() if tensor.is_floating_point()}
    if dtypes != {entry['dtype']}:
        faults.append(f'{WEIGHTS} is {" and ".join(sorted(dtypes))}, the manifest says {entry["dtype"]}')
    config = folder.read_json(path / 'config.json')
    for key, value in config['pretrained_cfg'].items():
        known = reference.pretrained_cfg.get(key)
        if value != (list(known) if isinstance(known, tuple) else known):
            faults.append(f'config.json has {key} {value} in pretrained_cfg, the package {known}')
    model = folder.load(path)
    for key, value in build.describe_net(release, model).items():
        if value != entry[key]:
            faults.append(f'{key}: measured {value:,}, the manifest says {entry[key]:,}')
    for key in ('parameters', 'twin_parameters') if release.in_paper else ():
        if entry[key] not in (None, getattr(release.net, key)):
            faults.append(f'{key}: the manifest says {entry[key]:,}, the original {getattr(release.net, key):,}')
    if sample and dataset.sample:
        faults += sample_faults(folder.wrong_in_sample(model, dataset), entry['sample'], dataset)
    return faults


def session_faults(release, sample=True):
    """What is wrong with the ONNX files in ONNX Runtime: validity, names, kernels, outputs, predictions."""
    onnx = release.shelf.read()[0][release.name]['onnx']
    model = folder.load(release.path)
    faults = []
    for name in (name for name in KINDS if name in onnx['files']):
        try:
            found = opened_faults(release.path / ONNX / name, onnx['files'][name], model, release.dataset, sample)
        except Exception as e:
            found = [f'cannot be verified: {type(e).__name__}: {e}']
        faults += [f'{ONNX}/{name} {fault}' for fault in found]
    count = folder.count_kernels(unshare(model)) if onnx['twin'] else 0
    for name, record in (onnx['twin'] or {}).items():
        if record['kernels'] != count:
            faults.append(f"{ONNX}, the twin's {name} has {count} 3x3 kernels, the manifest says {record['kernels']}")
    return faults


def opened_faults(file, record, model, dataset, sample):
    """What is wrong with an ONNX file of a model."""
    import onnx

    onnx.checker.check_model(str(file), full_check=True)
    faults = []
    proto = onnx.load(file, load_external_data=False)
    for tensor in proto.graph.initializer:
        tensor.ClearField('raw_data')
    leak = re.search(PATHS, proto.SerializeToString())
    if leak:
        faults.append(f'names a file of the machine that wrote it: {leak[0].decode()}')
    kernels, count = inspect(file).kernels, folder.count_kernels(model)
    if not kernels == record['kernels'] == count:
        faults.append(
            f'has {kernels} 3x3 kernels in ONNX Runtime, the manifest says {record["kernels"]}, the net has {count}'
        )
    session = open_session(file)
    names = [node.name for node in (*session.get_inputs(), *session.get_outputs())]
    if names != [INPUT, OUTPUT]:
        faults.append(f'has the inputs and outputs {names} instead of {[INPUT, OUTPUT]}')
    if KINDS[file.name] == 'fp32':
        error = folder.output_error(model, session, dataset)
        if not error <= folder.ERROR:
            faults.append(f'differs from {WEIGHTS} by {error:.1e} of the largest output')
    elif sample and dataset.sample:
        wrong = folder.wrong_in_sample(model, dataset, session)
        faults += [f'is wrong: {fault}' for fault in sample_faults(wrong, record['sample'], dataset)]
    return faults


def sample_faults(wrong, recorded, dataset):
    """What is wrong with the predictions on our sample, given the indices of the images that were not recognized."""
    if (recorded or {}).get('images') != dataset.sample:
        return [f'the manifest does not have the sample {dataset.sample}']
    changed = sorted(set(wrong) ^ set(recorded['wrong']))
    if len(changed) <= TOLERANCE:
        return []
    return [
        f'{len(changed)} images of {dataset.sample} are not classified as the manifest says ({TOLERANCE} may be so): '
        f'{", ".join(map(str, changed[:5]))}{", ..." if len(changed) > 5 else ""}; {len(wrong)} wrong instead of '
        f'{len(recorded["wrong"])}'
    ]


if __name__ == '__main__':
    sys.exit(main())

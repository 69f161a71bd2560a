"""The Space: the page of space/, with the nets that it runs and what it says of them.

The nets are the ONNX files of a published folder, and beside each its unshared twin. `nets.json` has all that the page
shows of them, so that the page itself names no net and no figure.
"""

import base64
import hashlib
import json
import math
import shutil
import string

import timm
from catalog import parse
from folder import HUB, KINDS, ONNX, load_sample, read_json, sha256

from timm_sharesnet import export
from timm_sharesnet.cli import CommandError

SOURCE = HUB / 'space'
ARCH = 'sharesnet164_cifar'
PICTURE = 'sharing.svg'
README = 'README.md'
NETS = 'nets.json'
RUNTIME = 'https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/'
LOCAL_RUNTIME = 'onnxruntime-web/'
SAMPLES = (48, 101, 310, 31, 24, 276, 93, 297, 222, 126)  # one of each class, not all of them easy


def default_release(shelf):
    """The release of the weights that a user gets by the name of the net alone."""
    return parse(f'{ARCH}.{timm.models.get_pretrained_cfg(ARCH).tag}', shelf)


def assemble(release, namespace, target, runtime=None):
    """Write the Space into an empty directory.

    Args:
        release: Whose nets it shows.
        namespace: Where the release is published.
        target: The directory.
        runtime: Folder of onnxruntime-web, for a page that takes it from there and not from its CDN.

    Raises:
        CommandError: If the ONNX files are not those of the manifest, or the page would prepare images otherwise than
            timm does.
    """
    export.require('onnx')
    repo = f'{namespace}/{release.name}'
    for path in sorted([*SOURCE.glob('*.*'), HUB / PICTURE]):
        shutil.copyfile(path, target / path.name)
    text = (SOURCE / README).read_text(encoding='utf-8')
    (target / README).write_text(string.Template(text).substitute(repo=repo), encoding='utf-8')
    settings = {'name': release.name, 'repo': repo, **describe_images(release)}
    settings['nets'] = write_nets(release, settings['input']['size'], target)
    settings['samples'] = write_samples(release, target)
    (target / NETS).write_text(json.dumps(settings, indent=2) + '\n', encoding='utf-8')
    if runtime:
        (target / LOCAL_RUNTIME).symlink_to(runtime)
        for name, there, here in (('index.html', f' {RUNTIME}', ''), ('net.js', RUNTIME, LOCAL_RUNTIME)):
            text = (target / name).read_text(encoding='utf-8')
            (target / name).write_text(text.replace(there, here), encoding='utf-8')


def describe_images(release):
    """How images are prepared, and what the classes are."""
    cfg = timm.data.resolve_data_config(pretrained_cfg=read_json(release.path / 'config.json')['pretrained_cfg'])
    (channels, height, width), kind = cfg['input_size'], (cfg['interpolation'], cfg['crop_mode'])
    if (channels, height, *kind) != (3, width, 'bicubic', 'center'):
        raise CommandError(
            f'{release.name} takes images as {kind}, {cfg["input_size"]}, which space/image.js does not make'
        )
    size = {'size': height, 'resize': math.floor(height / cfg['crop_pct'])}
    dataset = release.dataset
    return {
        'data': {'name': dataset.name, 'images': dataset.images, 'labels': dataset.names()},
        'input': {**size, 'mean': cfg['mean'], 'std': cfg['std']},
    }


def write_nets(release, size, target):
    """Copy the ONNX files, and write the twin's beside them. Tells what they are, what the page takes first first."""
    entry = read_json(release.shelf.manifest)[release.name]
    (target / ONNX).mkdir()
    nets = []
    for name in sorted(KINDS, reverse=True):  # int8 before fp32
        path, known = release.path / ONNX / name, entry['onnx']['files'].get(name)
        if not known:
            continue
        if not path.is_file() or sha256(path) != known['sha256']:
            raise CommandError(f'{release.shown}/{ONNX}/{name} is not the file of the manifest: see hub/check.py')
        shutil.copyfile(path, target / ONNX / name)
        copy_kernels(path, target / ONNX / f'twin_{name}')
        common = {'kind': KINDS[name], 'size': size, 'top1': known['accuracy'] and known['accuracy']['top1']}
        kernels = {'': known['kernels'], 'twin_': entry['onnx']['twin'][name]['kernels']}
        parameters = {'': entry['parameters'], 'twin_': entry['twin_parameters']}
        for who in ('', 'twin_'):
            file = target / ONNX / f'{who}{name}'
            counts = {'shared': not who, 'parameters': parameters[who], 'kernels': kernels[who]}
            nets.append({**common, **counts, **describe_file(file, target)})
    return nets


def describe_file(path, target):
    data = path.read_bytes()
    integrity = base64.b64encode(hashlib.sha256(data).digest()).decode()
    return {'file': path.relative_to(target).as_posix(), 'bytes': len(data), 'integrity': f'sha256-{integrity}'}


def copy_kernels(path, target):
    """Write an ONNX file in which each use of a kernel has a copy of its own: the twin, with the same outputs.

    Its size is that of `fold(unshare(model))` to one part in a thousand. Made like this, int8 needs no training images.
    """
    import onnx

    proto = onnx.load(path)
    graph, copies, seen = proto.graph, [], set()
    weights = {tensor.name: tensor for tensor in graph.initializer}
    made = {node.output[0]: node for node in graph.node if node.op_type == 'DequantizeLinear'}

    def copy(name, end):
        if name in weights:
            tensor = graph.initializer.add()
            tensor.CopyFrom(weights[name])
            tensor.name += end
            return tensor.name
        node = onnx.NodeProto()
        node.CopyFrom(made[name])
        node.name += end
        node.input[:] = [copy(each, end) for each in node.input]
        node.output[0] += end
        copies.append(node)
        return node.output[0]

    for node in graph.node:
        if node.op_type == 'Conv':
            kernel = node.input[1]
            if kernel in seen:
                node.input[1] = copy(kernel, f'.{node.output[0]}')
            seen.add(kernel)
    nodes = [*copies, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(proto, target)


def write_samples(release, target):
    """Write an image of each class. Tells their files."""
    names = release.dataset.names()
    (target / 'samples').mkdir()
    sample = load_sample(release.dataset)
    files = []
    for image, label in (sample[i] for i in SAMPLES):
        files.append({'file': f'samples/{names[label]}.png', 'label': names[label]})
        image.save(target / files[-1]['file'])
    return files

"""What transformers.js reads of a published folder, beside `onnx/` and the size of its files.

One config.json cannot serve its pipeline and Python's: it goes by `model_type` and knows none for nets of timm, and by
each that it does know Python's transformers builds another net, or none. So the card names the classes of
transformers.js, which do not look at it.
"""

import json
import math

import timm
from folder import read_json

PREPROCESSOR = 'preprocessor_config.json'
# In Node.js the only filter by which transformers.js uses all pixels of a larger image. A browser has its own.
LANCZOS = 1


def describe_config(release, files):
    """What it reads of config.json: names of classes, and which ONNX files (of the manifest) have weights beside them.

    Python's transformers takes the names from `label_names` or timm, whatever is here.
    """
    names = release.dataset.names() or timm.data.ImageNetInfo().label_descriptions()
    beside = {name.removesuffix('_data'): 1 for name in files if name.endswith('_data')}
    external = {'transformers.js_config': {'use_external_data_format': beside}} if beside else {}
    return {'id2label': {str(i): name for i, name in enumerate(names)}, **external}


def describe_preprocessor(pretrained_cfg):
    """What `PREPROCESSOR` says: the preprocessing of timm, or None if transformers.js has no words for it.

    It has no `image_processor_type`, by which Python's transformers would take another one than timm's.
    """
    config = timm.data.resolve_data_config(pretrained_cfg=pretrained_cfg)
    channels, height, width = config['input_size']
    if channels != 3 or height != width or config['crop_mode'] != 'center':
        return None
    return {
        'do_resize': True,
        'size': {'shortest_edge': math.floor(width / config['crop_pct'])},
        'resample': LANCZOS,
        'do_center_crop': True,
        'crop_size': {'height': height, 'width': width},
        'do_rescale': True,
        'do_normalize': True,
        'image_mean': [*config['mean']],
        'image_std': [*config['std']],
    }


def write(path, release, files):
    """Add to a folder what transformers.js reads."""
    config = read_json(path / 'config.json') | describe_config(release, files)
    (path / 'config.json').write_text(json.dumps(config, indent=2), encoding='utf-8')
    preprocessor = describe_preprocessor(config['pretrained_cfg'])
    if preprocessor:
        (path / PREPROCESSOR).write_text(json.dumps(preprocessor, indent=2), encoding='utf-8')


def preprocessor_faults(path):
    """What is wrong with `PREPROCESSOR` in a folder, given its config.json."""
    expected = describe_preprocessor(read_json(path / 'config.json')['pretrained_cfg'])
    found = read_json(path / PREPROCESSOR) or None
    if found == expected:
        return []
    if expected is None:
        return [f'{PREPROCESSOR} does not belong there: transformers.js cannot preprocess for this net']
    odd = sorted(key for key in expected.keys() | (found or {}) if expected.get(key) != (found or {}).get(key))
    return [f'{PREPROCESSOR} is not as build.py writes it: {", ".join(odd)}' if found else f'{PREPROCESSOR} is missing']

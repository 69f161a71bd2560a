"""How weights came about, as it is published: what makes the recipe, and nothing else.

Nothing is published because it looks harmless, but only what is known to be: options of train.py by their names, with
numbers or with words that such an option has, and figures of epochs. Paths, addresses, accounts and remarks stay where
the run was. What a person wrote by hand (training.json, source.json) is refused where it is more than plain words.
"""

import csv
import inspect
import json
import re

import yaml
from folder import PROVENANCE
from timm.models import ResNet, is_model, list_models
from timm.optim import list_optimizers

from timm_sharesnet.cli import CommandError
from timm_sharesnet.model_args import TRAIN_ARGS, TRAIN_OPTIONS
from timm_sharesnet.resnetv2 import CifarResNetV2

AUTHOR = 'https://github.com/aboulch/sharesnet'
NOT_RECORDED = {'how': 'not recorded'}  # training.json where nothing is known
# What of train.py's options makes a recipe, as the card shows it
RECIPE = (
    'pretrained initial_checkpoint epochs batch_size grad_accum_steps opt lr lr_base sched decay_milestones '
    'decay_epochs decay_rate warmup_epochs warmup_lr min_lr momentum weight_decay opt_kwargs train_crop_mode scale '
    'ratio hflip color_jitter aa aug_repeats reprob remode mixup cutmix mixup_prob mixup_off_epoch smoothing bce_loss '
    'drop drop_path model_kwargs model_ema model_ema_decay kd_model_name amp amp_dtype channels_last torchcompile '
    'seed'
).split()

_WORD = r'[a-z]{1,16}\d{0,3}[a-z]{0,2}(_[a-z0-9]{1,12}){0,3}'  # 'batchnorm2d', 'hard_swish'
_FILES = 'last.pth.tar', 'model_best.pth.tar', 'model.safetensors', 'pytorch_model.bin'
# Words that options with text have. Options that are not here are published with numbers only.
_TEXTS = {
    'aa': r'(rand|augmix|original|originalr|v0|v0r|3a)(-(m|n|p|w|mstd|mmax|inc|d|b|t)\d{1,3}(\.\d{1,3})?)*',
    'sched': 'cosine|tanh|step|multistep|plateau|poly',
    'clip_mode': 'norm|value|agc',
    'lr_base_scale': 'sqrt|linear',
    'train_crop_mode': 'rrc|rkrc|rkrr',
    'remode': 'pixel|rand|const',
    'mixup_mode': 'batch|pair|elem|half',
    'dist_bn': 'reduce|broadcast',
    'torchcompile': 'inductor|eager|aot_eager|cudagraphs',
    'kd_loss_type': 'kl|mse|cosine',
    'gp': '(fast)?(avg|max|avgmax|catavgmax)',
    'input_img_mode': 'LA?|RGBA?',
    **dict.fromkeys(('amp_dtype', 'model_dtype'), 'b?float16|float32'),
    **dict.fromkeys(('interpolation', 'train_interpolation'), 'random|bilinear|bicubic|nearest|lanczos|box|hamming'),
    **{option['name']: '|'.join(option['choices']) for option in TRAIN_OPTIONS['options'] if 'choices' in option},
}
_OPT_KWARGS = set(
    'amsgrad betas capturable caution corrected_weight_decay dampening decoupled decoupled_decay eps '
    'filter_bias_and_bn foreach fused momentum nesterov trust_clip trust_coeff weight_decouple'.split()
)
_MODEL_KWARGS = {p for net in (ResNet, CifarResNetV2) for p in inspect.signature(net).parameters} | TRAIN_ARGS.keys()
_TYPES = {'int': int, 'float': (int, float), 'bool': bool}
_HEADERS = [
    ['epoch', 'train_loss', 'lr'],
    ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr'],
]

# What a person may tell: sentences of words, names like CIFAR-10 and numbers, no run of letters as long as a token
_RUN = r'(\d{1,9}([a-z]{1,3}\d{0,4})?|[A-Z]{1,8}\d{0,4}[a-z]?|([A-Z]?[a-z]{1,15}){1,3}\d{0,4}[a-z]?)'
_TEXT = rf'([`("\']*{_RUN}([-_.,+]{_RUN})*[`)"\';:,.%]*|[=%+-][);:,.]*)'
_TOLD = {
    'training.json': 'how data recipe cost seed runs versions epochs changed_since optimizer weight_decay precision '
    'images not_used averaging torch timm epoch seconds px train_loss eval_loss eval_top1 eval_top5 lr batch_size',
    'source.json': 'source imported_with file sha256',
}
_EXACT = {'file': r'[\w-]{1,24}(\.[\w-]{1,8}){0,3}\.t7(\.gz)?', 'sha256': r'[0-9a-f]{64}', 'source': re.escape(AUTHOR)}


def read(path):
    """The files of a folder that tell of it, name -> bytes, as they may be published."""
    return {name: clean(name, (path / name).read_bytes()) for name in sorted(PROVENANCE) if (path / name).is_file()}


def clean(name, content):
    """A file of a run as it may be published.

    Raises:
        CommandError: Where a file that is published as it is holds more than it may: the key, never the value.
    """
    try:
        if name == 'summary.csv':
            read_summary(content)
            return content
        told = yaml.safe_load(content) or {} if name == 'args.yaml' else json.loads(content)
    except (ValueError, yaml.YAMLError) as e:
        raise CommandError(f'{name} cannot be read: {type(e).__name__}') from None
    if not isinstance(told, dict):
        raise CommandError(f'{name} holds no names with values but a {type(told).__name__}')
    if name == 'args.yaml':
        return yaml.safe_dump(clean_options(told), sort_keys=False).encode()
    _require_plain(told, name)
    return dump(told)


def dump(data):
    return json.dumps(data, indent=1, ensure_ascii=False).encode() + b'\n'


def clean_options(args):
    """The options of train.py that make the recipe, where their values are numbers or words that are known."""
    found = {}
    for option in TRAIN_OPTIONS['options']:
        name, value = option['name'], args.get(option['name'])
        if value is None or 'wandb' in name:
            continue
        if name in ('model', 'kd_model_name'):
            value = _model(value)
        elif name == 'opt':
            value = value if str(value).removeprefix('lookahead_') in list_optimizers() else None
        elif name in ('initial_checkpoint', 'pretrained_path', 'class_map'):
            file = str(value).replace('\\', '/').rpartition('/')[2]
            value = value and (file if file in _FILES else 'a file')
        elif name in ('model_kwargs', 'opt_kwargs'):
            keys = _MODEL_KWARGS if name == 'model_kwargs' else _OPT_KWARGS
            value = value if isinstance(value, dict) else {}
            value = {k: v for k, v in value.items() if k in keys and is_plain(v)}
        elif isinstance(value, str):
            value = value if value == '' or re.fullmatch(_TEXTS.get(name, '(?!)'), value) else None
        elif not is_plain(value) or not all(isinstance(v, _TYPES.get(option['type'], ())) for v in _flat(value)):
            value = None
        if value is not None:
            found[name] = value
    return found


def is_plain(value):
    """Whether an argument of a net is made of numbers and short words: those of timm, but of no token or address."""
    if isinstance(value, dict):
        return all(isinstance(v, (str, int)) and is_plain(v) for v in value) and is_plain([*value.values()])
    if isinstance(value, (list, tuple, set)):
        return all(map(is_plain, value))
    if isinstance(value, str):
        return bool(re.fullmatch(_WORD, value, re.ASCII)) or is_model(value)
    return value is None or isinstance(value, bool) or (isinstance(value, (int, float)) and abs(value) < 1e12)


def _flat(value):
    return [v for item in value for v in _flat(item)] if isinstance(value, (list, tuple)) else [value]


def _model(name):
    """A model by its name, where timm has that, and of a folder or the Hub also without: what it came from."""
    source, colon, path = str(name).rpartition(':')
    owner, _, model = path.replace('\\', '/').rpartition('/')
    arch, _, tag = model.partition('.')
    if not is_model(arch):
        model = ''
    elif tag and model not in list_models(f'{arch}.*', include_tags=True):
        model = arch
    if source not in ('', 'hf-hub', 'hf_hub', 'local-dir'):
        return None
    return f'{source}{colon}{"timm/" if source.startswith("hf") and owner == "timm" else ""}{model}' or None


def _require_plain(value, where, key=''):
    """Raise unless what was told has known keys, numbers and plain words."""
    where, key = (f'{where}: {key}', key) if key else (where, key)
    if isinstance(value, dict):
        known = _TOLD[where.partition(':')[0]].split()
        for k, v in value.items():
            if k.replace(' ', '_') not in known:
                shown = ', '.join(known).replace('_', ' ')
                raise CommandError(f'{where} has a key that is none of {shown}, and would be published: take it out')
            _require_plain(v, where, k)
    elif isinstance(value, list):
        for item in value:
            _require_plain(item, where)
    elif isinstance(value, str):
        exact = _EXACT.get(key) if where.startswith('source.json') else None
        words = [value] if exact else value.split()
        if not all(re.fullmatch(exact or _TEXT, word, re.ASCII) for word in words):
            raise CommandError(f'{where} is not in plain words (paths, addresses, tokens?), and would be published')
    elif not is_plain(value):
        raise CommandError(f'{where} is no number that was recorded, and would be published')


def describe(files):
    """What the files (name -> bytes) tell: label -> text for the card, the epochs' points for the curves, the seed."""
    if 'args.yaml' in files:
        args = yaml.safe_load(files['args.yaml'])
        table = {f'`{k}`': args[k] for k in RECIPE if _counts(k, args)}
        return table, read_summary(files.get('summary.csv', b'')), args.get('seed')
    if 'training.json' in files:
        training = json.loads(files['training.json'])
        flat = {k: v for k, v in training.items() if not isinstance(v, (list, dict))}
        flat |= {k: v for value in training.values() if isinstance(value, dict) for k, v in value.items()}
        return flat, training.get('epochs', []), training.get('seed')
    return json.loads(files.get('source.json', b'{}')), [], None


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
        'decay_rate': args.get('sched') in ('step', 'multistep', 'poly'),
        'lr_base': not args.get('lr'),
        'mixup_off_epoch': mixing and args.get('mixup_off_epoch'),
        'mixup_prob': mixing,
        'model_ema_decay': args.get('model_ema'),
        'remode': args.get('reprob'),
        'warmup_lr': args.get('warmup_epochs'),
    }
    return bool(effect.get(option, True))


def read_summary(content):
    """The points of train.py's summary.csv. An epoch without validation has a shorter row, whatever the header says."""
    points, headers = [], {len(header): header for header in _HEADERS}
    for row in csv.reader(content.decode().splitlines()):
        if not row or row in _HEADERS:  # a resumed run may write the header again
            continue
        try:
            points.append(dict(zip(headers[len(row)], map(float, row), strict=True)))
        except (KeyError, ValueError) as e:
            raise CommandError(f'summary.csv: a row of {len(row)} values is not one of train.py') from e
    return points

"""How weights came about: what train.py or an import left, read, and rid of paths and secrets to be published."""

import csv
import json
import re
from pathlib import PurePosixPath

import yaml
from folder import Fault

NOT_RECORDED = {'how': 'not recorded'}  # training.json where nothing is known
# What of timm's args.yaml makes a recipe
RECIPE = (
    'pretrained initial_checkpoint epochs batch_size grad_accum_steps opt lr lr_base sched decay_milestones '
    'decay_epochs decay_rate warmup_epochs warmup_lr min_lr momentum weight_decay opt_kwargs train_crop_mode scale '
    'ratio hflip color_jitter aa aug_repeats reprob remode mixup cutmix mixup_prob mixup_off_epoch smoothing bce_loss '
    'drop drop_path model_kwargs model_ema model_ema_decay kd_model_name amp amp_dtype channels_last torchcompile '
    'seed'
).split()

# Scheme, user information, host and path, query and fragment
URL = re.compile(r"""([A-Za-z][\w+.-]*://)(?:[^\s/?#"']*@)?([^\s?#"']*)(?:[?#][^\s"']*)?""")
LOGIN = re.compile(r"""(?<![\w:.-])[\w.+-]+:[^\s/@:"']+@(?=[\w.-])""")  # user:password@host without a scheme
_SECRET = r'token|password|passwd|pwd|secret|credentials?|(?:api|access|private|secret)[_-]?key'
SECRET_KEY = re.compile(rf'(?i)(?:{_SECRET}|authorization|(?:^|[_.-])auth|(?<!input)(?<!target)[_-]key)$')
SECRET = re.compile(
    rf"""
    (?<![A-Za-z0-9]) (?:
        hf_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{{8,}} | hf_[a-z]{{20,}} | api_org_\w{{10,}}  # Hugging Face
        | gh[pousr]_\w{{10,}} | github_pat_\w+ | glpat-[\w-]+           # GitHub, GitLab
        | A[KS]IA[A-Z0-9]{{12,}} | AIza[\w-]{{20,}} | ya29\.            # Amazon, Google
        | xox[a-z]-[\w-]+ | sk-[\w-]{{16,}}                             # Slack, OpenAI and others
        | eyJ[\w-]{{6,}}\.[\w-]+                                        # JSON web token
        | (?=[A-Za-z0-9]*[a-z])(?=[A-Za-z0-9]*[A-Z])(?=[A-Za-z0-9]*\d)[A-Za-z0-9]{{32,}}
    )
    | -----BEGIN | ://[^\s/@:]+:[^\s/@]+@
    | (?i: \bauthorization\b | \bx-auth | \bcookie\s*: | \bbearer\s+\S | (?:\s|^)(?:-u|--user)[\s=]+\S+:\S
        | (?:{_SECRET} | signature | \bsig)["']?\s*[=:]\s*["']?[^\s"'] | (?:\s|^)--(?:{_SECRET})\s+\S )
    """,
    re.VERBOSE,
)


def clean(name, content):
    """A file of a run as it may be published: paths cut to their last part, URLs without user and query.

    Who trained, and where, is nobody's business.

    Raises:
        Fault: Where something looks like a token or password: the key, never the value.
    """
    if name == 'args.yaml':
        args = yaml.safe_load(content) or {}
        if not isinstance(args, dict):
            raise Fault(f'{name} holds no options but a {type(args).__name__}')
        return yaml.safe_dump(_clean(args, name), sort_keys=False).encode()
    if name.endswith('.json'):
        return dump(_clean(json.loads(content), name))
    refuse_secret(content.decode(), name)
    return content


def dump(data):
    return json.dumps(data, indent=1, ensure_ascii=False).encode('utf-8', 'backslashreplace') + b'\n'


def refuse_secret(text, where):
    """Raise if a text holds what looks like a secret."""
    if SECRET.search(text):
        raise Fault(f'{where} looks like a token or a password, and would be published: take it out')


def _clean(value, where, key=''):
    where = f'{where}: {key}' if key else where
    if isinstance(value, dict):
        for k in value:
            refuse_secret(str(k), f'{where}: a key')
        return {k: _clean(v, where, str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [_clean(v, where) for v in value]
    if SECRET_KEY.search(key) and isinstance(value, (str, int)) and value and not isinstance(value, bool):
        raise Fault(f'{where} looks like a token or a password, and would be published: take it out')
    if not isinstance(value, str):
        return value
    value = strip_urls(value)
    if where != 'args.yaml: dataset' or not re.match(r'\w+/\w', value):  # 'torch/cifar10' is no path
        value = cut_paths(value)
    refuse_secret(value, where)
    return value


def strip_urls(text):
    """Take user information, query and fragment out of all URLs, which may hold passwords and signatures."""
    text = URL.sub(r'\1\2', text)
    return text if re.match(r'(?:hf[-_]hub|local-dir):', text) else LOGIN.sub('', text)


def cut_paths(text):
    """Cut paths to their last part: a text without blanks that has a slash, and absolute paths inside a text."""
    if re.fullmatch(r'https?://\S*|hf[-_]hub:\S*', text):
        return text
    if re.match(r'(local-dir:)?(~|\.{0,2}[/\\]|[A-Za-z]:[/\\])', text) or not re.search(r'\s', text):
        prefix, path = re.fullmatch(r'(local-dir:)?(.*)', text, re.S).groups()
        return (prefix or '') + PurePosixPath(path.replace('\\', '/')).name if re.search(r'[/\\]', path) else text
    return re.sub(r'(?<![\w:/.])(?:~|\.{1,2}|[A-Za-z]:)?[/\\](?:[^\s/\\]+[/\\])+([^\s/\\]*)', r'\1', text)


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
    """train.py's summary.csv. An epoch without validation has a shorter row, whatever the header says."""
    fields = {
        3: ('epoch', 'train_loss', 'lr'),
        6: ('epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr'),
    }
    points = []
    for row in csv.reader(content.decode().splitlines()):
        if row and row[0] != 'epoch':  # a resumed run may write the header again
            if len(row) not in fields:
                raise Fault(f'summary.csv: a row of {len(row)} values: {",".join(row)}')
            points.append(dict(zip(fields[len(row)], map(float, row), strict=True)))
    return points

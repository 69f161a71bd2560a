"""Where pretrained weights come from, and the checks they pass before anything is loaded.

`weights.json` is the only source of pins and hashes: SHA-256 and size of the `model.safetensors` of each `arch.tag`,
the Hub repository and commit that hold it once it is published, and whether the file also travels with the package.
Weights that it pins are loaded only if their SHA-256 is the one written there, be they in the package, in the cache or
on the Hub. A user's own sources (`file=`, `url=`, `local-dir:`, `hf-hub:` at another revision) are not compared with
it. All must hold exactly the tensors of the model (`checkpoint_filter_fn`).
"""

import contextlib
import hashlib
import json
import tempfile
from functools import partial
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional, Tuple, Union, cast

import safetensors.torch
import torch
import torch.nn as nn
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import LocalEntryNotFoundError

from .cli import did_you_mean
from .stage import SharedStage

_WEIGHTS_DIR = Path(__file__).parent / 'weights'
_MANIFEST: Dict[str, Dict[str, Any]] = json.loads((Path(__file__).parent / 'weights.json').read_text())
_FILENAME = 'model.safetensors'  # one request, and no pickle that timm would fall back to
_AUTHOR = 'https://github.com/aboulch/sharesnet#pre-trained-models'  # of ImageNet nets
_TIMEOUT = 5  # seconds until a silent network counts as dead


def with_sources(cfgs: Dict[str, Dict[str, Any]]) -> Dict[str, Dict[str, Any]]:
    """Add to default cfgs ('arch.tag' -> cfg) where their weights are: in the package, and on the Hub by full commit.

    A cfg whose weights are not published gets no source, so that timm does not list it as pretrained, and nobody can
    register a repository that we name.
    """
    cfgs = {name: dict(cfg) for name, cfg in cfgs.items()}
    for name in cfgs.keys() & _MANIFEST.keys():
        entry = _MANIFEST[name]
        if entry.get('revision'):
            cfgs[name].update(hf_hub_id=f'{entry["repo"]}@{entry["revision"]}', hf_hub_filename=_FILENAME)
        if entry.get('packaged'):
            cfgs[name].update(file=str(_WEIGHTS_DIR / f'{name}.safetensors'))  # timm prefers it to the Hub
    return cfgs


def create(model_cls: Callable[..., nn.Module], variant: str, pretrained: bool = False, **kwargs: Any) -> Any:
    """timm's `build_model_with_cfg`, with weights that were verified, and loaded from the bytes that were.

    Raises:
        See `resolve_weights`, `checkpoint_filter_fn` and `_check_runs`.
    """
    # Imported late: this file is needed while timm.models is imported
    from timm.models import build_model_with_cfg, resolve_pretrained_cfg

    filter_fn = partial(checkpoint_filter_fn, features_only=kwargs.get('features_only', False))
    if pretrained:
        kwargs['pretrained_cfg_overlay'] = resolve_weights(variant, **kwargs)
    model: Any = build_model_with_cfg(model_cls, variant, pretrained, pretrained_filter_fn=filter_fn, **kwargs)
    if pretrained:
        _check_runs(model, variant, kwargs.get('pretrained_model_args') or {})
        given = [kwargs.get(key) for key in ('pretrained_cfg', 'pretrained_cfg_overlay')]
        # The filter may have taken it out
        model.pretrained_cfg['first_conv'] = resolve_pretrained_cfg(variant, *given).first_conv
    cfg = model.pretrained_cfg
    cfg.pop('state_dict', None)  # loaded, and of no use to whoever saves the model
    if getattr(model, 'num_classes', None) != cfg.get('num_classes'):
        cfg.pop('label_names', None)  # they are not the model's
    return model


def _check_runs(model: Any, variant: str, saved: Dict[str, Any]) -> None:
    """Refuse another share_rate than the one that weights were saved with, if their names do not tell.

    Args:
        model: Model with the weights.
        variant: Architecture name.
        saved: The arguments that are saved beside the weights of `local-dir:` and `hf-hub:` (from timm 1.0.29 on).
    """
    stages = [m for m in model.modules() if isinstance(m, SharedStage)]
    if not any(stage.several for stage in stages):  # where they share one convolution, the names tell
        return
    from .model_args import net_beside  # late, as it needs timm.models

    expected: Any = None
    file = model.pretrained_cfg.get('file')
    if 'share_rate' in saved:
        from timm.models import create_model

        expected = create_model(variant, **saved, device='meta')
    elif file and model.pretrained_cfg.get('source') != 'local-dir':
        with contextlib.suppress(Exception):  # whatever a constructor raises at what it does not take
            expected = (net_beside(file) or [None, None])[1]
    if expected is None:
        return
    # Of a backbone (`features_only`) the last stages may be gone
    for stage, other in zip(stages, (m for m in expected.modules() if isinstance(m, SharedStage)), strict=False):
        if stage.runs() != other.runs():
            raise RuntimeError(
                f'The weights are those of a net in which other blocks share than with the share_rate that was given, '
                f'though the tensors have the same names: {other.runs()}, given {stage.runs()}. Pass the share_rate of '
                f'the config beside the weights, or load the folder by local-dir: without one.'
            )


def resolve_weights(
    variant: str,
    pretrained_cfg: Optional[Union[str, Dict[str, Any]]] = None,
    pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
    cache_dir: Optional[Union[str, Path]] = None,
    **_: Any,
) -> Dict[str, Any]:
    """Find and verify the weights that `pretrained=True` will load, fetching them where needed.

    The arguments are those of `timm.create_model`, which passes them on.

    Returns:
        The overlay to build the model with. For weights that the package pins it has their tensors.

    Raises:
        FileNotFoundError: If the file that the user asked for is not there.
        RuntimeError: If no weights are published, they cannot be fetched, or they are not the published ones.
        ValueError: If the user's state dict is empty.
    """
    from timm.models import resolve_pretrained_cfg

    overlay = dict(pretrained_cfg_overlay or {})
    if any(overlay.get(key) for key in ('state_dict', 'file', 'hf_hub_id', 'url')):
        # else a source of the default cfg would silently win over the one asked for
        overlay = {'source': None, 'file': None, 'hf_hub_id': None, 'hf_hub_filename': None, **overlay}
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)

    # timm's order: what the model name's prefix says, then state_dict, file, hf_hub_id, url
    if cfg.state_dict is not None and not cfg.state_dict:  # timm would take the next source
        raise ValueError('state_dict is empty: pass the tensors of the model, or leave it out.')
    if cfg.source == 'local-dir' or (cfg.source != 'hf-hub' and cfg.state_dict):
        return overlay
    if cfg.source != 'hf-hub' and cfg.file:
        path = Path(cfg.file)
        if path.parent == _WEIGHTS_DIR:
            remedy = 'run pip install --force-reinstall --no-deps timm-sharesnet'
            return {**overlay, 'state_dict': _read(path, _MANIFEST.get(path.stem, {}), remedy)}
        if not path.is_file():
            raise FileNotFoundError(f'There is no file {path} to load weights from.')  # timm's own error has no text
        return overlay
    if cfg.hf_hub_id:
        repo, _at, revision = cfg.hf_hub_id.partition('@')
        for entry in _MANIFEST.values():
            if revision and revision == entry.get('revision'):
                path = _fetch(repo, entry, cache_dir)
                # The blob: the path is the cache's link to it
                return {**overlay, 'source': None, 'state_dict': _read(path, entry, f'delete {path.resolve()}')}
        return overlay
    if cfg.url or not cfg.tag:  # without a tag it is a user's own cfg, and timm says what that lacks
        return overlay
    raise RuntimeError(_no_weights(variant, cfg.tag))


def _no_weights(variant: str, tag: str) -> str:
    """What a user can do who asked for weights that are not published."""
    import timm

    name, ways = f'{variant}.{tag}', []
    others = timm.list_pretrained(f'{variant}.*')
    if others:
        ways.append(f"others are there: timm.create_model('{others[0]}', pretrained=True)")
    folder = Path(__file__).parents[1] / 'hub' / name  # of a clone
    if (folder / _FILENAME).is_file():
        ways.append(f"they lie in this clone: timm.create_model('local-dir:{folder}', pretrained=True)")
    if f'{variant}.torch7_in1k' in timm.list_models(f'{variant}.*', include_tags=True):
        ways.append(
            f"the author's Torch7 file is linked on {_AUTHOR}: model.load_state_dict(timm_sharesnet.load_torch7(FILE, "
            f"'{variant}')) (pip install 'timm-sharesnet[torch7]')"
        )
    if variant.startswith('sha'):
        ways.append('a trained plain ResNet makes a warm start: python -m timm_sharesnet.sharing')
    ways += [
        f"timm's train.py trains them: train_configs/ of the repository{_repository()}",
        "a file of yours: pretrained_cfg_overlay=dict(file='model.safetensors'), with num_classes if it has others",
        'random weights: pretrained=False',
    ]
    return f'No weights are published for {name} yet. What can be done: {"; ".join(ways)}.'


def _repository() -> str:
    """Where the repository is, if the installed package knows."""
    try:
        urls = metadata('timm-sharesnet').get_all('Project-URL') or []
    except PackageNotFoundError:
        return ''
    return next((f', {url.partition(", ")[2]}' for url in urls if url.startswith('Repository,')), '')


def _fetch(repo: str, entry: Dict[str, Any], cache_dir: Optional[Union[str, Path]]) -> Path:
    """The file at the pinned commit, from the cache without any request, else from the Hub.

    The Hub, or its mirror, is asked once, without huggingface_hub's retries (but for those of 0.35 and 0.36), before
    anything is downloaded: its answer already tells whether the network is there and whether the file can be the
    published one.
    """
    location = dict(repo_id=repo, filename=_FILENAME, revision=entry['revision'])
    try:
        return Path(hf_hub_download(**location, cache_dir=cache_dir, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        found = get_hf_file_metadata(hf_hub_url(**location), timeout=_TIMEOUT)
        if found.size in (None, entry['size']):
            return Path(hf_hub_download(**location, cache_dir=cache_dir, library_name='timm-sharesnet'))
    except Exception as e:  # huggingface_hub 0, 1 and 2 raise the errors of different HTTP libraries
        reason = next(iter(str(e).strip().splitlines()), '')
        raise RuntimeError(
            f'{_FILENAME} of {repo} (commit {entry["revision"]}) is not in the cache and could not be fetched: '
            f'{type(e).__name__}: {reason}'
        ) from e
    raise RuntimeError(
        f'{repo} at commit {entry["revision"]} does not hold the published {_FILENAME} ({entry["size"]} bytes), but '
        f'one of {found.size} bytes. Nothing was downloaded.'
    )


def _read(path: Path, entry: Dict[str, Any], remedy: str) -> Dict[str, torch.Tensor]:
    """The tensors of a file that we pin. It is read once: what is hashed is what is loaded."""
    expected, size = entry.get('sha256'), entry.get('size')
    if not path.is_file():
        found = 'no file'
    elif path.stat().st_size != size:
        found = f'{path.stat().st_size} bytes instead of {size}'
    else:
        with path.open('rb') as file:
            data = file.read(size + 1)
        found = hashlib.sha256(data).hexdigest()
        if found == expected:
            return safetensors.torch.load(data)
    raise RuntimeError(
        f'{path} is not the published file (SHA-256 {expected}, found {found}). Nothing was loaded: '
        f'{remedy} and try again.'
    )


def unknown_model(name: str) -> str:
    """What to say of a model name, with or without tag, that timm does not know. Empty if it does."""
    import timm

    arch, _, tag = name.partition('.')
    if not timm.is_model(arch):
        name, known = arch, timm.list_models()
    elif tag and name not in timm.list_models(f'{arch}.*', include_tags=True):
        known = timm.list_models(f'{arch}.*', include_tags=True)
    else:
        return ''
    return f'timm knows no model {name}{did_you_mean(name, known, ". timm.list_models() has the names.")}'


def save_folder(
    model: Any, folder: Union[str, Path], model_args: Dict[str, Any], model_config: Optional[Dict[str, Any]] = None
) -> None:
    """Write a folder that timm (`local-dir:`) and transformers load, complete or not at all.

    If it is there, its `model.safetensors` and `config.json` are replaced, and no other file is touched.

    Args:
        model_args: Arguments that build the model again, beside its name. The number of classes is not repeated in
            config.json: transformers passes it beside `model_args` and fails where that has it, too
            (huggingface/transformers#34564). timm takes it from the top level.
        model_config: What else config.json tells, as for `timm.models.save_for_hf`.
    """
    from timm.models._hub import save_config_for_hf

    folder = Path(folder)
    beside = folder if folder.is_dir() else folder.parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{folder.name}-', dir=beside) as temporary:
        new = Path(temporary, folder.name)
        new.mkdir()
        tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
        safetensors.torch.save_file(tensors, new / _FILENAME, metadata={'format': 'pt'})
        (new / _FILENAME).chmod(0o644)  # safetensors lets nobody else read it
        args = {k: v for k, v in model_args.items() if k != 'num_classes'}
        path: Any = new / 'config.json'  # timm 1.0.28 takes no str, for all that it says
        save_config_for_hf(model, path, model_config=model_config, model_args=args)
        config = json.loads((new / 'config.json').read_text(encoding='utf-8'))
        config.pop('model_args', None)  # versions of timm write different ones
        if args:
            config['model_args'] = args
        (new / 'config.json').write_text(json.dumps(config, indent=2), encoding='utf-8')
        if folder.is_dir():
            for file in new.iterdir():
                file.replace(folder / file.name)
        else:
            new.rename(folder)


def checkpoint_filter_fn(
    state_dict: Dict[str, torch.Tensor], model: nn.Module, features_only: bool = False
) -> Dict[str, torch.Tensor]:
    """Refuse a checkpoint that does not match the model, whatever strictness timm loads with.

    timm loads non-strictly as soon as `num_classes` differs from the cfg's, so half a file would pass, and the
    classifier of a fine-tuned model would be dropped. A classifier that fits the model is loaded, whatever the cfg
    says, but for a cfg with `num_classes=-1`, by which train.py asks for a new one (`--pretrained-path`). One that does
    not fit is left out, as by timm, if the model's classes are not the cfg's. The first convolution may have the number
    of input channels of the cfg's `input_size`, which timm adapts, in place of the model's.

    Args:
        features_only: The model will be a backbone, whose classifier does not matter.

    Raises:
        RuntimeError: If a tensor is missing, unexpected, of another shape or type, or not finite.
    """
    cfg = cast(Dict[str, Any], model.pretrained_cfg)
    expected, found = model.state_dict(), dict(state_dict)
    classifier = [f'{cfg["classifier"]}.weight', f'{cfg["classifier"]}.bias']
    fits = all(k in expected and _shape(found.get(k)) == _shape(expected[k]) for k in classifier)
    if fits and not features_only and cfg['num_classes'] >= 0:
        if cfg['num_classes'] != model.num_classes:
            cfg['num_classes'] = model.num_classes
            cfg.pop('label_names', None)  # of the cfg's classes
    elif features_only or model.num_classes != cfg['num_classes']:  # timm leaves it out
        for k in classifier:
            expected.pop(k, None)
            found.pop(k, None)

    first_conv = f'{cfg["first_conv"]}.weight'
    if _shape(found.get(first_conv)) == _shape(expected.get(first_conv)):
        cfg['first_conv'] = None  # timm 1.0.28 would adapt from 3 channels what fits already, or leave it at random
    elif first_conv in expected:
        shape = _shape(expected[first_conv])
        adapted = (shape[0], cfg['input_size'][0], *shape[2:])
        if _shape(found.get(first_conv)) == adapted:
            expected[first_conv] = expected[first_conv].new_empty(adapted)
    faults = mismatches(expected, found)
    for k in faults.keys() & found.keys() & set(classifier):
        if _shape(found[k]) not in ((), _shape(expected[k])):
            cure = f'pass num_classes={len(found[k])}, or for a new classifier num_classes=-1 in pretrained_cfg_overlay'
            faults[k] += f': {cure}'
    if faults:
        raise RuntimeError(
            f'The checkpoint is not one of {cfg.get("architecture", type(model).__name__)}, nothing was loaded: '
            f'{first_of(faults)}.'
        )
    return state_dict


def mismatches(expected: Mapping[str, torch.Tensor], found: Mapping[str, Any]) -> Dict[str, str]:
    """What is wrong with tensors that should be a model's: names, shapes, types and values.

    Returns:
        A sentence for each name at fault, in order of the names.
    """
    faults = {name: _fault(name, expected.get(name), found.get(name)) for name in sorted({*expected, *found})}
    return {name: f'{name} {fault}' for name, fault in faults.items() if fault}


def first_of(faults: Mapping[str, str]) -> str:
    """The first of several faults, and how many there are."""
    more = f' (and {len(faults) - 1} more)' if len(faults) > 1 else ''
    return next(iter(faults.values())) + more


def _fault(name: str, expected: Optional[torch.Tensor], found: Any) -> str:
    if found is None:
        return 'is missing'
    if expected is None:
        return 'is not part of the model'
    if not isinstance(found, torch.Tensor):
        return f'is no tensor but a {type(found).__name__}'
    if found.shape != expected.shape:
        return f'has shape {_shape(found)} instead of {_shape(expected)}'
    if _kind(found) != _kind(expected):
        return f'is {found.dtype} instead of {expected.dtype}'
    if found.is_meta or found.layout is not torch.strided:
        return f'is a {"meta" if found.is_meta else "sparse"} tensor'
    if not torch.isfinite(found.float()).all():
        return 'has values that are not finite'
    if name.endswith('running_var') and (found.float() < 0).any():
        return 'has negative variances'
    return ''


def _kind(tensor: torch.Tensor) -> Tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.dtype is torch.bool


def _shape(tensor: Any) -> Tuple[int, ...]:
    return tuple(getattr(tensor, 'shape', ()))

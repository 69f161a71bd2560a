"""Where pretrained weights come from, and the checks they pass before anything is loaded.

`weights.json` is the only source of pins and hashes: SHA-256 and size of the `model.safetensors` of each `arch.tag`,
the Hub repository and commit that hold it once it is published, and whether the file also travels with the package.
Weights that it pins are loaded only if their SHA-256 is the one written there, be they in the package, in the cache or
on the Hub. A user's own sources (`file=`, `url=`, `local-dir:`, `hf-hub:` at another revision) are not compared with
it. All must hold exactly the tensors of the model (`checkpoint_filter_fn`).
"""

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any, Dict, Optional, Union, cast

import timm
import torch
import torch.nn as nn
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import LocalEntryNotFoundError
from timm.models import resolve_pretrained_cfg

_WEIGHTS_DIR = Path(__file__).parent / 'weights'
_MANIFEST: Dict[str, Dict[str, Any]] = json.loads((Path(__file__).parent / 'weights.json').read_text())
_FILENAME = 'model.safetensors'  # one request, and no pickle that timm would fall back to
_TIMEOUT = 5  # seconds until a silent network counts as dead


def with_sources(cfgs: Dict[str, Dict[str, Any]]) -> Dict[str, Dict[str, Any]]:
    """Add to default cfgs ('arch.tag' -> cfg) where their weights are: in the package, and on the Hub by full commit.

    A cfg whose weights are not published gets no source, so that timm does not list it as pretrained, and nobody can
    register a repository that we name.
    """
    return {name: {**cfg, **_sources(name, _MANIFEST.get(name, {}))} for name, cfg in cfgs.items()}


def _sources(name: str, entry: Dict[str, Any]) -> Dict[str, str]:
    sources: Dict[str, str] = {}
    if entry.get('revision'):
        sources.update(hf_hub_id=f'{entry["repo"]}@{entry["revision"]}', hf_hub_filename=_FILENAME)
    if entry.get('packaged'):
        sources.update(file=str(_WEIGHTS_DIR / f'{name}.safetensors'))  # timm prefers it to the Hub
    return sources


def resolve_weights(
    variant: str,
    pretrained_cfg: Optional[Union[str, Dict[str, Any]]] = None,
    pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
    cache_dir: Optional[Union[str, Path]] = None,
    **_: Any,
) -> Dict[str, Any]:
    """Find and verify the weights that `pretrained=True` will load, fetching them where needed.

    Args:
        variant: Architecture name.
        pretrained_cfg: As for `timm.create_model`.
        pretrained_cfg_overlay: As for `timm.create_model`.
        cache_dir: As for `timm.create_model`.

    Returns:
        The overlay to build the model with. For weights that the package pins it names the verified file.

    Raises:
        FileNotFoundError: If the file that the user asked for is not there.
        RuntimeError: If no weights are published, they cannot be fetched, or they are not the published ones.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    if any(overlay.get(key) for key in ('state_dict', 'file', 'hf_hub_id', 'url')):
        # else a source of the default cfg would silently win over the one asked for
        overlay = {'source': None, 'file': None, 'hf_hub_id': None, 'hf_hub_filename': None, **overlay}
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)

    # timm's order: what the model name's prefix says, then state_dict, file, hf_hub_id, url
    if cfg.source == 'local-dir' or (cfg.source != 'hf-hub' and cfg.state_dict):
        return overlay
    if cfg.source != 'hf-hub' and cfg.file:
        path = Path(cfg.file)
        if path.parent == _WEIGHTS_DIR:
            _verify(path, _MANIFEST.get(path.stem, {}), 'run pip install --force-reinstall --no-deps timm-sharesnet')
        elif not path.is_file():
            raise FileNotFoundError(f'There is no file {path} to load weights from.')  # timm's own error has no text
        return overlay
    if cfg.hf_hub_id:
        repo, _at, revision = cfg.hf_hub_id.partition('@')
        for entry in _MANIFEST.values():
            if revision and revision == entry.get('revision'):
                path = _fetch(repo, entry, cache_dir)
                _verify(path, entry, f'delete {path.resolve()}')  # the blob: the path is the cache's link to it
                return {**overlay, 'source': None, 'file': str(path)}
        return overlay
    if cfg.url or not cfg.tag:  # without a tag it is a user's own cfg, and timm says what that lacks
        return overlay
    name = f'{variant}.{cfg.tag}'
    raise RuntimeError(
        f'No weights are published for {name} yet. From a clone that has them in hub/: '
        f"timm.create_model('local-dir:hub/{name}', pretrained=True). From the original author's Torch7 file: "
        f'hub/import_torch7.py or timm_sharesnet.load_torch7. By training: the commands of train_configs/README.md. '
        f"From a file of your own: pretrained_cfg_overlay=dict(file='model.safetensors'). Without: pretrained=False."
    )


def _fetch(repo: str, entry: Dict[str, Any], cache_dir: Optional[Union[str, Path]]) -> Path:
    """The file at the pinned commit, from the cache without any request, else from the Hub.

    The Hub is asked once, without huggingface_hub's retries, before anything is downloaded: its answer already tells
    whether the network is there and whether the file is the published one.
    """
    location = dict(repo_id=repo, filename=_FILENAME, revision=entry['revision'])
    try:
        return Path(hf_hub_download(**location, cache_dir=cache_dir, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        found = get_hf_file_metadata(hf_hub_url(**location), timeout=_TIMEOUT)
        if (found.commit_hash, found.etag, found.size) == (entry['revision'], entry['sha256'], entry['size']):
            return Path(hf_hub_download(**location, cache_dir=cache_dir, library_name='timm-sharesnet'))
    except Exception as e:  # huggingface_hub 1 and 2 raise the errors of different HTTP libraries
        reason = next(iter(str(e).strip().splitlines()), '')
        raise RuntimeError(
            f'{_FILENAME} of {repo} (commit {entry["revision"]}) is not in the cache and could not be fetched: '
            f'{type(e).__name__}: {reason}'
        ) from e
    raise RuntimeError(
        f'{repo} at commit {entry["revision"]} does not hold the published {_FILENAME} (SHA-256 {entry["sha256"]}, '
        f'{entry["size"]} bytes), but {found.etag}, {found.size} bytes, of commit {found.commit_hash}. '
        f'Nothing was downloaded.'
    )


def _verify(path: Path, entry: Dict[str, Any], remedy: str) -> None:
    expected = entry.get('sha256')
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else 'no file'
    if found != expected:
        raise RuntimeError(
            f'{path} is not the published file (SHA-256 {expected}, found {found}). Nothing was loaded: '
            f'{remedy} and try again.'
        )


def unknown_model(name: str) -> str:
    """What to say of a model name, with or without tag, that timm does not know. Empty if it does."""
    arch, _, tag = name.partition('.')
    if not timm.is_model(arch):
        name, known = arch, timm.list_models()
    elif tag and name not in timm.list_models(f'{arch}.*', include_tags=True):
        known = timm.list_models(f'{arch}.*', include_tags=True)
    else:
        return ''
    close = difflib.get_close_matches(name, known, 3)
    meant = f', did you mean {" or ".join(close)}?' if close else '. timm.list_models() has the names.'
    return f'timm knows no model {name}{meant}'


def drop_repeated_args(config: Path) -> None:
    """Rewrite a config.json that timm wrote without what its `model_args` repeat of the rest.

    transformers passes `num_classes` beside `model_args` and fails where that has it, too
    (huggingface/transformers#34564). timm takes it from the top level.
    """
    content = json.loads(config.read_text(encoding='utf-8'))
    args = content.pop('model_args', {})
    args.pop('num_classes', None)
    if args:
        content['model_args'] = args
    config.write_text(json.dumps(content, indent=2), encoding='utf-8')


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Refuse a checkpoint that does not match the model, whatever strictness timm loads with.

    timm loads non-strictly as soon as `num_classes` differs from the checkpoint's, so half a file would pass. The
    classifier may differ or be missing, and the first convolution may have the number of input channels of the cfg's
    `input_size`, which timm adapts, in place of the model's.

    Raises:
        RuntimeError: If a tensor is missing, unexpected or of another shape.
    """
    cfg = cast(Dict[str, Any], model.pretrained_cfg)
    classifier = {f'{cfg["classifier"]}.weight', f'{cfg["classifier"]}.bias'}
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items() if k not in classifier}
    found = {k: tuple(getattr(v, 'shape', ())) for k, v in state_dict.items() if k not in classifier}
    faults = [f'{k} is missing' for k in expected.keys() - found.keys()]
    faults += [f'{k} is not part of the model' for k in found.keys() - expected.keys()]
    first_conv, pretrained_chans = f'{cfg["first_conv"]}.weight', cfg['input_size'][0]
    for k in expected.keys() & found.keys():
        adapted = (expected[k][0], pretrained_chans, *expected[k][2:]) if k == first_conv else expected[k]
        if found[k] not in (expected[k], adapted):
            faults.append(f'{k} has shape {found[k]} instead of {expected[k]}')
    if faults:
        raise RuntimeError(
            f'The checkpoint is not one of {cfg.get("architecture", type(model).__name__)}, nothing was loaded: '
            f'{sorted(faults)[0]}' + (f' (and {len(faults) - 1} more)' if len(faults) > 1 else '') + '.'
        )
    return state_dict

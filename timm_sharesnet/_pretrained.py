"""Where pretrained weights come from, and the checks they pass before anything is loaded."""

import hashlib
import json
from pathlib import Path
from typing import Any, Dict, Optional, Union, cast

import torch
import torch.nn as nn
from timm.models import resolve_pretrained_cfg

_WEIGHTS_DIR = Path(__file__).parent / 'weights'
_MANIFEST = json.loads((Path(__file__).parent / 'weights.json').read_text())  # 'arch.tag' -> sha256, size


def packaged(name: str) -> Dict[str, str]:
    """Default cfg source of the weights `name` ('arch.tag') that travel with the package."""
    return {'file': str(_WEIGHTS_DIR / f'{name}.safetensors')}


def resolve_weights(
    variant: str,
    pretrained_cfg: Optional[Union[str, Dict[str, Any]]] = None,
    pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
    **_: Any,
) -> Dict[str, Any]:
    """Find and verify the weights that `pretrained=True` will load.

    Args:
        variant: Architecture name.
        pretrained_cfg: As for `timm.create_model`.
        pretrained_cfg_overlay: As for `timm.create_model`.

    Returns:
        The overlay to build the model with.

    Raises:
        RuntimeError: If there are no weights, or the packaged file is not the published one.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    if not overlay.get('file') and any(overlay.get(key) for key in ('hf_hub_id', 'url', 'state_dict')):
        overlay['file'] = None  # else the file of the default cfg would silently win over the source asked for
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    if not cfg.has_weights and not cfg.state_dict:
        name = f'{variant}.{cfg.tag}' if cfg.tag else variant
        raise RuntimeError(
            f'There are no published weights for {name} yet. Import the file of the original authors '
            f'(timm_sharesnet.load_torch7, hub/import_torch7.py), train with a config of train_configs/, load your own '
            f"with pretrained_cfg_overlay=dict(file='model.safetensors'), or use pretrained=False."
        )
    if cfg.file and Path(cfg.file).parent == _WEIGHTS_DIR:
        _verify(Path(cfg.file))
    return overlay


def _verify(path: Path) -> None:
    expected = _MANIFEST[path.stem]['sha256']
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else 'no file'
    if found != expected:
        raise RuntimeError(
            f'{path} is not the published file (SHA-256 {expected}, found {found}). '
            f'Reinstall: pip install --force-reinstall --no-deps timm-sharesnet'
        )


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Refuse a checkpoint that does not match the model, whatever strictness timm loads with.

    timm loads non-strictly as soon as `num_classes` differs from the checkpoint's, so half a file would pass. The
    classifier may differ or be missing, and the first convolution may have another number of input channels.

    Raises:
        RuntimeError: If a tensor is missing, unexpected or of another shape.
    """
    cfg = cast(Dict[str, Any], model.pretrained_cfg)
    expected = {k: v.shape for k, v in model.state_dict().items() if not k.startswith(f'{cfg["classifier"]}.')}
    found = {k: v.shape for k, v in state_dict.items() if not k.startswith(f'{cfg["classifier"]}.')}
    faults = [f'{k} is missing' for k in expected.keys() - found.keys()]
    faults += [f'{k} is not part of the model' for k in found.keys() - expected.keys()]
    first_conv = f'{cfg["first_conv"]}.weight'
    for k in expected.keys() & found.keys():
        a, b = expected[k], found[k]
        if k == first_conv:
            a, b = a[:1] + a[2:], b[:1] + b[2:]  # timm adapts the input channels
        if a != b:
            faults.append(f'{k} has shape {tuple(found[k])} instead of {tuple(expected[k])}')
    if faults:
        raise RuntimeError(
            f'The checkpoint is not one of {cfg.get("architecture", type(model).__name__)}, nothing was loaded: '
            f'{sorted(faults)[0]}' + (f' (and {len(faults) - 1} more)' if len(faults) > 1 else '') + '.'
        )
    return state_dict

#!/usr/bin/env python3
"""Turn a Torch7 checkpoint of the author into a folder that timm loads.

    python hub/import_torch7.py resnet-34.t7 --model sharesnet34 --output sharesnet34
    python hub/import_torch7.py wrn-22-2.t7 --model shawrn40_4 --model-kwargs layers=3,3,3 widen_factor=2 --output out

Written are DIR/model.safetensors and DIR/config.json, and no other file of DIR is touched. Then
`timm.create_model('local-dir:DIR', pretrained=True)` loads it, and so does transformers. A file that is not what
`--model` says is refused: one line says which layer differs, and nothing is written.
Exit code 0, or 1 and a line that says what is wrong, or 2 for wrong options.
"""

import argparse
import ast
import difflib
import hashlib
import io
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, List, Optional, Tuple

import timm
from timm.models import save_for_hf

from timm_sharesnet import load_torch7
from timm_sharesnet.weights import drop_repeated_args, unknown_model


def main(argv: Optional[List[str]] = None) -> Optional[str]:
    """Run the command line, and return the error message if there is one."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')  # a terminal need not know the letters of a path
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', type=Path, help='file of the author, .t7 or .t7.gz')
    parser.add_argument('--model', required=True, metavar='NAME', help='model that it holds')
    parser.add_argument('--output', required=True, type=Path, metavar='DIR', help='folder to write')
    parser.add_argument('--model-kwargs', nargs='*', default=[], metavar='k=v', help='as for train.py of timm')
    args = parser.parse_args(argv)
    try:
        if args.output.exists() and not args.output.is_dir():
            raise FileExistsError(f'{args.output} is not a directory')
        _require_model(args.model)
        model_kwargs = dict(map(_key_value, args.model_kwargs))
        state_dict = load_torch7(args.checkpoint, args.model, **model_kwargs)
        model = timm.create_model(args.model, **model_kwargs)
        model.load_state_dict(state_dict)
        _write(model, model_kwargs, args.checkpoint, args.output)
    except Exception as e:
        return f'{parser.prog}: error: ' + ' '.join(str(e).split())
    print(
        f'Wrote {args.output}/model.safetensors and config.json: {args.model}, '
        f'{sum(p.numel() for p in model.parameters()):,} parameters. '
        f"Load it with timm.create_model('local-dir:{args.output}', pretrained=True)."
    )
    return None


def _require_model(name: str) -> None:
    """Raise unless it is a model of this package: only these exist in Torch7."""
    arch = name.partition('.')[0]
    ours = [n for n in timm.list_models() if timm.models.model_entrypoint(n).__module__.startswith('timm_sharesnet.')]
    if arch not in ours:
        close = difflib.get_close_matches(arch, ours, 3)
        meant = f'did you mean {" or ".join(close)}?' if close else f'they are {", ".join(ours)}'
        raise ValueError(f'{arch} is no model of timm_sharesnet, and only these exist in Torch7: {meant}')
    if unknown := unknown_model(name):
        raise ValueError(unknown)


def _key_value(text: str) -> Tuple[str, Any]:
    key, equals, value = text.partition('=')
    if not (key and equals):
        raise ValueError(f'--model-kwargs: expected key=value, found {text!r}')
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value  # a string needs no quotes


def _write(model: Any, model_kwargs: Dict[str, Any], checkpoint: Path, output: Path) -> None:
    """Write both files beside their place before either is moved there. config.json tells which file was imported."""
    folder = output if output.is_dir() else output.parent
    folder.mkdir(parents=True, exist_ok=True)
    tag = model.pretrained_cfg['tag'] if 'torch7' in model.pretrained_cfg['tag'] else 'torch7'
    with TemporaryDirectory(prefix='.import_torch7-', dir=folder) as tmp:
        new = Path(tmp) / 'new'
        source = dict(file=checkpoint.name, sha256=hashlib.sha256(checkpoint.read_bytes()).hexdigest())
        # The default tag may be that of other weights. timm ignores keys that it does not know.
        config = dict(pretrained_cfg=dict(tag=tag), torch7=source)
        save_for_hf(model, str(new), model_config=config, model_args=model_kwargs, safe_serialization=True)
        drop_repeated_args(new / 'config.json')
        if output.is_dir():
            for file in new.iterdir():
                os.replace(file, output / file.name)
        else:
            new.rename(output)


if __name__ == '__main__':
    sys.exit(main())

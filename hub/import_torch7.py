#!/usr/bin/env python3
"""Turn a Torch7 checkpoint of the author into a folder that timm loads.

    python hub/import_torch7.py resnet-34.t7 --model sharesnet34 --output sharesnet34
    python hub/import_torch7.py wrn-22-2.t7 --model shawrn40_4 --model-kwargs layers=3,3,3 widen_factor=2 --output out

Written are DIR/model.safetensors and DIR/config.json, and no other file of DIR is touched. Then
`timm.create_model('local-dir:DIR', pretrained=True)` loads it, and so does transformers. A file that is not what
`--model` says is refused: one line says which layer differs, and nothing is written.
Exit code 0, or 2 and a line that says what is wrong.
"""

import sys
from pathlib import Path

import timm
from folder import sha256
from timm.utils import ParseKwargs

from timm_sharesnet import load_torch7
from timm_sharesnet.cli import CommandError, Parser, command, did_you_mean, reason
from timm_sharesnet.weights import save_folder, unknown_model


@command('import_torch7.py')
def main(argv):
    parser = Parser(description=__doc__)
    parser.add_argument('checkpoint', type=Path, help='file of the author, .t7 or .t7.gz')
    parser.add_argument('--model', required=True, metavar='NAME', help='model that it holds')
    parser.add_argument('--output', required=True, type=Path, metavar='DIR', help='folder to write')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE')
    args = parser.parse_args(argv)
    if args.output.exists() and not args.output.is_dir():
        raise CommandError(f'{args.output} is not a directory')
    require_model(args.model)
    try:
        state_dict = load_torch7(args.checkpoint, args.model, **args.model_kwargs)
        model = timm.create_model(args.model, **args.model_kwargs)
    except (ImportError, ValueError) as e:
        raise CommandError(reason(e)) from e
    model.load_state_dict(state_dict)
    write(model, args.model_kwargs, args.checkpoint, args.output)
    print(
        f'Wrote {args.output}/model.safetensors and config.json: {args.model}, '
        f'{sum(p.numel() for p in model.parameters()):,} parameters. '
        f"Load it with timm.create_model('local-dir:{args.output}', pretrained=True)."
    )


def require_model(name):
    """Raise unless it is a model of this package: only these exist in Torch7."""
    arch = name.partition('.')[0]
    ours = [n for n in timm.list_models() if timm.models.model_entrypoint(n).__module__.startswith('timm_sharesnet.')]
    if arch not in ours:
        meant = did_you_mean(arch, ours, f', they are {", ".join(ours)}')
        raise CommandError(f'{arch} is no model of timm_sharesnet, and only these exist in Torch7{meant}')
    if unknown := unknown_model(name):
        raise CommandError(unknown)


def write(model, model_kwargs, checkpoint, output):
    """Write the folder. config.json tells which file was imported, and keeps the tag of no other weights."""
    tag = model.pretrained_cfg['tag'] if 'torch7' in model.pretrained_cfg['tag'] else 'torch7'
    source = {'file': checkpoint.name, 'sha256': sha256(checkpoint)}
    save_folder(model, output, model_kwargs, {'pretrained_cfg': {'tag': tag}, 'torch7': source})


if __name__ == '__main__':
    sys.exit(main())

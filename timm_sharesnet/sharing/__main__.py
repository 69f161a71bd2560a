"""The command, see `timm_sharesnet.sharing`."""

import argparse
import ast
import shlex
import sys
from pathlib import Path
from typing import Sequence

from safetensors import SafetensorError

from ..cli import CommandError, Parser, command, concerning, reason
from ..images import FolderImages, add_calibration_arguments
from ..loading import add_model_arguments, load_model
from ..model_args import model_args, options_for_train, unlike_its_name
from ..share_rate import ShareRate
from ..weights import save_folder
from . import __doc__
from .convert import share
from .run import INITS


def _rate(text: str) -> ShareRate:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError) as e:
        raise argparse.ArgumentTypeError(
            f'must be a number, or one for each stage such as 0.5,0.5,1,1: {text!r}'
        ) from e


def _parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog='python -m timm_sharesnet.sharing', description=__doc__)
    add_model_arguments(parser)
    parser.add_argument('--output', required=True, type=Path, metavar='DIR', help='folder to write, which is new')
    parser.add_argument('--rate', type=_rate, metavar='R', help='from 0 to 1, for all stages or each (1)')
    parser.add_argument('--save', type=float, metavar='PART', help='in place of a rate: of all parameters')
    parser.add_argument('--init', choices=INITS, default='align', help='kernel that blocks share (align)')
    add_calibration_arguments(parser, 1000)
    parser.add_argument('--device', default='cpu', help='where the images go through the net, such as cuda (cpu)')
    parser.add_argument(
        '--no-refit', action='store_true', help='estimate statistics only, which goes through the images once'
    )
    return parser.parse_args(argv)


@command('share')
def main(argv: Sequence[str]) -> None:
    """The command line, see the package."""
    args = _parse_args(argv)
    if args.output.exists():
        raise CommandError(f'{args.output} exists already')
    with concerning(args.output, SafetensorError):
        model = load_model(args.model, args.checkpoint, args.num_classes, args.in_chans, args.model_kwargs)
        images = None
        if args.calibration_dir is not None:
            found = FolderImages(args.calibration_dir, model)
            chosen = found.spread(args.calibration_images)
            print(f'calibrating on {len(chosen):,} of {found}', flush=True)
            images = found.batches(chosen)
        try:
            model.to(args.device)
        except (RuntimeError, AssertionError) as e:  # what torch raises if it is not there
            raise CommandError(f'--device {args.device}: {reason(e)}') from e
        try:
            shared = share(model, args.rate, args.init, images, not args.no_refit, True, args.save).cpu()
        except (ImportError, TypeError, ValueError) as e:
            raise CommandError(reason(e)) from e
        if fault := unlike_its_name(shared):
            raise CommandError(f'{args.model} is not what timm builds by its name and arguments: {fault}')
        save_folder(shared, args.output, model_args(shared))
    print(shared.share_report)
    print(f'{args.output}: {sum(p.numel() for p in shared.parameters()):,} parameters, to train on with')
    weights = str(args.output / 'model.safetensors')
    print(f'  {shlex.join([*options_for_train(shared), "--initial-checkpoint", weights])}')


if __name__ == '__main__':
    sys.exit(main())

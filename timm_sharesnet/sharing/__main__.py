"""The command, see `timm_sharesnet.sharing`."""

import argparse
import ast
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Iterable, NoReturn, Optional, Sequence

import torch
import torch.nn as nn
from safetensors import SafetensorError
from timm.models import save_for_hf
from timm.utils import ParseKwargs

from ..cli import one_line
from ..model_args import model_args, train_options, unlike_its_name
from ..share_rate import ShareRate
from ..weights import drop_repeated_args
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f'share: {message}\n')


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog='python -m timm_sharesnet.sharing',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument('model', metavar='MODEL')
    parser.add_argument('--output', required=True, type=Path, metavar='DIR', help='folder to write, which is new')
    parser.add_argument('--rate', type=_rate, default=1.0, metavar='R', help='from 0 to 1, for all stages or each (1)')
    parser.add_argument('--init', choices=INITS, default='align', help='kernel that blocks share (align)')
    parser.add_argument('--checkpoint', metavar='FILE', help='weights to take in place of the pretrained ones')
    parser.add_argument('--num-classes', type=int, metavar='N', help="the checkpoint's classes, if not the default")
    parser.add_argument('--in-chans', type=int, metavar='N', help="the checkpoint's input channels, likewise")
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE')
    parser.add_argument('--calibration-dir', metavar='DIR', help='folder of images, in subfolders or not')
    parser.add_argument(
        '--no-refit', action='store_true', help='estimate statistics only, which takes memory for one batch'
    )
    parser.add_argument('--calibration-images', type=int, default=1000, metavar='N', help='how many of them (1000)')
    return parser


def _images(model: nn.Module, folder: str, count: int) -> Iterable[torch.Tensor]:
    """Batches of a folder's images at equal distances, preprocessed for a model."""
    from ..images import FolderImages

    images = FolderImages(folder, model)
    chosen = images.spread(count)
    print(f'calibrating on {len(chosen):,} of {images}', flush=True)
    return images.batches(chosen)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command line, see the module. Returns the exit code, 0 or 2."""
    from ..export import ExportError, load_model

    try:
        args = _parser().parse_args(argv)
    except ValueError:  # of ParseKwargs
        _parser().error('--model-kwargs must be KEY=VALUE')
    try:
        if args.output.exists():
            raise ExportError(f'{args.output} exists already')
        if args.calibration_images < 1:
            raise ExportError(f'--calibration-images must be positive, got {args.calibration_images}')
        model = load_model(args.model, args.checkpoint, args.num_classes, args.in_chans, args.model_kwargs)
        images = None
        if args.calibration_dir is not None:
            images = _images(model, args.calibration_dir, args.calibration_images)
        try:
            shared = share(model, args.rate, args.init, images, not args.no_refit, progress=True)
        except (ImportError, TypeError, ValueError) as e:
            raise ExportError(str(e)) from e
        fault = unlike_its_name(shared)
        if fault:
            raise ExportError(f'{args.model} is not what timm builds by its name and arguments: {fault}')
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.share-', dir=args.output.parent) as temporary:
            folder = Path(temporary, args.output.name)
            save_for_hf(shared, str(folder), model_args=model_args(shared), safe_serialization=True)
            drop_repeated_args(folder / 'config.json')
            folder.rename(args.output)
    except (ExportError, OSError, SafetensorError) as e:
        print('share:', one_line(e, args.output), file=sys.stderr)
        return 2
    print(shared.share_report)
    print(f'{args.output}: {sum(p.numel() for p in shared.parameters()):,} parameters, to train on with')
    weights = str(args.output / 'model.safetensors')
    print(f'  {shlex.join([*train_options(shared), "--initial-checkpoint", weights])}')
    return 0


if __name__ == '__main__':
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors='backslashreplace')  # type: ignore[union-attr]  # paths that a terminal cannot show
    sys.exit(main())

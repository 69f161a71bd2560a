"""Write a net as it is deployed to ONNX files that keep one copy of each shared kernel at run time, too.

    python -m timm_sharesnet.export MODEL --output FILE.onnx [--fp16] [--int8 --calibration-dir DIR]

MODEL is a name that timm knows (with its pretrained weights), such a name with `--checkpoint FILE` (of timm's train.py,
averaged weights if it has them), `local-dir:DIR` or `hf-hub:ORG/NAME`: a net of this package, or a plain ResNet of
timm's to compare with. The net is folded (`timm_sharesnet.fold`) and written with a dynamic batch; `pixel_values` is an
image preprocessed as timm does, `logits` the output. Each file is opened in ONNX Runtime and compared with the net, and
its size is printed, the 3x3 kernels that ONNX Runtime holds after its own optimisation, and the memory of a session.

Written are FILE.onnx, and on demand FILE_fp16.onnx (input and output stay fp32) and FILE_quantized.onnx (int8, static
QDQ, a scale for each channel), calibrated with images of DIR and its subfolders, or of DIR/train alone if DIR has
splits. Weights beyond 16 MB are in FILE.onnx_data beside the file, which ONNX Runtime maps into memory and does not
copy. Nothing is written if anything is wrong. Exit code 0, or 2 and one line that says what is.
"""

import contextlib
import copy
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, NamedTuple, Optional, Sequence, Set, Tuple, Union
from unittest import mock

import torch
import torch.nn as nn

from .cli import CommandError, Parser, command, concerning, reason
from .folding import fold
from .images import FolderImages, add_calibration_arguments, image_size
from .loading import add_model_arguments, load_model

__all__ = ['Contents', 'Memory', 'export', 'export_onnx', 'inspect', 'main', 'quantize', 'session_memory']

EXTERNAL_ABOVE = 16e6  # bytes of weights
INPUT, OUTPUT = 'pixel_values', 'logits'  # the Hub's convention for image classification
COMPARED = 1000  # images, at most
TOLERANCE = {'fp32': 1e-4, 'fp16': 5e-2}  # largest difference of an output / largest output


class Contents(NamedTuple):
    """What a file holds, and what is left of it after ONNX Runtime's default optimisation."""

    bytes: int  # of the file and its `.onnx_data`
    kernels: int  # different 3x3 kernels that are left
    uses: int  # 3x3 convolutions that are left
    weight_bytes: int  # of all weights that are left


class Memory(NamedTuple):
    """Growth of a process, MiB."""

    loaded: float  # by the session, with what the allocator keeps of the memory that was freed while it was made
    held: float  # by the session alone (glibc's allocator gives the rest back, `malloc_trim`)
    peak: float  # at most, in the session's making and three inferences


def require(*names: str) -> None:
    """Raise a CommandError that names the extra if a package is not installed."""
    for name in names:
        try:
            __import__(name)
        except ImportError as e:
            raise CommandError(f"{name} is not installed: pip install 'timm-sharesnet[onnx]'") from e


# Writing


def export_onnx(model: nn.Module, path: Union[str, Path], input_size: Tuple[int, int, int], half: bool = False) -> None:
    """Write a net as it is (see `fold`) to an ONNX file with a dynamic batch.

    Args:
        model: Net in evaluation mode, in fp32 on the CPU.
        path: File to write. Large weights go to a second one, see the module.
        input_size: Channels, height and width of an image.
        half: Compute and store in fp16. Input and output stay fp32.
    """
    if half:
        model = _Half(model).eval()
    images = (torch.zeros(2, *input_size),)
    names: Dict[str, Any] = {'input_names': [INPUT], 'output_names': [OUTPUT]}
    if torch.__version__ < '2.7':  # with dynamo it fails at a batch norm
        proto = _export_by_tracing(model, images, path, names)
    else:
        dynamic_shapes = ({0: torch.export.Dim('batch')},)
        program = torch.onnx.export(model, images, dynamo=True, verbose=False, dynamic_shapes=dynamic_shapes, **names)
        assert program is not None
        proto = program.model_proto
    _save(proto, Path(path))


def _export_by_tracing(model: nn.Module, images: Any, path: Union[str, Path], names: Dict[str, Any]) -> Any:
    """Export as torch did before dynamo, which folds all batch norms. `fold` leaves none after a shared kernel."""
    import onnx

    axes = {name: {0: 'batch'} for name in (INPUT, OUTPUT)}
    # Equal kernels stay apart, as with dynamo: a shared one is a single tensor anyway, and an unshared net has copies
    with mock.patch.object(torch._C, '_jit_pass_onnx_deduplicate_initializers', lambda graph, params, _: params):
        torch.onnx.export(model, images, path, dynamo=False, dynamic_axes=axes, **names)
    return onnx.load(path)


class _Half(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).half()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.half()).float()


def _save(proto: Any, path: Path) -> None:
    """Save without the exporter's records of source lines, which tell the paths of this machine and take memory."""
    import onnx

    graph = proto.graph
    for item in (proto, graph, *graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output):
        del item.metadata_props[:]
        item.doc_string = ''
    size = sum(len(tensor.raw_data) for tensor in graph.initializer)
    external = size > EXTERNAL_ABOVE
    data = path.with_name(path.name + '_data')
    onnx.save(proto, path, save_as_external_data=external, location=data.name, size_threshold=1024)
    if external:
        data.chmod(path.stat().st_mode)  # onnx lets nobody else read it


@contextlib.contextmanager
def _temporary(fault: str) -> Iterator[Path]:
    """A folder for files of onnx and ONNX Runtime, which fail in many ways if it is full."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield Path(folder)
        except Exception as e:
            raise CommandError(f'{fault}, with temporary files in {tempfile.gettempdir()}: {reason(e)}') from e


def quantize(path: Union[str, Path], target: Union[str, Path], batches: Sequence[Any]) -> None:
    """Quantize an ONNX file to int8: static QDQ, as ONNX Runtime recommends (after `quant_pre_process`).

    It is calibrated with `batches` of preprocessed images, arrays of shape (B, C, H, W).
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    inputs = ({INPUT: batch} for batch in batches)

    class Reader(CalibrationDataReader):
        def get_next(self) -> Optional[Dict[str, Any]]:
            return next(inputs, None)

    with _temporary(f'{Path(path).name} cannot be quantized') as folder:
        whole, prepared, quantized = (folder / f'{name}.onnx' for name in ('whole', 'prepared', 'quantized'))
        onnx.save(onnx.load(path), whole)  # ONNX Runtime would look for weights of a second file beside its own copy
        # onnx infers the shapes, too; the symbolic inference fails where the pooling takes a maximum
        quant_pre_process(str(whole), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(quantized),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,  # weights of 7 bits, whose sums processors without VNNI can hold
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        proto = onnx.load(quantized)
    _save(proto, Path(target))


# Reading


def run(session: Any, images: Any) -> Any:
    """The output for images of shape (B, C, H, W)."""
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def open_session(path: Union[str, Path], **options: Any) -> Any:
    """A session of ONNX Runtime on the CPU with its default optimisation."""
    import onnxruntime

    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 3
    for name, value in options.items():
        setattr(session_options, name, value)
    return onnxruntime.InferenceSession(str(path), session_options, providers=['CPUExecutionProvider'])


def inspect(path: Union[str, Path]) -> Contents:
    """Find out what a file holds, and what of it is left after ONNX Runtime's default optimisation."""
    import onnx

    path = Path(path)
    data = path.with_name(path.name + '_data')
    with _temporary(f'{path.name} cannot be optimised') as folder:
        optimized = folder / 'optimized.onnx'
        open_session(path, optimized_model_filepath=str(optimized))
        graph = onnx.load(optimized, load_external_data=False).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    made = {node.output[0]: node for node in graph.node if node.op_type in ('DequantizeLinear', 'Cast')}
    kernels: Set[str] = set()
    uses = 0
    for node in graph.node:
        if node.op_type in ('Conv', 'FusedConv', 'QLinearConv'):
            name = node.input[3 if node.op_type == 'QLinearConv' else 1]
            while name in made:
                name = made[name].input[0]
            if tuple(weights[name].dims[2:]) == (3, 3):
                kernels.add(name)
                uses += 1
    size = path.stat().st_size + (data.stat().st_size if data.exists() else 0)
    itemsize = {t: onnx.helper.tensor_dtype_to_np_dtype(t).itemsize for t in {w.data_type for w in graph.initializer}}
    weight_bytes = sum(math.prod(tensor.dims) * itemsize[tensor.data_type] for tensor in graph.initializer)
    return Contents(size, len(kernels), uses, weight_bytes)


# Loads a file in ONNX Runtime
LOAD = """
import numpy, onnxruntime

def load(path, *entries):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for entry in entries:
        options.add_session_config_entry(*entry.split('='))
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    node = session.get_inputs()[0]
    return lambda: session.run(None, {node.name: numpy.zeros([1, *node.shape[1:]], 'float32')})
"""

_MEASURE = """
import ctypes, json, re, sys

def rss(key='VmRSS'):
    return int(re.search(key + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024

before = rss()
infer = load(*sys.argv[1:])
loaded = rss()
getattr(ctypes.CDLL(None), 'malloc_trim', int)(0)  # glibc's
held = rss()
for _ in range(3):
    infer()
print(json.dumps([loaded - before, held - before, rss('VmHWM') - before]))
"""


def session_memory(path: Union[str, Path], *arguments: str, load: str = LOAD) -> Optional[Memory]:
    """Measure by how much a fresh process grows when it opens a file in ONNX Runtime. None where there is no `/proc`.

    Args:
        path: ONNX file.
        arguments: Entries of the session's configuration, such as 'session.disable_prepacking=1'.
        load: Code of another runtime that defines `load(path, *arguments)`, which returns a function that infers.
    """
    if not os.path.exists('/proc/self/status'):
        return None
    process = [sys.executable, '-c', load + _MEASURE, str(path), *arguments]
    result = subprocess.run(process, capture_output=True, text=True)
    if result.returncode:
        said = result.stderr.strip().splitlines()[-1:]
        raise CommandError(f'{path} cannot be opened in a process of its own: {said}')
    return Memory(*json.loads(result.stdout))


# The command


def export(
    model: nn.Module,
    output: Union[str, Path],
    input_size: Optional[Tuple[int, int, int]] = None,
    fp16: bool = False,
    calibration_dir: Optional[Union[str, Path]] = None,
    calibration_images: int = 256,
    force: bool = False,
) -> Iterator[str]:
    """Fold a net and write it, yielding a line when there is something to tell. The files appear at the end, together.

    Args:
        model: Net in evaluation mode that `fold` takes, on any device and in any precision. It is not changed.
        output: File of the fp32 net, `NAME.onnx`.
        input_size: Channels, height and width, those of the model's preprocessing by default.
        fp16: Write `NAME_fp16.onnx`, too.
        calibration_dir: Folder of images, in subfolders or not, or one of splits, of which `train` is taken. With it,
            `NAME_quantized.onnx` is written, too.
        calibration_images: How many of them to calibrate with.
        force: Overwrite files that exist.

    Raises:
        CommandError: If files exist, an image cannot be read, or a file does not compute what the net does. Nothing is
            written then.
    """
    output = Path(output)
    if output.suffix != '.onnx' or not output.parent.is_dir():
        raise CommandError(f'{output} must end in .onnx and lie in a folder that exists')
    names = {'fp32': output.name}
    if fp16:
        names['fp16'] = f'{output.stem}_fp16.onnx'
    if calibration_dir is not None:
        names['int8'] = f'{output.stem}_quantized.onnx'
    existing = [f for n in names.values() for f in (n, f'{n}_data') if (output.parent / f).exists()]
    if existing and not force:
        raise CommandError(f'{output.parent / existing[0]} exists already (--force overwrites)')
    if any(tensor.is_meta for tensor in itertools.chain(model.parameters(), model.buffers())):
        raise CommandError('the model is on the meta device and has no values to write: load its weights first')
    model = copy.deepcopy(model).to('cpu', torch.float32)
    size = input_size or image_size(model)
    try:
        folded = fold(model)
    except (TypeError, ValueError) as e:
        raise CommandError(reason(e)) from e
    try:
        probe = torch.randn(4, *size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected = model(probe)
    except RuntimeError as e:
        raise CommandError(f'the net does not take images of {size}: {reason(e)}') from e
    if not isinstance(expected, torch.Tensor):
        kind = type(expected).__name__
        raise CommandError(f'the net gives a {kind}, and a file is written of one that gives a tensor')
    images, calibrated, calibration = None, [], []
    if calibration_dir is not None:
        images = FolderImages(calibration_dir, model, size)
        calibrated = images.spread(calibration_images)
        calibration = [batch.numpy() for batch in images.batches(calibrated)]

    floats = [kind for kind in names if kind in TOLERANCE]
    yield f'exporting {", ".join(names[kind] for kind in floats)}'
    with tempfile.TemporaryDirectory(prefix='.export-', dir=output.parent) as temporary:
        paths = {kind: Path(temporary, name) for kind, name in names.items()}
        for kind in floats:
            export_onnx(folded, paths[kind], size, half=kind == 'fp16')
            found = torch.from_numpy(run(open_session(paths[kind]), probe.numpy()))
            error = ((found - expected).abs().max() / expected.abs().max()).item()
            if not error <= TOLERANCE[kind]:
                raise CommandError(f'{names[kind]} differs from the net by {error:.1e} of its largest output')
            yield _describe(paths[kind], f'largest difference {error:.0e} of the largest output')
        if images is not None:
            yield from _export_int8(paths['fp32'], paths['int8'], images, calibrated, calibration)
        written = sorted(Path(temporary).iterdir(), reverse=True)  # the weights before the file that names them
        for path in written:
            os.replace(path, output.parent / path.name)
        for stale in set(existing) - {path.name for path in written}:
            (output.parent / stale).unlink()


def _export_int8(
    path: Path, target: Path, images: FolderImages, calibrated: Sequence[int], calibration: Sequence[Any]
) -> Iterator[str]:
    yield f'calibrating int8 on {len(calibrated):,} of {images}'
    quantize(path, target, calibration)
    others = images.spread(COMPARED, leave=calibrated)
    compared = others or calibrated
    sessions = open_session(path), open_session(target)
    agreed = 0
    for batch in images.batches(compared):
        a, b = (run(session, batch.numpy()).argmax(1) for session in sessions)
        agreed += int((a == b).sum())
    which = 'others' if others else 'of these images, there are no others'
    yield _describe(target, f'agrees with fp32 on {agreed:,} of {len(compared):,} {which}')


def _describe(path: Path, agreement: str) -> str:
    contents, memory = inspect(path), session_memory(path)
    session = 'session not measured on this system'
    if memory:
        session = f'session {memory.loaded:.0f} MiB ({memory.held:.0f} held, peak {memory.peak:.0f})'
    return (
        f'{path.name}: {contents.bytes / 1e6:.1f} MB, {contents.kernels} 3x3 kernels for {contents.uses} uses after '
        f'optimisation, {session}, {agreement}'
    )


@command('export')
def main(argv: Sequence[str]) -> None:
    """The command line, see the module."""
    parser = Parser(prog='python -m timm_sharesnet.export', description=__doc__)
    add_model_arguments(parser)
    parser.add_argument('--output', required=True, metavar='FILE.onnx', help='file to write')
    parser.add_argument('--img-size', type=int, metavar='PX', help="height and width, the model's by default")
    parser.add_argument('--fp16', action='store_true', help='write a file in half precision, too')
    parser.add_argument('--int8', action='store_true', help='write a quantized file, too')
    add_calibration_arguments(parser, 256)
    parser.add_argument('--force', action='store_true', help='overwrite existing files')
    args = parser.parse_args(argv)
    require('onnx', 'onnxscript', 'onnxruntime')
    if args.int8 != (args.calibration_dir is not None):
        raise CommandError('--int8 and --calibration-dir go together')
    with concerning(args.output):
        model = load_model(args.model, args.checkpoint, args.num_classes, args.in_chans, args.model_kwargs)
        size = image_size(model)
        if args.img_size is not None:
            size = (size[0], args.img_size, args.img_size)
        calibration = args.calibration_dir, args.calibration_images
        for line in export(model, args.output, size, args.fp16, *calibration, args.force):
            print(line, flush=True)


if __name__ == '__main__':
    sys.exit(main())

"""Runtimes of phones and boards, and of servers beside ONNX Runtime, as `deploy.py` measures them.

A new one is an entry of RUNTIMES: the packages without which it is skipped, a function that writes a net to a file (or
a folder), and one that loads the file. Nothing is imported before it is needed: the packages conflict with one another,
and are tried in several environments.
"""

import importlib.metadata
import importlib.util
import subprocess
import tempfile
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np


class Runtime(NamedTuple):
    distributions: Tuple[str, ...]  # that pip installs, of which the versions are told
    modules: Tuple[str, ...]  # of Python, the last of which infers, and is no part of the memory that a net takes
    convert: Callable  # (net in evaluation mode, images of shape (N, C, H, W) to trace or calibrate with, path)
    load: Optional[Callable]  # (path, number of threads) -> function of images that gives logits; None: not on Linux

    def missing(self) -> List[str]:
        """The packages that are not installed."""
        packages = dict.fromkeys(module.partition('.')[0] for module in self.modules)
        return [package for package in packages if importlib.util.find_spec(package) is None]

    def version(self) -> str:
        return ' '.join(f'{name} {importlib.metadata.version(name)}' for name in self.distributions)


def size_of(path) -> int:
    """Bytes of a file or of a folder's files, and of `PATH.*` and `PATH_data` beside it, which belong to it."""
    path = Path(path)
    own = [
        f
        for f in path.parent.iterdir()
        if f.name == path.name or f.name.startswith((f'{path.name}.', f'{path.name}_data'))
    ]
    return sum(f.stat().st_size for p in own for f in ([p] if p.is_file() else p.rglob('*')) if f.is_file())


def loader(key: Tuple[str, str]) -> str:
    """Code for `session_memory`, which takes the path and the size of an image."""
    return f"""
import importlib, os, sys
import numpy
sys.stdout = os.fdopen(os.dup(1), 'w')  # for what is measured alone: some runtimes print
os.dup2(2, 1)
sys.path.insert(0, {str(Path(__file__).parent)!r})
from runtimes import RUNTIMES

runtime = RUNTIMES[{key!r}]
importlib.import_module(runtime.modules[-1])

def load(path, *size):
    infer, images = runtime.load(path, 1), numpy.zeros([1, *map(int, size)], 'float32')
    return lambda: infer(images)
"""


def one_by_one(infer: Callable) -> Callable:
    """Infer a batch with a net that takes one image, of shape (1, C, H, W)."""
    return lambda images: np.concatenate([infer(np.ascontiguousarray(images[i : i + 1])) for i in range(len(images))])


def exported(net, images):
    import torch

    return torch.export.export(net, (images[:1],))


def write_onnx(net, images, path):
    from timm_sharesnet.export import export_onnx

    export_onnx(net, path, tuple(images.shape[1:]))


# ncnn


def convert_ncnn(net, images, path):
    """Write `path`.param and `path`.bin, by pnnx."""
    import pnnx
    import torch

    with tempfile.TemporaryDirectory() as folder:
        traced = Path(folder, 'net.pt')
        torch.jit.trace(net, images[:1]).save(str(traced))
        shape = ','.join(map(str, images[:1].shape))
        command = [pnnx.EXEC_PATH, str(traced), f'inputshape=[{shape}]', 'fp16=0']
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        for suffix in '.param', '.bin':
            Path(f'{path}{suffix}').write_bytes(Path(folder, f'net.ncnn{suffix}').read_bytes())


def convert_ncnn_shared(net, images, path):
    """The same with each kernel of several uses once, see `share_ncnn`."""
    convert_ncnn(net, images, path)
    share_ncnn(path)


def share_ncnn(path):
    """Rewrite `path`.param and `path`.bin of pnnx (fp32) so that convolutions with equal kernels read one of them.

    ncnn has no shared weights. A convolution of `dynamic_weight` takes its kernel and its bias as inputs, here from
    `MemoryData` layers, and packs them at each inference.
    """
    param, binary = Path(f'{path}.param'), Path(f'{path}.bin')
    magic, _, *lines = param.read_text().splitlines()
    data, position, layers = binary.read_bytes(), 0, []
    for words in map(str.split, lines):
        inputs = 4 + int(words[2])
        outputs = inputs + int(words[3])
        values = dict(word.split('=') for word in words[outputs:])
        length = _ncnn_bytes(words[0], values)
        layers.append((words[:2], words[4:inputs], words[inputs:outputs], values, data[position : position + length]))
        position += length
    if position != len(data):
        raise ValueError(f'{binary.name} has {len(data)} bytes, of which {position} were understood')
    uses: Dict[bytes, List[str]] = {}
    for (kind, name), _, _, values, own in layers:
        if kind == 'Convolution':
            uses.setdefault(own[: 4 + 4 * int(values['6'])], []).append(name)
    shared = {kernel: names for kernel, names in uses.items() if len(names) > 1}
    kernels, rest = [], []
    for i, (kernel, names) in enumerate(shared.items()):
        blobs = [f'kernel{i}_{name}' for name in names]
        values = next(values for (_, name), _, _, values, _ in layers if name == names[0])
        width, height = int(values['1']), int(values.get('11', values['1']))
        channels = int(values['6']) // (width * height * int(values['0']))
        dims = {'0': width, '1': height, '11': channels, '2': values['0']}
        kernels.append((('MemoryData', f'kernel{i}'), [], [f'kernel{i}'], dims, kernel[4:]))
        kernels.append((('Split', f'split_kernel{i}'), [f'kernel{i}'], blobs, {}, b''))
    for (kind, name), inputs, outputs, values, own in layers:
        kernel = own[: 4 + 4 * int(values['6'])] if kind == 'Convolution' else None
        if kernel in shared:
            i = list(shared).index(kernel)
            inputs = [*inputs, f'kernel{i}_{name}']
            if values.get('5') == '1':
                kernels.append(
                    (('MemoryData', f'bias_{name}'), [], [f'bias_{name}'], {'0': values['0']}, own[len(kernel) :])
                )
                inputs.append(f'bias_{name}')
            values, own = {**values, '19': '1'}, b''
        rest.append(((kind, name), inputs, outputs, values, own))
    layers = [*kernels, *rest]
    blobs = sum(len(outputs) for _, _, outputs, _, _ in layers)
    text = [magic, f'{len(layers)} {blobs}']
    for names, inputs, outputs, values, _ in layers:
        counts = str(len(inputs)), str(len(outputs))
        text.append(' '.join([*names, *counts, *inputs, *outputs, *(f'{k}={v}' for k, v in values.items())]))
    param.write_text('\n'.join(text) + '\n')
    binary.write_bytes(b''.join(own for *_, own in layers))


def _ncnn_bytes(kind: str, values: Dict[str, str]) -> int:
    """Bytes that a layer has in the file: a flag before the kernel, fp32."""
    bias = {'Convolution': '5', 'ConvolutionDepthWise': '5', 'InnerProduct': '1'}.get(kind)
    if bias:
        kernel = values['2' if kind == 'InnerProduct' else '6']
        return 4 + 4 * int(kernel) + 4 * int(values['0']) * (values.get(bias) == '1')
    return 16 * int(values['0']) if kind == 'BatchNorm' else 0


def load_ncnn(path, threads, **options):
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = threads
    for name, value in options.items():
        setattr(net.opt, name, value)
    if net.load_param(f'{path}.param') or net.load_model(f'{path}.bin'):
        raise ValueError(f'ncnn does not load {path}')

    def infer(images):
        extractor = net.create_extractor()
        extractor.input('in0', ncnn.Mat(images[0]).clone())
        return np.array(extractor.extract('out0')[1])[None]

    return one_by_one(infer)


def load_ncnn_shared(path, threads):
    """Without Winograd's transform, which takes longer than it saves if the kernel is transformed each time."""
    return load_ncnn(path, threads, use_winograd_convolution=False)


# MNN


def convert_mnn(net, images, path, options='--optimizePrefer 1'):
    """`optimizePrefer` 1 (smallest) keeps a kernel apart that has several uses. By default one of up to four is copied.

    The function behind the command `mnnconvert` is called: the command installs a package that reports its use.
    """
    import _tools  # of MNN

    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder, 'net.onnx')
        write_onnx(net, images, onnx)
        _tools.mnnconvert(f'mnnconvert -f ONNX --modelFile {onnx} --MNNModel {path} --bizCode x {options}'.split())


def convert_mnn_default(net, images, path):
    convert_mnn(net, images, path, '')


def convert_mnn_int8(net, images, path):
    """Weights alone: MNN's static quantization (`_tools.mnnquant`) aborts the process, version 3.6.1."""
    convert_mnn(net, images, path, '--optimizePrefer 1 --weightQuantBits 8')


def load_mnn(path, threads):
    import MNN.expr
    import MNN.nn

    manager = MNN.nn.create_runtime_manager(({'backend': 'CPU', 'numThread': threads, 'precision': 'high'},))
    net = MNN.nn.load_module_from_file(str(path), ['pixel_values'], ['logits'], runtime_manager=manager)

    def infer(images):
        logits = net.forward([MNN.expr.const(images, list(images.shape), MNN.expr.NCHW)])[0]
        return np.array(MNN.expr.convert(logits, MNN.expr.NCHW).read())

    return one_by_one(infer)


# Core ML


def convert_coreml(net, images, path):
    """A program for iOS 16 in fp16, which is the default."""
    import coremltools
    import torch

    inputs = [coremltools.TensorType(name='pixel_values', shape=images[:1].shape)]
    target = coremltools.target.iOS16
    program = coremltools.convert(torch.jit.trace(net, images[:1]), inputs=inputs, minimum_deployment_target=target)
    program.save(f'{path}.mlpackage')


# LiteRT


def convert_litert(net, images, path):
    import litert_torch

    litert_torch.convert(net, (images[:1],)).export(str(path))


def convert_litert_int8(net, images, path):
    """Static, calibrated with the images."""
    import litert_torch
    from ai_edge_quantizer import quantizer, recipe

    with tempfile.TemporaryDirectory() as folder:
        source = str(Path(folder, 'net.tflite'))
        litert_torch.convert(net, (images[:1],)).export(source)
        quantized = quantizer.Quantizer(source)
        quantized.load_quantization_recipe(recipe.static_wi8_ai8())
        signature = {'serving_default': [{'args_0': image.numpy()} for image in images.split(1)]}
        quantized.quantize(quantized.calibrate(signature)).export_model(str(path), overwrite=True)


def load_litert(path, threads):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=threads)
    interpreter.allocate_tensors()
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()

    def infer(images):
        if source['dtype'] == np.int8:
            scale, zero = source['quantization']
            images = (images / scale + zero).round().clip(-128, 127).astype('int8')
        interpreter.set_tensor(source['index'], images)
        interpreter.invoke()
        logits = interpreter.get_tensor(target['index'])
        if logits.dtype == np.int8:
            scale, zero = target['quantization']
            logits = scale * (logits.astype('float32') - zero)
        return logits

    return one_by_one(infer)


# ExecuTorch


def convert_executorch(net, images, path):
    _write_executorch(exported(net, images), path)


def convert_executorch_int8(net, images, path):
    """Static, calibrated with the images."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    module = exported(net, images).module()
    separate_uses(module)
    prepared = prepare_pt2e(module, quantizer)
    for image in images.split(1):
        prepared(image)
    _write_executorch(exported(convert_pt2e(prepared), images), path)


def separate_uses(module):
    """Give each use of a parameter a copy, in an exported module: the quantizer leaves all uses but one in fp32.

    The copies are equal, also in int8, and the file has them once.
    """
    import torch

    for node in list(module.graph.nodes):
        users = list(node.users) if node.op == 'get_attr' else []
        for i, user in enumerate(users[1:]):
            name = f'{node.target.replace(".", "_")}_use{i}'
            module.register_parameter(name, torch.nn.Parameter(module.get_parameter(node.target).detach().clone()))
            with module.graph.inserting_before(user):
                copy = module.graph.get_attr(name)
            copy.meta = dict(node.meta)
            user.replace_input_with(node, copy)
    module.recompile()


def _write_executorch(program, path):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    Path(path).write_bytes(lowered.buffer)


def load_executorch(path, threads):
    """ExecuTorch has no word in Python for the number of threads, and takes one for each core."""
    import torch
    from executorch.runtime import Runtime as Program

    program = Program.get().load_program(Path(path))
    method = program.load_method('forward')

    def infer(images):
        return method.execute([torch.from_numpy(images)])[0].numpy().copy()

    infer.program = program  # or it is freed
    return one_by_one(infer)


# OpenVINO, quantized by NNCF


def convert_nncf(net, images, path):
    import nncf
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder, 'net.onnx')
        write_onnx(net, images, onnx)
        model = openvino.Core().read_model(onnx)
        model.reshape([1, *images.shape[1:]])
        dataset = nncf.Dataset([image.numpy() for image in images.split(1)])
        quantized = nncf.quantize(model, dataset, subset_size=len(images))
        openvino.save_model(quantized, f'{path}.xml', compress_to_fp16=False)


def compile_openvino(path, threads):
    import openvino

    config = {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': threads, 'NUM_STREAMS': 1}
    return openvino.Core().compile_model(path, 'CPU', config)


def load_openvino(path, threads):
    compiled = compile_openvino(f'{path}.xml', threads)
    return one_by_one(lambda images: compiled(images)[0])


# AOTInductor


def convert_aoti(net, images, path):
    import torch

    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(exported(net, images), package_path=f'{path}.pt2')


def load_aoti(path, threads):
    import torch

    torch.set_num_threads(threads)
    package = torch._inductor.aoti_load_package(f'{path}.pt2')
    return one_by_one(lambda images: package(torch.from_numpy(images)).numpy())


# ONNX Runtime, in other ways than `timm_sharesnet.export` writes its files


def convert_ort_optimized(net, images, path):
    """The file that ONNX Runtime saves after its own optimisation, for processors like this one, weights beside it."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder, 'net.onnx')
        write_onnx(net, images, onnx)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = f'{path}.onnx'
        prefix, data = 'session.optimized_model_external_initializers', f'{Path(path).name}.onnx_data'
        options.add_session_config_entry(f'{prefix}_file_name', data)
        options.add_session_config_entry(f'{prefix}_min_size_in_bytes', '1024')
        onnxruntime.InferenceSession(str(onnx), options, providers=['CPUExecutionProvider'])


def convert_ort_inputs(net, images, path):
    """int8 whose shared kernels are optional inputs, too, so that a session packs them at each inference alone."""
    import onnx

    from timm_sharesnet.export import quantize

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, 'net.onnx')
        write_onnx(net, images, source)
        quantize(source, f'{path}.onnx', [image.numpy() for image in images.split(1)])
    proto = onnx.load(f'{path}.onnx')
    readers = [name for node in proto.graph.node for name in node.input]
    for node in proto.graph.node:
        for tensor in proto.graph.initializer:
            if node.op_type == 'DequantizeLinear' and node.input[0] == tensor.name and len(tensor.dims) == 4:
                if readers.count(node.output[0]) + readers.count(tensor.name) > 2:
                    value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
                    proto.graph.input.append(value)
    Path(f'{path}.onnx_data').unlink(missing_ok=True)
    onnx.save(proto, f'{path}.onnx')


def load_ort(path, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    session = onnxruntime.InferenceSession(f'{path}.onnx', options, providers=['CPUExecutionProvider'])
    return one_by_one(lambda images: session.run(None, {'pixel_values': images})[0])


ORT = ('onnxruntime',), ('onnx', 'onnxruntime')
NCNN, MNN = (('ncnn', 'pnnx'), ('pnnx', 'ncnn')), (('MNN',), ('MNN', 'MNN.nn'))
EXECUTORCH = ('executorch', 'torchao'), ('torchao', 'torch', 'executorch.runtime')
LITERT = (
    ('litert-torch', 'ai-edge-litert', 'ai-edge-quantizer'),
    ('litert_torch', 'ai_edge_quantizer', 'ai_edge_litert.interpreter'),
)
RUNTIMES: Dict[Tuple[str, str], Runtime] = {
    ('ncnn', 'fp32'): Runtime(*NCNN, convert_ncnn, load_ncnn),
    ('ncnn-shared', 'fp32'): Runtime(*NCNN, convert_ncnn_shared, load_ncnn_shared),
    ('mnn', 'fp32'): Runtime(*MNN, convert_mnn, load_mnn),
    ('mnn', 'int8'): Runtime(*MNN, convert_mnn_int8, load_mnn),
    ('mnn-default', 'fp32'): Runtime(*MNN, convert_mnn_default, load_mnn),
    ('coreml', 'fp16'): Runtime(('coremltools',), ('coremltools',), convert_coreml, None),
    ('litert', 'fp32'): Runtime(*LITERT, convert_litert, load_litert),
    ('litert', 'int8'): Runtime(*LITERT, convert_litert_int8, load_litert),
    ('executorch', 'fp32'): Runtime(*EXECUTORCH, convert_executorch, load_executorch),
    ('executorch', 'int8'): Runtime(*EXECUTORCH, convert_executorch_int8, load_executorch),
    ('nncf', 'int8'): Runtime(('nncf', 'openvino'), ('nncf', 'openvino'), convert_nncf, load_openvino),
    ('onnxruntime-optimized', 'fp32'): Runtime(*ORT, convert_ort_optimized, load_ort),
    ('onnxruntime-inputs', 'int8'): Runtime(*ORT, convert_ort_inputs, load_ort),
    ('aoti', 'fp32'): Runtime(('torch',), ('torch',), convert_aoti, load_aoti),
}

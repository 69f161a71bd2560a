"""Compilation and export: torch.compile, torch.export, ONNX, TorchScript."""

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from models import RUNS, SHARED, SMALL, create, images, slow_but_for, small
from torch._dynamo.testing import CompileCounterWithBackend

ALL = [*SMALL, *RUNS]
kinds = pytest.mark.parametrize('kind', ALL)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


# ---- torch.compile


@slow_but_for('bottleneck', of=ALL)
@pytest.mark.parametrize('checkpointing', [False, True], ids=['', 'checkpointing'])
def test_training_step_compiles_to_one_graph_with_equal_gradients(kind, checkpointing):
    model = small(kind).double().train()
    compiled = copy.deepcopy(model)
    compiled.set_grad_checkpointing(checkpointing)
    counter = CompileCounterWithBackend('aot_eager')
    x = images(model, 4)
    for net in model, torch.compile(compiled, backend=counter, fullgraph=True):
        F.cross_entropy(net(x), torch.arange(4)).backward()
    assert counter.frame_count == 1
    expected = {k: p.grad for k, p in model.named_parameters()}
    found = {k: p.grad for k, p in compiled.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@slow_but_for('wide', of=ALL)
@pytest.mark.parametrize(
    'dynamic,sizes,graphs',
    [
        (True, [2, 3, 5, 8], 1),
        (None, [2, 3, 5, 8], 2),  # torch's automatic dynamic shapes: once more when a size changes
    ],
    ids=['dynamic', 'automatic'],
)
def test_graphs_serve_all_batch_sizes(kind, dynamic, sizes, graphs):
    model = small(kind)
    counter = CompileCounterWithBackend('eager')
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
    for n in sizes:
        x = images(model, n)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == graphs


@slow_but_for('wide', of=ALL)
def test_inductor_computes_the_same(kind):
    model = small(kind)
    x = images(model)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-3, atol=1e-4)


# ---- torch.export and TorchScript


@kinds
def test_export_keeps_the_names_and_the_output(kind):
    model = small(kind)
    x = images(model)
    batch = torch.export.Dim('batch', min=2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    assert program.state_dict.keys() == model.state_dict().keys()
    for n in 2, 5:
        torch.testing.assert_close(program.module()(images(model, n)), model(images(model, n)))


@kinds
def test_torchscript_computes_the_same_and_survives_saving(kind, tmp_path):
    model = small(kind)
    x = images(model)
    torch.jit.script(model).save(str(tmp_path / 'model.pt'))
    scripted = torch.jit.load(str(tmp_path / 'model.pt'))
    torch.testing.assert_close(scripted(x), model(x))
    assert {k for k, _ in scripted.named_parameters()} == {k for k, _ in model.named_parameters()}


def test_torchscript_keeps_stride_and_dilation_of_the_shared_convolution():
    model = small('bottleneck', output_stride=8)
    x = images(model)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


# ---- ONNX

by_dynamo = pytest.mark.skipif(torch.__version__ < '2.7', reason="torch 2.6's dynamo exporter fails at a batch norm")


def export_onnx(model: nn.Module, x: torch.Tensor, path: Path) -> Path:
    torch.onnx.export(model, (x,), str(path), dynamo=True, external_data=False, verbose=False)
    return path


def stored(path: Path) -> int:
    """Number of values of the weights in a file."""
    return sum(int(np.prod(t.dims)) for t in onnx.load(path).graph.initializer)


def run_onnx(path: Path, x: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@by_dynamo
@slow_but_for('bottleneck', of=ALL)
def test_onnx_stores_a_shared_convolution_once_and_computes_the_same(kind, tmp_path):
    model = small(kind)
    x = images(model)
    path = export_onnx(model, x, tmp_path / 'model.onnx')
    onnx.checker.check_model(str(path))
    output = run_onnx(path, x)
    assert (output - model(x)).abs().max() <= 2e-5 * output.abs().max()
    # Batch norm adds a scale and a shift to what is stored where it cannot be folded, never a convolution.
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters * 0.98 < stored(path) < parameters * 1.02


@by_dynamo
@slow_but_for('shawrn40_4', name='name', of=SHARED)
def test_onnx_file_of_each_model_is_as_small_as_its_weights(name, tmp_path):
    model = create(name)
    x = torch.randn(1, *model.pretrained_cfg['input_size'])
    path = export_onnx(model, x, tmp_path / 'model.onnx')
    assert path.stat().st_size < 4 * sum(p.numel() for p in model.parameters()) * 1.02 + 1.2e6  # and the graph
    output = run_onnx(path, x)
    assert (output - model(x)).abs().max() <= 2e-5 * output.abs().max()

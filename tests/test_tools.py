"""Tools that rewrite a net are right or refuse, on a net of each kind, shared and folded, with the twin beside it.

They fold the batch norm after a convolution into it, or replace a module, at each of its calls. For a convolution that
is called several times that is wrong, which `test_tool_is_wrong_where_a_module_is_called_twice` shows.
"""

import copy
import functools
import warnings
from typing import Any, Callable, Dict, Tuple

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
import torch.nn.utils.prune as prune
from additions import ADDITIONS, add
from models import SMALL, error, images, kinds, slow_but_for, small, unshared, uses
from plain_nets import batch_norms
from torch.ao.quantization import ObserverBase, get_default_qat_qconfig_mapping, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, fuse_fx, prepare_fx, prepare_qat_fx
from torch.fx.experimental.optimization import fuse, optimize_for_inference

from timm_sharesnet import fold, unshare

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::UserWarning')
slow = pytest.mark.slow

DEPTHS = {'basic': (2, 1, 1, 1), 'bottleneck': (2, 1, 1, 1), 'preact': (3, 1, 1), 'wide': (3, 1, 1)}


def net(kind: str) -> nn.Module:
    """A net of a kind, one of whose convolutions is used twice."""
    model = small(kind, layers=DEPTHS[kind])
    assert len(uses(model.layer1)) == 2
    return model


NETS: Dict[str, Callable[[str], nn.Module]] = {
    'shared': net,
    'twin': lambda kind: unshared(net(kind)),
    'folded': lambda kind: fold(net(kind)),
    'unshared': lambda kind: unshare(net(kind)),
}
each_net = pytest.mark.parametrize(
    'kind,which',
    [
        pytest.param(kind, which, marks=() if which == 'shared' or kind == 'bottleneck' else slow)
        for kind in SMALL
        for which in ('shared', 'twin', 'folded')
    ],
)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def which():
    return 'shared'


@pytest.fixture
def model(kind, which):
    return NETS[which](kind)


@pytest.fixture
def x(model):
    return images(model)


# ---- Folding batch norms


Rewriter = Callable[[nn.Module, torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]


def exported(model: nn.Module, x: torch.Tensor) -> nn.Module:
    return torch.export.export(model, (x,)).module()


def jit_optimized(scripted: torch.jit.ScriptModule, x: torch.Tensor) -> Callable:
    optimized = torch.jit.optimize_for_inference(torch.jit.freeze(scripted))
    optimized(x)  # the first calls are profiled
    return optimized


def torchao_pt2e(module: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return pytest.importorskip(f'torchao.quantization.pt2e.{module}')


def fused_program(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """The exported program, as PT2E folds it."""
    program = exported(model, x)
    torchao_pt2e('utils')._fuse_conv_bn_(program)
    return program


REWRITERS: Dict[str, Rewriter] = {
    'fx fuse': lambda model, x: fuse(model),
    'fx optimize_for_inference': lambda model, x: optimize_for_inference(model),
    'fuse_fx': lambda model, x: fuse_fx(model),
    'jit script': lambda model, x: jit_optimized(torch.jit.script(model), x),
    'jit trace': lambda model, x: jit_optimized(torch.jit.trace(model, x), x),
    'pt2e': fused_program,
}


@each_net
@pytest.mark.parametrize('rewriter', REWRITERS)
def test_batch_norms_are_folded_rightly(model, x, rewriter):
    assert error(REWRITERS[rewriter](copy.deepcopy(model), x)(x), model(x)) <= 1e-5


@kinds
@pytest.mark.parametrize('rewriter', ['fx fuse', 'fuse_fx'])
def test_batch_norms_of_unshared_convolutions_are_folded_as_in_the_twin(kind, rewriter):
    model, twin = net(kind), NETS['twin'](kind)
    x = images(model)
    left = [len(batch_norms(REWRITERS[rewriter](copy.deepcopy(m), x))) for m in (model, twin)]
    assert left[0] - left[1] == (0 if kind == 'wide' else len(uses(model)))  # wide: none follows
    assert left[0] < len(batch_norms(model))


class CalledTwice(nn.Module):
    """A convolution that two batch norms follow, called as a module: what the nets here do not give to the tools."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        for norm in self.norms:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            norm.running_var.uniform_(0.5, 1.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm in self.norms:
            x = F.relu(norm(self.conv(x)))
        return x


@pytest.mark.parametrize('rewriter', ['fx fuse', 'fx optimize_for_inference', 'fuse_fx', 'pt2e'])
def test_tool_is_wrong_where_a_module_is_called_twice(rewriter):
    """Guards the tests of this file. If it fails, torch is cured, and `SharingBlock._traced` may be superfluous."""
    model, x = CalledTwice().eval(), torch.randn(2, 8, 8, 8)
    assert error(REWRITERS[rewriter](copy.deepcopy(model), x)(x), model(x)) > 0.1


@slow
@each_net
def test_inductor_s_freezing_folds_rightly(model, x):
    torch._dynamo.reset()
    expected = model(x)
    with torch._inductor.config.patch(freezing=True):
        assert error(torch.compile(model)(x), expected) <= 1e-4


@slow_but_for()
@pytest.mark.parametrize('which', ['shared', 'twin'])
def test_inductor_s_folding_in_training_is_right(model, x):
    torch._dynamo.reset()
    expected = model(x)
    with torch._inductor.config.patch(efficient_conv_bn_eval_fx_passes=True), torch.enable_grad():
        assert error(torch.compile(model)(x), expected) <= 1e-4


@kinds
def test_features_that_timm_takes_from_an_fx_graph_are_right(kind):
    graph, model = (small(kind, layers=DEPTHS[kind], features_only=True, feature_cls=c) for c in ('fx', 'getter'))
    found = {k.removeprefix('graph_module.'): v for k, v in graph.state_dict().items()}
    model.model.load_state_dict(found, strict=True)
    x = torch.randn(1, 3, 64, 64)
    assert max(map(error, graph(x), model(x))) <= 1e-5


# ---- FX quantization


def quantized_fx(model: nn.Module, x: torch.Tensor) -> Tuple[Callable, Callable]:
    """The net with observers, and the int8 net."""
    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(torch.backends.quantized.engine), (x,))
    prepared(x)
    return prepared, convert_fx(copy.deepcopy(prepared))


def quantized_fx_in_training(model: nn.Module, x: torch.Tensor) -> Tuple[Callable, Callable]:
    mapping = get_default_qat_qconfig_mapping(torch.backends.quantized.engine)
    with torch.enable_grad():
        prepared = prepare_qat_fx(copy.deepcopy(model).train(), mapping, (x,))
    prepared.eval()
    prepared(x)
    return prepared, convert_fx(copy.deepcopy(prepared))


Quantizer = Callable[[nn.Module, torch.Tensor], Tuple[Callable, Callable]]


@functools.lru_cache(maxsize=None)
def quantization_errors(quantize: Quantizer, kind: str, which: str) -> Tuple[float, float]:
    """Errors, relative to the net, of the prepared and the converted net."""
    model = NETS[which](kind)
    x = images(model)
    expected = model(x)
    prepared, converted = quantize(model, x)
    return error(prepared(x), expected), error(converted(x), expected)


def assert_as_accurate_as_the_twin(quantize: Quantizer, kind: str, which: str) -> None:
    found, expected = (quantization_errors(quantize, kind, w)[1] for w in (which, 'twin'))
    assert expected < 0.3
    assert found <= 3 * expected + 0.05


@kinds
@pytest.mark.parametrize('which', ['shared', 'twin', pytest.param('folded', marks=slow)])
def test_net_prepared_by_fx_computes_the_same(kind, which):
    assert quantization_errors(quantized_fx, kind, which)[0] <= 1e-5


@kinds
@pytest.mark.parametrize('which', ['shared', pytest.param('folded', marks=slow)])
def test_net_quantized_by_fx_is_as_accurate_as_the_twin(kind, which):
    assert_as_accurate_as_the_twin(quantized_fx, kind, which)


@slow_but_for('bottleneck')
def test_net_quantized_by_fx_in_training_is_as_accurate_as_the_twin(kind):
    assert_as_accurate_as_the_twin(quantized_fx_in_training, kind, 'shared')


@kinds
def test_fx_quantizes_the_shared_kernel_and_its_input_at_each_use(model):
    prepared = prepare_fx(model, get_default_qconfig_mapping(torch.backends.quantized.engine), (images(model),))
    calls = [node for node in prepared.graph.nodes if node.op == 'call_function' and node.target is F.conv2d]
    assert len(calls) == len(uses(model))
    observers = [argument.target for call in calls for argument in call.args[:2]]
    assert all(isinstance(prepared.get_submodule(name), ObserverBase) for name in observers)
    assert len(set(observers[::2])) == len(calls)  # each input has a scale of its own


# ---- What was added to a shared convolution

ATTACHED = [a for a in ADDITIONS if a != 'LoRA']  # to the convolution itself, which stays an nn.Conv2d
TRACERS: Dict[str, Rewriter] = {
    'fuse': REWRITERS['fx fuse'],
    'prepare_fx': lambda model, x: quantized_fx(model, x)[0],
}


@kinds
@pytest.mark.parametrize('addition', ATTACHED)
@pytest.mark.parametrize('tracer', TRACERS)
def test_fx_refuses_an_addition_that_it_would_miss_and_names_the_cure(model, addition, tracer):
    add(addition, model, 'layer1.conv')
    with pytest.raises(RuntimeError, match='Make it plain first'):
        TRACERS[tracer](model, images(model))


@kinds
@pytest.mark.parametrize('which', ['shared', pytest.param('folded', marks=slow)])
@pytest.mark.parametrize('tracer', TRACERS)
def test_fx_keeps_a_module_in_place_of_the_shared_convolution(model, x, tracer):
    before = model(x)
    add('LoRA', model, 'layer1.conv')
    expected = model(x)
    assert error(expected, before) > 1e-2
    assert error(TRACERS[tracer](model, x)(x), expected) <= 1e-5


@slow_but_for('wide')
def test_fx_quantizes_a_net_with_a_module_in_place_of_the_shared_convolution(model, x):
    add('LoRA', model, 'layer1.conv')
    assert error(quantized_fx(model, x)[1](x), model(x)) <= 0.3


@kinds
@pytest.mark.parametrize('which', ['shared', 'folded'])
@pytest.mark.parametrize('addition', ADDITIONS)
def test_torchscript_refuses_an_addition_and_names_the_cure(model, addition):
    add(addition, model, 'layer1.conv')
    with pytest.raises(RuntimeError, match=r'(?s)TorchScript gets.*script timm_sharesnet\.unshare'):
        torch.jit.script(model)


@kinds
@pytest.mark.parametrize('attribute,value', [('dilation', (2, 2)), ('padding', (0, 0)), ('stride', (2, 2))])
def test_torchscript_refuses_a_shared_convolution_with_other_arguments(model, attribute, value):
    setattr(model.layer1.conv, attribute, value)
    with pytest.raises(RuntimeError, match='TorchScript gets'):
        torch.jit.script(model)


@kinds
def test_torchscript_takes_other_weights_in_a_convolution_of_the_same_kind(model):
    before = model(images(model))
    conv = copy.deepcopy(model.layer1.conv)
    nn.init.normal_(conv.weight, std=0.1)
    model.layer1.conv = conv
    found, expected = torch.jit.script(model)(images(model)), model(images(model))
    assert error(expected, before) > 1e-2
    assert error(found, expected) <= 1e-5


@kinds
def test_merged_additions_are_scripted_and_traced(model, x):
    """The cures that the refusals name."""
    add('pruning', model, 'layer1.conv')
    add('parametrization', model, 'layer2.blocks.0.conv1')
    expected = model(x)
    prune.remove(model.layer1.conv, 'weight')
    parametrize.remove_parametrizations(model.layer2.blocks[0].conv1, 'weight')
    assert error(torch.jit.script(model)(x), expected) <= 1e-5
    assert error(fuse(model)(x), expected) <= 1e-5
    assert error(fold(model)(x), expected) <= 1e-5


@kinds
@pytest.mark.parametrize('addition', ['pruning', 'parametrization'])
def test_weight_changed_by_name_is_that_of_every_use(kind, addition):
    model, expected = net(kind), net(kind)
    x = images(model)
    before = model(x)
    add(addition, model, 'layer1.conv')
    expected.layer1.conv.weight.copy_(model.layer1.conv.weight)
    assert error(unshared(expected)(x), before) > 1e-2
    assert error(model(x), unshared(expected)(x)) <= 1e-5


@slow_but_for('bottleneck')
@pytest.mark.parametrize('which', ['shared', pytest.param('folded', marks=slow)])
@pytest.mark.parametrize('addition', ADDITIONS)
def test_exported_program_has_the_addition(model, x, addition):
    add(addition, model, 'layer1.conv')
    assert error(exported(model, x)(x), model(x)) <= 1e-5


@slow_but_for('bottleneck')
@pytest.mark.parametrize('addition', ['LoRA', 'bias', 'circular padding'])  # torch.fx sees no others in any net
def test_unshared_net_with_an_addition_is_right_for_the_tool(model, x, addition):
    """The way out that the refusals name."""
    add(addition, model, 'layer1.conv')
    for tool in 'fx fuse', 'jit script':
        assert error(REWRITERS[tool](unshare(model), x)(x), model(x)) <= 1e-5


# ---- Quantization of exported programs (PT2E, torchao)


@pytest.fixture
def pt2e():
    return torchao_pt2e('quantize_pt2e')


def xnnpack() -> Any:
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))


def x86() -> Any:
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as q

    return q.X86InductorQuantizer().set_global(q.get_default_x86_inductor_quantization_config())


def quantized_pt2e(quantizer: Callable, model: nn.Module, x: torch.Tensor) -> Tuple[Callable, Callable]:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(exported(model, x), quantizer())
    prepared(x)
    return prepared, convert_pt2e(copy.deepcopy(prepared))


PT2E = {name: functools.partial(quantized_pt2e, quantizer) for name, quantizer in [('xnnpack', xnnpack), ('x86', x86)]}
refused = pytest.mark.skipif(torch.__version__ < '2.7', reason='X86Inductor refuses kernels used twice on torch 2.6')
quantizers = pytest.mark.parametrize('quantizer', ['xnnpack', pytest.param('x86', marks=refused)])


@pytest.fixture
def no_qat_patterns(pt2e, monkeypatch):
    """Leave out of `convert_pt2e` what takes 30 s wherever a batch norm is left, and only concerns training."""
    monkeypatch.setattr(pt2e, '_fold_conv_bn_qat', lambda model: model)


@each_net
@quantizers
def test_net_prepared_by_pt2e_computes_the_same(kind, which, quantizer, pt2e, no_qat_patterns):
    assert quantization_errors(PT2E[quantizer], kind, which)[0] <= 1e-5


@kinds
@pytest.mark.parametrize('which', ['shared', 'folded', 'unshared'])
@quantizers
def test_net_quantized_by_pt2e_is_as_accurate_as_the_twin(kind, which, quantizer, pt2e, no_qat_patterns):
    assert_as_accurate_as_the_twin(PT2E[quantizer], kind, which)


@slow_but_for()
@pytest.mark.parametrize('which', ['shared', 'twin'])
def test_whole_conversion_by_pt2e_gives_the_same(model, x, pt2e):
    expected = PT2E['xnnpack'](model, x)[1](x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pt2e, '_fold_conv_bn_qat', lambda model: model)
        assert torch.equal(PT2E['xnnpack'](model, x)[1](x), expected)

"""Folding: the same function without batch norms, each shared kernel once."""

import copy
import pickle
from collections import Counter
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

import pytest
import timm
import torch
import torch.nn as nn
from additions import ADDITIONS, add
from models import SHALLOW, SMALL, VARIANTS, assert_equal_outputs, create, error, images, kinds, small, unshared, uses
from plain_nets import batch_norms
from safetensors.torch import load_file, save_file
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from timm.models import FeatureDictNet, FeatureHookNet, FeatureListNet
from timm.utils import reparameterize_model
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops.misc import FrozenBatchNorm2d

from timm_sharesnet import SharedStage, SharingBlock, fold
from timm_sharesnet.conv_bn import MAX_SHIFT

slow = pytest.mark.slow


def twin(kind: str) -> nn.Module:
    return unshared(small(kind))


nets = pytest.mark.parametrize('net', [small, twin], ids=['shared', 'twin'])
nets_twins_slow = pytest.mark.parametrize('net', [small, pytest.param(twin, marks=slow)], ids=['shared', 'twin'])

NORMS = nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def net():
    return small


@pytest.fixture
def model(kind, net):
    return net(kind)


@pytest.fixture
def double(model):
    """The net in double precision."""
    return model.double()


@pytest.fixture
def folded(model):
    return fold(model)


@pytest.fixture
def x(model):
    return images(model)


def assert_folds(model: nn.Module, x: Optional[torch.Tensor] = None) -> nn.Module:
    """Fold a net of double precision: what it computes stays."""
    folded = fold(model)
    assert_equal_outputs(folded, model, images(model) if x is None else x)
    return folded


def norms(model: nn.Module) -> List[str]:
    return [name for name, m in model.named_modules() if isinstance(m, NORMS)]


def norm_name(block: SharingBlock) -> str:
    """Name of the layer that follows the 3x3."""
    return block.branch[block.branch.index('conv2') + 1]


def norms_after(blocks: Iterable[SharingBlock]) -> List[nn.BatchNorm2d]:
    """Batch norms that follow the 3x3 of a block: in a wide block there is none."""
    layers = (getattr(block, norm_name(block)) for block in blocks)
    return [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]


def form(block: SharingBlock) -> str:
    """What the batch norm after a use of the shared convolution became."""
    norm = getattr(block, norm_name(block))
    if block.conv2_bias is not None:
        assert isinstance(norm, nn.Identity)
        return 'bias'
    if isinstance(norm, nn.Conv2d):
        assert norm.kernel_size == (1, 1) and norm.groups == norm.in_channels == norm.out_channels
        return 'depthwise'
    return 'norm' if isinstance(norm, NORMS) else 'nothing'


# ---- The same function


@kinds
@nets
def test_folded_net_computes_the_same(kind, net):
    assert_folds(net(kind).double())


@kinds
@nets
def test_folded_net_gives_the_same_features(double, net):
    folded, x = fold(double), images(double)
    assert error(folded.forward_features(x), double.forward_features(x)) <= 1e-12
    found, expected = (net.forward_intermediates(x, intermediates_only=True) for net in (folded, double))
    assert len(found) == len(expected) > 3
    assert max(map(error, found, expected)) <= 1e-12


Channels = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
MIXTURE = torch.tensor([1, -1, 0, -0.0, 1e-30, -1e-8, 1e-4, 1e-310, -10], dtype=torch.double)
# What is made of a batch norm's weights w, given a random number per channel, r
HARD: Dict[str, Channels] = {
    'negative': lambda w, r: -w,
    'some negative': lambda w, r: torch.where(r < 0.2, -w, w),
    'zero': lambda w, r: 0 * w,
    'some zero': lambda w, r: torch.where(r < 0.5, 0, w),
    'near zero': lambda w, r: torch.where(r < 0.5, 1e-8 * w, w),
    'all near zero': lambda w, r: 1e-8 * w,
    'tiny': lambda w, r: torch.where(r < 0.5, 1e-30 * w, w),
    'denormal': lambda w, r: torch.where(r < 0.5, torch.finfo(w.dtype).smallest_normal / 1000, w),
    'mixture': lambda w, r: w * MIXTURE.to(w.dtype)[(r * len(MIXTURE)).long()],
}


def harden(model: nn.Module, channels: Channels) -> nn.Module:
    """Change the weights of the batch norms around each 3x3 that is or could be shared."""
    torch.manual_seed(2)
    for norm in batch_norms(model):
        norm.weight.copy_(channels(norm.weight, torch.rand(len(norm.weight))))
    return model


@kinds
@nets_twins_slow
@pytest.mark.parametrize('scales', HARD)
def test_scales_of_any_sign_and_size_fold_exactly(kind, net, scales):
    assert_folds(harden(net(kind).double(), HARD[scales]))


@kinds
@nets_twins_slow
@pytest.mark.parametrize('size', [50, 1e6])
def test_biases_far_from_zero_fold_exactly(double, size):
    for norm in batch_norms(double):
        norm.bias.mul_(size)
    assert_folds(double)


@kinds
@pytest.mark.parametrize('scales', ['some negative', 'all near zero', 'mixture'])
def test_folded_net_loses_nothing_in_single_precision(kind, scales):
    model = harden(small(kind), HARD[scales])
    x = images(model)
    assert error(fold(model)(x), model(x)) <= 1e-5


SHRINK = 0.3 / MAX_SHIFT  # scales that just move: shifts of up to the bound, kernels as small as they can become


@kinds
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scales', ['moved', 'near zero', 'some negative'])
def test_folded_net_is_as_accurate_as_the_net_in_half_precision(model, kind, dtype, scales):
    if scales == 'moved':
        for norm in norms_after(uses(model)):
            norm.weight.mul_(SHRINK)
            norm.bias.uniform_(-0.1, 0.1)
    else:
        harden(model, HARD[scales])
    folded = fold(model)
    if scales == 'moved':
        assert {form(block) for block in uses(folded)} == FORMS[kind]
    x = images(model, 1)[..., :16, :16]
    expected = model(x)
    found, unfolded = (copy.deepcopy(net).to(dtype)(x.to(dtype)).float() for net in (folded, model))
    assert error(found, expected) <= max(2 * error(unfolded, expected), 4 * torch.finfo(dtype).eps)


# ---- What becomes of each batch norm

FORMS = {'basic': {'depthwise'}, 'bottleneck': {'bias'}, 'preact': {'bias'}, 'wide': {'nothing'}}
# Batch norms that no convolution of the block's own precedes, by the last part of their name
KEPT = {'basic': [], 'bottleneck': [], 'preact': ['bn1', 'norm'], 'wide': ['bn1', 'norm']}


@kinds
@nets
def test_only_batch_norms_without_a_convolution_before_them_are_left(model, kind):
    expected = [name for name in norms(model) if name.rpartition('.')[2] in KEPT[kind]]
    assert norms(fold(model)) == expected


@kinds
def test_use_of_a_shared_convolution_takes_the_form_of_its_kind_of_block(folded, kind):
    assert {form(block) for block in uses(folded)} == FORMS[kind]


def set_shift(norm: nn.BatchNorm2d, shift: float) -> None:
    """Give one channel a shift, relative to its scale, of so much."""
    norm.running_mean[1] = 0
    norm.bias[1] = shift * norm.weight[1] / (norm.running_var[1] + norm.eps).sqrt()


@pytest.mark.parametrize('kind', ['bottleneck', 'preact'])
@pytest.mark.parametrize(
    'change,expected',
    [
        (lambda norm: norm.weight[1].neg_(), 'depthwise'),
        (lambda norm: norm.weight[1].zero_(), 'bias'),
        (lambda norm: norm.weight.zero_(), 'bias'),
        (lambda norm: set_shift(norm, 0.999 * MAX_SHIFT), 'bias'),
        (lambda norm: set_shift(norm, -0.999 * MAX_SHIFT), 'bias'),
        (lambda norm: set_shift(norm, 1.001 * MAX_SHIFT), 'depthwise'),
        (lambda norm: set_shift(norm, -1.001 * MAX_SHIFT), 'depthwise'),
    ],
    ids=['negative', 'zero', 'all zero', 'shift', 'negative shift', 'large shift', 'large negative shift'],
)
def test_scale_moves_unless_a_channel_is_negative_or_shifts_too_far(double, change, expected):
    block = double.layer1.blocks[1]
    change(getattr(block, norm_name(block)))
    folded = assert_folds(double)
    assert [form(block) for block in uses(folded.layer1)[-2:]] == [expected, 'bias']  # the change is its own


@pytest.mark.parametrize('act_layer', ['silu', 'leaky_relu', 'relu6'])
def test_scale_does_not_move_past_another_activation_than_relu(act_layer):
    folded = assert_folds(small('bottleneck', act_layer=act_layer).double())
    assert {form(block) for block in uses(folded)} == {'depthwise'}


def test_constants_of_channels_with_scale_zero_reach_the_output():
    """Guards the tests of zero scales: dropping relu(c) of such a channel would be noticed."""
    model = harden(small('bottleneck').double(), HARD['some zero'])
    changed = copy.deepcopy(model)
    for block in uses(changed):
        block.bn2.bias[block.bn2.weight == 0] = 0
    assert error(changed(images(model)), model(images(model))) > 1e-3


# ---- What it stores


@kinds
def test_each_shared_kernel_is_stored_once_as_it_was(model, folded):
    stages = [name for name, m in model.named_modules() if isinstance(m, SharedStage) and m.conv is not None]
    assert len(stages) > 1 and len(uses(folded)) > len(stages)
    for name in stages:
        assert torch.equal(folded.get_submodule(name).conv.weight, model.get_submodule(name).conv.weight)
        assert folded.get_submodule(name).conv.bias is None
    found, expected = (
        Counter(m.weight.shape for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3))
        for net in (folded, model)
    )
    assert found == expected
    storages = [v.untyped_storage().data_ptr() for v in folded.state_dict().values()]
    assert len(set(storages)) == len(storages)


@kinds
@nets
def test_each_folded_batch_norm_saves_a_parameter_per_channel(model, kind, net):
    stay = KEPT[kind] + (['bn2'] if kind == 'basic' and net is small else [])  # bn2: depthwise, weight and bias
    channels = {name: len(m.weight) for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    saved = sum(n for name, n in channels.items() if name.rpartition('.')[2] not in stay)
    if kind == 'preact' and net is small:  # a bias for the constants of channels with scale zero
        saved -= sum(block.conv3.out_channels for block in uses(model))
    before, after = (sum(p.numel() for p in n.parameters()) for n in (model, fold(model)))
    assert before - after == saved


@kinds
@nets
def test_model_is_not_changed(model):
    before, names = copy.deepcopy(model.state_dict()), norms(model)
    fold(model)
    assert norms(model) == names
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@kinds
@nets_twins_slow
def test_folded_net_shares_no_memory_with_the_model(model, folded, x):
    before = folded(x)
    for t in model.state_dict().values():
        t.zero_()
    assert torch.equal(folded(x), before)


@kinds
@nets_twins_slow
def test_folding_twice_changes_nothing(folded):
    torch.testing.assert_close(fold(folded).state_dict(), folded.state_dict(), rtol=0, atol=0)


@kinds
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_mode_and_memory_format_are_the_model_s(kind, dtype):
    model = small(kind).to(dtype=dtype, memory_format=torch.channels_last)
    folded = fold(model)
    assert {t.dtype for t in folded.state_dict().values() if t.is_floating_point()} == {dtype}
    assert not any(m.training for m in folded.modules())
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in folded.parameters() if p.ndim == 4)
    x = images(model)
    folded = folded.double()
    assert error(folded(x.double()), folded(x.double().to(memory_format=torch.channels_last))) <= 1e-12


# ---- Saving and loading


def other_form(kind: str) -> nn.Module:
    """A net some of whose uses are folded to another form than those of `small(kind)`."""
    model = small(kind)
    for norm in norms_after(model.layer1.blocks):
        norm.weight.neg_()
    return model


forms = pytest.mark.parametrize('saved,fresh', [(small, small), (small, other_form), (other_form, small)])


@kinds
@forms
def test_state_dict_loads_strictly_into_any_folded_net(kind, saved, fresh, tmp_path):
    folded = fold(saved(kind))
    save_file(folded.state_dict(), tmp_path / 'folded.safetensors')
    loaded = fold(fresh(kind))
    if kind in ('bottleneck', 'preact'):  # the others have one form
        assert (loaded.state_dict().keys() == folded.state_dict().keys()) is (saved is fresh)
    for t in loaded.state_dict().values():
        t.zero_()
    loaded.load_state_dict(load_file(tmp_path / 'folded.safetensors'), strict=True)
    x = images(folded)
    assert torch.equal(loaded(x), folded(x))
    assert loaded.state_dict().keys() == folded.state_dict().keys()


@kinds
def test_state_dict_loads_into_the_folded_net_that_timm_creates(folded):
    name, kwargs = folded.made_by
    loaded = fold(timm.create_model(name, **kwargs).eval())  # timm's last batch norms have scale zero
    loaded.load_state_dict(folded.state_dict(), strict=True)
    assert torch.equal(loaded(images(folded)), folded(images(folded)))


@kinds
@pytest.mark.parametrize('assign', [False, True])
def test_state_dict_keeps_the_type_of_the_net_that_loads_it(folded, kind, assign):
    loaded = fold(other_form(kind).double())
    loaded.load_state_dict(folded.state_dict(), assign=assign)
    dtype = torch.float if assign else torch.double
    assert {t.dtype for t in loaded.state_dict().values() if t.is_floating_point()} == {dtype}
    assert error(loaded(images(loaded)).double(), folded(images(folded)).double()) <= 1e-5


@kinds
@nets_twins_slow
def test_state_dicts_of_folded_and_unfolded_nets_are_not_confused(model, folded):
    for target, source in (folded, model), (model, folded):
        with pytest.raises(RuntimeError, match='Missing key'):
            copy.deepcopy(target).load_state_dict(source.state_dict())


CLONES = {'deepcopy': copy.deepcopy, 'pickle': lambda model: pickle.loads(pickle.dumps(model))}


@kinds
@nets_twins_slow
@pytest.mark.parametrize('clone', CLONES.values(), ids=CLONES)
def test_folded_net_can_be_copied_and_pickled(folded, x, clone):
    assert torch.equal(clone(folded)(x), folded(x))


@kinds
@pytest.mark.parametrize('clone', CLONES.values(), ids=CLONES)
def test_copy_of_a_folded_net_takes_the_form_that_it_loads(kind, clone):
    original, other = fold(small(kind)), fold(other_form(kind))
    x = images(original)
    before = original(x)
    loaded = clone(original)
    loaded.load_state_dict(other.state_dict())
    assert torch.equal(loaded(x), other(x))
    assert torch.equal(original(x), before)


# ---- What can vary

PLAIN: List[Tuple[str, Dict[str, Any]]] = [
    ('resnet18', {}),
    ('resnet50d', {}),
    ('resnetaa50', {}),
    ('resnetblur18', {}),
    ('resnetrs50', {}),
    ('resnext50_32x4d', dict(cardinality=4, base_width=16)),
    ('seresnet50', {}),
    ('ecaresnet50t', {}),
    ('wide_resnet50_2', {}),
]


def assert_every_norm_folds(model: nn.Module, x: torch.Tensor) -> None:
    assert norms(model) and not norms(assert_folds(model, x))


def noise(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, 64, 64, dtype=torch.double)


def variant(name: str, kwargs: Dict[str, Any]) -> Tuple[nn.Module, torch.Tensor]:
    model = create(name, **{**({} if name in ('sharesnet164_cifar', 'shawrn40_4') else SHALLOW), **kwargs}).double()
    torch.manual_seed(3)
    return model, torch.randn(2, kwargs.get('in_chans', 3), 64, 64, dtype=torch.double)


@pytest.mark.parametrize('name,kwargs', VARIANTS)
def test_what_the_nets_can_vary_folds(name, kwargs):
    folded = assert_folds(*variant(name, kwargs))
    assert all(form(block) in ('bias', 'depthwise') for block in uses(folded)) or name == 'shawrn40_4'


@pytest.mark.parametrize('name,kwargs', PLAIN)
def test_timm_s_plain_resnets_fold(name, kwargs):
    assert_every_norm_folds(*variant(name, {'layers': (1, 2, 1, 1), **kwargs}))


@pytest.mark.parametrize('name', ['sharesnet34', 'sharesnet50', 'resnet50'])
def test_norm_layer_of_another_kind_stays(name):
    model, x = variant(name, dict(norm_layer=lambda chs, **kwargs: nn.GroupNorm(4, chs, **kwargs)))
    folded = fold(model)
    assert [type(m) for m in folded.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(folded(x), model(x))


@kinds
@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'getter'])
def test_features_only_net_folds(kind, feature_cls):
    model = small(kind, features_only=True, feature_cls=feature_cls).double()
    folded = assert_folds(model, noise())
    assert len(norms(folded)) < len(norms(model))
    assert {name.rpartition('.')[2] for name in norms(folded)} <= {*KEPT[kind], 'norm'}


@pytest.mark.parametrize('stem_type', ['', 'deep'])
@pytest.mark.parametrize('flatten', [False, True])
@pytest.mark.parametrize('wrapper', [FeatureListNet, FeatureDictNet, FeatureHookNet])
def test_every_batch_norm_of_a_net_that_timm_takes_apart_folds(wrapper, flatten, stem_type):
    model = wrapper(create('sharesnet50', stem_type=stem_type, **SHALLOW), flatten_sequential=flatten)
    assert_every_norm_folds(model.double().eval(), noise())


class Both(nn.ModuleList):
    """A net that gives a tensor, and one that gives a list."""

    def forward(self, x: torch.Tensor) -> List[torch.Tensor]:
        return [self[0](x), *self[1](x)]


def test_net_that_is_there_whole_and_taken_apart_folds_once():
    whole = create('resnet26d')
    assert_every_norm_folds(Both([whole, FeatureListNet(whole)]).double().eval(), noise(1))


class NormFirst(nn.Module):
    """A net with layers called as a ResNet's stem, in another order."""

    feature_info = [dict(num_chs=4, reduction=1, module='conv1'), dict(num_chs=8, reduction=1, module='conv2')]

    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(3)
        self.conv1, self.bn2 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 8, 3)


OTHERS: Dict[str, Callable[[], nn.Module]] = {
    'no conv1': lambda: timm.create_model('ghostnet_050', features_only=True),
    'bn1 before conv1': lambda: FeatureListNet(NormFirst(), out_indices=(1,)),
    'a feature between conv1 and bn2': lambda: FeatureListNet(NormFirst(), out_indices=(0, 1)),
    'a hook between conv1 and bn2': lambda: FeatureHookNet(NormFirst(), out_indices=(0, 1), no_rewrite=False),
}


@pytest.mark.parametrize('other', OTHERS)
def test_net_of_another_kind_in_the_same_model_computes_the_same(other):
    model = Both([small('bottleneck'), OTHERS[other]()]).double().eval()
    for norm in batch_norms(model[1]):
        for t in norm.weight, norm.bias, norm.running_mean, norm.running_var:
            t.uniform_(0.5, 1.5)
    assert not norms(assert_folds(model, noise())[0])


@kinds
def test_net_taken_apart_into_a_graph_is_refused(kind):
    """Its blocks are not there any more."""
    model = small(kind, features_only=True, feature_cls='fx')
    with pytest.raises(TypeError, match='FeatureGraphNet has no stage of timm_sharesnet'):
        fold(model)


@kinds
def test_stage_folds_by_itself(kind):
    stage = small(kind).double().layer1
    folded = assert_folds(stage, torch.randn(2, stage.blocks[0].conv1.in_channels, 8, 8, dtype=torch.double))
    assert len(norms(folded)) < len(norms(stage))


@kinds
@nets
def test_net_within_a_model_folds(double):
    detector = nn.Sequential(double, nn.BatchNorm1d(10), nn.Linear(10, 2)).double().eval()
    assert norms(assert_folds(detector, images(double))[0]) == norms(fold(double))


@kinds
@nets_twins_slow
@pytest.mark.parametrize('convert', [convert_sync_batchnorm, freeze_batch_norm_2d], ids=['sync', 'frozen'])
def test_synchronized_and_frozen_batch_norms_fold(kind, net, convert):
    model = convert(net(kind).double()).eval()
    assert not any(type(m) is nn.BatchNorm2d for m in model.modules())
    assert {name.rpartition('.')[2] for name in norms(assert_folds(model))} == set(KEPT[kind])


@kinds
@nets_twins_slow
def test_batch_norms_without_weights_fold(double):
    for norm in batch_norms(double):
        norm.weight = norm.bias = None
    assert_folds(double)


@kinds
def test_batch_norms_without_statistics_stay(double):
    for norm in batch_norms(double):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    folded = fold(double)
    assert norms(folded) == norms(double)
    assert torch.equal(folded(images(double)), double(images(double)))


@kinds
@nets
def test_timm_s_reparameterize_model_gives_the_same_function(double, net):
    found = reparameterize_model(double)
    if net is small:
        assert set(norms(found)) == {*norms(fold(double)), *(['bn1'] if 'bn1' in norms(double) else [])}
    assert_equal_outputs(found, double, images(double))


@kinds
def test_timm_s_scripts_may_reparameterize_before_they_call_eval(double):
    found = reparameterize_model(copy.deepcopy(double).train()).eval()
    assert_equal_outputs(found, double, images(double))


# ---- What was added to the net


@kinds
@pytest.mark.parametrize('addition', ADDITIONS)
def test_addition_to_a_shared_convolution_is_refused_with_the_cure(model, kind, addition):
    add(addition, model, 'layer2.conv' if kind == 'preact' else 'layer1.conv')
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match='merge or remove'):
        fold(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


LAYERS = [('bottleneck', name) for name in ('conv1', 'bn2', 'act2', 'conv3', 'bn3', '')]
LAYERS += [('preact', name) for name in ('bn3', 'act3', 'conv3')] + [('basic', name) for name in ('conv1', 'bn2')]
# Which layers can have an addition, where not all can
OF = {
    'pruning': ('conv', 'bn'),
    'parametrization': ('conv', 'bn'),
    'LoRA': 'conv',
    'bias': 'conv',
    'circular padding': (),
    'forward pre-hook': (),  # as the forward hook
}


@pytest.mark.parametrize(
    'kind,name,addition',
    [(kind, name, a) for kind, name in LAYERS for a in ADDITIONS if name.startswith(OF.get(a, ''))],
)
def test_addition_to_a_block_s_own_layer_keeps_its_effect(double, name, addition):
    x = images(double)
    before = double(x)
    add(addition, double, f'layer1.blocks.1.{name}'.rstrip('.'))
    assert error(double(x), before) > 1e-3
    assert_folds(double, x)


@kinds
@pytest.mark.parametrize('addition', ADDITIONS)
def test_addition_to_the_shared_convolution_of_a_folded_net_reaches_every_use(double, addition):
    folded, x = fold(double), images(double)
    before = double(x)
    for net in double, folded:
        add(addition, net, 'layer1.conv')
    assert error(double(x), before) > 1e-3
    assert_equal_outputs(folded, double, x)


@kinds
def test_hook_on_the_shared_convolution_of_a_folded_net_sees_every_use(folded):
    calls: List[int] = []
    folded.layer1.conv.register_forward_hook(lambda *_: calls.append(1))
    folded(images(folded))
    assert len(calls) == len(uses(folded.layer1)) > 1


@pytest.mark.parametrize('kind', ['bottleneck', 'preact', 'wide'])
def test_flop_counter_counts_every_use_of_a_folded_net(kind):
    flops = []
    for net in fold(small(kind)), fold(twin(kind)):
        with FlopCounterMode(display=False) as counter:
            net(images(net))
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


# ---- What runs it


RUNNERS: Dict[str, Callable[[nn.Module, torch.Tensor], Callable]] = {
    'script': lambda model, x: torch.jit.script(model),
    'trace': torch.jit.trace,
    'export': lambda model, x: torch.export.export(model, (x,)).module(),
    'compile': lambda model, x: torch.compile(model, backend='aot_eager', fullgraph=True),
    'fx': lambda model, x: torch.fx.symbolic_trace(model),
}


@pytest.mark.parametrize(
    'kind,runner',
    [
        pytest.param(kind, runner, marks=slow if runner in ('export', 'compile') and kind != 'bottleneck' else ())
        for kind in SMALL
        for runner in RUNNERS
    ],
)
def test_folded_net_runs_scripted_traced_exported_and_compiled(kind, runner):
    torch._dynamo.reset()
    folded = fold(other_form(kind).double())
    x = images(folded)
    assert error(RUNNERS[runner](folded, x)(x), folded(x)) <= 1e-12


@pytest.mark.parametrize('kind', ['bottleneck', 'preact'])
def test_folded_net_that_runs_so_has_both_forms(kind):
    """Guards the test above."""
    assert {form(block) for block in uses(fold(other_form(kind)))} == {'bias', 'depthwise'}


@kinds
def test_exported_folded_net_has_no_operation_that_folding_should_have_saved(folded):
    program = torch.export.export(folded, (images(folded),))
    count = Counter(str(node.target) for node in program.graph.nodes if node.op == 'call_function')
    assert count['aten.batch_norm.default'] == len(norms(folded))
    assert not [name for name in count if 'alias' in name or 'positive' in name or 'mul' in name]


# ---- Errors


@kinds
@nets
def test_training_mode_is_refused(kind, net):
    with pytest.raises(ValueError, match=r'training mode.*call model\.eval\(\) first'):
        fold(net(kind).train())


@kinds
@nets
def test_single_layer_in_training_mode_is_refused_by_name(model):
    name = norms(model)[3]
    model.get_submodule(name).train()
    with pytest.raises(ValueError, match=f'{name} is in training mode'):
        fold(model)


@pytest.mark.parametrize(
    'make',
    [
        lambda: nn.Linear(2, 2),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
        lambda: timm.create_model('resnetv2_50', layers=(1, 1, 1, 1)),
        lambda: timm.create_model('res2net50_26w_4s', layers=(1, 1, 1, 1)),
        lambda: small('bottleneck').layer1.blocks[0],
    ],
    ids=['layer', 'sequential', 'other family', 'other block', 'block without its stage'],
)
def test_model_without_a_net_to_fold_is_refused(make):
    with pytest.raises(TypeError, match='no stage of timm_sharesnet and no block of timm.models.ResNet'):
        fold(make().eval())


@kinds
def test_model_without_values_is_refused(kind):
    with pytest.raises(ValueError, match='meta device'):
        fold(small(kind).to('meta'))

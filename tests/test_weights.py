"""Loading weights: from the package, from a folder or file, and from the stand-in for the Hub (hub_server.py).

Hub tests run the real huggingface_hub client in a process of its own, because it reads its environment at import, on a
copy of the package whose weights.json pins a commit of the stand-in as a release will pin one of the Hub.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import forks
import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from demo import classify, load_images
from hub_server import Blob, Commit, Failure, HubServer, Repo
from packaging.version import Version

import timm_sharesnet
from timm_sharesnet import weights

PACKAGE = Path(timm_sharesnet.__file__).parent
ROOT = Path(__file__).parents[1]
HUB = ROOT / 'hub'
NAME = 'sharesnet164_cifar.cpu_c10'  # in the package
FOLDER = HUB / NAME
WEIGHTS = (FOLDER / 'model.safetensors').read_bytes()

PUBLISHED = 'sharesnet164_cifar.modern_c10'  # only on the stand-in, with the files of FOLDER
REPO = f'our-org/{PUBLISHED}'

OURS = ('sharesnet*', 'shawrn*', 'resnet164_cifar', 'resnet92_cifar', 'wrn*')
ADAPTED = [{}, dict(num_classes=5), dict(in_chans=1), dict(features_only=True)]


def ids(kwargs):
    return ', '.join(f'{k}={v}' for k, v in kwargs.items()) or 'as it is'


# Files that must not be loaded


class Payload:
    """Pickles to a call that leaves a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def pickled(data, mark):
    return pickle.dumps(Payload(mark), protocol=2)  # torch's


def flipped(data, mark):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def truncated(data, mark):
    return data[:-1000]


def lying(data, mark):
    """The header puts two tensors in the same place."""
    size = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8 : 8 + size])
    header['layer1.conv.weight']['data_offsets'] = header['layer2.conv.weight']['data_offsets']
    header = json.dumps(header).encode()
    return len(header).to_bytes(8, 'little') + header + data[8 + size :]


def edited(edit):
    def damage(data, mark):
        tensors = safetensors.torch.load(data)
        edit(tensors)
        return safetensors.torch.save(tensors)

    return damage


def other_net(data, mark):
    other = timm.create_model('shawrn40_4', layers=(1, 1, 1), widen_factor=1)
    return safetensors.torch.save(other.state_dict())


UNREADABLE = {'a pickle': pickled, 'a truncated file': truncated, 'a header that lies': lying}
MISFITS = {
    'a wrong shape': edited(lambda t: t.update({'layer2.conv.weight': torch.zeros(3, 3)})),
    'a missing tensor': edited(lambda t: t.pop('layer2.conv.weight')),
    'an extra tensor': edited(lambda t: t.update(extra=torch.zeros(3))),
    "another net's weights": other_net,
}
DAMAGED = {**UNREADABLE, **MISFITS, 'a flipped byte': flipped}


def parametrize_damage(kinds):
    return pytest.mark.parametrize('damage', kinds.values(), ids=kinds)


@pytest.fixture
def mark(tmp_path):
    """A file that is there at the end if the payload was executed."""
    mark = tmp_path / 'executed'
    pickle.loads(pickled(b'', mark))
    assert mark.exists()  # else the tests could not fail
    mark.unlink()
    yield mark
    assert not mark.exists()


@pytest.fixture
def no_network(monkeypatch):
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError('no network')

    for name in ('connect', 'connect_ex'):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    yield
    assert not attempts


# What is there


def test_only_weights_that_exist_are_listed():
    manifest = json.loads((PACKAGE / 'weights.json').read_text())
    packaged = [name for name, entry in manifest.items() if entry['packaged']]
    assert all((PACKAGE / 'weights' / f'{name}.safetensors').is_file() for name in packaged)
    there = [name for name, entry in manifest.items() if entry['packaged'] or entry['revision']]
    assert sorted(timm.list_pretrained(OURS)) == sorted(there)


def test_every_tag_is_known_to_timm():
    names = timm.list_models(OURS, include_tags=True)
    assert {name.split('.')[0] for name in names} == set(timm.list_models(OURS))
    for name in names:
        cfg = timm.create_model(name, device='meta').pretrained_cfg
        assert f'{cfg["architecture"]}.{cfg["tag"]}' == name


@pytest.mark.parametrize('arch, tag', [('sharesnet50', 'torch7_in1k'), ('sharesnet164_cifar', 'cpu_c10')])
def test_default_tag(arch, tag):
    assert timm.get_pretrained_cfg(arch).tag == tag


UNPUBLISHED = sorted(set(timm.list_models(OURS, include_tags=True)) - set(timm.list_pretrained(OURS)))


@pytest.mark.parametrize('name', UNPUBLISHED)
def test_unpublished_weights_are_refused_with_what_their_user_can_do_and_without_network(name, no_network):
    arch = name.partition('.')[0]
    with pytest.raises(RuntimeError, match=f'^No weights are published for {name} yet') as e:
        timm.create_model(name, pretrained=True)
    message = str(e.value)
    for part in 'train_configs/', "dict(file='model.safetensors')", 'pretrained=False':
        assert part in message
    imported = re.fullmatch(r'sharesnet\d+', arch) is not None  # the nets of which the author published weights
    for part in 'https://github.com/aboulch/sharesnet', f"load_torch7(FILE, '{arch}')":
        assert (part in message) == imported
    assert ('sharesnet164_cifar.cpu_c10' in message) == (arch == 'sharesnet164_cifar')
    assert 'local-dir:' not in message  # there is no such folder


def test_folder_of_a_clone_that_has_the_weights_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, '__file__', str(tmp_path / 'timm_sharesnet' / 'weights.py'))
    folder = tmp_path / 'hub' / 'shawrn40_4.modern_c10'
    folder.mkdir(parents=True)
    (folder / 'model.safetensors').touch()
    with pytest.raises(RuntimeError, match=re.escape(f"timm.create_model('local-dir:{folder}', pretrained=True)")):
        timm.create_model('shawrn40_4', pretrained=True)


# The weights that travel in the package


def test_packaged_weights_load_without_network_and_equal_the_published_folder(no_network):
    assert_equal(load().state_dict(), safetensors.torch.load(WEIGHTS))


@pytest.mark.parametrize(('count', 'others'), [(200, 1), pytest.param(1000, 3, marks=pytest.mark.slow)])
def test_packaged_weights_classify_real_images_as_measured(count, others):
    images, labels = (values[:count] for values in load_images()[:2])
    predictions, _ = classify(load().eval().to(memory_format=torch.channels_last), images)
    wrong = [i for i, (found, label) in enumerate(zip(predictions, labels, strict=True)) if found != label]
    expected = json.loads((HUB / 'manifest.json').read_text())[NAME]['sample']['wrong']
    assert len(set(wrong) ^ {i for i in expected if i < count}) <= others  # other CPUs round differently


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A copy of the packaged file, which the package takes for its own."""
    path = tmp_path / f'{NAME}.safetensors'
    shutil.copyfile(PACKAGE / 'weights' / path.name, path)
    monkeypatch.setattr(weights, '_WEIGHTS_DIR', tmp_path)
    return path


def load(overlay=None, name='sharesnet164_cifar', **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def load_packaged(path):
    return load(dict(file=str(path)))


def test_bytes_that_were_hashed_are_those_that_are_loaded(packaged, monkeypatch):
    sha256 = hashlib.sha256

    def swap(data):
        packaged.write_bytes(safetensors.torch.save({'other': torch.zeros(3)}))
        return sha256(data)

    monkeypatch.setattr(weights.hashlib, 'sha256', swap)
    assert_equal(load_packaged(packaged).state_dict(), safetensors.torch.load(WEIGHTS))
    assert packaged.stat().st_size < 1000


def test_file_of_another_size_is_not_read(packaged, monkeypatch):
    os.truncate(packaged, 12 << 30)  # sparse
    monkeypatch.setattr(Path, 'open', None)
    monkeypatch.setattr(Path, 'read_bytes', None)
    with pytest.raises(RuntimeError, match=f'found 12884901888 bytes instead of {len(WEIGHTS)}'):
        load_packaged(packaged)


def test_model_does_not_keep_the_tensors_that_it_was_loaded_from():
    for kwargs in {}, dict(features_only=True):
        assert 'state_dict' not in load(**kwargs).pretrained_cfg


@pytest.mark.parametrize('name', ['sharesnet164_cifar', 'wrn28_10'])
def test_cfg_names_the_classes_unless_the_model_has_others(name):
    cfg = timm.create_model(name, device='meta').pretrained_cfg
    sample = json.loads((ROOT / 'tests' / 'data' / f'cifar{cfg["num_classes"]}_test_1000.json').read_text())
    assert list(cfg['label_names']) == sample['classes']
    assert 'label_names' not in timm.create_model(name, device='meta', num_classes=5).pretrained_cfg


# A user's own files and folders. Their bytes are not compared, their tensors are.

SMALL = dict(layers=(2, 2, 2))


@pytest.fixture(scope='module')
def small():
    """A small net: its tensors, and the files of its folder."""
    torch.manual_seed(0)
    model = timm.create_model('sharesnet164_cifar', **SMALL)
    config = json.loads((FOLDER / 'config.json').read_text())
    return SimpleNamespace(
        tensors=model.state_dict(),
        weights=safetensors.torch.save(model.state_dict()),
        config=json.dumps({**config, 'model_args': {k: list(v) for k, v in SMALL.items()}}),
    )


@pytest.fixture
def write(small, tmp_path):
    """Write a folder with the given weights."""

    def write(weights, name='model.safetensors'):
        (tmp_path / 'config.json').write_text(small.config)
        (tmp_path / name).write_bytes(weights)
        return tmp_path

    return write


def assert_equal(found, expected, but=()):
    """The same tensors, apart from those whose names begin with `but`."""
    found, expected = ({k: v for k, v in tensors.items() if not k.startswith(but)} for tensors in (found, expected))
    assert found.keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in found.items())


def load_folder(folder, **kwargs):
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs)


def load_file(folder, **kwargs):
    return load(dict(file=str(folder / 'model.safetensors')), **SMALL, **kwargs)


def load_tensors(tensors):
    return load(dict(state_dict=tensors), **SMALL)


each_source = pytest.mark.parametrize('load', [load_folder, load_file])


@each_source
@pytest.mark.parametrize('kwargs', ADAPTED, ids=ids)
def test_own_weights_load(load, kwargs, small, write):
    expected = dict(small.tensors)
    if 'in_chans' in kwargs:
        expected['conv1.weight'] = expected['conv1.weight'].sum(1, keepdim=True)  # timm's way
    but = ('fc.', 'norm.') if 'features_only' in kwargs else ('fc.',) if 'num_classes' in kwargs else ()
    assert_equal(load(write(small.weights), **kwargs).state_dict(), expected, but)


@pytest.mark.parametrize('in_chans', [1, 2, 4])
def test_own_weights_of_other_channels_load_as_they_are(in_chans, tmp_path):
    """timm 1.0.28 by itself would leave the first convolution of 2 and of 4 at random values."""
    args = {'in_chans': in_chans, **SMALL}
    model = timm.create_model('sharesnet164_cifar', **args)
    model.pretrained_cfg['input_size'] = (in_chans, 32, 32)
    timm.models.save_for_hf(model, str(tmp_path), model_args=args, safe_serialization=True)
    for kwargs in ({}, {'features_only': True}):
        loaded = load_folder(tmp_path, **kwargs)
        assert torch.equal(loaded.state_dict()['conv1.weight'], model.conv1.weight)
        if not kwargs:
            assert loaded.pretrained_cfg['first_conv'] == 'conv1'


@each_source
@parametrize_damage(MISFITS)
@pytest.mark.parametrize('kwargs', ADAPTED, ids=ids)
def test_own_weights_that_do_not_fit_are_refused(load, damage, kwargs, small, write, mark):
    with pytest.raises(RuntimeError, match=r'^The checkpoint is not one of sharesnet164_cifar, nothing was loaded: '):
        load(write(damage(small.weights, mark)), **kwargs)


@each_source
@parametrize_damage(UNREADABLE)
def test_own_weights_that_are_no_safetensors_are_refused(load, damage, small, write, mark):
    with pytest.raises(safetensors.SafetensorError):
        load(write(damage(small.weights, mark)))


def test_own_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f'no file {re.escape(str(tmp_path))}/model.safetensors'):
        load_file(tmp_path)


def test_own_pickle_is_not_executed(write, mark):
    with pytest.raises((RuntimeError, pickle.UnpicklingError), match='[Ww]eights.only'):
        load_folder(write(pickled(b'', mark), 'pytorch_model.bin'))


@pytest.mark.parametrize(
    'name', ['sharesnet164_cifar', 'sharesnet164_cifar.modern_c10'], ids=['packaged', 'unpublished']
)
@pytest.mark.parametrize('source', ['file', 'relative file', 'state_dict', 'pretrained_cfg', 'train.py'])
def test_own_source_wins_over_that_of_the_tag(name, source, small, write, monkeypatch):
    folder = write(small.weights)
    monkeypatch.chdir(folder)
    kwargs = {
        'file': dict(pretrained_cfg_overlay=dict(file=folder / 'model.safetensors')),
        'relative file': dict(pretrained_cfg_overlay=dict(file='model.safetensors')),
        'state_dict': dict(pretrained_cfg_overlay=dict(state_dict=dict(small.tensors))),
        'pretrained_cfg': dict(pretrained_cfg=dict(file='model.safetensors', num_classes=10)),
        # --pretrained-path: the classifier is new
        'train.py': dict(pretrained_cfg_overlay=dict(file='model.safetensors', num_classes=-1)),
    }[source]
    model = timm.create_model(name, pretrained=True, **SMALL, **kwargs)
    assert_equal(model.state_dict(), small.tensors, but=('fc.',) if source == 'train.py' else ())


@pytest.fixture(params=['file', 'state_dict', 'url', 'local-dir'])
def load_head(request, small, write, tmp_path):
    """Load a checkpoint with a classifier of 5 classes, whose cfg says 10."""
    torch.manual_seed(1)
    tensors = timm.create_model('sharesnet164_cifar', num_classes=5, **SMALL).state_dict()
    folder = write(safetensors.torch.save(tensors))
    torch.save(tensors, tmp_path / 'tuned.pth')
    source = {
        'file': dict(file=str(tmp_path / 'tuned.pth')),
        'state_dict': dict(state_dict=dict(tensors)),
        'url': dict(url=(tmp_path / 'tuned.pth').as_uri()),
    }.get(request.param)

    def load_head(overlay=None, **kwargs):
        if source is None:
            return load_folder(folder, pretrained_cfg_overlay=overlay, **kwargs)
        return load({**source, **(overlay or {})}, cache_dir=tmp_path / 'cache', **SMALL, **kwargs)

    return SimpleNamespace(load=load_head, tensors=tensors)


def test_classifier_that_fits_the_model_is_loaded_whatever_the_cfg_says(load_head):
    model = load_head.load(num_classes=5)
    assert_equal(model.state_dict(), load_head.tensors)
    assert model.pretrained_cfg['num_classes'] == 5 and 'label_names' not in model.pretrained_cfg


def test_classifier_that_does_not_fit_is_refused_with_the_cure_or_left_out_where_that_was_asked_for(load_head):
    with pytest.raises(RuntimeError, match=r'fc.bias has shape \(5,\) instead of \(10,\): pass num_classes=5, or'):
        load_head.load()
    new = dict(overlay=dict(num_classes=-1))
    for kwargs in new, dict(new, num_classes=5), dict(num_classes=7), dict(num_classes=0), dict(features_only=True):
        tensors = load_head.load(**kwargs).state_dict()
        assert torch.equal(tensors['conv1.weight'], load_head.tensors['conv1.weight'])
        assert not torch.equal(tensors.get('fc.weight', torch.empty(0)), load_head.tensors['fc.weight'])


@pytest.mark.parametrize('name', ['conv1.weight', 'layer2.conv.weight', 'fc.weight'])
@pytest.mark.parametrize(
    'change, reason',
    [
        (lambda t: t * torch.nan, 'has values that are not finite'),
        (lambda t: t / 0, 'has values that are not finite'),
        (lambda t: t.to(torch.int8), 'is torch.int8 instead of torch.float32'),
        (lambda t: t > 0, 'is torch.bool instead of torch.float32'),
        (lambda t: t.to(torch.complex64), 'is torch.complex64 instead of torch.float32'),
        (lambda t: t.to_sparse(), 'is a sparse tensor'),
        (lambda t: t.to('meta'), 'is a meta tensor'),
        (lambda t: t.tolist(), 'is no tensor but a list'),
    ],
    ids='NaN infinite int8 bool complex sparse meta list'.split(),
)
def test_tensors_that_cannot_be_weights_are_refused(name, change, reason, small):
    tensors = {**small.tensors, name: change(small.tensors[name])}
    with pytest.raises(RuntimeError, match=f'{name} {reason}'):
        load_tensors(tensors)


def test_statistics_that_cannot_be_are_refused(small):
    wrong = {'norm.running_var': -torch.ones(256), 'norm.num_batches_tracked': torch.tensor(True)}
    for name, tensor in wrong.items():
        with pytest.raises(RuntimeError, match=f'nothing was loaded: {name} '):
            load_tensors({**small.tensors, name: tensor})


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_weights_of_other_precision_load(dtype, small):
    tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in small.tensors.items()}
    assert_equal(load_tensors(tensors).state_dict(), {k: v.to(small.tensors[k].dtype) for k, v in tensors.items()})


@pytest.mark.parametrize('name', ['sharesnet164_cifar', 'sharesnet50'])
def test_empty_state_dict_is_refused(name):
    with pytest.raises(ValueError, match='state_dict is empty'):
        load(dict(state_dict={}), name)


# The Hub

CLIENT = """
import hashlib, json, sys, time
import timm, torch
import timm_sharesnet

print(json.dumps(dict(package=timm_sharesnet.__file__, listed=timm.list_pretrained('sharesnet164_cifar'))), flush=True)
for line in sys.stdin:
    name, kwargs = json.loads(line)
    start = time.perf_counter()
    torch.manual_seed(0)
    try:
        model = timm.create_model(name, pretrained=True, **kwargs).eval()
        with torch.inference_mode():
            outputs = model(torch.randn(2, kwargs.get('in_chans', 3), 32, 32))
        outputs = b''.join(x.numpy().tobytes() for x in (outputs if isinstance(outputs, list) else [outputs]))
        answer = dict(outputs=hashlib.sha256(outputs).hexdigest(), error=None)
    except Exception as e:
        answer = dict(outputs=None, error=type(e).__name__, message=str(e))
    print(json.dumps(dict(answer, seconds=time.perf_counter() - start)), flush=True)
"""


class Client:
    """A process that loads models from a Hub endpoint with a copy of the package."""

    def __init__(self, package, endpoint, offline=False):
        script = package.parent / 'client.py'  # its folder comes first in sys.path, before any installed package
        script.write_text(CLIENT)
        env = {k: v for k, v in os.environ.items() if not k.startswith('HF_')}
        env.update(HF_ENDPOINT=endpoint, HF_HOME=str(package.parent / 'home'), HF_HUB_DISABLE_XET='1')
        env.update(HF_HUB_OFFLINE=str(int(offline)), NO_PROXY='127.0.0.1,localhost', OMP_NUM_THREADS='1')
        (questions, self._questions), (self._answers, answers) = os.pipe(), os.pipe()
        self._program = forks.Program([script], [questions, answers, sys.__stderr__], env)
        os.close(questions), os.close(answers)
        self._answers = open(self._answers)
        self.hello = self._read()
        assert Path(self.hello.package).parent == package

    def load(self, name, **kwargs):
        """What `timm.create_model` gives: digest of the outputs on a fixed input, or the error; and the seconds."""
        os.write(self._questions, (json.dumps([name, kwargs], default=str) + '\n').encode())
        return self._read()

    def refused(self, name, *said, error='RuntimeError', **kwargs):
        """Load what must not load: the message, which has these parts."""
        loaded = self.load(name, **kwargs)
        assert loaded.error == error and all(part in loaded.message for part in said), loaded
        assert loaded.seconds < SECONDS
        return loaded.message

    def _read(self):
        return SimpleNamespace(**json.loads(self._answers.readline()))

    def close(self):
        os.close(self._questions), self._answers.close()
        self._program.wait()


@pytest.fixture(scope='module')
def server():
    with HubServer() as server:
        server.create(REPO, {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.is_file()})
        yield server


@pytest.fixture
def hub(server):
    """The stand-in as it was, whatever the last test did to it."""
    head = server.repos[REPO].head
    before = dict(server.repos), dict(head.files), dict(server.lfs)
    server.requests.clear()
    yield server
    server.heal()
    server.renamed.clear()
    server.repos, head.files, server.lfs = before


@pytest.fixture(scope='module')
def pin(server):
    return server.repos[REPO].head.oid


@pytest.fixture(scope='module')
def package(pin, tmp_path_factory):
    """A copy of the package that pins the stand-in's commit."""
    package = tmp_path_factory.mktemp('copy') / 'timm_sharesnet'
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns('__pycache__'))
    manifest = json.loads((package / 'weights.json').read_text())
    entry = dict(repo=REPO, revision=pin, sha256=hashlib.sha256(WEIGHTS).hexdigest(), size=len(WEIGHTS), packaged=False)
    (package / 'weights.json').write_text(json.dumps({**manifest, PUBLISHED: entry}))
    return package


def client_fixture(**options):
    @pytest.fixture(scope='module')
    def client(package, server):
        client = Client(package, **{'endpoint': server.endpoint, **options})
        yield client
        client.close()

    return client


client = client_fixture()
offline_client = client_fixture(offline=True)
cut_off_client = client_fixture(endpoint='http://127.0.0.1:9')  # nobody listens there


@pytest.fixture
def cache(tmp_path):
    return tmp_path / 'cache'


@pytest.fixture(scope='module')
def expected(client):
    """Outputs of the published folder."""
    return {ids(kwargs): client.load(f'local-dir:{FOLDER}', **kwargs).outputs for kwargs in ADAPTED}


@pytest.fixture(params=[PUBLISHED, f'hf-hub:{REPO}', f'hf-hub:{REPO}@PIN'])
def name(request, pin):
    return request.param.replace('PIN', pin)


@pytest.fixture(params=[PUBLISHED, f'hf-hub:{REPO}@PIN'])
def pinned(request, pin):
    """A name that stands for the published bytes alone."""
    return request.param.replace('PIN', pin)


SECONDS = 10  # the retries of huggingface_hub take 23
CLIENT_VERSION = Version(huggingface_hub.__version__)
without_retries = pytest.mark.skipif(
    Version('0.35') < CLIENT_VERSION < Version('1'), reason='huggingface-hub 0.35 and 0.36 always try six times'
)


def downloads(hub):
    return [request for request in hub.requests if request.startswith('GET /lfs/')]


def replace(hub, weights):
    """Let the repository hold other weights at the same commit."""
    blob = Blob(weights, lfs=True)
    hub.repos[REPO].head.files['model.safetensors'] = blob
    hub.lfs = {**hub.lfs, blob.oid: weights}
    return blob


def test_published_weights_are_listed(client):
    assert client.hello.listed == [NAME, PUBLISHED]


@pytest.mark.parametrize('kwargs', ADAPTED, ids=ids)
def test_published_weights_load_from_an_empty_cache(name, kwargs, client, hub, expected, cache):
    loaded = client.load(name, cache_dir=cache, **kwargs)
    assert loaded.outputs == expected[ids(kwargs)], loaded
    assert len(downloads(hub)) == 1


def test_second_load_downloads_nothing_and_works_offline(name, client, offline_client, hub, expected, cache):
    client.load(name, cache_dir=cache)
    hub.requests.clear()
    assert offline_client.load(name, cache_dir=cache).outputs == expected['as it is']
    assert client.load(name, cache_dir=cache).outputs == expected['as it is']
    if name == f'hf-hub:{REPO}':  # may have moved on: timm asks, and finds that it has not
        assert [request.split()[0] for request in hub.requests] == ['HEAD'] * len(hub.requests)
    else:
        assert not hub.requests


def test_packaged_weights_load_offline(offline_client, expected, cache):
    assert offline_client.load(NAME, cache_dir=cache).outputs == expected['as it is']


def test_cold_cache_offline_says_at_once_that_it_is_offline(offline_client, cache):
    offline_client.refused(PUBLISHED, REPO, 'HF_HUB_OFFLINE', cache_dir=cache)


@without_retries
def test_dead_network_is_an_error_within_seconds(cut_off_client, cache):
    cut_off_client.refused(PUBLISHED, REPO, 'could not be fetched: Connect', cache_dir=cache)


@without_retries
def test_silent_network_is_an_error_within_seconds(client, hub, cache):
    hub.fail('HEAD', 'model.safetensors', 15.0)
    client.refused(PUBLISHED, 'could not be fetched: ReadTimeout', cache_dir=cache)


@pytest.mark.parametrize('status', [401, 404, pytest.param(503, marks=without_retries)])
def test_refusal_of_the_hub_is_an_error_at_once(status, client, hub, cache):
    hub.fail('HEAD', 'model.safetensors', status, times=9)
    client.refused(PUBLISHED, 'could not be fetched', str(status), cache_dir=cache)


def test_download_cut_half_way_is_finished(client, hub, expected, cache):
    hub.fail('GET', '/lfs/', Failure.HALF)
    if CLIENT_VERSION < Version('1'):  # the next call goes on
        client.refused(PUBLISHED, 'could not be fetched', cache_dir=cache)
    assert client.load(PUBLISHED, cache_dir=cache).outputs == expected['as it is']
    assert len(downloads(hub)) == 2


# The Hub, the way to it, the cache or the package holds something else than was published


@parametrize_damage(DAMAGED)
def test_other_bytes_at_the_pinned_commit_are_not_loaded_and_of_another_size_not_downloaded(
    pinned, damage, client, hub, cache, mark
):
    other = damage(WEIGHTS, mark)
    replace(hub, other)
    if len(other) == len(WEIGHTS):
        client.refused(pinned, 'is not the published file', cache_dir=cache)
    else:
        client.refused(pinned, 'does not hold the published model.safetensors', cache_dir=cache)
        assert not downloads(hub)


def test_mirror_with_another_etag_but_the_published_bytes_is_taken(client, hub, expected, cache):
    hub.repos[REPO].head.files['model.safetensors'] = Blob(WEIGHTS, lfs=False)  # its ETag is then git's SHA-1
    assert client.load(PUBLISHED, cache_dir=cache).outputs == expected['as it is']


@parametrize_damage(DAMAGED)
def test_bytes_other_than_the_hub_announced_are_not_loaded(damage, client, hub, cache, mark):
    hub.lfs = dict.fromkeys(hub.lfs, damage(WEIGHTS, mark))
    client.refused(PUBLISHED, cache_dir=cache)
    assert downloads(hub)


@pytest.fixture
def cached(client, hub, cache):
    """The weights in the cache."""
    client.load(f'hf-hub:{REPO}', cache_dir=cache)
    (cached,) = cache.glob('*/snapshots/*/model.safetensors')
    return cached


@parametrize_damage(DAMAGED)
def test_other_bytes_in_the_cache_are_not_loaded(pinned, damage, client, cache, cached, mark):
    cached.write_bytes(damage(WEIGHTS, mark))
    for kwargs in ({}, dict(num_classes=5)):
        client.refused(pinned, 'is not the published file', cache_dir=cache, **kwargs)


def test_load_works_again_once_the_file_named_in_the_error_is_deleted(client, expected, cache, cached):
    cached.write_bytes(flipped(WEIGHTS, None))
    message = client.load(PUBLISHED, cache_dir=cache).message
    Path(re.search(r'delete (.+) and try again', message)[1]).unlink()
    assert client.load(PUBLISHED, cache_dir=cache).outputs == expected['as it is']


@parametrize_damage({**DAMAGED, 'no file': None})
def test_other_bytes_in_the_package_are_not_loaded(damage, client, package, mark):
    packaged = package / 'weights' / f'{NAME}.safetensors'
    good = packaged.read_bytes()
    try:
        packaged.write_bytes(damage(WEIGHTS, mark)) if damage else packaged.unlink()
        for kwargs in ({}, dict(num_classes=5), dict(pretrained_cfg=dict(file=packaged, tag='cpu_c10'))):
            said = 'is not the published file', 'pip install --force-reinstall'
            client.refused('sharesnet164_cifar', *said, **kwargs)
    finally:
        packaged.write_bytes(good)


@pytest.mark.parametrize('same_commit', [False, True])
def test_repository_that_redirects_to_other_bytes_is_refused(pinned, same_commit, client, hub, pin, cache):
    files = hub.repos[REPO].head.files
    commit = Commit('impostor', {**files, 'model.safetensors': replace(hub, flipped(WEIGHTS, None))})
    commit.oid = pin if same_commit else commit.oid
    hub.repos['impostor/net'] = Repo(False, [commit])
    hub.renamed[REPO] = 'impostor/net'
    loaded = client.load(pinned, cache_dir=cache)
    assert loaded.error in ('RuntimeError', 'RevisionNotFoundError')


def test_pinned_weights_have_no_other_file_to_fall_back_to(client, hub, cache, mark):
    files = hub.repos[REPO].head.files
    del files['model.safetensors']
    files['pytorch_model.bin'] = Blob(pickled(b'', mark), lfs=True)
    client.refused(PUBLISHED, 'EntryNotFoundError', cache_dir=cache)
    assert not any('.bin' in request for request in hub.requests)


# Repositories and revisions that are not pinned are not compared


@pytest.fixture
def other_repo(hub, small):
    """A repository that no release pins, with the weights of a small net."""

    def create(weights=small.weights):
        hub.create('me/mine', {'config.json': small.config.encode(), 'model.safetensors': weights})
        return 'me/mine'

    return create


def test_other_repositories_and_revisions_are_not_compared(client, hub, other_repo, cache):
    repo = other_repo()
    by_name = client.load(f'hf-hub:{repo}', cache_dir=cache)
    by_commit = client.load(f'hf-hub:{repo}@{hub.repos[repo].head.oid}', cache_dir=cache)
    assert by_name.outputs and by_name.outputs == by_commit.outputs


@pytest.mark.parametrize('name', [NAME, PUBLISHED])
def test_own_repository_wins_over_the_source_of_the_tag(name, client, other_repo, cache):
    repo = other_repo()
    loaded = client.load(name, cache_dir=cache, pretrained_cfg_overlay=dict(hf_hub_id=repo), **SMALL)
    assert loaded.outputs and loaded.outputs == client.load(f'hf-hub:{repo}', cache_dir=cache).outputs


@pytest.mark.parametrize('kwargs', ADAPTED, ids=ids)
@parametrize_damage(UNREADABLE | MISFITS)
def test_unpinned_repository_that_does_not_fit_is_refused(damage, kwargs, client, other_repo, small, cache, mark):
    repo = other_repo(damage(small.weights, mark))
    said = dict(error='SafetensorError') if damage in UNREADABLE.values() else {}
    client.refused(f'hf-hub:{repo}', *(() if said else ('nothing was loaded',)), cache_dir=cache, **said, **kwargs)

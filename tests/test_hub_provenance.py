"""What is published of how weights were trained: no paths, no secrets, and one order of classes."""

import json
import os

import pytest
import timm
import yaml
from hub_project import NAME, ROOT, copy_project, run, save, snapshot, use
from PIL import Image

TOKEN = 'hf_' + 'aBcDeFgH' * 4
SECRETS = {
    'data_dir': f'pipe:curl -s -L -H "Authorization:Bearer {TOKEN}" https://example.org/train-{{000..009}}.tar',
    'initial_checkpoint': f'https://example.org/{TOKEN}/last.pth',
    'hf_token': 'anything',
    'wandb_password': 12345,
    'wandb_key': '0123456789' * 4,
    'remote': 'pipe:curl -H "Cookie: session=1" https://example.org/w.tar',
    'experiment': 'ghp_' + 'a1B2' * 9,
    'log_wandb': 'AKIA' + 'ABCDEFGHIJKLMNOP',
    'train_split': 'pipe:curl -u me:secret https://example.org/w.tar',
    'val_split': 'pipe:aws --secret-key abc s3 cp s3://bucket/w.tar -',
    'head': 'eyJhbGciOiJI.eyJzdWIiOiIx.x',
    'teacher': 'a1' + 'bC3dE4fG5' * 4,
    'source': 'host.org/w.tar?X-Amz-Signature=abcdef',
}


@pytest.fixture
def provenance(tmp_path, monkeypatch):
    use(copy_project(tmp_path / 'project'), monkeypatch)
    import provenance

    return provenance


@pytest.mark.parametrize('name', ['args.yaml', 'training.json', 'source.json'])
@pytest.mark.parametrize('key', SECRETS)
def test_what_looks_like_a_secret_is_refused_by_its_key(provenance, name, key):
    dump = yaml.safe_dump if name == 'args.yaml' else json.dumps
    for content in ({'epochs': 3, key: SECRETS[key]}, {'model_kwargs': {key: SECRETS[key]}}):
        with pytest.raises(provenance.Fault) as e:
            provenance.clean(name, dump(content).encode())
        message = str(e.value)
        assert message.startswith(f'{name}: ') and f'{key} looks like a token or a password' in message
        assert str(SECRETS[key]) not in message and TOKEN not in message


@pytest.mark.parametrize(
    ('value', 'published'),
    {
        'user and password': ('https://me:secret@example.org/w.pth', 'https://example.org/w.pth'),
        'a token as user': (f'https://{TOKEN}@example.org/w.pth', 'https://example.org/w.pth'),
        'an @ in the password': ('https://me:se@cret@example.org/w.pth', 'https://example.org/w.pth'),
        'a presigned URL': (f'https://s3.org/b/w.pth?X-Amz-Signature={TOKEN}&x=1', 'https://s3.org/b/w.pth'),
        'a fragment': (f'https://example.org/w.pth#{TOKEN}', 'https://example.org/w.pth'),
        'another scheme': ('pipe:s3cmd get s3://k:s@bucket/w.tar -', 'pipe:s3cmd get s3://bucket/w.tar -'),
        'in a text': ('from "https://u:p@h.org/x?sig=1" and /home/me/x.pth', 'from "https://h.org/x" and x.pth'),
        'without a scheme': ('scp me:secret@host', 'scp host'),
        'without a scheme, after slashes': ('//me:secret@host', 'host'),
        'a path': ('/home/me/runs/last.pth', 'last.pth'),
        'a model of the Hub': ('hf-hub:org/name@' + 'a1' * 20, 'hf-hub:org/name@' + 'a1' * 20),
        'a hash': ('0123456789abcdef' * 4, '0123456789abcdef' * 4),
        'nothing': ('sharesnet164_cifar.modern_c10, 200 epochs', 'sharesnet164_cifar.modern_c10, 200 epochs'),
    }.values(),
)
def test_urls_lose_user_query_and_fragment(provenance, value, published):
    for content in ({'source': value}, {'nested': [{'source': value}]}):
        cleaned = provenance.clean('training.json', json.dumps(content).encode())
        assert json.loads(cleaned) == json.loads(json.dumps(content).replace(json.dumps(value), json.dumps(published)))
        assert provenance.clean('training.json', cleaned) == cleaned


def test_options_of_train_py_are_published_as_they_are(provenance):
    """None of their names and ordinary values is taken for a secret."""
    args = {'data_dir': 'cifar10', 'dataset': 'torch/cifar10', 'aa': 'rand-m9-mstd0.5-inc1', 'mean': [0.5, 0.5, 0.5]}
    args |= {'class_map': '', 'smoothing': 0.1, 'model_kwargs': {'class_token': True}, 'hflip': 0.5, 'input_key': 'jpg'}
    assert yaml.safe_load(provenance.clean('args.yaml', yaml.safe_dump(args).encode())) == args


@pytest.fixture
def train_run(tmp_path):
    """A folder as train.py leaves it, whose weights nobody gets to read."""
    path = tmp_path / 'run'
    path.mkdir()
    save(path / 'last.pth.tar', {})
    (path / 'args.yaml').write_text(yaml.safe_dump({'model': 'shawrn40_4', 'epochs': 3}))
    (path / 'summary.csv').write_text('epoch,train_loss,lr\n0,2.1,0.1\n')
    return path


def build_refuses(path, monkeypatch, capsys):
    import build
    import catalog

    before = snapshot(catalog.OURS.path.parent)
    code, out, err = run(build, [path, '--model', 'shawrn40_4.test_c10'], monkeypatch, capsys)
    assert (code, out, len(err)) == (1, '', 1) and snapshot(catalog.OURS.path.parent) == before
    return err[0]


def test_build_refuses_a_run_with_a_secret(provenance, train_run, monkeypatch, capsys):
    (train_run / 'args.yaml').write_text(yaml.safe_dump({'data_dir': SECRETS['data_dir']}))
    assert 'args.yaml: data_dir looks like a token' in build_refuses(train_run, monkeypatch, capsys)
    (train_run / 'args.yaml').write_text('epochs: 3\n')
    (train_run / 'summary.csv').write_text(f'epoch,{TOKEN}\n')
    assert 'summary.csv looks like a token' in build_refuses(train_run, monkeypatch, capsys)


@pytest.mark.parametrize('name', ['args.yaml', 'summary.csv', 'last.pth.tar'])
def test_build_refuses_links_in_a_run(provenance, train_run, monkeypatch, capsys, name):
    (train_run / name).rename(train_run.parent / name)
    (train_run / name).symlink_to(train_run.parent / name)
    assert f'{name} is a link' in build_refuses(train_run, monkeypatch, capsys)


@pytest.mark.parametrize('name', ['training.json', 'README.md'])
def test_check_names_a_secret_and_a_url_that_holds_one(provenance, monkeypatch, name):
    import catalog
    import check

    path = catalog.OURS.path / NAME
    if name == 'training.json':
        training = json.loads((path / name).read_text())
        training['data'] = 'https://me:secret@example.org/cifar10'
        (path / name).write_text(json.dumps(training))
        faults = check.static_faults(catalog.parse(NAME, catalog.OURS))
        assert faults == ['training.json has paths or URLs that are not cut, or is not as build.py writes it']
        training['data'] = TOKEN
        (path / name).write_text(json.dumps(training))
    else:
        text = (path / name).read_text()
        (path / name).write_text(f'{text}\nhttps://me:secret@example.org/cifar10\n')
        faults = check.static_faults(catalog.parse(NAME, catalog.OURS))
        assert faults == ['README.md looks like a token or a password, and would be published: take it out']
        (path / name).write_text(f'{text}\n{TOKEN}\n')
    faults = check.static_faults(catalog.parse(NAME, catalog.OURS))
    where = 'training.json: data' if name == 'training.json' else name
    assert faults == [f'{where} looks like a token or a password, and would be published: take it out']


# Classes


@pytest.fixture
def numbered(tmp_path):
    """Images of classes 0 to 11 in train/ and val/, each of the colour of its class."""
    for split in ('train', 'val'):
        for label in range(12):
            path = tmp_path / 'data' / split / str(label) / 'x.png'
            path.parent.mkdir(parents=True)
            Image.new('RGB', (8, 8), (label, 0, 0)).save(path)
    return tmp_path / 'data'


def test_classes_are_in_train_py_s_order(provenance, numbered):
    """9 before 10, where a sorted list of texts has it behind."""
    import build
    from catalog import Dataset

    images, calibration = build.open_images(numbered, Dataset(None, 'Mine', 'validation', None, 12))
    assert [(image.getpixel((0, 0))[0], label) for image, label in images] == [(i, i) for i in range(12)]
    assert [label for _, label in calibration] == [*range(12)]
    theirs = timm.data.create_dataset('', root=str(numbered), split='val')
    assert [label for _, label in theirs] == [label for _, label in images]


def test_given_names_of_classes_are_the_order_of_the_labels(provenance, numbered):
    import build
    from catalog import Dataset

    names = [str(i) for i in range(11, -1, -1)]
    images, _ = build.open_images(numbered, Dataset(None, 'Mine', 'validation', None, 12, label_names=names))
    assert sorted((image.getpixel((0, 0))[0], label) for image, label in images) == [(i, 11 - i) for i in range(12)]


def test_splits_of_other_classes_are_refused(provenance, numbered, monkeypatch):
    import build
    import catalog
    from catalog import Dataset

    os.rename(numbered / 'train' / '3', numbered / 'train' / 'x')
    with pytest.raises(build.Fault, match='train does not have the classes of Mine'):
        build.open_images(numbered, Dataset(None, 'Mine', 'validation', None, 12))
    like_imagenet = Dataset('org/known', 'Known', 'validation', 24, 12)  # without names to compare with
    monkeypatch.setitem(catalog.DATASETS, 'known', like_imagenet)
    with pytest.raises(build.Fault, match='do not have the same classes'):
        build.open_images(numbered, like_imagenet)
    os.rename(numbered / 'val' / '3', numbered / 'val' / '4' / 'x')
    (numbered / 'val' / '4' / 'x' / 'x.png').unlink()
    with pytest.raises(build.Fault, match='val has 11 classes, Mine has 12'):
        build.open_images(numbered, Dataset(None, 'Mine', 'validation', None, 12))


def test_labels_of_a_class_map_are_not_guessed(provenance, train_run, numbered, monkeypatch, capsys):
    (train_run / 'args.yaml').write_text('class_map: /home/me/classes.txt\n')
    own = ['--output', train_run.parent / 'own', '--namespace', 'me', '--dataset-name', 'Mine']
    import build

    argv = [train_run, '--model', 'shawrn40_4.mine', '--data-dir', numbered, *own]
    code, _, err = run(build, argv, monkeypatch, capsys)
    assert code == 1 and 'the labels were given by class_map classes.txt: say --class-names' in err[0]
    argv = [train_run, '--model', 'shawrn40_4.mine_c10', '--data-dir', ROOT]
    code, _, err = run(build, argv, monkeypatch, capsys)
    assert code == 1 and 'so they are not those of CIFAR-10' in err[0]
    assert not (train_run.parent / 'own').exists()

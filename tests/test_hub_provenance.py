"""What is published of how weights were trained: what makes the recipe, no paths, no secrets; one order of classes."""

import json
import os

import build
import catalog
import check
import provenance
import pytest
import timm
import yaml
from hub_project import NAME, ROOT, release, save
from PIL import Image

pytestmark = pytest.mark.usefixtures('scripts')

MODEL = ('--model', 'shawrn40_4.test_c10')
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
# What people may tell in words: as it is written, and what is refused
TOLD = [
    'sharesnet164_cifar.modern_c10, 200 epochs',
    '4 CPU cores, 7,200 s (top-1 94.31 %; of `short`)',
    'TrivialAugment, bf16 autocast, weight decay 5e-4, an 8x8 cut-out',
]
REFUSED = {
    'user and password': 'https://me:secret@example.org/w.pth',
    'a token as user': f'https://{TOKEN}@example.org/w.pth',
    'an @ in the password': 'https://me:se@cret@example.org/w.pth',
    'a presigned URL': f'https://s3.org/b/w.pth?X-Amz-Signature={TOKEN}&x=1',
    'a fragment': f'https://example.org/w.pth#{TOKEN}',
    'another scheme': 'pipe:s3cmd get s3://k:s@bucket/w.tar -',
    'in a text': 'from "https://u:p@h.org/x?sig=1" and /home/me/x.pth',
    'without a scheme': 'scp me:secret@host',
    'without a scheme, after slashes': '//me:secret@host',
    'a path': '/home/me/runs/last.pth',
    'a model of the Hub': 'hf-hub:org/name@' + 'a1' * 20,
    'a hash': '0123456789abcdef' * 4,
}


@pytest.mark.parametrize('name', ['args.yaml', 'training.json', 'source.json'])
@pytest.mark.parametrize('key', SECRETS)
def test_what_is_not_known_to_be_harmless_is_not_published(name, key):
    """Of options it is left out. A person's own words are refused by their key."""
    secret = SECRETS[key]
    contents = [{key: secret}, {'model_kwargs': {key: secret}}, {'recipe': {key: secret}}]
    if secret not in ('anything', 12345):  # which are words and numbers as others are
        contents += [{'how': secret}, {'source': secret}]
    for content in contents:
        if name == 'args.yaml':
            published = provenance.clean(name, yaml.safe_dump({'epochs': 3} | content).encode()).decode()
            assert (
                published == 'epochs: 3\n'
                or published == 'model_kwargs: {}\nepochs: 3\n'
                or key == 'initial_checkpoint'
            )
            assert str(secret) not in published and TOKEN not in published
        else:
            with pytest.raises(provenance.CommandError) as e:
                provenance.clean(name, json.dumps(content).encode())
            assert str(e.value).startswith(name) and str(secret) not in str(e.value) and TOKEN not in str(e.value)


def test_no_option_of_train_py_lets_a_secret_pass():
    """Whatever its type is: alone, in a list, as a keyword and below one that a net or an optimizer takes."""
    for secret in {*SECRETS.values(), *REFUSED.values(), TOKEN} - {'anything', 12345}:
        for value in (secret, [secret], {secret: 1}, {'act_layer': secret, 'betas': secret, 'pretrained_cfg': secret}):
            options = {option['name']: value for option in provenance.TRAIN_OPTIONS['options']}
            published = provenance.clean('args.yaml', yaml.safe_dump(options).encode()).decode()
            assert secret not in published and TOKEN not in published and 'secret' not in published


@pytest.mark.parametrize('text', TOLD)
def test_plain_words_are_published_as_they_are(text):
    content = provenance.dump({'how': text, 'recipe': {'not used': text}, 'epochs': [{'epoch': 1, 'lr': 0.1}]})
    assert provenance.clean('training.json', content) == content


@pytest.mark.parametrize('case', REFUSED)
def test_paths_addresses_and_tokens_in_words_are_refused(case):
    for content in ({'how': REFUSED[case]}, {'recipe': {'images': f'of {REFUSED[case]}'}}, {'epochs': [REFUSED[case]]}):
        with pytest.raises(provenance.CommandError, match='is not in plain words') as e:
            provenance.clean('training.json', json.dumps(content).encode())
        assert REFUSED[case] not in str(e.value)


def test_options_of_the_recipe_are_published_as_they_are():
    args = {'model': 'sharesnet50.a2_in1k', 'aa': 'rand-m9-mstd0.5-inc1', 'mean': [0.5, 0.5, 0.5], 'smoothing': 0.1}
    args |= {'model_kwargs': {'act_layer': 'hard_swish', 'share_rate': [0, [[1, 3]], 1.0]}, 'hflip': 0.5, 'amp': True}
    args |= {'opt': 'lookahead_adamw', 'sched': 'multistep', 'kd_model_name': 'hf-hub:timm/resnet50.a1_in1k'}
    args |= {'opt_kwargs': {'fused': True}, 'train_interpolation': 'bicubic', 'initial_checkpoint': 'last.pth.tar'}
    args |= {'seed': 42}
    assert yaml.safe_load(provenance.clean('args.yaml', yaml.safe_dump(args).encode())) == args
    paths = {
        'initial_checkpoint': '/home/me/mine.pth',
        'class_map': 'my classes.txt',
        'kd_model_name': 'local-dir:/me/resnet164_cifar',
    }
    published = {'initial_checkpoint': 'a file', 'class_map': 'a file', 'kd_model_name': 'local-dir:resnet164_cifar'}
    assert yaml.safe_load(provenance.clean('args.yaml', yaml.safe_dump(paths).encode())) == published


def test_every_option_of_our_recipes_but_places_is_published():
    left = set()
    for file in (ROOT / 'train_configs').glob('*.yaml'):
        options = yaml.safe_load(file.read_text())
        published = provenance.clean_options(options)
        left |= {key for key, value in options.items() if published.get(key) != value}
    places = {'dataset', 'train_split', 'val_split', 'initial_checkpoint', 'kd_model_name'}
    assert left == places | {'device', 'torchcompile_mode'}


@pytest.fixture
def train_run(tmp_path):
    """A folder as train.py leaves it, whose weights nobody gets to read."""
    path = tmp_path / 'run'
    path.mkdir()
    save(path / 'last.pth.tar', {})
    (path / 'args.yaml').write_text(yaml.safe_dump({'model': 'shawrn40_4', 'epochs': 3}))
    (path / 'summary.csv').write_text('epoch,train_loss,lr\n0,2.1,0.1\n')
    return path


def test_build_refuses_a_run_with_a_secret(train_run, refused):
    (train_run / 'summary.csv').write_text(f'epoch,{TOKEN}\n')
    assert TOKEN not in refused('summary.csv: a row of 2 values is not one of train.py', train_run, *MODEL)
    (train_run / 'summary.csv').unlink()
    (train_run / 'args.yaml').write_text(yaml.safe_dump({'model': 'shawrn40_4', 'model_kwargs': {'act_layer': TOKEN}}))
    assert TOKEN not in refused('model_kwargs: act_layer is more than numbers and short words', train_run, *MODEL)


@pytest.mark.parametrize('name', ['args.yaml', 'summary.csv', 'last.pth.tar'])
def test_build_refuses_links_in_a_run(train_run, refused, name):
    (train_run / name).rename(train_run.parent / name)
    (train_run / name).symlink_to(train_run.parent / name)
    refused(f'{name} is a link', train_run, *MODEL)


@pytest.mark.parametrize('secret', ['https://me:secret@example.org/cifar10', TOKEN])
@pytest.mark.parametrize('name', ['training.json', 'README.md', 'config.json'])
def test_check_finds_a_secret_and_does_not_tell_it(name, secret):
    path = catalog.OURS.path / NAME
    text = (path / name).read_text()
    if name == 'README.md':
        (path / name).write_text(f'{text}\n{secret}\n')
    else:
        (path / name).write_text(json.dumps(json.loads(text) | {'data': secret}))
    faults = check.static_faults(release(path))
    where = {
        'training.json': 'training.json: data is not in plain words',
        'README.md': f'README.md: line {len(text.splitlines()) + 2} is not one',
    }
    assert any(where.get(name, 'config.json has 1 keys') in fault for fault in faults)
    assert secret not in ''.join(faults)


# Classes

MINE = catalog.Dataset(None, 'Mine', 'validation', None, 12)


@pytest.fixture
def numbered(tmp_path):
    """Images of classes 0 to 11 in train/ and val/, each of the colour of its class."""
    for split in ('train', 'val'):
        for label in range(12):
            path = tmp_path / 'data' / split / str(label) / 'x.png'
            path.parent.mkdir(parents=True)
            Image.new('RGB', (8, 8), (label, 0, 0)).save(path)
    return tmp_path / 'data'


def colour_model(classes=12):
    """A net whose images are not changed."""
    model = timm.create_model('sharesnet164_cifar', num_classes=classes, layers=(1, 1, 1), device='meta')
    model.pretrained_cfg |= {'input_size': (3, 8, 8), 'mean': (0, 0, 0), 'std': (1, 1, 1), 'crop_pct': 1.0}
    return model


def colours(images):
    return [(round(255 * image[0, 0, 0].item()), label) for image, label in images]


def test_classes_are_in_train_py_s_order(numbered):
    """9 before 10, where a sorted list of texts has it behind."""
    images, calibration = build.open_images(numbered, MINE, colour_model())
    assert colours(images) == [(i, i) for i in range(12)]
    assert [i for i, _ in colours((image, 0) for image in calibration)] == [*range(12)]
    theirs = timm.data.create_dataset('', root=str(numbered), split='val')
    assert [label for _, label in theirs] == [label for _, label in images]


def test_given_names_of_classes_are_the_order_of_the_labels(numbered):
    names = [str(i) for i in range(11, -1, -1)]
    mine = MINE._replace(label_names=names)
    images, _ = build.open_images(numbered, mine, colour_model())
    assert sorted(colours(images)) == [(i, 11 - i) for i in range(12)]


def test_splits_of_other_classes_are_refused(numbered, monkeypatch):
    os.rename(numbered / 'train' / '3', numbered / 'train' / 'x')
    with pytest.raises(build.CommandError, match='train does not have the classes of Mine'):
        build.open_images(numbered, MINE, colour_model())
    like_imagenet = catalog.Dataset('org/known', 'Known', 'validation', 24, 12)  # without names to compare with
    monkeypatch.setitem(catalog.DATASETS, 'known', like_imagenet)
    with pytest.raises(build.CommandError, match='do not have the same classes'):
        build.open_images(numbered, like_imagenet, colour_model())
    os.rename(numbered / 'val' / '3', numbered / 'val' / '4' / 'x')
    (numbered / 'val' / '4' / 'x' / 'x.png').unlink()
    with pytest.raises(build.CommandError, match='val has 11 classes, Mine has 12'):
        build.open_images(numbered, MINE, colour_model())


def test_labels_of_a_class_map_are_not_guessed(train_run, numbered, run):
    (train_run / 'args.yaml').write_text('class_map: /home/me/classes.txt\n')
    own = ['--output', train_run.parent / 'own', '--namespace', 'me', '--dataset-name', 'Mine']

    argv = [train_run, '--model', 'shawrn40_4.mine', '--data-dir', numbered, *own]
    code, _, err = run('build', *argv)
    assert code == 2 and 'the labels were given by class_map /home/me/classes.txt: say --class-names' in err[0]
    argv = [train_run, '--model', 'shawrn40_4.mine_c10', '--data-dir', ROOT]
    code, _, err = run('build', *argv)
    assert code == 2 and 'so they are not those of CIFAR-10' in err[0]
    assert not (train_run.parent / 'own').exists()

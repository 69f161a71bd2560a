"""Folders that the scripts of hub/ write load in transformers, too: by its pipeline, with timm's logits."""

from pathlib import Path

import models
import pytest
import timm
import torch
from hub_project import NAME, ROOT, release, small_net
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

TORCH7 = Path(__file__).parent / 'data' / 'torch7'


@pytest.fixture
def image():
    with Image.open(ROOT / 'tests' / 'data' / 'cifar10_test_1000.webp') as sheet:
        return sheet.convert('RGB').crop((0, 0, 32, 32))


def classify(path, image):
    """The name of an image's class by the pipeline, whose net must have timm's logits."""
    classifier = pipeline('image-classification', model=str(path))
    model = timm.create_model(f'local-dir:{path}', pretrained=True).eval()
    batch = timm.data.create_transform(**timm.data.resolve_data_config(model=model))(image)[None]
    with torch.no_grad():
        logits = model(batch)
        torch.testing.assert_close(classifier.model(batch).logits, logits)
    best = classifier(image)[0]
    assert best['score'] == pytest.approx(logits.softmax(1).max().item(), abs=1e-3)
    return best['label']


def test_published_folder(image):
    assert classify(ROOT / 'hub' / NAME, image) == 'cat'


def test_imported_net_of_another_architecture_than_the_default(scripts, image, tmp_path):
    import import_torch7

    argv = [TORCH7 / 'preact-29-c10.t7.gz', '--model', 'sharesnet164_cifar', '--output', tmp_path / 'new']
    assert import_torch7.main([*map(str, argv), '--model-kwargs', 'layers=3,3,3']) == 0
    assert classify(tmp_path / 'new', image).startswith('LABEL_')  # nobody told the names


def build_folder(path, model, **known):
    import build

    what = release(path)._replace(**known)
    return build.build(path, what, build.make_model(what, {}, {}), {'weights': model.state_dict()}, None)


def test_built_net_with_arguments(scripts, tmp_path):
    args = {'act_layer': 'silu', 'global_pool': 'max', 'in_chans': 1, 'share_rate': 0.5, 'layers': [5, 3, 3]}
    path = tmp_path / 'sharesnet164_cifar.silu_c10'
    path.mkdir()
    model = models.create('sharesnet164_cifar', **args)
    build_folder(path, model, model_args=args)
    theirs = AutoModelForImageClassification.from_pretrained(path).eval()
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(theirs(images).logits, model(images))


def test_built_net_in_fp16(scripts, tmp_path, monkeypatch):
    """As our own are above 20 MB."""
    import build

    monkeypatch.setattr(build, 'HALF_ABOVE', 0)
    model = small_net(monkeypatch)
    path = tmp_path / 'sharesnet164_cifar.half_c10'
    path.mkdir()
    assert build_folder(path, model)['dtype'] == 'float16'
    theirs = AutoModelForImageClassification.from_pretrained(path, dtype=torch.float32).eval()
    ours = timm.create_model(f'local-dir:{path}', pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(theirs(images).logits, ours(images))

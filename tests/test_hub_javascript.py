"""transformers.js, the package from npm, classifies by the lines of the card as timm and Python's transformers do."""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import folder
import javascript
import numpy as np
import onnx
import pytest
import timm
import torch
from catalog import DATASETS, OURS, parse
from hub_project import NAME, ROOT, edit, snippets
from PIL import Image
from transformers import AutoConfig, pipeline

MODEL = ROOT / 'hub' / NAME
CLASSES = DATASETS['c10'].names()
SCRIPTS = Path(__file__).parent / 'javascript'
CFG = {'input_size': [3, 32, 32], 'interpolation': 'bicubic', 'crop_pct': 1.0, 'mean': [0.5] * 3, 'std': [0.25] * 3}
PACKAGE = '/node_modules/@huggingface/transformers'
PAGE = f"""<!doctype html>
<script type="importmap">{{"imports": {{"@huggingface/transformers": "{PACKAGE}/dist/transformers.js"}}}}</script>
<script type="module">
import {{ env }} from '@huggingface/transformers';
Object.assign(env, {{ allowLocalModels: true, allowRemoteModels: false, localModelPath: '/' }});
env.backends.onnx.wasm.wasmPaths = '{PACKAGE}/node_modules/onnxruntime-web/dist/';
window.classifier = (await import('./card.mjs')).classifier;
</script>"""
CLASSIFY = """async ([names, smoothed]) => {
  const draw = async (name) => {
    const image = await createImageBitmap(await (await fetch(name)).blob());
    const canvas = new OffscreenCanvas(32, 32);
    const context = canvas.getContext('2d');
    context.imageSmoothingQuality = 'high';
    context.drawImage(image, 0, 0, 32, 32);
    return canvas;
  };
  return await classifier(smoothed ? await Promise.all(names.map(draw)) : names, { top_k: null });
}"""


@pytest.fixture
def models(node_modules, tmp_path):
    """A directory with the published folder by its name on the Hub, and the packages."""
    (tmp_path / 'timm-sharesnet').mkdir()
    shutil.copytree(MODEL, tmp_path / 'timm-sharesnet' / NAME)
    (tmp_path / 'node_modules').symlink_to(node_modules)
    return tmp_path


@pytest.fixture
def node(models):
    """Run a script without network. Returns its output, and fails if it warns."""

    def node(*argv):
        command = ['node', '--import', str(SCRIPTS / 'offline.mjs'), *map(str, argv)]
        result = subprocess.run(command, env=os.environ | {'MODELS': str(models)}, cwd=models, capture_output=True)
        assert (result.returncode, result.stderr.decode()) == (0, '')
        return result.stdout.decode()

    return node


@pytest.fixture
def prepare(models):
    """Write the card's lines as a module that exports the classifier, for a file of another kind, and images."""

    def prepare(images, dtype):
        module, directory = models / 'card.mjs', models / 'images'
        module.write_text(card_code())
        edit(module, "console.log(await classifier('image.png'));", 'export { classifier };')
        edit(module, "dtype: 'q8'", f"dtype: '{dtype}'")
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        for i, image in enumerate(images):
            image.save(directory / f'{i:04}.png')
        return module, directory

    return prepare


@pytest.fixture
def classify(node, prepare):
    """Probabilities (images, 10) in Node.js by the card's lines, with the filter that the folder names or another."""

    def classify(images, dtype, *resample):
        return to_array(json.loads(node(SCRIPTS / 'classify.mjs', *prepare(images, dtype), *resample)))

    return classify


@pytest.fixture
def classify_in_browser(models, prepare, browser):
    """The same in a browser. Smoothed, square images are drawn on a canvas of the net's size beforehand."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, '.mjs': 'text/javascript'}

        def log_message(self, *_):
            pass

    def classify(images, dtype, smoothed=False):
        prepare(images, dtype)
        (models / 'index.html').write_text(PAGE)
        page.goto(f'http://127.0.0.1:{server.server_port}/')
        page.wait_for_function('!!window.classifier', timeout=60_000)
        names = [f'images/{i:04}.png' for i in range(len(images))]
        return to_array(page.evaluate(CLASSIFY, [names, smoothed]))

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=str(models)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = browser.new_page()
    yield classify
    page.close()
    server.shutdown()
    server.server_close()


def to_array(found):
    """Probabilities (images, 10) of what a pipeline returns."""
    scores = [{one['label']: one['score'] for one in image} for image in found]
    return np.array([[one[name] for name in CLASSES] for one in scores])


def card_code(language='js'):
    (code,) = snippets((MODEL / 'README.md').read_text(), language)
    return code


def sample(step):
    return folder.load_sample(DATASETS['c10'])[::step]


@functools.cache
def timm_model():
    model = timm.create_model(f'local-dir:{MODEL}', pretrained=True).eval()
    return model, timm.data.create_transform(**timm.data.resolve_data_config(model=model))


def classify_in_timm(images):
    model, transform = timm_model()
    batches = torch.stack([transform(image) for image in images]).split(25)
    with torch.inference_mode():
        return torch.cat([model(batch) for batch in batches]).softmax(1).numpy()


def classify_in_python(images):
    return to_array(pipeline('image-classification', model=str(MODEL))(images, top_k=10, batch_size=25))


def agreement(a, b):
    """Part of the images that get the same class."""
    return (a.argmax(1) == b.argmax(1)).mean()


def test_lines_of_the_card_run_as_they_are(models, node):
    image, label = next((image, label) for image, label in sample(10) if label == 3)
    image.save(models / 'image.png')
    (models / 'card.mjs').write_text(card_code())
    scores = re.findall(r"label: '(\w+)', score: ([\d.e-]+)", node('card.mjs'))
    assert len(scores) == 5 and scores[0][0] == 'cat' and float(scores[0][1]) > 0.5


@pytest.mark.parametrize('step', [20, pytest.param(1, marks=pytest.mark.slow)])
def test_three_libraries_agree_on_test_images(classify, step):
    images, labels = zip(*sample(step), strict=True)
    expected = classify_in_timm(images)
    for found in (classify_in_python([*images]), classify(images, 'fp32')):
        assert agreement(found, expected) == 1
        np.testing.assert_allclose(found, expected, atol=1e-3)
    wrong = json.loads((ROOT / 'hub' / 'manifest.json').read_text())[NAME]['onnx']['files']['model_quantized.onnx']
    missed = (classify(images, 'q8').argmax(1) != labels).nonzero()[0] * step
    recorded = {i for i in wrong['sample']['wrong'] if i % step == 0}
    assert len({*missed.tolist()} ^ recorded) <= 3  # as hub/check.py allows


def enlarge(images):
    return [image.resize((128, 128), Image.Resampling.BICUBIC) for image in images]


def mosaics(images):
    """Images of 160 x 160 that have as much detail as a photograph: 25 test images each."""
    sheets = []
    for start in range(len(images)):
        sheet = Image.new('RGB', (160, 160))
        for k in range(25):
            sheet.paste(images[(start + 7 * k) % len(images)], (k % 5 * 32, k // 5 * 32))
        sheets.append(sheet)
    return sheets


LARGER = pytest.mark.parametrize('make', [enlarge, mosaics])


@pytest.mark.slow
@LARGER
def test_larger_images_are_resized_otherwise_than_in_timm(classify, make):
    """By Lanczos, and much more so by the bicubic filter of transformers.js, which uses few of the pixels."""
    images = make([image for image, _ in sample(2)])
    expected = classify_in_timm(images)
    by_lanczos = agreement(classify(images, 'fp32'), expected)
    by_bicubic = agreement(classify(images, 'fp32', 3), expected)
    print(f'{make.__name__}: {by_lanczos:.1%} by Lanczos, {by_bicubic:.1%} by bicubic')
    assert {enlarge: 0.97, mosaics: 0.8}[make] <= by_lanczos < 1 and by_bicubic < by_lanczos


@pytest.mark.slow
def test_browser_agrees_on_test_images(classify_in_browser):
    images = [image for image, _ in sample(20)]
    np.testing.assert_allclose(classify_in_browser(images, 'fp32'), classify_in_timm(images), atol=1e-3)


@pytest.mark.slow
@LARGER
def test_browser_resizes_as_badly_unless_a_canvas_smooths(classify_in_browser, make):
    images = make([image for image, _ in sample(5)])
    expected = classify_in_timm(images)
    found = agreement(classify_in_browser(images, 'fp32'), expected)
    smoothed = agreement(classify_in_browser(images, 'fp32', smoothed=True), expected)
    print(f'{make.__name__}: {found:.1%} in a browser, {smoothed:.1%} smoothed beforehand')
    assert found < {enlarge: 1, mosaics: 0.5}[make] and smoothed > {enlarge: 0.9, mosaics: 0.7}[make]


def write_preprocessor(path, **changes):
    path.mkdir()
    (path / javascript.PREPROCESSOR).write_text(json.dumps(javascript.describe_preprocessor({**CFG, **changes})))


@pytest.mark.parametrize('image_size', [(53, 53), (53, 70)])
def test_image_that_needs_no_resizing_is_cropped_as_in_timm(models, node, image_size):
    changes = {'input_size': [3, 48, 48], 'crop_pct': 0.9}
    write_preprocessor(models / 'net', **changes)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*image_size, 3), dtype=np.uint8))
    image.save(models / 'image.png')
    found = json.loads(node(SCRIPTS / 'preprocess.mjs', 'net', 'image.png'))
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg={**CFG, **changes}))
    assert found['dims'] == [1, 3, 48, 48]
    np.testing.assert_allclose(np.array(found['data']), transform(image).flatten(), atol=1e-5)


@pytest.mark.parametrize(
    'changes',
    [{'input_size': [1, 32, 32], 'mean': [0.5], 'std': [0.25]}, {'input_size': [3, 32, 48]}, {'crop_mode': 'border'}],
    ids=['grey images', 'not square', 'borders'],
)
def test_preprocessing_that_it_does_not_have_is_left_out(changes):
    assert javascript.describe_preprocessor({**CFG, **changes}) is None


def test_weights_beside_the_file_are_found(models, classify):
    """As of nets beyond 16 MB."""
    path = models / 'timm-sharesnet' / NAME
    proto = onnx.load(path / 'onnx' / 'model.onnx')
    onnx.save(proto, path / 'onnx' / 'model.onnx', save_as_external_data=True, location='model.onnx_data')
    javascript.write(path, parse(NAME, OURS), [file.name for file in (path / 'onnx').iterdir()])
    images = [image for image, _ in sample(100)]
    np.testing.assert_allclose(classify(images, 'fp32'), classify_in_timm(images), atol=1e-3)


def test_classes_of_imagenet_are_those_of_python_s_transformers(tmp_path):
    config = {'architecture': 'sharesnet50', 'num_classes': 1000, 'pretrained_cfg': {'num_classes': 1000}}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    theirs = AutoConfig.from_pretrained(tmp_path).id2label
    ours = javascript.describe_config(parse('sharesnet50.x_in1k', OURS), [])
    assert ours == {'id2label': {str(i): name for i, name in theirs.items()}}


@pytest.mark.parametrize('model_type', ['null', "'timm_wrapper'"])
def test_its_pipeline_does_not_know_what_python_s_transformers_goes_by(models, node, model_type):
    """If it does one day, the card's lines become one, and config.json serves both."""
    (models / 'pipeline.mjs').write_text(f"""
        import {{ AutoConfig, env, LogLevel, pipeline }} from '@huggingface/transformers';
        env.logLevel = LogLevel.ERROR;
        const name = 'timm-sharesnet/{NAME}';
        const config = {{ ...await AutoConfig.from_pretrained(name), model_type: {model_type} }};
        await pipeline('image-classification', name, {{ config }}).catch((error) => console.log(error.message));
    """)
    assert node('pipeline.mjs') == f'Unsupported model type: {model_type.strip(chr(39))}\n'

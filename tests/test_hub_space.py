"""The page of hub/space/ in a real browser, and what it is put together from."""

import base64
import hashlib
import io
import json
import re
import statistics
import threading
import time
import urllib.request
from pathlib import Path

import catalog
import folder
import numpy as np
import page as space
import pytest
import serve
import timm
import torch
from hub_project import NAME, edit_json, flip_last_byte
from PIL import Image, ImageOps

from timm_sharesnet import unshare
from timm_sharesnet.export import inspect, open_session, run

CDN = 'https://cdn.jsdelivr.net/'
LOADED = 60_000  # ms that a net and its runtime may take on a busy machine
HEIC = b'\0\0\0\x18ftypheic\0\0\0\0mif1heic'


@pytest.fixture(scope='module')
def release():
    return space.default_release(catalog.OURS)


@pytest.fixture(scope='module')
def published(release, tmp_path_factory):
    """The files as they are published."""
    target = tmp_path_factory.mktemp('published')
    space.assemble(release, catalog.NAMESPACE, target)
    return target


@pytest.fixture(scope='module')
def settings(published):
    return json.loads((published / 'nets.json').read_text())


def serving(path):
    """Serve a folder. Yields its address."""
    with serve.make_server(path) as server:
        threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}/'
        server.shutdown()


@pytest.fixture(scope='module')
def published_address(published):
    yield from serving(published)


@pytest.fixture(scope='module')
def address(release, node_modules, tmp_path_factory):
    """Of the page, with the runtime of npm beside it."""
    target = tmp_path_factory.mktemp('local')
    space.assemble(release, catalog.NAMESPACE, target, node_modules / 'onnxruntime-web' / 'dist')
    yield from serving(target)


class Visit:
    """A page that somebody has open, and what they see."""

    def __init__(self, page):
        self.page, self.console, self.requests = page, [], []
        page.on('console', lambda message: self.console.append(message.text))
        page.on('pageerror', lambda error: self.console.append(str(error)))
        page.on('request', lambda request: self.requests.append(request.url))
        page.set_default_timeout(LOADED)

    def sample(self, name):
        return self.page.get_by_role('button', name=name, exact=True)

    def expect(self, text):
        """Wait for an answer that begins so."""
        self.page.locator('#status', has_text=re.compile(f'^{text}')).wait_for(state='attached')

    def expect_failure(self, text):
        """Wait for an alert that says so, and nothing that waits."""
        self.page.get_by_role('alert').filter(has_text=text).wait_for()
        self.page.locator('#busy').wait_for(state='hidden')

    def choose(self, name, data, kind='image/png'):
        self.page.set_input_files('#file', [{'name': name, 'mimeType': kind, 'buffer': data}])

    def give(self, event, key, data, kind='image/png'):
        """Drop or paste a file, or text."""
        self.page.evaluate(
            """([event, key, data, kind]) => {
                const transfer = new DataTransfer();
                const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
                if (kind === 'text/plain') transfer.setData(kind, 'text');
                else transfer.items.add(new File([bytes], 'given', { type: kind }));
                const made = new (event === 'drop' ? DragEvent : ClipboardEvent)(event, {
                    [key]: transfer, bubbles: true, cancelable: true });
                document.body.dispatchEvent(made);
            }""",
            [event, key, base64.b64encode(data).decode(), kind],
        )


@pytest.fixture
def visit(browser):
    """Open a page: a Visit."""
    contexts = []

    def visit(address, prepare=lambda page: None, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        visit = Visit(context.new_page())
        prepare(visit.page)
        visit.page.goto(address)
        visit.page.locator('.sample').first.wait_for()
        return visit

    yield visit
    for context in contexts:
        context.close()


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, 'png')
    return buffer.getvalue()


# What the page is put together from


def test_twin_has_a_kernel_for_each_use_and_computes_the_same(published, release):
    """And it has the size of what `fold(unshare(model))` gives, as build.py measured it."""
    model = folder.load(release.path)
    images = torch.stack([image for image, _ in folder.preprocess_sample(model, release.dataset, step=100)])
    measured = folder.read_json(release.shelf.manifest)[NAME]['onnx']['twin']
    for name in folder.KINDS:
        shared, twin = published / 'onnx' / name, published / 'onnx' / f'twin_{name}'
        assert (inspect(shared).kernels, inspect(twin).kernels) == (7, 55)
        assert twin.stat().st_size == pytest.approx(measured[name]['size'], rel=1e-3)
        found = [run(open_session(path), images.numpy()) for path in (shared, twin)]
        assert np.array_equal(*found)
        if name == 'model.onnx':
            with torch.inference_mode():
                assert torch.allclose(unshare(model)(images), torch.from_numpy(found[1]), atol=1e-3)


def test_what_the_page_says_of_the_nets_is_measured(settings, published, release):
    entry = folder.read_json(release.shelf.manifest)[NAME]
    assert [(net['kind'], net['shared']) for net in settings['nets']] == [
        ('int8', True),
        ('int8', False),
        ('fp32', True),
        ('fp32', False),
    ]
    for net in settings['nets']:
        data = (published / net['file']).read_bytes()
        assert net['bytes'] == len(data)
        assert net['integrity'] == f'sha256-{base64.b64encode(hashlib.sha256(data).digest()).decode()}'
        assert net['parameters'] == entry['parameters' if net['shared'] else 'twin_parameters']
    assert settings['nets'][0]['top1'] == entry['onnx']['files']['model_quantized.onnx']['accuracy']['top1']


def test_space_of_damaged_nets_or_of_another_preprocessing_is_refused(project, tmp_path):
    shelf = catalog.Shelf(project / 'hub', project / 'timm_sharesnet')
    release = catalog.parse(NAME, shelf)
    flip_last_byte(release.path / 'onnx' / 'model.onnx')
    (tmp_path / 'a').mkdir()
    with pytest.raises(space.CommandError, match='onnx/model.onnx is not the file of the manifest'):
        space.assemble(release, catalog.NAMESPACE, tmp_path / 'a')
    edit_json(release.path / 'config.json', lambda config: config['pretrained_cfg'].update(interpolation='bilinear'))
    (tmp_path / 'b').mkdir()
    with pytest.raises(space.CommandError, match=r"takes images as \('bilinear', 'center'\)"):
        space.assemble(release, catalog.NAMESPACE, tmp_path / 'b')


def test_hashes_of_the_runtime_are_those_of_the_package(node_modules, published):
    package = node_modules / 'onnxruntime-web'
    version = json.loads((package / 'package.json').read_text())['version']
    code = (published / 'net.js').read_text()
    assert space.RUNTIME in code and f'onnxruntime-web@{version}/' in space.RUNTIME
    assert space.RUNTIME in (published / 'index.html').read_text()
    hashes = re.findall(r"RUNTIME}([\w.-]+)`,\s+integrity: 'sha384-([^']+)'", code)
    assert len(hashes) == 2
    for name, expected in hashes:
        data = (package / 'dist' / name).read_bytes()
        assert base64.b64encode(hashlib.sha384(data).digest()).decode() == expected


def test_serve_shows_the_page_until_ctrl_c_and_says_if_the_port_is_taken(tmp_path, monkeypatch, capsys):
    def look(server):
        threading.Thread(target=server.handle_request, daemon=True).start()
        with urllib.request.urlopen(f'http://127.0.0.1:{server.server_port}') as response:
            assert b'<main>' in response.read()
        raise KeyboardInterrupt

    monkeypatch.setattr(serve.http.server.ThreadingHTTPServer, 'serve_forever', look)
    with serve.make_server(tmp_path) as other:
        port = str(other.server_port)
        assert serve.main(['--port', port]) == 2
    assert capsys.readouterr().err == f'serve.py: port {port}: Address already in use; --port takes another\n'
    assert serve.main(['--port', port]) == 0
    assert capsys.readouterr().out == f'{NAME} at http://localhost:{port}\n'


# The page as it is published


def test_published_page_loads_itself_and_the_runtime_and_nothing_else_and_may_not(
    visit, published_address, node_modules
):
    def cdn(route):
        path = node_modules / 'onnxruntime-web' / 'dist' / Path(route.request.url).name
        route.fulfill(path=path, headers={'access-control-allow-origin': '*'})

    seen = visit(published_address, lambda page: page.route(f'{CDN}**', cdn))
    seen.sample('frog').click()
    seen.expect('frog')
    outside = {url for url in seen.requests if not url.startswith((published_address, 'blob:'))}
    assert outside == {f'{space.RUNTIME}{name}' for name in ('ort.wasm.bundle.min.mjs', 'ort-wasm-simd-threaded.wasm')}
    assert 'twin' not in ' '.join(seen.requests) and seen.console == []
    for forbidden in (
        "fetch('https://example.org/')",
        "fetch('https://cdn.jsdelivr.net/npm/other/')",
        "import('https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/ort.min.mjs')",
        "new Promise((done) => setTimeout(done)).then(() => new Function('1'))",
    ):
        assert seen.page.evaluate(f'{forbidden}.then(() => "allowed", (error) => error.name)') != 'allowed'
    assert all('Content Security Policy' in line for line in seen.console if 'ERR_' not in line)
    assert not any('example.org' in url for url in seen.requests if url.startswith('http:'))


@pytest.mark.slow
def test_first_prediction_from_a_warm_cache_takes_two_seconds(visit, address):
    """From the navigation to the result of a sample that is clicked at once; `pytest -s` shows the figures."""
    seen = visit(address)
    seconds = []
    for _ in range(6):
        begun = time.perf_counter()
        seen.page.goto(address)
        seen.sample('cat').click()
        seen.expect('cat')
        seconds.append(time.perf_counter() - begun)
    print('first prediction, s:', *(f'{each:.1f}' for each in seconds))
    assert statistics.median(seconds[1:]) < 2


# What people give


def test_samples_and_nets_are_run_with_the_keyboard_alone(visit, address, settings):
    seen = visit(address)
    page = seen.page

    def tab_to(locator):
        for _ in range(40):
            page.keyboard.press('Tab')
            if locator.evaluate('(element) => element === document.activeElement'):
                return page.keyboard.press('Enter')
        raise AssertionError(f'{locator} is not reached')

    for label in settings['data']['labels']:
        tab_to(seen.sample(label))
        seen.expect(label)
    assert page.locator('#best li').count() == 3 and page.locator('#net-bytes').inner_text() == '1.43 MB'
    assert page.locator('#runtime-bytes').inner_text() == '14.3 MB'
    answers = []
    for net in settings['nets']:
        name = f'Run: {"ShaResNet" if net["shared"] else "Unshared twin"}, {net["kind"]}'
        button = page.get_by_role('button', name=name)
        tab_to(button)
        answer = button.locator('xpath=following-sibling::*[@role="status"]').filter(has_text=' ms')
        answer.wait_for()
        answers.append(answer.inner_text().rpartition(',')[0])
    assert answers[0] == answers[1] and answers[2] == answers[3] and all(a.startswith('truck') for a in answers)
    seen.sample('cat').click()
    page.locator('.answer', has_text='cat').nth(3).wait_for()  # all that are loaded see each new image
    assert seen.console == []


def test_image_is_dropped_pasted_or_chosen_and_what_cannot_be_read_is_told(visit, address, tmp_path, release):
    samples = folder.load_sample(release.dataset)
    horse, ship, frog = (png(samples[i][0]) for i in (231, 154, 93))
    seen = visit(address)
    seen.give('drop', 'dataTransfer', horse)
    seen.expect('horse')
    seen.give('paste', 'clipboardData', ship)
    seen.expect('ship')
    seen.choose('frog.png', frog)
    seen.expect('frog')
    seen.give('drop', 'dataTransfer', b'', 'text/plain')
    seen.expect_failure('There is no image in what you dropped')
    seen.give('paste', 'clipboardData', b'', 'text/plain')
    seen.expect_failure('There is no image in what you pasted')
    for name, data, message in (
        ('notes.txt', b'words', 'not an image that the browser can read'),
        ('empty.png', b'', 'not an image that the browser can read'),
        ('cut.png', horse[:300], 'not an image that the browser can read'),
        ('photo.heic', HEIC, 'cannot read HEIC'),
    ):
        seen.choose(name, data)
        seen.expect_failure(message)
    large = tmp_path / 'large.png'
    with large.open('wb') as file:
        file.truncate(100_000_000)
    seen.page.set_input_files('#file', large)
    seen.expect_failure('too large: 100 MB')
    assert seen.page.locator('#best li').first.inner_text().startswith('frog')  # what was told before is still there
    seen.choose('horse.png', horse)
    seen.expect('horse')
    assert seen.page.get_by_role('alert').inner_text() == '' and seen.console == []


def test_camera_gives_a_picture_and_says_why_not(visit, address):
    seen = visit(address)
    page = seen.page
    page.get_by_role('button', name='Camera').click()
    page.wait_for_timeout(500)  # the camera begins with nothing
    page.get_by_role('button', name='Take the picture').click()
    seen.expect(r'\w')
    assert page.evaluate("document.getElementById('video').srcObject.getTracks()[0].readyState") == 'ended'
    for name, message in {'NotAllowedError': 'Allow it', 'NotFoundError': 'None was found'}.items():
        page.evaluate(
            'name => { navigator.mediaDevices.getUserMedia = async () => { throw new DOMException("", name) } }', name
        )
        page.get_by_role('button', name='Camera').click()
        seen.expect_failure(message)
    page.evaluate("Object.defineProperty(navigator, 'mediaDevices', { value: undefined })")
    page.get_by_role('button', name='Camera').click()
    seen.expect_failure('over https alone')


# What fails


def refuse(page, pattern, **answer):
    page.route(pattern, lambda route: route.fulfill(**answer) if answer else route.abort())


FAILURES = {
    'no network for the runtime': ('**/*.wasm', {}, 'simd-threaded.wasm could not be loaded. Are you online?'),
    'another runtime': ('**/*.wasm', {'body': 'x'}, 'not the file that this page was made with'),
    'no such net': ('**/*.onnx', {'status': 404}, 'The server answers 404'),
    'no network for the net': ('**/*.onnx', {}, 'model_quantized.onnx could not be loaded. Are you online?'),
}


def test_what_could_not_be_loaded_is_told_and_loaded_when_tried_again(visit, address):
    pattern, answer, message = FAILURES['no network for the runtime']
    seen = visit(address, lambda page: refuse(page, pattern, **answer))
    seen.expect_failure(message)
    for pattern_, answer, message in [*FAILURES.values()][1:]:
        seen.page.unroute(pattern)
        pattern = pattern_
        refuse(seen.page, pattern, **answer)
        seen.sample('bird').click()
        seen.expect_failure(message)
    seen.page.unroute(pattern)
    seen.page.get_by_role('button', name='Try again').click()
    seen.expect('bird')
    assert seen.page.get_by_role('alert').inner_text() == ''
    refuse(seen.page, '**/twin*')
    run_twin = seen.page.get_by_role('button', name='Run: Unshared twin, int8')
    run_twin.click()
    seen.page.locator('.answer.wrong', has_text='twin_model_quantized.onnx could not be loaded').wait_for()
    seen.page.unroute('**/twin*')
    run_twin.click()
    seen.page.locator('.answer', has_text='bird').nth(1).wait_for()


def test_browser_without_webassembly_is_told(visit, address):
    seen = visit(address, lambda page: page.add_init_script('delete window.WebAssembly'))
    seen.sample('bird').click()
    seen.expect_failure('This browser has no WebAssembly')


# How it looks

CONTRAST = """(selectors) => {
    const channels = (color) => color.match(/[\\d.]+/g).map(Number);
    const luminance = (color) => channels(color).slice(0, 3).map((c) => c / 255)
        .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (element) => {
        const color = getComputedStyle(element).backgroundColor;
        return channels(color)[3] === 0 ? behind(element.parentElement) : color;
    };
    return selectors.map((selector) => {
        const element = document.querySelector(selector);
        const pair = [getComputedStyle(element).color, behind(element)].map(luminance).sort((a, b) => b - a);
        return (pair[0] + 0.05) / (pair[1] + 0.05);
    });
}"""


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_page_fits_a_narrow_screen_and_is_read_in_light_and_dark(visit, address, scheme):
    seen = visit(address, viewport={'width': 320, 'height': 640}, color_scheme=scheme, reduced_motion='reduce')
    seen.choose('notes.txt', b'words')
    seen.expect_failure('not an image')
    width = 'document.documentElement.scrollWidth'
    assert seen.page.evaluate(width) == 320
    texts = ['h1', '.lead', '#choose', '#camera', '#hint', '.error p', '.knows', '.text', '.who .small', 'footer p']
    for selector, contrast in zip(texts, seen.page.evaluate(CONTRAST, texts), strict=True):
        assert contrast >= 4.5, (selector, contrast)
    dark = seen.page.evaluate('getComputedStyle(document.body).backgroundColor') == 'rgb(20, 20, 23)'
    assert dark == (scheme == 'dark')
    for name in ('Choose image', 'Camera', 'Run: ShaResNet, int8'):
        box = seen.page.get_by_role('button', name=name).bounding_box()
        assert box['height'] >= 44  # of a finger
    seen.sample('deer').click()
    seen.expect('deer')
    assert seen.page.evaluate(width) == 320


# Python's predictions

CLASSIFY = """async ([files, precisions]) => {
    const { decode, normalize, prepare } = await import('./image.js');
    const { loadSettings, open } = await import('./net.js');
    const settings = await loadSettings();
    const answers = [];
    for (const file of files) {
        const bytes = Uint8Array.from(atob(file), (c) => c.charCodeAt(0));
        const pixels = prepare(await decode(new Blob([bytes])), settings.input);
        const answer = { pixels: [...pixels] };
        for (const kind of precisions) {
            const { classify } = await open(settings.nets.find((net) => net.kind === kind && net.shared));
            answer[kind] = (await classify(normalize(pixels, settings.input))).probabilities;
        }
        answers.push(answer);
    }
    return answers;
}"""


def classify(seen, files, *kinds):
    """Pixels, and probabilities, of files in the browser."""
    return seen.page.evaluate(CLASSIFY, [[base64.b64encode(file).decode() for file in files], kinds])


def pixels_of(answer):
    return np.array(answer['pixels'], np.uint8).reshape(32, 32, 4)[..., :3]


@pytest.mark.parametrize('kind', ['fp32', pytest.param('int8', marks=pytest.mark.slow)])
def test_predictions_of_100_images_are_those_of_python(visit, address, release, kind):
    model = folder.load(release.path)
    images = folder.load_sample(release.dataset)[::10]
    inputs = torch.stack([image for image, _ in folder.preprocess_sample(model, release.dataset, step=10)])
    answers = classify(visit(address), [png(image) for image, _ in images], kind)
    for answer, (image, _) in zip(answers, images, strict=True):
        assert np.array_equal(pixels_of(answer), np.array(image))
    found = torch.tensor([answer[kind] for answer in answers])
    file = {kind: name for name, kind in folder.KINDS.items()}[kind]
    expected = [torch.from_numpy(run(open_session(release.path / 'onnx' / file), inputs.numpy()))]
    if kind == 'fp32':
        with torch.inference_mode():
            expected.append(model(inputs))
    for logits in expected:
        assert torch.equal(found.argmax(1), logits.argmax(1))
        if kind == 'fp32':
            assert torch.allclose(found, logits.softmax(1), atol=1e-3)


def test_larger_and_smaller_images_are_prepared_as_timm_does(visit, address, release):
    model = folder.load(release.path)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model), normalize=False)
    rng = np.random.default_rng(0)
    photo = folder.load_sample(release.dataset)[93][0]
    images = [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        for width, height in ((33, 32), (32, 45), (20, 31), (500, 333), (333, 600), (301, 1207))
    ]
    images += [photo.resize((1600, 1200)), photo.convert('L').resize((48, 40))]
    answers = classify(visit(address), [png(image) for image in images])
    for answer, image in zip(answers, images, strict=True):
        expected = transform(image.convert('RGB')).permute(1, 2, 0).numpy()
        difference = np.abs(pixels_of(answer).astype(int) - expected)
        # Pillow 13 resizes the columns first where that is cheaper, which rounds otherwise
        assert difference.max() <= (image.height > 2 * image.width), image.size

    # A photo that lies on its side, as cameras write it
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    photo.resize((640, 480)).save(turned, 'jpeg', exif=exif, quality=95)
    (answer,) = classify(visit(address), [turned.getvalue()])
    expected = transform(ImageOps.exif_transpose(Image.open(turned))).permute(1, 2, 0).numpy()
    assert np.abs(pixels_of(answer).astype(int) - expected).max() <= 2

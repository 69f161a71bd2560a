"""Memory and latency of deployed nets in one runtime after the other, each against its unshared twin. Run by hand:

    python tests/benchmarks/deploy.py sharesnet34 sharesnet50
    python tests/benchmarks/deploy.py sharesnet152 --precisions fp32 --batch-sizes    (memory only)
    python tests/benchmarks/deploy.py sharesnet50 --runtimes ncnn mnn --batch-sizes
    python tests/benchmarks/deploy.py sharesnet164_cifar --runtimes mnn nncf --accuracy DATA

Three forms of each net, with batch norms that are not trivial (`tests/models.py`): `exported` as it is, as any exporter
does it, `folded` by `timm_sharesnet.fold`, and the `twin`, unshared and folded by the same function. int8 is calibrated
with random images, so its latency and memory mean something here, and its accuracy nothing.

Memory is the growth of a fresh process, MiB, the median of several: `loaded` by the session, with what the allocator
keeps of what was freed while it was made; `held` by the session alone (after `malloc_trim`); `peak`, with three
inferences; `peak_unpacked`, that with `session.disable_prepacking`. OpenVINO is used as in its guide, read_model and
compile_model, and computes in fp32. Latency (BATCHxTHREADS): the forms run in turns, and each turn gives a ratio to the
twin; the medians are kept. It means something only if nothing else runs.

What is measured replaces what tests/benchmarks/results/deploy-MACHINE-VERSIONS.csv has of these nets; the picture
hub/deploy.svg is drawn from all rows. Printed, too, are the bytes of gradients and optimizer state, counted on the meta
device. Needs the extra `timm-sharesnet[bench]`. Exit code 0, or 2 for options that it does not know.

The runtimes of devices (`runtimes.py`) take one image, and each is skipped where its packages are not installed. The
net is folded, as the twin is. Their rows go to devices-MACHINE-VERSIONS.csv, with the versions of the runtime, and
`error`: the largest difference from torch's logits on eight images of noise, relative to the largest logit; the tables
of this folder's README are written of them. What int8 costs is measured with `--accuracy DATA` instead, and nothing
else then: top-1 of the packaged weights on the images of DATA/test/CLASS, calibrated with some of DATA/train.
"""

import argparse
import csv
import functools
import importlib.util
import itertools
import platform
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import device_tables
import matplotlib
import numpy as np
import onnxruntime
import runtimes
import timm
import torch
from runtimes import size_of

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import SHARED, TWINS, create, error  # noqa: E402

from timm_sharesnet import fold, unshare  # noqa: E402
from timm_sharesnet.export import export_onnx, inspect, open_session, quantize, run, session_memory  # noqa: E402
from timm_sharesnet.images import FolderImages  # noqa: E402

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

RESULTS = Path(__file__).with_name('results')
PICTURE = Path(__file__).parents[2] / 'hub' / 'deploy.svg'
FORMS = {'exported': 'as it is', 'folded': 'folded', 'twin': 'unshared twin'}
LABELS = ['net', 'precision', 'runtime', 'form']
PACKAGED = {'sharesnet164_cifar': 'sharesnet164_cifar.cpu_c10'}  # nets whose weights come with the package
CALIBRATION = 256  # images
PRECISIONS = ['fp32', 'int8', 'fp16']
COLOURS = {'exported': '#b0b0bc', 'folded': '#c44e52', 'twin': '#4c72b0'}

OPENVINO = """
import numpy, openvino

core = openvino.Core()

def load(path):
    model = core.read_model(path)
    compiled = core.compile_model(model, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda: compiled(numpy.zeros([1, *(d.get_length() for d in list(model.inputs[0].partial_shape)[1:])], 'f'))
"""


def ort_runner(path, threads):
    session = open_session(path, intra_op_num_threads=threads)
    return lambda images: run(session, images)


def openvino_runner(path, threads):
    compiled = runtimes.compile_openvino(path, threads)
    return lambda images: compiled(images)[0]


RUNTIMES = {  # of the ONNX files
    'onnxruntime': (session_memory, ort_runner),
    'openvino': (functools.partial(session_memory, load=OPENVINO), openvino_runner),
}


def write_files(name, precisions, folder):
    """Files of the three forms: (form, precision) -> path."""
    model = create(name)
    size = model.pretrained_cfg['input_size']
    images = np.random.default_rng(0).standard_normal((8, *size), 'float32')
    paths = {}
    for form, net in (('exported', model), ('folded', fold(model)), ('twin', fold(unshare(model)))):
        paths[form, 'fp32'] = str(folder / f'{form}.onnx')
        export_onnx(net, paths[form, 'fp32'], size)
        if 'int8' in precisions:
            paths[form, 'int8'] = str(folder / f'{form}_int8.onnx')
            quantize(paths[form, 'fp32'], paths[form, 'int8'], images[:, None])
    return paths, size


def training_bytes(name):
    """Bytes of gradients, which ranks exchange at each step, and of AdamW's state, of the net and of its twin."""
    found = []
    for model in (timm.create_model(name, device='meta'), timm.create_model(TWINS[name], device='meta')):
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.step()
        state = [t for values in optimizer.state.values() for t in values.values()]
        grads = [p.grad for p in model.parameters()]
        found.append([sum(t.numel() * t.element_size() for t in tensors) for tensors in (grads, state)])
    return found


def measure_latency(paths, make_runner, images, threads, turns):
    """Median time of each form, ms, and median ratio to the twin."""
    runners = {form: make_runner(path, threads) for form, path in paths.items()}
    times = {form: [] for form in runners}
    for turn in range(turns + 2):
        for form in list(runners)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            runners[form](images)
            if turn > 1:  # the first two warm up
                times[form].append(time.perf_counter() - start)
    ratios = {f: statistics.median(np.divide(t, times['twin'])) for f, t in times.items()}
    return {form: (1000 * statistics.median(t), ratios[form]) for form, t in times.items()}


def measure_onnx(name, args, folder):
    """The rows of a net in the runtimes that take its ONNX files."""
    paths, size = write_files(name, args.precisions, folder)
    rows = []
    for what, (ours, twin) in zip(('gradients', 'AdamW state'), zip(*training_bytes(name), strict=True), strict=True):
        print(f'{name} {what}: {ours / 1e6:.1f} MB, twin {twin / 1e6:.1f} MB, ratio {ours / twin:.3f}')
    for precision, runtime in itertools.product([p for p in args.precisions if p != 'fp16'], args.onnx_runtimes):
        measure_memory, make_runner = RUNTIMES[runtime]
        files = {form: paths[form, precision] for form in FORMS}
        new = {}
        for form, path in files.items():
            contents = inspect(path)
            memory = zip(*(measure_memory(path) for _ in range(args.processes)), strict=True)
            loaded, held, peak = (round(statistics.median(values), 1) for values in memory)
            new[form] = {
                **dict(zip(LABELS, (name, precision, runtime, form), strict=True)),
                'file_mb': round(contents.bytes / 1e6, 2),
                'kernels': contents.kernels if runtime == 'onnxruntime' else '',
                'uses': contents.uses if runtime == 'onnxruntime' else '',
                'weights_mb': round(contents.weight_bytes / 1e6, 2) if runtime == 'onnxruntime' else '',
                'loaded_mib': loaded,
                'held_mib': held,
                'peak_mib': peak,
            }
            if (precision, runtime) == ('int8', 'onnxruntime'):  # packs the kernel again for each use
                unpacked = session_memory(path, 'session.disable_prepacking=1')
                new[form]['peak_unpacked_mib'] = round(unpacked.peak, 1)
        for batch_size, threads in itertools.product(args.batch_sizes, args.threads):
            images = np.random.default_rng(0).standard_normal((batch_size, *size), 'float32')
            latency = measure_latency(files, make_runner, images, threads, args.turns)
            for form, (ms, ratio) in latency.items():
                new[form] |= {
                    f'ms_{batch_size}x{threads}': f'{ms:.2f}',
                    f'ratio_{batch_size}x{threads}': f'{ratio:.3f}',
                }
        rows += new.values()
        for row in new.values():
            tell(row)
    return rows


def measure_device(name, key, args, folder):
    """The rows of a net in a runtime of devices."""
    runtime, model = runtimes.RUNTIMES[key], create(name)
    images = torch.randn(8, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    paths, rows = {}, {}
    # The twin's kernels are its own: `unshare`'s differ by a scale of each channel, which int8 takes out, and OpenVINO
    # stores those once that are equal
    for form, net in (('folded', fold(model)), ('twin', fold(create(TWINS[name])))):
        paths[form] = str(folder / form)
        runtime.convert(net, images, paths[form])
        rows[form] = {
            **dict(zip(LABELS, (name, *key[::-1], form), strict=True)),
            'version': runtime.version(),
            'file_mb': round(size_of(paths[form]) / 1e6, 2),
        }
        if runtime.load is None:
            continue
        size = map(str, images.shape[1:])
        measure_memory = functools.partial(session_memory, paths[form], *size, load=runtimes.loader(key))
        memory = zip(*(measure_memory() for _ in range(args.processes)), strict=True)
        rows[form] |= zip(
            ('loaded_mib', 'held_mib', 'peak_mib'), (round(statistics.median(m), 1) for m in memory), strict=True
        )
        with torch.inference_mode():
            rows[form]['error'] = (
                f'{error(torch.from_numpy(runtime.load(paths[form], 1)(images.numpy())), net(images)):.1e}'
            )
    for threads in args.threads if 1 in args.batch_sizes and runtime.load else []:
        latency = measure_latency(paths, runtime.load, images[:1].numpy(), threads, args.turns)
        for form, (ms, ratio) in latency.items():
            rows[form] |= {f'ms_1x{threads}': f'{ms:.2f}', f'ratio_1x{threads}': f'{ratio:.3f}'}
    return list(rows.values())


def measure_accuracy(name, key, data, folder):
    """The rows of a net with its packaged weights in a runtime of devices."""
    runtime = runtimes.RUNTIMES[key]
    model = timm.create_model(PACKAGED[name], pretrained=True).eval()
    training, test = FolderImages(data / 'train', model), FolderImages(data / 'test', model)
    calibration = torch.cat(list(training.batches(training.spread(CALIBRATION))))
    classes = sorted(path.name for path in (data / 'test').iterdir())
    labels = [classes.index(Path(name).parent.name) for name in test.reader.filenames(absolute=True)]
    rows = []
    for form, net in (('folded', fold(model)), ('twin', fold(unshare(model)))):
        path = str(folder / form)
        runtime.convert(net, calibration, path)
        infer = runtime.load(path, 1)
        found = np.concatenate([infer(batch.numpy()).argmax(1) for batch in test.batches(range(len(test)))])
        row = dict(zip(LABELS, (name, *key[::-1], form), strict=True))
        rows.append(row | {'version': runtime.version(), 'top1': f'{100 * (found == labels).mean():.2f}'})
    return rows


def tell(row):
    print(*(f'{k} {v}' for k, v in row.items() if v != ''), sep=', ', flush=True)


def chosen_devices(args):
    """The runtimes of devices, by name and precision, that are asked for and installed. It says which are not."""
    chosen = []
    for (name, precision), runtime in runtimes.RUNTIMES.items():
        if name in args.runtimes and precision in args.precisions and not (args.accuracy and runtime.load is None):
            if runtime.missing():
                print(f'{name} {precision}: skipped, {" and ".join(runtime.missing())} is not installed')
            else:
                chosen.append((name, precision))
    return chosen


def results_file(kind):
    cpu = next((m[1] for m in re.finditer(r'model name\s*: (.+)', Path('/proc/cpuinfo').read_text())), '')
    machine = '-'.join(re.findall(r'\w+', cpu or platform.machine()))
    versions = f'torch{torch.__version__}'
    if kind == 'deploy':
        import openvino

        versions = f'ort{onnxruntime.__version__}-ov{openvino.__version__.split("-")[0]}-{versions}'
    return RESULTS / f'{kind}-{machine}-{versions}.csv'


def update(path, rows):
    """Put what was measured into a CSV, in place of what it has of the same cases."""
    old = list(csv.DictReader(path.open())) if path.exists() else []
    cases = {tuple(row[k] for k in LABELS): row for row in old}
    for row in rows:
        case = tuple(row[k] for k in LABELS)
        cases[case] = cases.get(case, {}) | row
    rows = sorted(cases.values(), key=lambda row: SHARED.index(row['net']))
    columns = dict.fromkeys(itertools.chain.from_iterable(rows))
    with path.open('w', newline='') as f:
        writer = csv.DictWriter(f, list(columns), restval='')
        writer.writeheader()
        writer.writerows(rows)
    return rows


def draw(rows):
    """Memory that a session holds, fp32, a panel a runtime."""
    rows = [row for row in rows if row['precision'] == 'fp32']
    runtimes = {'onnxruntime': 'ONNX Runtime', 'openvino': 'OpenVINO'}
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout='constrained')
    for panel, (runtime, title) in zip(panels, runtimes.items(), strict=True):
        held = {(r['net'], r['form']): float(r['held_mib']) for r in rows if r['runtime'] == runtime}
        nets = [net for net in SHARED if (net, 'folded') in held]
        for i, (form, label) in enumerate(FORMS.items()):
            bars = panel.barh(
                [y + 0.27 * (i - 1) for y in range(len(nets))],
                [held[net, form] for net in nets],
                0.25,
                label=label,
                color=COLOURS[form],
            )
            panel.bar_label(bars, fmt='%.0f', fontsize=7, padding=2)
        panel.set(title=title, xlabel='memory that a session holds, MiB', yticks=range(len(nets)), yticklabels=nets)
        panel.spines[['top', 'right']].set_visible(False)
        panel.invert_yaxis()
    panels[0].invert_yaxis()  # the axis is shared: once is enough
    panels[1].legend(frameon=False)
    matplotlib.rcParams.update({'svg.hashsalt': 'deploy', 'svg.fonttype': 'none'})
    figure.savefig(PICTURE, metadata={'Date': None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('nets', nargs='*', metavar='NET', help='all seven by default')
    parser.add_argument('--precisions', nargs='*', default=PRECISIONS, choices=PRECISIONS)
    names = [*RUNTIMES, *dict.fromkeys(name for name, _ in runtimes.RUNTIMES)]
    parser.add_argument('--runtimes', nargs='*', default=names, choices=names)
    parser.add_argument('--batch-sizes', nargs='*', type=int, default=[1, 8], help='of the latency; none: memory only')
    parser.add_argument('--threads', nargs='*', type=int, default=[1, 2])
    parser.add_argument('--turns', type=int, default=15)
    parser.add_argument('--processes', type=int, default=5, help='that measure memory')
    parser.add_argument('--accuracy', type=Path, metavar='DATA', help='top-1 of packaged weights, and nothing else')
    args = parser.parse_args()
    unknown = set(args.nets) - set(SHARED)
    if unknown:
        parser.error(f'unknown net {", ".join(sorted(unknown))}, choose from {", ".join(SHARED)}')
    if args.accuracy and not set(args.nets) <= set(PACKAGED):
        parser.error(f'--accuracy takes nets whose weights come with the package: {", ".join(PACKAGED)}')
    nets = args.nets or (PACKAGED if args.accuracy else SHARED)
    RESULTS.mkdir(exist_ok=True)
    args.onnx_runtimes = [] if args.accuracy else [name for name in RUNTIMES if name in args.runtimes]
    if args.onnx_runtimes and importlib.util.find_spec('openvino') is None:
        args.onnx_runtimes = []  # the file of results has its version in its name
        print('onnxruntime and openvino: skipped, openvino is not installed')
    devices = chosen_devices(args)
    for name in nets:
        if args.onnx_runtimes:
            with tempfile.TemporaryDirectory() as folder:
                rows = update(results_file('deploy'), measure_onnx(name, args, Path(folder)))
            draw(rows)
        for key in devices:
            with tempfile.TemporaryDirectory() as folder:
                if args.accuracy:
                    rows = measure_accuracy(name, key, args.accuracy, Path(folder))
                else:
                    rows = measure_device(name, key, args, Path(folder))
            for row in rows:
                tell(row)
            update(results_file('devices'), rows)
            device_tables.write()


if __name__ == '__main__':
    import logging

    logging.disable()
    main()

"""The tables of what `deploy.py` measured in the runtimes of devices, of the rows of all machines."""

import csv

from share_tables import RESULTS, markdown, put

NETS = 'sharesnet34', 'sharesnet50', 'sharesnet152', 'sharesnet164_cifar'
NAMES = {
    'ncnn': 'ncnn, as pnnx writes it',
    'ncnn-shared': 'ncnn, `share_ncnn`',
    'mnn': 'MNN, `--optimizePrefer 1`',
    'mnn-default': 'MNN, by default',
    'coreml': 'Core ML',
    'litert': 'LiteRT',
    'executorch': 'ExecuTorch',
    'aoti': 'AOTInductor',
    'nncf': 'NNCF, OpenVINO',
    'onnxruntime-optimized': 'ONNX Runtime, optimised file',
    'onnxruntime-inputs': 'ONNX Runtime, shared kernels as inputs',
}


def read():
    """The rows of each net in each runtime and precision, by their form."""
    found = {}
    for path in sorted(RESULTS.glob('devices-*.csv')):
        with path.open(newline='') as file:
            for row in csv.DictReader(file):
                key = row['net'], row['runtime'], row['precision']
                found.setdefault(key, {})[row['form']] = row
    return found


def tables(found):
    """The tables, by what their first lines begin with."""
    return {
        '| file, MB |': of_nets(found, 'file, MB', file_size),
        '| held, MiB |': of_nets(found, 'held, MiB', held),
        '| top-1, int8 |': accuracies(found),
    }


def of_nets(found, title, cell):
    """A line a runtime and precision that was measured, a column a net."""
    lines = []
    precisions = sorted({precision for _, _, precision in found})
    for runtime, precision in ((r, p) for r in NAMES for p in precisions):
        cells = [cell(**found.get((net, runtime, precision), {})) for net in NETS]
        if set(cells) != {'-'}:
            lines.append([NAMES[runtime], precision, *cells])
    return markdown([title, '', *(f'`{net}`' for net in NETS)], lines)


def file_size(folded=None, twin=None):
    """That of the folded net, that of its twin, and the ratio."""
    if not (folded and folded['file_mb']):
        return '-'
    ours, other = (float(row['file_mb']) for row in (folded, twin))
    return f'{ours:.1f} / {other:.1f}, {ours / other:.2f}'


def held(folded=None, twin=None):
    """What a process holds of the folded net, and of its twin, and the ratio of their latencies."""
    if not (folded and folded['held_mib']):
        return '-'
    ours, other = (float(row['held_mib']) for row in (folded, twin))
    return f'{short(ours)} / {short(other)}, {float(folded["ratio_1x1"]):.2f}'


def short(mib):
    return f'{mib:.0f}' if mib >= 30 else f'{mib:.1f}'


def accuracies(found):
    """What int8 leaves on real images."""
    lines = []
    for name, title in NAMES.items():
        forms = found.get(('sharesnet164_cifar', name, 'int8'), {})
        if forms and all(row['top1'] for row in forms.values()):
            lines.append([title, forms['folded']['top1'], forms['twin']['top1']])
    return markdown(['top-1, int8', 'folded', 'twin'], lines)


def write():
    """Replace the tables of this folder's README."""
    page = RESULTS.with_name('README.md')
    page.write_text(put(page.read_text(), tables(read())))

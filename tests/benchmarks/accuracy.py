"""Results of all nets, as timm has them in results/: one file, from which README.md's table and a picture are made.

    python tests/benchmarks/accuracy.py

Written are results/accuracy-MACHINE-VERSIONS.csv, the table of models in README.md, and hub/accuracy.svg (after Figure
5 of the paper), and the paper's Tables 1 to 3 are printed. Parameters, convolutions, GMACs and activations are counted
on the running nets; accuracies are those of hub/manifest.json and of the paper; file and session memory are those of
the results/deploy-MACHINE-VERSIONS.csv of the newest versions (the folded net in ONNX Runtime, fp32), hence the name.
It needs matplotlib.
"""

import csv
import re
import sys
from pathlib import Path

import timm
import torch
from packaging.version import Version

RESULTS = Path(__file__).parent / 'results'
ROOT = Path(__file__).parents[2]
README = ROOT / 'README.md'
PICTURE = ROOT / 'hub' / 'accuracy.svg'

sys.path.append(str(ROOT / 'hub'))
import catalog  # noqa: E402
import folder  # noqa: E402
from catalog import DATASETS, NETS  # noqa: E402

COLUMNS = (
    'model dataset img_size param_count convs gmacs macts tag top1 top5 top1_paper top5_paper table onnx_mb '
    'session_mib twin'
).split()
SHARED = [name for name, net in NETS.items() if net.twin != name]


def main():
    deploy = newest(RESULTS.glob('deploy-*.csv'))
    rows = measure(deploy)
    path = deploy.with_name(deploy.name.replace('deploy', 'accuracy', 1))
    text = put_table(README.read_text(encoding='utf-8'), models_table(rows))
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    README.write_text(text, encoding='utf-8')
    draw(rows)
    print('\n\n'.join(paper_tables(rows)))


def newest(paths):
    """The file of the newest versions, ONNX Runtime's first, as its name tells: a clone does not keep the times."""

    def versions(path):
        return [Version(version) for version in re.findall(r'-(?:ort|ov|torch)(\d[^-]*)', path.stem)], path.name

    return max(paths, key=versions)


def measure(deploy):
    """The rows of all nets, given a file of deployed nets: ours first, then the unshared ones."""
    with deploy.open(newline='', encoding='utf-8') as file:
        deployed = {
            row['net'] if row['form'] == 'folded' else NETS[row['net']].twin: row
            for row in csv.DictReader(file)
            if (row['precision'], row['runtime']) == ('fp32', 'onnxruntime') and row['form'] != 'exported'
        }
    manifest, _ = catalog.OURS.read()
    twins = dict.fromkeys(NETS[name].twin for name in SHARED)
    rows = []
    for name in (*SHARED, *twins, *(name for name in NETS if name not in SHARED and name not in twins)):
        net, paper = paper_of(name)
        model = timm.create_model(name).eval()
        counts = folder.measure(model)
        best = find_best(name, manifest)
        accuracy = manifest[best]['accuracy'] if best else {'top1': '', 'top5': ''}
        rows.append(
            {
                'model': name,
                'dataset': DATASETS[net.dataset].name,
                'img_size': model.pretrained_cfg['input_size'][-1],
                'param_count': counts['parameters'],
                'convs': count_convolutions(model),
                'gmacs': counts['gmacs'],
                'macts': counts['activations'],
                'tag': best.partition('.')[2] if best else '',
                'top1': accuracy['top1'],
                'top5': accuracy['top5'],
                'top1_paper': paper.top1,
                'top5_paper': '' if paper.top5 is None else paper.top5,
                'table': paper.table,
                'onnx_mb': deployed[name]['file_mb'] if name in deployed else '',
                'session_mib': deployed[name]['held_mib'] if name in deployed else '',
                'twin': net.twin if name in SHARED else '',
            }
        )
    return rows


def find_best(name, manifest):
    """The most accurate weights of a net as the paper has it, None if there are none."""
    trained = {
        n: entry['accuracy']['top1']
        for n, entry in manifest.items()
        if n.partition('.')[0] == name and entry['accuracy'] and not catalog.other_args(name, entry['model_args'])
    }
    return max(trained, key=trained.get, default=None)


def paper_of(name):
    """The entry that a net belongs to, its own or its shared net's, and what the paper says of it."""
    for shared in SHARED:
        net = NETS[shared]
        if name in (shared, net.twin):
            return net, net.paper[name == net.twin]
    return NETS[name], NETS[name].paper[2]  # of like size


def count_convolutions(model):
    """Distinct convolutions, those of the shortcuts among them."""
    return sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())


def models_table(rows):
    """README's table, from the rows of the file."""
    by_name = {row['model']: row for row in rows}
    lines = [
        '| model | data | parameters | unshared twin | saving | GMACs | session, MiB: net / twin | paper, shared | '
        'paper, unshared | ours | weights |',
        '| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |',
    ]
    manifest, pins = catalog.OURS.read()
    for row in rows:
        if row['twin']:
            twin = by_name[row['twin']]
            name = f'{row["model"]}.{row["tag"]}'
            where = ', in the package' if pins.get(name, {}).get('packaged') else ''
            cells = [
                f'`{row["model"]}`',
                row['dataset'],
                f'{int(row["param_count"]):,}',
                f'`{row["twin"]}`, {int(twin["param_count"]):,}',
                f'{100 * (1 - int(row["param_count"]) / int(twin["param_count"])):.0f} %',
                f'{float(row["gmacs"]):.2f}',
                f'{float(row["session_mib"]):.0f} / {float(twin["session_mib"]):.0f}',
                f'{float(row["top1_paper"]):g}',
                f'{float(twin["top1_paper"]):g}',
                f'{float(row["top1"]):.2f}' if row['top1'] != '' else 'not trained',
                f'`{row["tag"]}`{where}' if name in manifest else 'none yet',
            ]
            lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def put_table(text, table):
    """README with the table of models replaced."""
    found = re.findall(r'^\| model \| data \|.*\n(?:\|.*\n)+', text, re.M)
    if len(found) != 1:
        sys.exit(f'{README.name} has {len(found)} tables of models instead of one')
    return text.replace(found[0], table + '\n')


def paper_tables(rows):
    """Tables 1 to 3 of the paper in Markdown: counts of the running nets, accuracies of the paper and ours."""
    by_name = {row['model']: row for row in rows}
    shared = [by_name[name] for name in SHARED]

    def millions(row):
        return f'{int(row["param_count"]) / 1e6:.2f} M'

    def both(row):
        return ' / '.join(f'{float(row[k]):g}' for k in ('top1_paper', 'top5_paper') if row[k] != '')

    first = ['| Table 1 | data | original | shared | decrease | convolutions, shared |', '| --- ' * 6 + '|']
    second = ['| Table 2 | data | original, top-1 / top-5 | shared | ours, top-1 |', '| --- ' * 5 + '|']
    third = ['| Table 3 | data | parameters | top-1 |', '| --- ' * 4 + '|']
    for row in shared:
        twin = by_name[row['twin']]
        saved = 100 * (1 - int(row['param_count']) / int(twin['param_count']))
        label = f'| {row["model"]} | {row["dataset"]} |'
        first.append(f'{label} {millions(twin)} | {millions(row)} | {saved:.0f} % | {row["convs"]} |')
        second.append(f'{label} {both(twin)} | {both(row)} | {row["top1"] or "-"} |')
    for row in rows:
        if row['table'] == 'Table 3':
            like = min(shared, key=lambda other: abs(int(other['param_count']) - int(row['param_count'])))
            for net in like, row:
                third.append(f'| {net["model"]} | {net["dataset"]} | {millions(net)} | {both(net)} |')
    return ['\n'.join(table) for table in (first, second, third)]


def draw(rows):
    """Accuracy against parameters, a panel a data set: the paper's nets and our own weights."""
    import matplotlib
    from matplotlib.figure import Figure

    by_name = {row['model']: row for row in rows}
    matplotlib.rcParams.update({'svg.hashsalt': 'accuracy', 'svg.fonttype': 'none'})
    figure = Figure(figsize=(11, 3.8), layout='constrained')
    panels = figure.subplots(1, 3, width_ratios=[1, 0.8, 1.2])
    for axes, dataset in zip(panels, ('CIFAR-10', 'CIFAR-100', 'ImageNet-1k'), strict=True):
        places = {}
        for row in (row for row in rows if row['dataset'] == dataset):
            places[row['model']] = x, y = int(row['param_count']) / 1e6, float(row['top1_paper'])
            if row['twin']:
                twin = by_name[row['twin']]
                axes.plot([x, int(twin['param_count']) / 1e6], [y, float(twin['top1_paper'])], color='#c8c8d0', lw=1)
            label, colour = ('shared, paper', '#c44e52') if row['twin'] else ('unshared, paper', '#4c72b0')
            axes.plot(x, y, 'o', color=colour, label=label, zorder=2)
            if row['top1'] != '':
                axes.plot(x, float(row['top1']), '*', color='#2e8b57', ms=11, label='ours, measured', zorder=3)
        axes.set(title=dataset, xlabel='parameters, M', ylabel='top-1, %')
        axes.margins(x=0.25, y=0.15)
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
        labels = {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        axes.legend(labels.values(), labels.keys(), fontsize=7, loc='lower right')
        figure.draw_without_rendering()  # settles where points are
        put_labels(axes, places)
    figure.savefig(PICTURE, metadata={'Date': None})


def put_labels(axes, places):
    """Write names beside points, name -> (x, y) of the data: each inside, on no other, no point and no line."""
    from matplotlib.transforms import Bbox

    lines = [line.get_path().interpolated(50).transformed(axes.transData) for line in axes.get_lines()]
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for line in lines for x, y in line.vertices]
    taken.append(axes.get_legend().get_window_extent())
    sides = {'left': 6, 'right': -6, 'center': 0}  # of the point that the text is aligned at
    for name, point in places.items():
        tried = []
        for dy in (-12, 6, -3, -20, 14):
            for side, dx in sides.items():
                text = axes.annotate(name, point, (dx, dy), textcoords='offset points', ha=side, fontsize=7)
                box = text.get_window_extent().padded(1)  # a browser's letters may be a little wider
                inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
                tried.append((sum(box.overlaps(other) for other in taken) + (not inside), len(tried), box, text))
        *_, box, best = min(tried)
        taken.append(box)
        for *_, text in tried:
            if text is not best:
                text.remove()


if __name__ == '__main__':
    main()

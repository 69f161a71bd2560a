"""The tables and the picture of what `share.py` measured, of the rows of all machines."""

import csv
import re
import statistics
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

RESULTS = Path(__file__).with_name('results')
README = Path(__file__).parents[2] / 'README.md'
PICTURE = Path(__file__).parents[2] / 'hub' / 'share.svg'
CASE = ['net', 'seed', 'what', 'rate', 'init', 'refit', 'teacher', 'plain_epochs', 'epochs', 'spread']
KIND = ['what', 'rate', 'init', 'refit', 'teacher']
RESULT = ['parameters', 'top1_shared', 'top1', 'cosine', 'cosine_aligned', 'macs', 'bytes']
RATES = 0.25, 0.5, 0.75, 1.0
DRAWN = 'preact-56'
SAME = 0.01  # of the parameters: savings that differ by less stand in one column
# what is measured at the same savings without training: its name, and its colour
METHODS = {
    'share': ('share, all stages alike', '#8c8c8c'),
    'budget': ('share, by budget', '#c44e52'),
    'low-rank': ('low rank', '#4c72b0'),
    'pruned': ('pruned', '#55a868'),
}
PLAIN = '#333333'
PEERS = 'low-rank', 'pruned'
SPREADS = 'uniform', 'harm', 'last'  # of what peers save, over the stages


def read(paths=None):
    """The rows of files, by default of all. Columns that older files have not are empty."""
    rows = []
    for path in sorted(RESULTS.glob('share-*.csv')) if paths is None else paths:
        with path.open(newline='') as file:
            rows += [{key: row.get(key, '') for key in CASE + RESULT} for row in csv.DictReader(file)]
    return rows


def grouped(rows, **values):
    """The rows with these values, those in one list that differ in the seed alone."""
    groups = {}
    for row in rows:
        if all(row[key] == value for key, value in values.items()):
            groups.setdefault(tuple(row[k] for k in CASE if k != 'seed'), []).append(row)
    return list(groups.values())


def mean(rows):
    return statistics.mean([float(row['top1']) for row in rows])


def untrained(rows):
    """Those of the plain net as it is, None if there are none."""
    return next(iter(grouped(rows, what='plain', epochs='0')), None)


def span(rows):
    """Top-1 of the worst and the best seed."""
    found = [float(row['top1']) for row in rows]
    return min(found), max(found)


def by_net(rows):
    """The rows of each net, without those of plain nets that were trained for other than the usual 8 epochs."""
    found = {}
    for row in rows:
        if row['plain_epochs'] == '8':
            found.setdefault(row['net'], []).append(row)
    return found


# ---- What is saved, and what is left


def curve(rows, what):
    """What a method leaves without training, by the rate, or the part of the parameters that it was to save.

    Of a peer it is the best spread.
    """
    groups = grouped(rows, what=what, refit='1', epochs='0', teacher='0')
    best = {}
    for group in (g for g in groups if what in PEERS or g[0]['init'] == 'align'):
        rate = float(group[0]['rate'])
        best[rate] = max(best.get(rate, []), group, key=lambda g: (len(g), mean(g) if g else 0))
    return dict(sorted(best.items()))


def saved(group, rows):
    """The part of the plain net's parameters that nets have less, the mean of the seeds."""
    whole = next((int(row['parameters']) for row in rows if row['what'] == 'plain'), 0)
    return 1 - statistics.mean([int(row['parameters']) for row in group]) / whole if whole else 0


def at(what, saving, rows):
    """A cell: what a method leaves where about this part of the parameters is saved, and what else is to be known."""
    nearest, group = SAME, None
    for rate, other in curve(rows, what).items():
        difference = abs((saved(other, rows) if what == 'share' else rate) - saving)
        if difference < nearest:
            nearest, group = difference, other
    more = ''
    if group and what in PEERS:
        full = max(int(row['macs']) for row in rows if row['macs'] and row['what'] != 'scratch')
        more = f', {100 * (statistics.mean([int(row["macs"]) for row in group]) / full - 1):.0f} %'
    elif group and saved(group, rows) > saving + SAME:  # one more kernel was too much
        more = f' at -{100 * saved(group, rows):.0f} %'
    return cell(group) + more


def cell(rows):
    """Mean, and number of seeds."""
    return f'{mean(rows):.2f} ({len(rows)})' if rows else '-'


def markdown(title, lines):
    return '\n'.join(f'| {" | ".join(line)} |' for line in [title, ['---'] * len(title), *lines])


def pages(rows):
    """The tables of each page, by what their first lines begin with."""
    nets = by_net(rows)
    return {
        README: {'| net, its top-1 |': overview({DRAWN: nets[DRAWN]})},
        RESULTS.with_name('README.md'): {
            '| net, its top-1 |': overview(nets),
            '| net | fp32 |': files(nets),
            '| net |  | parameters |': from_scratch(rows),
            f'| {DRAWN}, saved |': by_spread(nets[DRAWN]),
            f'| {DRAWN} | parameters |': details(nets[DRAWN], DRAWN),
        },
    }


def put(text, tables):
    """A page with its tables replaced."""
    for start, table in tables.items():
        found = re.findall(rf'^{re.escape(start)}.*\n(?:\|.*\n)+', text, re.M)
        if len(found) != 1:
            raise ValueError(f'{len(found)} tables begin with {start} instead of one')
        text = text.replace(found[0], table + '\n')
    return text


def overview(nets):
    """At what uniform rates save: what each method leaves, and by how much peers' multiply-accumulates are less."""
    lines = []
    for net, rows in nets.items():
        groups = curve(rows, 'share')
        savings = [saved(groups[rate], rows) if rate in groups else 0 for rate in RATES]
        cells = [f'-{100 * saving:.0f} %' if saving else '-' for saving in savings]
        lines.append([f'{net}, {cell(untrained(rows))}', 'parameters', *cells])
        for what, (name, _) in METHODS.items():
            cells = [at(what, saving, rows) if saving else '-' for saving in savings]
            if set(cells) != {'-'}:
                lines.append(['', name + (', MACs' if what in PEERS else ''), *cells])
    return markdown(['net, its top-1', '', *(f'rate {rate:g}' for rate in RATES)], lines)


def files(nets):
    """Files of ONNX Runtime: in fp32 and int8, of the plain net and of one that shares."""
    lines = []
    for net, rows in nets.items():
        line = [net]
        for what, shares in ('fp32', False), ('int8', False), ('int8', True):
            groups = [g for g in grouped(rows, what=what) if (float(g[0]['rate']) > 0) == shares]
            for group in groups[:1]:
                saved = f', saves {float(group[0]["rate"]):.0%}' if shares else ''
                size = statistics.mean([int(row['bytes']) for row in group]) / 1e6
                line.append(f'{cell(group)}, {size:.2f} MB{saved}')
            line += [] if groups else ['-']
        if line != [net, '-', '-', '-']:
            lines.append(line)
    return markdown(['net', 'fp32', 'int8', 'share by budget, int8'], lines)


def from_scratch(rows):
    """Nets trained from scratch for equally long."""
    names = {
        'plain': 'plain',
        '0.75': 'shared, all stages at rate 0.75',
        '0.75last': 'shared, last stages alone',
        '1.0': 'shared, rate 1',
        '1.0thinner': 'plain, thinner',
        '1.0shallower': 'plain, shallower',
    }
    found = {}
    for group in (g for what in ('plain', 'scratch') for g in grouped(rows, what=what, epochs='0')):
        row = group[0]
        kind = 'plain' if row['what'] == 'plain' else row['rate'] + row['spread']
        found.setdefault((row['net'], row['plain_epochs']), {})[kind] = group
    lines = []
    for (net, epochs), groups in found.items():
        title = f'{net}, {epochs} epochs'
        for kind, name in names.items():
            if kind in groups and len(groups) > 1:
                group = groups[kind]
                low, high = span(group)
                alike = (
                    groups.get('1.0', []) if kind == 'plain' else group
                )  # older rows have no MACs, sharing has the same
                macs = next((f'{int(row["macs"]) / 1e6:.1f}' for row in alike if row['macs']), '-')
                range_ = f'{low:.2f} to {high:.2f}' if len(group) > 1 else '-'
                size = f'{int(group[0]["parameters"]):,}'
                lines.append([title, name, size, macs, cell(group), range_])
                title = ''
    return markdown(['net', '', 'parameters', 'MMACs', 'top-1', 'worst to best'], lines)


def by_spread(rows):
    """What each spread of the peers over the stages leaves, at all savings."""
    savings = list(curve(rows, 'budget'))
    lines = []
    for what, (name, _) in METHODS.items():
        for spread in SPREADS if what in PEERS else ['']:
            chosen = [row for row in rows if row['what'] != what or row['spread'] == spread]
            lines.append([name + (spread and f', {spread}'), *(at(what, saving, chosen) for saving in savings)])
    return markdown([f'{DRAWN}, saved', *(f'-{100 * saving:.3g} %' for saving in savings)], lines)


def details(rows, net):
    """All kernels, trained on for some epochs."""

    def order(row):
        init = ['', 'align', 'mean', 'first', 'random'].index(row['init'])
        what = ['plain', 'budget', 'share', 'steps', 'scratch'].index(row['what'])
        return what, row['teacher'], float(row['rate']), init, -int(row['refit'])

    rows = [row for row in rows if row['what'] in ('plain', 'budget', 'share', 'steps', 'scratch')]
    rows = [row for row in rows if row['what'] != 'scratch' or row['epochs'] != '0']
    epochs = sorted({row['epochs'] for row in rows}, key=int)
    lines = []
    for kind, row in {tuple(row[k] for k in KIND): row for row in sorted(rows, key=order)}.items():
        what, rate, init, refit, teacher = kind
        name = f'{float(rate):g}, {"aligned" if init == "align" else init}{", refitted" if refit == "1" else ""}'
        name = {'plain': 'the plain net', 'scratch': f'{float(rate):g}, from scratch'}.get(what, name)
        name = f'budget {100 * float(rate):.3g} %' if what == 'budget' else name
        name += {'1': ', with teacher'}.get(teacher, '') + {'steps': ', in two steps'}.get(what, '')
        groups = {g[0]['epochs']: g for g in grouped(rows, **dict(zip(KIND, kind, strict=True)))}
        lines.append([name, f'{int(row["parameters"]):,}', *(cell(groups.get(n)) for n in epochs)])
    return markdown([net, 'parameters', 'not trained', *(after(n) for n in epochs[1:])], lines)


def after(epochs):
    return f'+ {epochs} epoch{"s" * (epochs != "1")}'


# ---- The picture


def draw(rows):
    """What each method leaves without training, and what training brings back."""
    matplotlib.rcParams.update({'svg.hashsalt': 'share', 'svg.fonttype': 'none'})
    rows = by_net(rows).get(DRAWN, [])
    if untrained(rows) is None:
        return
    figure = Figure(figsize=(10, 4), layout='constrained')
    left, right = figure.subplots(1, 2)
    for i, (what, (name, colour)) in enumerate(METHODS.items()):
        points = {round(100 * saved(group, rows)): group for group in curve(rows, what).values()}
        # a little apart, so that the whiskers are seen
        points = [(0, untrained(rows)), *((x + 0.2 * i - 0.3, group) for x, group in points.items())]
        whiskers(left, points, name, colour)
    whiskers(left, [(0, untrained(rows))], None, PLAIN)
    left.annotate('plain net', (0, mean(untrained(rows))), (8, 6), textcoords='offset points', color=PLAIN)
    left.set(xlabel='parameters saved, %', ylabel='CIFAR-10 at 16 px, top-1, %', title='not trained')
    for label, colour, style, kind in [
        ('plain net', PLAIN, '-', {'what': 'plain'}),
        ('share, by budget, -25 %', METHODS['budget'][1], '-', {'what': 'budget', 'rate': '0.2497'}),
        (
            'share, rate 1, -33 %',
            METHODS['share'][1],
            '-',
            {'what': 'share', 'rate': '1.0', 'init': 'align', 'refit': '1'},
        ),
        (
            'rate 1, random kernels',
            METHODS['share'][1],
            ':',
            {'what': 'share', 'rate': '1.0', 'init': 'random', 'refit': '0'},
        ),
    ]:
        groups = grouped(rows, teacher='0', **kind)
        whiskers(right, [(int(group[0]['epochs']), group) for group in groups], label, colour, style)
    right.set(xlabel='epochs of training afterwards', title='trained on', xticks=[0, 1, 3, 8], ylim=(72, 83.5))
    for axes in left, right:
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
    left.legend(frameon=False, loc='lower left')
    right.legend(frameon=False, loc='lower right')
    figure.savefig(PICTURE, metadata={'Date': None})


def whiskers(axes, points, label, colour, style='-'):
    """A line of means over points (x, rows), with the worst and the best seed."""
    points = sorted(points, key=lambda point: point[0])
    x, y = [x for x, _ in points], [mean(group) for _, group in points]
    low, high = ([span(group)[i] for _, group in points] for i in (0, 1))
    axes.plot(x, y, 'o', linestyle=style, color=colour, label=label, ms=5)
    axes.vlines(x, low, high, color=colour, lw=1)

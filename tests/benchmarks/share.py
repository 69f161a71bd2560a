"""What a shared net keeps of a trained plain one, and what a warm start is worth, on CIFAR-10 with small images.

    python tests/benchmarks/share.py data --output output/share --net preact-56 --seeds 0

DATA has `train/CLASS/*.png` and `test/CLASS/*.png`. A plain net is trained; then, for each rate and kernel
(`timm_sharesnet.share`), the accuracy on the test images is measured right after sharing (copied), with kernels and
last 1x1 refitted on 1,000 training images or the batch norms' statistics alone estimated on them, and after some epochs
of training (SGD, learning rate 0.05 linearly to 0). Controls: the plain net trained on equally long, the shared net
trained from scratch for as many epochs in all, a random kernel with all else warm, the plain net as teacher, and half
the rate for the first third of the training.

Each case is a row of tests/benchmarks/results/share-MACHINE-VERSIONS.csv, written when it is done; a row that is there
is not measured again. Then hub/share.svg is drawn of the rows of preact-56, and the tables are printed. The plain nets
are kept in DIR. Exit code 0, or 2 for options that it does not know.
"""

import argparse
import csv
import itertools
import platform
import re
import statistics
from pathlib import Path

import matplotlib
import numpy as np
import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from timm.data import create_dataset

from timm_sharesnet import share, unshare

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
# depth and kind: timm's name of the plain net, its arguments, and the size of the images
NETS = {
    'preact-56': ('resnet164_cifar', {'layers': (6, 6, 6)}, 16),
    'preact-29': ('resnet164_cifar', {'layers': (3, 3, 3)}, 16),
    'wide-40': ('wrn40_4', {'widen_factor': 1}, 16),
    'resnet50-quarter': ('resnet50', {'channels': (16, 32, 64, 128), 'num_classes': 10}, 64),
    'resnet34-quarter': ('resnet34', {'channels': (16, 32, 64, 128), 'num_classes': 10}, 64),
}
CASE = ['net', 'seed', 'what', 'rate', 'init', 'refit', 'teacher', 'plain_epochs', 'epochs']
KIND = ['what', 'rate', 'init', 'refit', 'teacher']
RESULT = ['parameters', 'top1_shared', 'top1', 'cosine', 'cosine_aligned']
CALIBRATION = 1000
DRAWN = 'preact-56'
EPOCHS = {'1': '#8172b3', '3': '#55a868', '8': '#4c72b0'}  # and the colours of their curves
RESULTS = Path(__file__).with_name('results')
PICTURE = Path(__file__).parents[2] / 'hub' / 'share.svg'


def load(folder, px):
    """Images (N, 3, px, px) as bytes, and labels."""
    dataset = create_dataset('', root=str(folder))
    images = np.stack([np.asarray(image.resize((px, px), 3)) for image, _ in dataset])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor([label for _, label in dataset])


def normalize(images):
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def augment(images, generator):
    """Flip, and crop at random from a reflected border of an eighth."""
    n, _, px, _ = images.shape
    border = px // 8
    padded = F.pad(images.float(), 4 * [border], mode='reflect')
    top, left = torch.randint(2 * border + 1, (2, n, 1), generator=generator)
    columns = left + torch.arange(px)
    columns = torch.where(torch.rand(n, 1, generator=generator) < 0.5, columns, columns.flip(1))
    rows = top + torch.arange(px)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(model, data, epochs, peak, warmup, seed, teacher=None, span=(0.0, 1.0), batch_size=128):
    """SGD with a learning rate that rises to `peak` over the part `warmup` of the steps, and falls linearly to 0. Of
    these steps, those from one part to another (`span`)."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    model.to(memory_format=torch.channels_last).train()
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{'params': decay, 'weight_decay': 5e-4}, {'params': rest, 'weight_decay': 0}]
    optimizer = torch.optim.SGD(groups, lr=peak, momentum=0.9, nesterov=True)
    per_epoch = len(images) // batch_size
    steps = epochs * per_epoch
    order = None
    for step in range(round(span[0] * steps), round(span[1] * steps)):
        if order is None or step % per_epoch == 0:
            order = torch.randperm(len(images), generator=generator)
        part = step / steps
        rate = peak * (part / warmup if part < warmup else (1 - part) / (1 - warmup))
        for group in optimizer.param_groups:
            group['lr'] = rate
        batch = order[step % per_epoch * batch_size :][:batch_size]
        x, y = normalize(augment(images[batch], generator)), labels[batch]
        with torch.autocast('cpu', torch.bfloat16):
            logits = model(x)
            loss = F.cross_entropy(logits.float(), y)
            if teacher is not None:
                with torch.no_grad():
                    target = (teacher(x).float() / 2).softmax(1)
                log_probs = (logits.float() / 2).log_softmax(1)
                loss = 0.5 * loss + 0.5 * 4 * F.kl_div(log_probs, target, reduction='batchmean')
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.inference_mode()
def accuracy(model, data):
    images, labels = data
    right = 0
    for i in range(0, len(images), 500):
        with torch.autocast('cpu', torch.bfloat16):
            right += (model(normalize(images[i : i + 500])).argmax(1) == labels[i : i + 500]).sum().item()
    return round(100 * right / len(images), 2)


def plain_net(args, seed, training, test):
    """The trained plain net, from its file if it is there."""
    path = args.output / f'{args.net}-{args.plain_epochs}-{seed}.pth'
    name, kwargs, _ = NETS[args.net]
    torch.manual_seed(seed)
    model = timm.create_model(name, **kwargs)
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    train(model, training, args.plain_epochs, 0.2, 0.15, seed)
    torch.save(model.state_dict(), path)
    return model


def cases(args):
    """What is measured, the most telling first: (what, rate, init, refit, teacher, epochs)."""
    yield 'plain', 0.0, '', False, False, 0
    for init, refit in itertools.product(('align', 'mean', 'first', 'random'), (True, False)):
        yield 'share', 1.0, init, refit, False, 0
    for rate, refit in itertools.product((0.75, 0.5, 0.25), (True, False)):
        yield 'share', rate, 'align', refit, False, 0
    for epochs in args.epochs:
        yield 'plain', 0.0, '', False, False, epochs
        for init, refit in ('align', True), ('align', False), ('mean', False), ('random', False), ('first', False):
            yield 'share', 1.0, init, refit, False, epochs
        for rate, refit in itertools.product((0.75, 0.5, 0.25), (True, False)):
            yield 'share', rate, 'align', refit, False, epochs
        for refit in True, False:
            yield 'share', 1.0, 'align', refit, True, epochs
        yield 'steps', 1.0, 'align', True, False, epochs
        yield 'scratch', 1.0, '', False, False, epochs


def measure(case, args, plain, training, test, seed):
    """The row of a case."""
    what, rate, init, refit, teacher, epochs = case
    row = {}
    torch.manual_seed(seed)
    if what == 'scratch':
        name, kwargs, _ = NETS[args.net]
        model = share(timm.create_model(name, **kwargs), rate, 'random')
        train(model, training, args.plain_epochs + epochs, 0.2, 0.15, seed)
    elif what == 'plain':
        model = share(plain, 0.0)
        row['top1_shared'] = accuracy(model, test)
        train(model, training, epochs, 0.05, 0.0, seed)
    else:
        chosen = normalize(training[0][:: max(1, len(training[0]) // CALIBRATION)]).split(100)
        if what == 'steps':  # half the rate for a third of the time
            model = share(plain, rate / 2, init, chosen, refit)
            train(model, training, epochs, 0.05, 0.0, seed, span=(0, 1 / 3))
            model = share(unshare(model), rate, init, chosen, refit)
            train(model, training, epochs, 0.05, 0.0, seed, span=(1 / 3, 1))
        else:
            model = share(plain, rate, init, chosen, refit)
            if not epochs:
                row['top1_shared'] = accuracy(share(plain, rate, init), test)
                merges = model.share_report.merges
                if merges:  # none at a low rate of few blocks
                    row['cosine'] = round(statistics.mean([m.before for m in merges]), 3)
                    row['cosine_aligned'] = round(statistics.mean([m.after for m in merges]), 3)
            train(model, training, epochs, 0.05, 0.0, seed, plain if teacher else None)
    row['top1'] = accuracy(model, test)
    return row | {'parameters': sum(p.numel() for p in model.parameters())}


def results_file():
    cpu = next((m[1] for m in re.finditer(r'model name\s*: (.+)', Path('/proc/cpuinfo').read_text())), '')
    machine = '-'.join(re.findall(r'\w+', cpu or platform.machine()))
    return RESULTS / f'share-{machine}-torch{torch.__version__}.csv'


def table(rows):
    """The rows in Markdown: of all nets what is left without training, then all of each net. Means over the seeds."""
    rates = ['0.25', '0.5', '0.75', '1.0']
    title = ['net, its top-1', '', *(f'rate {float(rate):g}' for rate in rates)]
    lines = [f'| {" | ".join(title)} |', '| --- ' * len(title) + '|']
    nets = {net: [row for row in rows if row['net'] == net] for net in dict.fromkeys(row['net'] for row in rows)}
    for net, found in nets.items():
        plain = grouped(found, what='plain', epochs='0')
        for i, (what, refit) in enumerate({'parameters': '1', 'refitted': '1', 'statistics': '0'}.items()):
            cells = [f'{net}, {_cell(plain)}' if i == 0 else '', what]
            for rate in rates:
                groups = grouped(found, what='share', rate=rate, init='align', refit=refit, epochs='0')
                cells.append(_cell(groups) if i else _saved(groups, plain))
            lines.append(f'| {" | ".join(cells)} |')
    epochs = sorted({row['epochs'] for row in rows}, key=int)
    for net, found in nets.items():
        title = [net, 'parameters', 'not trained', *(f'+ {n} epoch{"s" * (n != "1")}' for n in epochs[1:])]
        lines += ['', f'| {" | ".join(title)} |', '| --- ' * len(title) + '|']
        lines += [f'| {" | ".join(line)} |' for line in _lines(found, epochs)]
    return '\n'.join(lines)


def _lines(rows, epochs):
    def order(row):
        init = ['', 'align', 'mean', 'first', 'random'].index(row['init'])
        what = ['plain', 'share', 'steps', 'scratch'].index(row['what'])
        return what, row['teacher'], float(row['rate']), init, -int(row['refit'])

    kinds = {tuple(row[k] for k in KIND): row for row in sorted(rows, key=order)}
    for kind, row in kinds.items():
        what, rate, init, refit, teacher = kind
        name = f'{float(rate):g}, {"aligned" if init == "align" else init}{", refitted" if refit == "1" else ""}'
        name = {'plain': 'the plain net', 'scratch': f'{float(rate):g}, from scratch'}.get(what, name)
        name += {'1': ', with teacher'}.get(teacher, '') + {'steps': ', in two steps'}.get(what, '')
        cells = [name, f'{int(row["parameters"]):,}']
        cells += [_cell(grouped(rows, epochs=n, **dict(zip(KIND, kind, strict=True)))) for n in epochs]
        yield cells


def _cell(groups):
    """Mean, and number of seeds."""
    return f'{mean(groups[0]):.2f} ({len(groups[0])})' if groups else '-'


def _saved(groups, plain):
    return f'{100 * int(groups[0][0]["parameters"]) / int(plain[0][0]["parameters"]) - 100:.0f} %' if groups else '-'


def grouped(rows, **values):
    """The rows with these values, those in one list that differ in the seed alone."""
    groups = {}
    for row in rows:
        if all(row[key] == value for key, value in values.items()):
            groups.setdefault(tuple(row[k] for k in CASE if k != 'seed'), []).append(row)
    return list(groups.values())


def mean(rows):
    return statistics.mean([float(row['top1']) for row in rows])


def draw(rows):
    """Accuracy against parameters before and after training, and against the epochs for each kernel."""
    matplotlib.rcParams.update({'svg.hashsalt': 'share', 'svg.fonttype': 'none'})
    figure = Figure(figsize=(10, 4), layout='constrained')
    left, right = figure.subplots(1, 2)
    rows = [row for row in rows if row['net'] == DRAWN and row['teacher'] == '0']
    refitted = grouped(rows, what='share', init='align', refit='1')
    plain = grouped(rows, what='plain')
    aligned = grouped(rows, what='share', init='align', refit='0', epochs='0')
    curves = [('not trained, statistics', [*aligned, *plain], '0', '#dd8452', '--')]
    curves += [('not trained, refitted', [*refitted, *plain], '0', '#c44e52', '-')]
    curves += [(f'+ {n} epoch{"s" * (n != "1")}', [*refitted, *plain], n, c, '-') for n, c in EPOCHS.items()]
    for label, groups, epochs, colour, style in curves:
        groups = sorted((g for g in groups if g[0]['epochs'] == epochs), key=lambda g: float(g[0]['rate']))
        x = [int(g[0]['parameters']) / 1e6 for g in groups]
        left.plot(x, [mean(g) for g in groups], 'o', linestyle=style, color=colour, label=label)
        if label == 'not trained, statistics':
            for g, x_ in zip(groups, x, strict=True):
                rate = f'rate {float(g[0]["rate"]):g}' if g[0]['what'] == 'share' else 'plain net'
                left.annotate(rate, (x_, mean(g)), xytext=(10, -3), textcoords='offset points')
    left.set(xlabel='parameters, M', ylabel='CIFAR-10 at 16 px, top-1, %', title='aligned kernels')
    left.set_xlim(right=max(int(row['parameters']) for row in rows) * 1.08 / 1e6)
    lines = [('plain net', plain, '#4c72b0'), ('aligned, refitted', refitted, '#c44e52')]
    for init, colour in ('align', '#dd8452'), ('mean', '#8172b3'), ('first', '#937860'), ('random', '#8c8c8c'):
        label = {'align': 'aligned'}.get(init, init)
        lines.append((f'{label}, statistics', grouped(rows, what='share', rate='1.0', init=init, refit='0'), colour))
    for label, groups, colour in lines:
        groups = sorted((g for g in groups if g[0]['rate'] in '0.0 1.0'.split()), key=lambda g: int(g[0]['epochs']))
        x = [int(g[0]['epochs']) for g in groups]
        right.plot(x, [mean(g) for g in groups], 'o-', color=colour, label=label)
    right.set(xlabel='epochs of training after sharing', title='rate 1', xticks=[0, 1, 3, 8], ylim=(55, None))
    for axes in left, right:
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
        axes.legend(frameon=False, loc='lower right')
    figure.savefig(PICTURE, metadata={'Date': None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path, metavar='DATA')
    parser.add_argument('--output', type=Path, required=True, metavar='DIR')
    parser.add_argument('--net', choices=NETS, default='preact-56')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--plain-epochs', type=int, default=8)
    parser.add_argument('--epochs', type=int, nargs='*', default=[1, 3, 8], help='of training after sharing')
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    path = results_file()
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    done = {tuple(row[k] for k in CASE) for row in rows}
    training, test = (load(args.data / split, NETS[args.net][2]) for split in ('train', 'test'))
    for seed in args.seeds:
        plain = plain_net(args, seed, training, test)
        print(f'seed {seed}: plain net {accuracy(plain, test)} %', flush=True)
        for case in cases(args):
            what, rate, init, refit, teacher, epochs = case
            values = (args.net, seed, what, rate, init, int(refit), int(teacher), args.plain_epochs, epochs)
            key = dict(zip(CASE, map(str, values), strict=True))
            if tuple(key.values()) not in done:
                result = measure(case, args, plain, training, test, seed)
                rows.append(key | {name: str(value) for name, value in result.items()})
                print(rows[-1], flush=True)
                with path.open('w', newline='') as file:
                    writer = csv.DictWriter(file, CASE + RESULT, restval='', lineterminator='\n')
                    writer.writeheader()
                    writer.writerows(rows)
    if any(row['net'] == DRAWN for row in rows):
        draw(rows)
    print(table(rows))


if __name__ == '__main__':
    main()

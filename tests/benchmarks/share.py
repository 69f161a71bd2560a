"""What a shared net keeps of a trained plain one, and what a warm start is worth, on CIFAR-10 with small images.

    python tests/benchmarks/share.py data --output output/share --layers 6 6 6 --seeds 0

DATA has `train/CLASS/*.png` and `test/CLASS/*.png`. A plain pre-activation bottleneck net is trained; then, for each
rate and kernel (`timm_sharesnet.share`), the accuracy on the test images is measured right after sharing, after the
batch norms' statistics were estimated anew on 5,000 training images, and after some epochs of training (SGD, learning
rate 0.05 linearly to 0). Controls: the plain net trained on equally long, the shared net trained from scratch for as
many epochs in all, a random kernel with all else warm, and the plain net as teacher.

Each case is a row of tests/benchmarks/results/share-MACHINE-VERSIONS.csv, written when it is done; a row that is there
is not measured again. Then the picture hub/share.svg is drawn of all rows, and a table printed. The plain nets are kept
in DIR. Exit code 0, or 2 for options that it does not know.
"""

import argparse
import csv
import platform
import re
import statistics
import time
from pathlib import Path

import matplotlib
import numpy as np
import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from timm.data import create_dataset

from timm_sharesnet import share

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CASE = ['layers', 'px', 'seed', 'what', 'rate', 'init', 'teacher', 'plain_epochs', 'epochs']
RESULT = ['parameters', 'top1_shared', 'top1_calibrated', 'top1', 'cosine', 'cosine_aligned', 'seconds']
CALIBRATION = 5000
RESULTS = Path(__file__).with_name('results')
PICTURE = Path(__file__).parents[2] / 'hub' / 'share.svg'
COLOURS = {'align': '#c44e52', 'mean': '#dd8452', 'first': '#8172b3', 'random': '#937860', '': '#4c72b0'}


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


def train(model, data, epochs, peak, warmup, seed, teacher=None, batch_size=128):
    """SGD with a learning rate that rises to `peak` over the part `warmup` of the steps, and falls linearly to 0."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    model.to(memory_format=torch.channels_last).train()
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{'params': decay, 'weight_decay': 5e-4}, {'params': rest, 'weight_decay': 0}]
    optimizer = torch.optim.SGD(groups, lr=peak, momentum=0.9, nesterov=True)
    per_epoch = len(images) // batch_size
    steps = epochs * per_epoch
    for step in range(steps):
        if step % per_epoch == 0:
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
    path = args.output / f'plain-{"-".join(map(str, args.layers))}-{args.px}px-{args.plain_epochs}-{seed}.pth'
    torch.manual_seed(seed)
    model = timm.create_model('resnet164_cifar', layers=tuple(args.layers))
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    train(model, training, args.plain_epochs, 0.2, 0.15, seed)
    torch.save(model.state_dict(), path)
    return model


def cases(args):
    """What is measured, the most telling first: (what, rate, init, teacher, epochs)."""
    for epochs in args.epochs:
        yield 'plain', 0.0, '', False, epochs
        for init in ('align', 'random', 'mean', 'first'):
            yield 'share', 1.0, init, False, epochs
        for rate in (0.75, 0.5, 0.25):
            yield 'share', rate, 'align', False, epochs
        yield 'share', 1.0, 'align', True, epochs
        yield 'scratch', 1.0, '', False, epochs


def measure(case, args, plain, training, test, seed):
    """The row of a case."""
    what, rate, init, teacher, epochs = case
    start, row = time.perf_counter(), {}
    torch.manual_seed(seed)
    if what == 'scratch':
        model = timm.create_model('sharesnet164_cifar', layers=tuple(args.layers), share_rate=rate)
        train(model, training, args.plain_epochs + epochs, 0.2, 0.15, seed)
    elif what == 'plain':
        model = share(plain, 0.0)
        row['top1_shared'] = accuracy(model, test)
        train(model, training, epochs, 0.05, 0.0, seed)
    else:
        row['top1_shared'] = accuracy(share(plain, rate, init), test)
        step = len(training[0]) // CALIBRATION
        chosen = normalize(training[0][::step])
        model = share(plain, rate, init, images=chosen.split(500))
        row['top1_calibrated'] = accuracy(model, test)
        merges = model.share_report.merges
        row['cosine'] = round(statistics.mean([m.before for m in merges]), 3)
        row['cosine_aligned'] = round(statistics.mean([m.after for m in merges]), 3)
        train(model, training, epochs, 0.05, 0.0, seed, plain if teacher else None)
    row['top1'] = accuracy(model, test)
    row['parameters'] = sum(p.numel() for p in model.parameters())
    return row | {'seconds': round(time.perf_counter() - start)}


def results_file():
    cpu = next((m[1] for m in re.finditer(r'model name\s*: (.+)', Path('/proc/cpuinfo').read_text())), '')
    machine = '-'.join(re.findall(r'\w+', cpu or platform.machine()))
    return RESULTS / f'share-{machine}-torch{torch.__version__}.csv'


def table(rows):
    """The rows in Markdown, the mean over the seeds."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in CASE if k != 'seed'), []).append(row)
    lines = [
        '| net | rate | kernel | epochs | parameters | right after | + statistics | + epochs |',
        '| --- ' * 8 + '|',
    ]
    for group in groups.values():
        row = group[0]
        tops = [_mean(group, key) for key in ('top1_shared', 'top1_calibrated', 'top1')]
        what = row['what'] + (', with teacher' if row['teacher'] == '1' else '')
        cells = [what, row['rate'], row['init'] or '-', row['epochs'], f'{int(row["parameters"]):,}', *tops]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def _mean(rows, key):
    values = [float(row[key]) for row in rows if row[key] not in ('', None)]
    return f'{statistics.mean(values):.2f}' if values else '-'


def draw(rows):
    """Accuracy against parameters: with statistics estimated anew (hollow), and after the longest training (filled)."""
    matplotlib.rcParams.update({'svg.hashsalt': 'share', 'svg.fonttype': 'none'})
    figure = Figure(figsize=(7, 4), layout='constrained')
    axes = figure.subplots()
    longest = max((row['epochs'] for row in rows), key=int)
    for row in (row for row in rows if row['teacher'] == '0' and row['epochs'] == longest):
        x, colour = int(row['parameters']) / 1e6, COLOURS[row['init']]
        label = row['init'] or {'plain': 'plain net, trained on', 'scratch': 'from scratch'}[row['what']]
        axes.plot(x, float(row['top1']), 'o' if row['what'] != 'scratch' else 's', color=colour, label=label)
        if row['top1_calibrated'] not in ('', None):
            axes.plot(x, float(row['top1_calibrated']), 'o', color=colour, mfc='none')
        if row['init'] == 'align':
            axes.annotate(f'rate {row["rate"]}', (x, float(row['top1'])), xytext=(0, 7), textcoords='offset points')
    axes.set(xlabel='parameters, M', ylabel='CIFAR-10 at 16 px, top-1, %')
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    labels = {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    axes.legend(labels.values(), labels.keys(), frameon=False, title='filled: + epochs, hollow: + statistics')
    figure.savefig(PICTURE, metadata={'Date': None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path, metavar='DATA')
    parser.add_argument('--output', type=Path, required=True, metavar='DIR')
    parser.add_argument('--layers', type=int, nargs=3, default=[6, 6, 6])
    parser.add_argument('--px', type=int, default=16)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--plain-epochs', type=int, default=8)
    parser.add_argument('--epochs', type=int, nargs='+', default=[3, 1, 8], help='of training after sharing')
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    path = results_file()
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    done = {tuple(row[k] for k in CASE) for row in rows}
    training, test = (load(args.data / split, args.px) for split in ('train', 'test'))
    for seed in args.seeds:
        plain = plain_net(args, seed, training, test)
        print(f'seed {seed}: plain net {accuracy(plain, test)} %', flush=True)
        for case in cases(args):
            what, rate, init, teacher, epochs = case
            layers = '-'.join(map(str, args.layers))
            values = (layers, args.px, seed, what, rate, init, int(teacher), args.plain_epochs, epochs)
            key = dict(zip(CASE, map(str, values), strict=True))
            if tuple(key.values()) not in done:
                rows.append(key | measure(case, args, plain, training, test, seed))
                print(rows[-1], flush=True)
                with path.open('w', newline='') as file:
                    writer = csv.DictWriter(file, CASE + RESULT, restval='', lineterminator='\n')
                    writer.writeheader()
                    writer.writerows(rows)
    draw(rows)
    print(table(rows))


if __name__ == '__main__':
    main()

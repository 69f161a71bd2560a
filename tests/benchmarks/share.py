"""What a shared net keeps of a trained plain one, beside its peers, and what sharing is worth, on CIFAR-10.

    python tests/benchmarks/share.py data --output output/share --net preact-56 --seeds 0 1 2 [--what budget pruned ...]

DATA has `train/CLASS/*.png` and `test/CLASS/*.png`. A plain net is trained on them at a small size. Then the accuracy
on the test images is measured of what `timm_sharesnet.share` makes of it with 1,000 training images: at each rate and
kernel, with kernels and last 1x1 refitted or the batch norms' statistics alone estimated, and with a budget in place of
a rate. Peers at the same savings are low-rank 3x3 and pruned channels (see `peers.py`), and int8 by ONNX Runtime. Some
are trained on for some epochs (SGD, learning rate 0.05 linearly to 0). Controls of that: the plain net trained on
equally long, the shared net trained from scratch for as many epochs in all, a random kernel with all else warm, the
plain net as teacher, and half the rate for the first third of the training. From scratch, at equal epochs, are trained:
nets that share all stages or the last ones alone, and thinner and shallower plain nets.

Each case is a row of tests/benchmarks/results/share-MACHINE-VERSIONS.csv, written when it is done. Rows of all machines
are read together (accuracies do not depend on them), and one that is in any of the files is not measured again. The
column `rate` is the part of the parameters to save in rows of a budget, of peers and of int8. Then hub/share.svg is
drawn of the rows of preact-56, the tables of README.md and of this folder's are replaced, and what each net gave is
printed. The plain nets are kept in DIR. Needs the extras `timm-sharesnet[bench,share]`. Exit code 0, or 2 for options
that it does not know.
"""

import argparse
import csv
import functools
import itertools
import math
import platform
import re
import statistics
import tempfile
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from peers import Moments, peer
from share_tables import (
    CASE,
    DRAWN,
    PEERS,
    RATES,
    RESULT,
    RESULTS,
    SAME,
    SPREADS,
    by_net,
    details,
    draw,
    pages,
    put,
    read,
)
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import ImageFolder

from timm_sharesnet import export, fold, share, unshare

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
# depth and kind: timm's name of the plain net, its arguments, and the size of the images
NETS = {
    'preact-56': ('resnet164_cifar', {'layers': (6, 6, 6)}, 16),
    'preact-29': ('resnet164_cifar', {'layers': (3, 3, 3)}, 16),
    'wide-40': ('wrn40_4', {'widen_factor': 1}, 16),
    'resnet50-quarter': ('resnet50', {'channels': (16, 32, 64, 128), 'num_classes': 10}, 64),
    'resnet34-quarter': ('resnet34', {'channels': (16, 32, 64, 128), 'num_classes': 10}, 64),
}
SAVINGS = {DRAWN: [0.1248, 0.1873, 0.2497, 0.2809, 0.3121]}  # of whole kernels, beside those of uniform rates
CALIBRATION = 1000
KINDS = 'plain', 'share', 'budget', *PEERS, 'fp32', 'int8', 'steps', 'scratch'


class Case(NamedTuple):
    """What is measured. The names are columns of the file."""

    what: str
    rate: float = 0.0
    init: str = ''
    refit: bool = False
    teacher: bool = False
    epochs: int = 0
    spread: str = ''


def load(folder, px):
    """Images (N, 3, px, px) as bytes, and labels."""
    dataset = ImageFolder(str(folder))  # timm's takes another image in place of a damaged one
    images = np.empty((len(dataset), px, px, 3), np.uint8)
    for i, (image, _) in enumerate(dataset):
        images[i] = np.asarray(image.resize((px, px), 3))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets)


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


def plain_net(args, seed, training):
    """The trained plain net, from its file if it is there."""
    path = args.output / f'{args.net}-{args.plain_epochs}-{seed}.pth'
    name, kwargs, _ = NETS[args.net]
    torch.manual_seed(seed)
    model = timm.create_model(name, **kwargs)
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    train(model, training, args.plain_epochs, 0.2, 0.15, seed).to(
        memory_format=torch.contiguous_format
    )  # as from a file
    torch.save(model.state_dict(), path)
    return model


def cases(net, epochs):
    """What is measured, the most telling first, what is trained last."""
    savings = savings_of(net)
    few = SAVINGS.get(net, savings)
    yield Case('plain')
    for rate in RATES:
        yield Case('share', rate, 'align', True)
    for save in savings:
        yield Case('budget', save, 'align', True)
    for save, kind, spread in itertools.product(savings, PEERS, SPREADS):
        yield Case(kind, save, refit=True, spread=spread)
    for kind in 'fp32', 'int8':
        yield Case(kind)
    yield Case('int8', few[len(few) // 2], 'align', True)
    for rate in RATES:
        yield Case('share', rate, 'align')
    for init, refit in itertools.product(('mean', 'first', 'random'), (True, False)):
        yield Case('share', 1.0, init, refit)
    for rate, spread in (1.0, ''), (0.75, 'last'), (0.75, ''), (1.0, 'thinner'), (1.0, 'shallower'):
        if rate == 1 or spread or size_of(net, rate) != size_of(net, 1.0):  # else it is the net of rate 1
            yield Case('scratch', rate, spread=spread)
    for n in epochs:
        yield Case('plain', epochs=n)
        for init, refit in ('align', True), ('align', False), ('mean', False), ('random', False), ('first', False):
            yield Case('share', 1.0, init, refit, epochs=n)
        for rate, refit in itertools.product((0.75, 0.5, 0.25), (True, False)):
            yield Case('share', rate, 'align', refit, epochs=n)
        for refit in True, False:
            yield Case('share', 1.0, 'align', refit, True, n)
        yield Case('steps', 1.0, 'align', True, epochs=n)
        yield Case('scratch', 1.0, epochs=n)
    for n, save in itertools.product(epochs, (few[len(few) // 2], few[0])):
        if net == DRAWN and n <= 3:
            yield Case('budget', save, 'align', True, epochs=n)


@functools.cache
def savings_of(net):
    """The parts of the parameters that a budget and the peers save: what uniform rates do, of some nets more."""
    more = SAVINGS.get(net, [])
    uniform = sorted({saved_by(net, rate) for rate in RATES} - {0.0})
    return more + [save for save in uniform if all(abs(save - other) >= SAME for other in more)]


def saved_by(net, rate):
    """The part of the parameters that a uniform rate saves, rounded down: more than the most is refused."""
    return math.floor(1e4 * (1 - size_of(net, rate) / size_of(net, 0.0))) / 1e4


def build(net, rate, **more):
    name, kwargs, _ = NETS[net]
    return timm.create_model('sharesnet', base=name, share_rate=rate, **kwargs | more)


def size_of(net, rate, **more):
    return parameters(build(net, rate, device='meta', **more))


def scratch_net(net, rate, spread):
    """An untrained net that shares all stages, or its last ones alone to save as much, or a plain one as small."""
    if spread in ('thinner', 'shallower'):
        size = size_of(net, rate)
        candidates = {'thinner': thinner, 'shallower': shallower}[spread](net)
        return build(net, 0.0, **min(candidates, key=lambda more: abs(size_of(net, 0.0, **more) - size)))
    if spread == 'last':
        save = saved_by(net, rate)
        save = rate * save if save == saved_by(net, 1.0) else save  # in nets of few blocks this rate is rate 1
        rate = share(build(net, 0.0), save=save)._model_args['share_rate']
    return build(net, rate)


class Width(Fraction):
    """A factor of channels, the product is a whole number of them."""

    def __rmul__(self, channels):
        return round(channels * Fraction(self))


def thinner(net):
    """Arguments of nets with a part of the channels."""
    channels = NETS[net][1].get('channels')
    for width in (Width(n, 64) for n in range(16, 65)):
        yield {'channels': tuple(c * width for c in channels)} if channels else {'widen_factor': width}


def shallower(net):
    """Arguments of nets with about the same part of the blocks of each stage."""
    model = build(net, 0.0, device='meta')
    layers = [len(model.get_submodule(info['module'])) for info in model.feature_info[1:]]
    found = set()
    for n in range(1, 65):
        choices = [{max(1, layer * n // 64), max(1, -(-layer * n // 64))} for layer in layers]
        found.update(itertools.product(*choices))
    return [{'layers': layers} for layers in sorted(found)]


def measure(case, args, seed, data):
    """The row of a case."""
    row = {}
    torch.manual_seed(seed)
    if case.what == 'scratch':
        model = scratch_net(args.net, case.rate, case.spread)
        train(model, data.training, args.plain_epochs + case.epochs, 0.2, 0.15, seed)
        row['top1'] = accuracy(model, data.test)
    elif case.what in PEERS:
        model = peer(case.what, data.plain(seed), data.moments(seed), case.rate, case.spread, data.chosen)
        row['top1'] = accuracy(model, data.test)
    elif case.what in ('fp32', 'int8'):
        model = share(data.plain(seed), save=case.rate, images=data.chosen)
        row |= deployed(model, case.what == 'int8', data)
    else:
        model, row = shared(case, seed, data)
        row['top1'] = accuracy(model, data.test)
    return row | {'parameters': parameters(model), 'macs': macs(model, data.px)}


def shared(case, seed, data):
    """The plain net, shared (but for the kind `plain`) and trained on, and what is to be told of it before that."""
    plain, row = data.plain(seed), {}
    if case.what == 'plain':
        model = share(plain, 0.0)
        row['top1_shared'] = accuracy(model, data.test)
        train(model, data.training, case.epochs, 0.05, 0.0, seed)
    elif case.what == 'steps':  # half the rate for a third of the time
        model = share(plain, case.rate / 2, case.init, data.chosen, case.refit)
        train(model, data.training, case.epochs, 0.05, 0.0, seed, span=(0, 1 / 3))
        model = share(unshare(model), case.rate, case.init, data.chosen, case.refit)
        train(model, data.training, case.epochs, 0.05, 0.0, seed, span=(1 / 3, 1))
    else:
        rate = {'save': case.rate} if case.what == 'budget' else {'rate': case.rate}
        model = share(plain, init=case.init, images=data.chosen, refit=case.refit, **rate)
        if not case.epochs:
            merges = model.share_report.merges
            if case.what == 'share':
                row['top1_shared'] = accuracy(share(plain, case.rate, case.init), data.test)
            if merges:  # none at a low rate of few blocks
                row['cosine'] = round(statistics.mean([m.before for m in merges]), 3)
                row['cosine_aligned'] = round(statistics.mean([m.after for m in merges]), 3)
        train(model, data.training, case.epochs, 0.05, 0.0, seed, plain if case.teacher else None)
    return model, row


def deployed(model, int8, data):
    """Accuracy and bytes of a net's file, folded, in ONNX Runtime."""
    right, (images, labels) = 0, data.test
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'net.onnx')
        export.export_onnx(fold(model.eval()), path, (3, data.px, data.px))
        if int8:
            batches = [batch.contiguous().numpy() for batch in data.chosen]
            export.quantize(path, path, batches)
        session = export.open_session(path, intra_op_num_threads=torch.get_num_threads())
        for i in range(0, len(images), 500):
            logits = export.run(session, normalize(images[i : i + 500]).contiguous().numpy())
            right += (logits.argmax(1) == labels[i : i + 500].numpy()).sum().item()
        return {'top1': round(100 * right / len(images), 2), 'bytes': export.inspect(path).bytes}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def macs(model, px):
    """Multiply-accumulates of convolutions and classifier for an image; a shared convolution counts once a use."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, px, px))
    return counter.get_total_flops() // 2


def results_file():
    cpu = next((m[1] for m in re.finditer(r'model name\s*: (.+)', Path('/proc/cpuinfo').read_text())), '')
    machine = '-'.join(re.findall(r'\w+', cpu or platform.machine()))
    return RESULTS / f'share-{machine}-torch{torch.__version__}.csv'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path, metavar='DATA')
    parser.add_argument('--output', type=Path, required=True, metavar='DIR')
    parser.add_argument('--net', choices=NETS, default='preact-56')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--what', choices=KINDS, nargs='+', default=KINDS, help='kinds of cases to measure')
    parser.add_argument('--plain-epochs', type=int, default=8, help='of training plain nets and those from scratch')
    parser.add_argument('--epochs', type=int, nargs='*', default=[1, 3, 8], help='of training after sharing')
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    path = results_file()
    done = {tuple(row[k] for k in CASE) for row in read()}
    todo = []
    for case, seed in itertools.product(cases(args.net, args.epochs), args.seeds):
        values = {'net': args.net, 'seed': seed, 'plain_epochs': args.plain_epochs, **case._asdict()}
        key = {k: str(int(values[k]) if isinstance(values[k], bool) else values[k]) for k in CASE}
        if case.what in args.what and tuple(key.values()) not in done:
            todo.append((case, seed, key))
    data = prepare(args) if todo else None
    for case, seed, key in todo:
        row = key | measure(case, args, seed, data)
        print({k: v for k, v in row.items() if v != ''}, flush=True)
        mine = read([path]) if path.exists() else []  # another process may have written there, too
        with path.open('w', newline='') as file:
            writer = csv.DictWriter(file, CASE + RESULT, restval='', lineterminator='\n')
            writer.writeheader()
            writer.writerows([*mine, row])
    rows = read()
    draw(rows)
    for page, tables in pages(rows).items():
        page.write_text(put(page.read_text(), tables))
    for net, found in by_net(rows).items():
        print(details(found, net), end='\n\n')


def prepare(args):
    """The images, and what each seed begins with."""
    px = NETS[args.net][2]
    training, test = (load(args.data / split, px) for split in ('train', 'test'))
    chosen = normalize(training[0][:: max(1, len(training[0]) // CALIBRATION)]).split(100)

    @functools.cache
    def plain(seed):
        return plain_net(args, seed, training)

    @functools.cache
    def moments(seed):
        return Moments(plain(seed), chosen)

    return SimpleNamespace(px=px, training=training, test=test, chosen=chosen, plain=plain, moments=moments)


if __name__ == '__main__':
    main()

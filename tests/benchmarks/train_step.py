"""Speed and memory of each net against its unshared twin, on synthetic data. Run by hand:

    python tests/benchmarks/train_step.py --output output/benchmarks
    python tests/benchmarks/train_step.py --models sharesnet164_cifar --modes eager graphs --batch-size 256 512

Both nets of a pair are built and then measured in turns, in changing order, so that what else happens on the machine
meets both. Each round gives one ratio (speed of the shared net / speed of the plain one); their median and quartiles
are what counts. On a CPU they mean something only if nothing else runs: threads that wait for a busy core make a step
several times slower. A training step is train.py's: forward under autocast, loss, backward, fused SGD with Nesterov
momentum (at rate 0, so that each step does the same work on the same weights).

Modes: eager; compiled (torch.compile with inductor); graphs (compiled with CUDA graphs, mode reduce-overhead; not on a
CPU). Each starts from a reset compiler and static shapes, so that no case inherits from the one before.

Writes benchmark-train.csv and benchmark-infer.csv with the columns of timm's results/benchmark-*.csv, then ours, and
ratios.png. `peak_memory_mb` is what torch allocates for the net and one step (on a CPU by the profiler's allocation
events, so without what libraries take for themselves); `kernel_launches` counts the CUDA launches of one step, a
replayed graph as one, and is empty on a CPU. Exit code 0, or 2 for options that it does not know.
"""

import argparse
import csv
import itertools
import statistics
import time
from pathlib import Path

import matplotlib
import timm
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

TWINS = {
    'sharesnet164_cifar': 'resnet164_cifar',
    'shawrn40_4': 'wrn40_4',
    'shawrn28_10': 'wrn28_10',
    'sharesnet34': 'resnet34',
    'sharesnet50': 'resnet50',
    'sharesnet101': 'resnet101',
    'sharesnet152': 'resnet152',
}
# Batch sizes, of the nets not named 4 and 256. On a CPU all seven pairs are meant to take less than 8 minutes.
CPU_BATCH = {'sharesnet164_cifar': 16, 'shawrn40_4': 8, 'shawrn28_10': 2}
CUDA_BATCH = {'sharesnet164_cifar': 512, 'shawrn40_4': 512, 'shawrn28_10': 256, 'sharesnet152': 128}
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
LAUNCHES = ('cudaLaunchKernel', 'cuLaunchKernel', 'cudaGraphLaunch')


class Net:
    """A net with a fixed batch, and one step of training or inference on it."""

    def __init__(self, name, device, phase, mode, batch_size, img_size, layout, precision):
        torch.manual_seed(0)
        self.before = torch.cuda.memory_allocated() if device.type == 'cuda' else 0
        self.name, self.device, self.phase, self.precision = name, device, phase, precision
        model = timm.create_model(name).to(device=device, memory_format=LAYOUTS[layout])
        model.train(phase == 'train')
        self.parameters = list(model.parameters())
        self.state = self.parameters + list(model.buffers())
        self.x = torch.randn(batch_size, 3, img_size, img_size, device=device).to(memory_format=LAYOUTS[layout])
        self.y = torch.randint(model.num_classes, (batch_size,), device=device)
        self.optimizer = torch.optim.SGD(self.parameters, 0.0, 0.9, weight_decay=5e-4, nesterov=True, fused=True)
        options = {'eager': None, 'compiled': {}, 'graphs': {'mode': 'reduce-overhead'}}[mode]
        self.model = model if options is None else torch.compile(model, **options)

    def step(self):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == 'bf16'):
            if self.phase == 'infer':
                with torch.inference_mode():
                    self.model(self.x)
                return
            loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self, steps):
        """Of one step, averaged over some."""
        self._synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        self._synchronize()
        return (time.perf_counter() - start) / steps

    def _synchronize(self):
        if self.device.type == 'cuda':
            torch.cuda.synchronize()

    def peak_memory_and_launches(self):
        """MB that the net and one step need, and number of CUDA launches of the step (None on a CPU)."""
        cuda = self.device.type == 'cuda'
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with profile(
            activities=[ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU], profile_memory=not cuda
        ) as p:
            self.step()
            self._synchronize()
        if cuda:
            launches = sum(e.count for e in p.key_averages() if e.key.startswith(LAUNCHES))
            return (torch.cuda.max_memory_allocated() - self.before) / 1e6, launches
        momenta = [state['momentum_buffer'] for state in self.optimizer.state.values()]
        held = sum(t.nbytes for t in {id(t): t for t in [*self.state, *momenta]}.values()) + self.x.nbytes
        events = [e for e in p.profiler.kineto_results.events() if e.name() == '[memory]']
        changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
        return (held + max(itertools.accumulate(changes, initial=0))) / 1e6, None


def measure(shared, rounds, window, **case):
    """Both rows of the table for one pair, and its ratios."""
    torch._dynamo.reset()
    nets = []
    for name in (shared, TWINS[shared]):
        nets.append(Net(name, **case))
        for _ in range(3):  # compile, record graphs, fill the allocator
            nets[-1].step()
        nets[-1].memory, nets[-1].launches = nets[-1].peak_memory_and_launches()
    steps = max(1, round(window / nets[1].seconds(2)))
    # A CPU is shared with others, hence turns of one step. On a GPU a step's launches overlap with the one before.
    turns, steps = (1, steps) if case['device'].type == 'cuda' else (steps, 1)
    times = {net: [] for net in nets}
    for i in range(rounds):
        seconds = {net: [] for net in nets}
        for j in range(turns):
            for net in nets if (i + j) % 2 == 0 else nets[::-1]:
                seconds[net].append(net.seconds(steps))
        for net in nets:
            times[net].append(statistics.mean(seconds[net]))
    ratios = [plain / ours for ours, plain in zip(times[nets[0]], times[nets[1]], strict=True)]
    rows = [row(net, statistics.median(times[net]), ratios if net is nets[0] else [], **case) for net in nets]
    return rows, ratios


def row(net, seconds, ratios, device, phase, mode, batch_size, img_size, layout, precision):
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios * 3 or ['', '', ''])
    return {
        'model': net.name,
        f'{phase}_samples_per_sec': round(batch_size / seconds, 2),
        f'{phase}_step_time': round(1000 * seconds, 3),
        f'{phase}_batch_size': batch_size,
        f'{phase}_img_size': img_size,
        'param_count': round(sum(p.numel() for p in net.parameters) / 1e6, 2),
        'mode': mode,
        'layout': layout,
        'precision': precision,
        'peak_memory_mb': round(net.memory, 1),
        'kernel_launches': '' if net.launches is None else net.launches,
        'ratio': middle and round(middle, 4),
        'ratio_q1': low and round(low, 4),
        'ratio_q3': high and round(high, 4),
        'device': torch.cuda.get_device_name() if device.type == 'cuda' else f'cpu, {torch.get_num_threads()} threads',
        'torch': torch.__version__,
    }


def draw(results, path):
    """One box a case: the ratios, with the shared net's speed beside its name."""
    figure, axes = plt.subplots(figsize=(9, 1 + 0.35 * len(results)), layout='constrained')
    labels = [f'{label}  {speed:,.0f} img/s' for label, speed, _ in results]
    axes.boxplot([ratios for *_, ratios in results], orientation='horizontal', tick_labels=labels, whis=(0, 100))
    axes.axvline(1, color='grey', linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel('speed of the shared net / speed of its unshared twin')
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    add = parser.add_argument
    add('--output', type=Path, default=Path('output/benchmarks'))
    add('--device', type=torch.device, default='cuda' if cuda else 'cpu')
    add('--models', nargs='+', choices=TWINS, default=list(TWINS))
    add('--phases', nargs='+', choices=['train', 'infer'], default=['train', 'infer'])
    add('--modes', nargs='+', choices=['eager', 'compiled', 'graphs'], help='default: all on CUDA, eager on a CPU')
    add('--batch-size', nargs='+', type=int, help='default: by model and device')
    add('--img-size', type=int, help='of the ImageNet nets, default: 224 on CUDA, 64 on a CPU')
    add('--layout', nargs='+', choices=LAYOUTS, help='default: channels_last on CUDA, contiguous on a CPU')
    add('--precision', nargs='+', choices=['fp32', 'bf16'], help='default: bf16 on CUDA, fp32 on a CPU')
    add('--rounds', type=int, default=15)
    add('--window', type=float, default=0.6, help='seconds of each net in a round, at least one step')
    args = parser.parse_args()
    cuda = args.device.type == 'cuda'
    modes = args.modes or (['eager', 'compiled', 'graphs'] if cuda else ['eager'])
    if 'graphs' in modes and not cuda:
        parser.error('CUDA graphs need a GPU: leave graphs out of --modes.')
    if cuda and not torch.cuda.is_available():
        parser.error('there is no CUDA device.')
    if min(args.rounds, *(args.batch_size or [1])) < 1:
        parser.error('--rounds and --batch-size must be positive.')
    layouts = args.layout or (['channels_last'] if cuda else ['contiguous'])
    precisions = args.precision or (['bf16'] if cuda else ['fp32'])
    torch._dynamo.config.automatic_dynamic_shapes = False

    args.output.mkdir(parents=True, exist_ok=True)
    if not any(args.output.iterdir()):
        (args.output / '.gitignore').write_text('*\n')
    results, pooled = [], []
    for phase in args.phases:
        rows = []
        for model, mode, layout, precision in itertools.product(args.models, modes, layouts, precisions):
            default = CUDA_BATCH.get(model, 256) if cuda else CPU_BATCH.get(model, 4)
            size = timm.get_pretrained_cfg(model).input_size[-1]
            size = size if size == 32 else args.img_size or (224 if cuda else 64)
            for batch_size in args.batch_size or [default]:
                case = dict(device=args.device, phase=phase, mode=mode, batch_size=batch_size, img_size=size)
                pair, ratios = measure(model, args.rounds, args.window, layout=layout, precision=precision, **case)
                rows += pair
                pooled += ratios
                label = f'{model} {phase} {mode} {batch_size} x {size} px {layout} {precision}'
                speeds = [p[f'{phase}_samples_per_sec'] for p in pair]
                results.append((label, speeds[0], ratios))
                quartiles = f'{pair[0]["ratio_q1"]:.3f} to {pair[0]["ratio_q3"]:.3f}'
                print(
                    f'{label}: {speeds[0]} / {speeds[1]} img/s, ratio {pair[0]["ratio"]:.3f} ({quartiles})', flush=True
                )
                with open(args.output / f'benchmark-{phase}.csv', 'w', newline='') as f:
                    writer = csv.DictWriter(f, rows[0])
                    writer.writeheader()
                    writer.writerows(rows)
    print(f'all: median of {len(pooled)} ratios {statistics.median(pooled):.3f}')
    draw(results, args.output / 'ratios.png')


if __name__ == '__main__':
    main()

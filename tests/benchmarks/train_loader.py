"""How much of the synthetic rate timm's train.py reaches with a config and real images. Run by hand:

    python tests/benchmarks/train_loader.py train.py train_configs/cifar10_shawrn40_4_modern.yaml --data-dir data

TRAIN_PY is train.py of timm's repository, from wherever it lies. Options after CONFIG, but for those below, are
train.py's, as `--workers 16` or `-b 512`. First the rate of training steps on one batch that stays on the device, with
the config's model, batch, image size, precision, layout, compilation, loss and optimizer; then train.py's own, from the
last log line of each epoch but the first, which warms up and compiles. train.py runs without validation.

--profile runs train.py once more and says where the time of a steady step goes: the device's kernels, waiting for the
loader, waiting for the device (`item`), and the operators with the largest share.

It prints, and writes nothing. Exit code 0, or 2 for options that it does not know, or 1 if train.py fails.
"""

import argparse
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
from timm.data import resolve_data_config
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile, schedule

from timm_sharesnet.preflight import PreflightError, build_model, parse_train_args

LINE = re.compile(
    r'Train: (?P<epoch>\d+) \[ *\d+/(?P<updates>\d+) .*?'
    r'Time: [\d.]+s, +[\d.]+/s +\((?P<seconds>[\d.]+)s, +(?P<rate>[\d.]+)/s\).*'
    r'Data: [\d.]+ \((?P<data>[\d.]+)\)'
)


def synthetic_rate(args, seconds):
    """Images per second of the config's training step on one random batch, measured for at least some seconds."""
    device = torch.device(args.device)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = build_model(args).to(device=device, memory_format=layout).train()
    size = resolve_data_config(vars(args), model=model)['input_size']
    x = torch.randn(args.batch_size, *size, device=device).to(memory_format=layout)
    y = torch.randn(args.batch_size, model.num_classes, device=device).softmax(dim=1)  # dense, as of mixing
    loss_fn = BinaryCrossEntropy(target_threshold=args.bce_target_thresh) if args.bce_loss else SoftTargetCrossEntropy()
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(True)
    if args.torchcompile:
        model = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)
    autocast = torch.autocast(device.type, getattr(torch, args.amp_dtype)) if args.amp else nullcontext()

    def run(steps):
        start = time.perf_counter()
        for _ in range(steps):
            with autocast:
                loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        loss.item()  # waits for the device
        return time.perf_counter() - start

    run(5)  # compiles, records graphs
    steps = max(3, round(seconds / (run(3) / 3)))
    return args.batch_size * steps / run(steps)


def train_command(script, config, options, epochs, output):
    ours = ['--epochs', epochs, '--warmup-epochs', 0, '--val-split', '', '--log-interval', 1000, '--output', output]
    return [str(v) for v in (script, '--config', config, *options, *ours)]


def train_rates(command):
    """What the last log line of each epoch but the first says: the groups of `LINE` as numbers."""
    process = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    last = {m['epoch']: m.groupdict() for m in LINE.finditer(process.stdout)}
    if process.returncode or len(last) < 2:
        sys.exit(f'train.py ended with {process.returncode} after {len(last)} epochs:\n{process.stdout[-3000:]}')
    return [{k: float(v) for k, v in line.items()} for epoch, line in last.items() if epoch != '0']


def profile_train(updates, command):
    """Run train.py in this process and print a profile of some steps of its second epoch. Ends the process."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    active = max(1, min(10, updates - 4))
    times = []

    def report(profiler):
        events = profiler.key_averages()

        def total(name):
            return sum(e.cpu_time_total for e in events if name in e.key) / active / 1000  # ms a step

        step = (times[-1] - times[-1 - active]) * 1000 / active
        on_device = [e for e in events if e.device_type.name != 'CPU' and not e.is_user_annotation]
        kernels = sum(e.self_device_time_total for e in on_device) / active / 1000
        print(f'of a step of {step:.1f} ms, profiler included:')
        print(f'  {kernels:8.1f} ms kernels on the device' + ('' if len(activities) > 1 else ' (none: this is a CPU)'))
        print(f'  {total("enumerate(DataLoader)"):8.1f} ms waiting for the loader')
        print(f'  {total("aten::_local_scalar_dense"):8.1f} ms waiting for the device in item()')
        print(f'  {total("Optimizer.step"):8.1f} ms in optimizer.step()')
        key = 'self_cuda_time_total' if len(activities) > 1 else 'self_cpu_time_total'
        print(events.table(sort_by=key, row_limit=12, max_name_column_width=50))
        sys.stdout.flush()
        raise SystemExit  # what follows would only be trained

    profiler = profile(
        activities=activities,
        schedule=schedule(wait=updates + 1, warmup=1, active=active, repeat=1),
        on_trace_ready=report,
    )

    def after_step(*_):
        times.append(time.perf_counter())
        profiler.step()

    register_optimizer_step_post_hook(after_step)
    sys.argv = command
    with profiler:
        runpy.run_path(command[0], run_name='__main__')


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('train_py', metavar='TRAIN_PY')
    parser.add_argument('config', metavar='CONFIG')
    parser.add_argument('--bench-epochs', type=int, default=3, help='epochs of train.py, the first is not counted')
    parser.add_argument('--seconds', type=float, default=10, help='of the synthetic measurement')
    parser.add_argument('--profile', action='store_true')
    ours, options = parser.parse_known_args()
    try:
        args = parse_train_args(ours.config, options)
    except PreflightError as e:
        parser.error(str(e))
    if args.kd_model_name:
        parser.error('a config with a teacher has no synthetic counterpart here.')

    synthetic = synthetic_rate(args, ours.seconds)
    print(f'synthetic: {synthetic:.1f} images/s', flush=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, 'train.py')  # beside the clone's timm it would import that
        script.write_bytes(Path(ours.train_py).read_bytes())
        command = train_command(script, ours.config, options, ours.bench_epochs, folder)
        lines = train_rates(command)
        for line in lines:
            waiting = line['data'] / line['seconds']
            print(f'train.py, epoch {line["epoch"]:.0f}: {line["rate"]:.1f} images/s, {waiting:.0%} waiting for data')
        rate = statistics.median(line['rate'] for line in lines)
        versions = f'{args.device}, torch {torch.__version__}, timm {timm.__version__}'
        print(f'ratio: {rate / synthetic:.3f} ({args.model}, {versions})')
        if ours.profile:
            sys.stdout.flush()
            updates = int(lines[0]['updates'])
            code = 'import sys, train_loader; train_loader.profile_train(int(sys.argv[1]), sys.argv[2:])'
            here = Path(__file__).parent
            subprocess.run(
                [
                    sys.executable,
                    '-c',
                    f'import sys; sys.path.insert(0, {str(here)!r}); {code}',
                    str(updates),
                    *command,
                ],
                stderr=subprocess.DEVNULL,
                check=True,
            )


if __name__ == '__main__':
    main()

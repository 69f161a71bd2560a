"""What others add to a layer, by name: LoRA, pruning, a parametrization, hooks, a bias."""

from typing import Any, Callable, Dict

import torch
import torch.nn as nn
import torch.nn.utils.parametrize as parametrize
import torch.nn.utils.prune as prune


class LowRank(nn.Module):
    """A convolution with an addition of low rank, as LoRA makes it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.conv = conv
        self.down = nn.Conv2d(conv.in_channels, 2, conv.kernel_size, conv.stride, conv.padding, dtype=conv.weight.dtype)
        self.up = nn.Conv2d(2, conv.out_channels, 1, dtype=conv.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + self.up(self.down(x))


class Larger(nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 1.5 * weight


def _replace_forward(model: nn.Module, name: str) -> None:
    """As accelerate's hooks do."""
    module = model.get_submodule(name)
    forward = module.forward
    module.forward = lambda *args: forward(*args).clamp(max=0.3)


def _add_bias(model: nn.Module, name: str) -> None:
    conv = model.get_submodule(name)
    conv.bias = nn.Parameter(torch.linspace(-1, 1, conv.out_channels, dtype=conv.weight.dtype))


def _pad_circularly(model: nn.Module, name: str) -> None:
    conv = model.get_submodule(name)
    new = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, padding_mode='circular', bias=False)
    new.weight = conv.weight
    model.set_submodule(name, new)


ADDITIONS: Dict[str, Callable[[nn.Module, str], Any]] = {
    'LoRA': lambda model, name: model.set_submodule(name, LowRank(model.get_submodule(name))),
    'pruning': lambda model, name: prune.l1_unstructured(model.get_submodule(name), 'weight', 0.5),
    'parametrization': lambda model, name: parametrize.register_parametrization(
        model.get_submodule(name), 'weight', Larger()
    ),
    'forward hook': lambda model, name: model.get_submodule(name).register_forward_hook(
        lambda m, args, output: output.clamp(max=0.3)
    ),
    'forward pre-hook': lambda model, name: model.get_submodule(name).register_forward_pre_hook(
        lambda m, args: (args[0].clamp(max=0.3), *args[1:])
    ),
    'forward': _replace_forward,
    'bias': _add_bias,  # to a convolution without
    'circular padding': _pad_circularly,  # to a 3x3
}


def add(addition: str, model: nn.Module, name: str) -> None:
    """Add something of `ADDITIONS` to a layer, and leave the model in evaluation mode."""
    ADDITIONS[addition](model, name)
    model.eval()

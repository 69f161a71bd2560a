"""What tools need that trace a net into a graph: FX, torch.export, TorchScript.

Tools that rewrite a graph fold the batch norm after a convolution into it. Done once per use of one kernel, that
computes garbage, so what they trace differs from what runs. What they do to a shared net is then right, but the batch
norms after the shared convolutions stay: `timm_sharesnet.fold` moves them out of the way, and `unshare` gives the plain
net to a tool that cannot handle a convolution used several times.
"""

from typing import Dict, Optional

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrize import type_before_parametrizations

from .conv_bn import conv_args, is_plain

# torch 2.6 does not tell torch.export from torch.compile, whose result is the same either way
_is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)


def is_tracing(x: torch.Tensor) -> bool:
    """Whether a tool is tracing, given the tensor that it passes through the net."""
    return isinstance(x, torch.fx.Proxy) or _is_exporting()


def traced_conv(
    x: torch.Tensor, conv: nn.Module, bias: Optional[torch.Tensor] = None, barrier: bool = True
) -> torch.Tensor:
    """Apply a shared convolution in a graph that other tools will rewrite.

    FX: a function call with the shared weight, which the FX tools fold nothing into, and which the quantizers give a
    scale per use. Where the module must be called, as one node, which they leave alone.

    torch.export: an operation without effect keeps batch norm and convolution apart for the quantizers (PT2E) and
    delegates (XNNPACK), which see no modules. ONNX files do not have it.

    Args:
        x: Input of the convolution.
        conv: The shared convolution.
        bias: Bias of this use.
        barrier: Whether a batch norm may follow, which is to be kept apart.

    Raises:
        RuntimeError: If FX would fold and quantize what was added to the convolution wrongly.
    """
    fx = isinstance(x, torch.fx.Proxy)
    if is_plain(conv):
        x = F.conv2d(x, conv.weight, bias, *conv_args(conv))
        bias = None
    elif not fx:
        x = conv(x)
    elif type_before_parametrizations(conv) is nn.Conv2d:
        raise RuntimeError(
            f'The shared convolution {conv} has a hook, pruning, a parametrization or a bias, and tools that trace '
            f'with FX would fold and quantize it wrongly. Make it plain first (torch.nn.utils.prune.remove, '
            f'torch.nn.utils.parametrize.remove_parametrizations), or trace timm_sharesnet.unshare(model).'
        )
    else:
        x = x.tracer.create_proxy('call_module', x.tracer.path_of_module(conv), (x,), {})
    if bias is not None:
        x = x + bias[:, None, None]
    return torch.ops.aten.alias(x) if barrier and not fx else x


class ScriptableStage(nn.Module):
    """A stage for TorchScript, which cannot pass modules: its blocks get the shared weight."""

    def forward_scripted(self, x: torch.Tensor) -> torch.Tensor:
        """The stage's forward in TorchScript."""
        if self.several:
            weights: Dict[str, torch.Tensor] = {}
            for key, conv in self.conv.items():
                weights[key] = conv.weight
            for i, block in enumerate(self.blocks):
                x = block(x, weights.get(self.keys[i]))
        else:
            for block in self.blocks:
                if self.conv is not None:
                    x = block(x, self.conv.weight)
                else:
                    x = block(x)
        return x

    def __prepare_scriptable__(self) -> 'ScriptableStage':
        """Called by `torch.jit.script`.

        Raises:
            RuntimeError: If the weight alone would not compute what the module does.
        """
        for i, block in enumerate(self.blocks):
            conv = self.conv_of(i)
            if conv is not None and not (is_plain(conv) and block.conv2_args == conv_args(conv)):
                raise RuntimeError(
                    f"TorchScript gets of a stage's shared convolution only the weight, and {conv} is not the "
                    f'convolution without bias, hooks and parametrization that the stage was built with. Merge what '
                    f'was added to it, or script timm_sharesnet.unshare(model).'
                )
        return self

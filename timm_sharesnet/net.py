"""What timm asks of any net whose stages share their convolutions."""

from typing import Any, Dict

import torch
import torch.nn as nn

from .stage import SharedStage

__all__ = ['SharingNet']


class SharingNet(nn.Module):
    """Base of the nets of shared stages, called `layer1`, `layer2` and so on."""

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Create regex patterns for parameter grouping, a stage's shared convolution with its first block."""
        blocks = [
            (r'^layer(\d+)\.blocks\.(\d+)', None),
            (r'^layer(\d+)\.conv\.(\d+)', None),
            (r'^layer(\d+)\.conv\.', (0,)),
            (r'^norm', (99999,)),
        ]
        return dict(stem=r'^conv1|bn1|maxpool', blocks=r'^layer(\d+)' if coarse else blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing of each block.

        The stages do it. `grad_checkpointing` of timm's ResNet stays False: with it, that flattens the stages and would
        call their blocks without the shared convolution.
        """
        for module in self.modules():
            if isinstance(module, SharedStage):
                module.grad_checkpointing = enable

"""Sharing as an operation: from a plain net to one that shares, with or without its weights, and back.

    python -m timm_sharesnet.sharing MODEL --save PART --output DIR [--checkpoint FILE] [--calibration-dir DIR]

makes of a trained plain ResNet one that shares (`share`), as it is or to be trained on: where it costs least, until a
PART of all parameters is saved, or by `--rate R` at one rate in all stages or each (1, the paper, if neither is given).
MODEL is a name that timm knows (with its pretrained weights), such a name with `--checkpoint FILE` (of timm's train.py,
averaged weights if it has them; with the `--num-classes`, `--in-chans` and `--model-kwargs` that it was trained with),
`local-dir:DIR` or `hf-hub:ORG/NAME`. On images of the calibration folder and its subfolders (of `train` alone if it has
splits), without labels, kernels and the last 1x1 of blocks are refitted, and batch norm statistics estimated anew.
Written is DIR with model.safetensors and config.json, which timm loads (`local-dir:DIR`), and train.py by the options
that are printed: the model, all that it was built with, and `--initial-checkpoint`. Nothing is written if anything is
wrong. Exit code 0, or 2 and one line that says what is.

All but the 3x3 that are shared is copied; of the kernels of a run of blocks one is made. Kernels of different blocks
have no order of channels in common, so by default each block's inner channels are first permuted, which leaves its
function as it is, to bring its kernel near to the others'.
"""

from .convert import create_shared, share, unshare

__all__ = ['create_shared', 'share', 'unshare']

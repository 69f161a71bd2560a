"""Registers the models with timm as soon as `timm.models` is there, so that `import timm` is enough.

torch loads the entry-point group `torch.backends` at the end of `import torch`, which timm imports. The entry point
`autoload` below is in that group (pyproject.toml). It imports nothing but the standard library, and cannot raise: an
exception would make `import torch` fail. Switched off with TIMM_SHARESNET_AUTOLOAD=0 (or, for all such entry points,
with torch's own TORCH_DEVICE_BACKEND_AUTOLOAD=0); `import timm_sharesnet` registers the models in any case.
"""

import os
import sys


def autoload():
    """Entry point that torch calls at the end of `import torch`."""
    if os.environ.get('TIMM_SHARESNET_AUTOLOAD') != '0':
        install()
    elif _Finder not in [type(finder) for finder in sys.meta_path]:
        # torch imported the package to find this function. Forget that, so that a later `import timm_sharesnet` runs.
        sys.modules.pop('timm_sharesnet._autoload', None)
        sys.modules.pop('timm_sharesnet', None)


def install():
    """Register the models now if `timm.models` is imported, otherwise as soon as it is."""
    models = sys.modules.get('timm.models')
    if models is not None and not getattr(getattr(models, '__spec__', None), '_initializing', False):
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def importing_torch():
    """True inside `import torch`, that is if torch's entry points import this package and not the user."""
    return getattr(getattr(sys.modules.get('torch'), '__spec__', None), '_initializing', False)


def _register():
    try:
        from . import resnet, resnetv2  # noqa: F401
    except Exception as e:
        _warn(f'timm-sharesnet could not register its models, timm works without them: {type(e).__name__}: {e}')


def _warn(message):
    import warnings

    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # warnings are errors (-W error)
        print(f'RuntimeWarning: {message}', file=sys.stderr)


class _Finder:
    """Finds `timm.models` as usual, and registers the models once its code has run."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != 'timm.models':
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, 'find_spec'):  # Python skips those without, too
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                break
        else:
            return None
        if not hasattr(spec.loader, 'exec_module'):  # a folder without __init__.py, which is not timm's
            return spec
        loader, exec_module = spec.loader, spec.loader.exec_module

        def exec_module_and_register(module):
            exec_module(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        loader.exec_module = exec_module_and_register
        return spec

"""Registers the models with timm as soon as `timm.models` is there, so that `import timm` is enough.

torch loads the entry-point group `torch.backends` at the end of `import torch`, which timm imports. The entry point
`autoload` below is in that group (pyproject.toml). It imports nothing but the standard library, and cannot raise: an
exception would make `import torch` fail. Switched off with TIMM_SHARESNET_AUTOLOAD=0 (or, for all such entry points,
with torch's own TORCH_DEVICE_BACKEND_AUTOLOAD=0); `import timm_sharesnet` registers the models in any case.
"""

import os
import sys

_PACKAGE = __name__.rpartition('.')[0]


def autoload():
    """Entry point that torch calls at the end of `import torch`."""
    if os.environ.get('TIMM_SHARESNET_AUTOLOAD') != '0':
        install()
    if _BY_TORCH:
        # Forget what was imported to find this function, so that a later `import timm_sharesnet` runs, which registers
        # models that are missing.
        sys.modules.pop(__name__, None)
        sys.modules.pop(_PACKAGE, None)


def install():
    """Register the models if `timm.models` is imported and does not have them, and whenever it is imported (again)."""
    # By name, as an earlier import of this file made another class
    ours = [finder for finder in sys.meta_path if _name(type(finder)) == _name(_Finder)]
    for finder in ours:
        sys.meta_path.remove(finder)
    sys.meta_path.insert(0, _Finder())
    models = sys.modules.get('timm.models')
    if models is not None and not _initializing(models):
        _register()


def importing_torch():
    """True inside `import torch`, that is if torch's entry points import this package and not the user."""
    return _initializing(sys.modules.get('torch'))


def _initializing(module):
    return getattr(getattr(module, '__spec__', None), '_initializing', False)


def _name(cls):
    return cls.__module__, cls.__qualname__


def _register():
    try:
        from importlib import import_module

        from timm.models import is_model

        models = dict(resnet='sharesnet50', resnetv2='sharesnet164_cifar', sharesnet='sharesnet')
        families = {f'{_PACKAGE}.{name}': model for name, model in models.items()}
        if all(map(is_model, families.values())):
            return
        before = [sys.modules[family] for family in families if sys.modules.get(family)]
        if before and not any(map(_initializing, before)):  # made with another import of timm, whose registry has gone
            for name in [name for name in sys.modules if name.startswith(f'{_PACKAGE}.') and name != __name__]:
                del sys.modules[name]
        for family in families:
            import_module(family)
    except Exception as e:
        _warn(f'timm-sharesnet could not register its models, timm works without them: {type(e).__name__}: {e}')


def _warn(message):
    import warnings

    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # warnings are errors (-W error)
        print(f'RuntimeWarning: {message}', file=sys.stderr)


class _Loader:
    """Loads a module as its own loader does, and registers the models once its code has run.

    It is no patch of that loader, which may be that of other modules, too, as of all in a folder of a zip file.
    """

    def __init__(self, spec):
        self.spec, self.loader = spec, spec.loader

    def __getattr__(self, name):  # for who looks a module up without importing it
        return getattr(self.loader, name)

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.spec.loader = self.loader  # nothing of ours stays
        if getattr(module, '__loader__', None) is self:
            module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register()


class _Finder:
    """Finds `timm.models` as usual, and registers the models once its code has run."""

    finding = False

    def find_spec(self, fullname, path=None, target=None):
        if self.finding:  # asked by another finder that we ask
            return None
        if fullname != 'timm.models':
            # What is in front of us may take timm.models for itself, as hooks that instrument a package do. timm asks
            # for modules that such a hook does not want before (apex), which is the time to get there first.
            if self in sys.meta_path[1:]:
                sys.meta_path.remove(self)
                sys.meta_path.insert(0, self)
            return None
        self.finding = True
        try:
            spec = self._find_spec(fullname, path, target)
        finally:
            self.finding = False
        if hasattr(getattr(spec, 'loader', None), 'exec_module'):  # found, and no folder that is not timm's
            spec.loader = _Loader(spec)
        return spec

    def _find_spec(self, fullname, path, target):
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, 'find_spec'):  # Python skips those without, too
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    return spec
        return None


_BY_TORCH = importing_torch()

"""timm's own tests of models pass for each of ours: `timm_suite.py`."""

from pathlib import Path

import forks
import pytest
from models import CIFAR_TWINS, SHARED

DEFAULT = ['sharesnet50', 'sharesnet164_cifar']
OTHERS = [name for name in [*SHARED, *CIFAR_TWINS] if name not in DEFAULT]


@pytest.mark.parametrize('name', [*DEFAULT, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_every_test_of_timm_s_passes(name):
    suite = forks.run([Path(__file__).with_name('timm_suite.py'), name])
    assert suite.returncode == 0, suite.stdout + suite.stderr
    assert '1 models pass every kind of test, none skipped' in suite.stdout

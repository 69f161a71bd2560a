"""timm's own tests of models pass for each of ours: `timm_suite.py`."""

from pathlib import Path

import forks
from models import CIFAR_TWINS, SHARED, slow_but_for


@slow_but_for('sharesnet164_cifar', name='name', of=[*SHARED, *CIFAR_TWINS])
def test_every_test_of_timm_s_passes(name):
    suite = forks.run([Path(__file__).with_name('timm_suite.py'), name])
    assert suite.returncode == 0, suite.stdout + suite.stderr
    assert '1 models pass every kind of test, none skipped' in suite.stdout

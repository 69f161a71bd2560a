"""benchmarks/accuracy.py takes the newest measurements, and the accuracies of the paper's nets alone."""

import os

import pytest
from hub_project import ROOT


@pytest.fixture
def accuracy(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tests' / 'benchmarks'))
    import accuracy

    return accuracy


def test_newest_measurements_are_those_of_the_newest_versions(accuracy, tmp_path):
    """Not of the youngest file: a clone does not keep the times. Nor of the last name: 10 comes after 9."""
    names = [
        'deploy-Z-ort1.9.0-ov2027.1.0-torch2.15.0.csv',
        'deploy-A-ort1.10.0-ov2026.4.1-torch2.14.1+cu130.csv',
        'deploy-B-ort1.10.0-ov2026.4.1-torch2.9.0+cu130.csv',
    ]
    for i, name in enumerate(names):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (i, i))
    assert accuracy.newest(tmp_path.iterdir()).name == names[1]


def test_net_with_other_arguments_is_not_the_best_of_its_name(accuracy):
    def entry(top1, **model_args):
        return {'accuracy': top1 and {'top1': top1, 'top5': 99.0}, 'model_args': model_args}

    manifest = {
        'shawrn28_10.a_c100': entry(80.0, block_drop_rate=0.3),
        'shawrn28_10.b_c100': entry(79.0),
        'shawrn28_10.silu_c100': entry(82.0, act_layer='silu'),
        'shawrn28_10.half_c100': entry(81.0, share_rate=0.5),
        'shawrn28_10.new_c100': entry(None),
        'wrn28_10.a_c100': entry(83.0, share_rate=0.0),
    }
    assert accuracy.find_best('shawrn28_10', manifest) == 'shawrn28_10.a_c100'
    assert accuracy.find_best('wrn28_10', manifest) == 'wrn28_10.a_c100'
    assert accuracy.find_best('wrn40_4', manifest) is None

"""The README's examples run as they stand, in order and in one session."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch.nn as nn
from demo import load_images

README = Path(__file__).parents[1] / 'README.md'


def test_python_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r'```python\n(.*?)```', README.read_text(), re.S)
    assert len(blocks) > 5
    monkeypatch.chdir(tmp_path)  # as outside of a clone
    load_images()[0][0].save('cat.png')
    session: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, 'README.md', 'exec'), session)
    assert capsys.readouterr().out.startswith('cat ')
    assert not any(isinstance(m, nn.BatchNorm2d) for m in session['folded'].modules())


def test_files_that_it_links_to_are_there() -> None:
    links = re.findall(r'\]\((?!https?:)([^)#]+)\)', README.read_text())
    assert links
    assert not [link for link in links if not (README.parent / link).exists()]


def test_table_of_models_is_the_one_of_the_results_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(README.parent / 'tests' / 'benchmarks'))
    import accuracy

    (path,) = accuracy.RESULTS.glob('accuracy-*.csv')
    with path.open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert accuracy.models_table(rows) + '\n' in README.read_text()
    for row in rows:  # counts of the running nets
        model = timm.create_model(row['model'], device='meta')
        assert int(row['param_count']) == sum(p.numel() for p in model.parameters())
        assert int(row['convs']) == accuracy.count_convolutions(model)
    assert f'[CSV](tests/benchmarks/results/{path.name})' in README.read_text()


def test_tables_of_sharing_are_those_of_the_results_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(README.parent / 'tests' / 'benchmarks'))
    import share

    (path,) = share.RESULTS.glob('share-*.csv')
    with path.open(newline='') as file:
        overview, first, *_ = share.table(list(csv.DictReader(file))).split('\n\n')
    assert first.startswith('| preact-56 |')
    assert f'\n{overview}\n' in README.read_text() and f'\n{first}\n' in README.read_text()


@pytest.mark.parametrize('repository', ['', 'https://github.com/org/timm-sharesnet'])
def test_relative_links_are_absolute_on_pypi_once_the_repository_has_an_address(repository: str) -> None:
    code = (README.parent / '.ci' / 'metadata_hook.py').read_text()
    hook: dict[str, Any] = {}
    exec(code[code.index('def absolute_links') :], {'re': re}, hook)
    text = hook['absolute_links'](README.read_text(), repository)
    relative = re.findall(r'\]\((?!https?:|#)[^)]+\)', text)
    assert bool(relative) == (not repository)
    if repository:
        assert '](https://github.com/org/timm-sharesnet/raw/main/hub/sharing.svg)' in text
        assert '](https://github.com/org/timm-sharesnet/blob/main/train_configs)' in text

"""The examples, links, commands and tables of the READMEs hold as they stand."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch.nn as nn

ROOT = Path(__file__).parents[1]
README = ROOT / 'README.md'
BENCHMARKS = ROOT / 'tests' / 'benchmarks'
PAGES = [
    README,
    *(ROOT / folder / 'README.md' for folder in ('hub', 'train_configs', 'timm_sharesnet')),
    BENCHMARKS / 'README.md',
]

each_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.parent.name if page != README else 'first')


def test_python_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r'```python\n(.*?)```', README.read_text(), re.S)
    assert len(blocks) > 4
    monkeypatch.chdir(tmp_path)  # as outside of a clone, but for the image
    (tmp_path / 'tests').symlink_to(ROOT / 'tests')
    session: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, 'README.md', 'exec'), session)
    assert capsys.readouterr().out.startswith('cat ')
    assert not any(isinstance(m, nn.BatchNorm2d) for m in session['folded'].modules())


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r'^#+ (.*)', re.sub(r'^```.*?^```', '', page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}


@each_page
def test_what_it_links_to_is_there(page: Path) -> None:
    links = re.findall(r'\]\((?!https?:)([^)]+)\)', page.read_text())
    assert links or page != README
    for link in links:
        path, _, anchor = link.partition('#')
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_page_of_the_package_names_every_file() -> None:
    package = ROOT / 'timm_sharesnet'
    names = {path.name for path in package.glob('*.py')} | {path.parent.name for path in package.glob('*/__init__.py')}
    text = (package / 'README.md').read_text()
    assert names - {'__init__.py'} == set(re.findall(r'^\|[^|]*\| \[`([\w.]+)`\]', text, re.M))


@each_page
def test_what_its_commands_run_and_name_is_there(page: Path) -> None:
    blocks = '\n'.join(re.findall(r'```bash\n(.*?)```', page.read_text(), re.S))
    for path in re.findall(r'\b(?:hub|tests|train_configs)/[\w./-]+\.\w+', blocks):
        assert (ROOT / path).exists(), path
    for module in re.findall(r'-m (timm_sharesnet\.\w+)', blocks):
        path = ROOT / module.replace('.', '/')
        assert (path / '__main__.py').exists() or path.with_suffix('.py').exists(), module
    extras = re.search(r'\[project.optional-dependencies\]\n(.*?)\n\n', (ROOT / 'pyproject.toml').read_text(), re.S)
    for extra in re.findall(r"pip install '\S+\[([\w,]+)\]'", page.read_text()):
        assert set(extra.split(',')) <= {*re.findall(r'^(\w+) =', extras[1], re.M)}, extra


def test_table_of_models_is_the_one_of_the_results_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import accuracy

    (path,) = accuracy.RESULTS.glob('accuracy-*.csv')
    with path.open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert accuracy.models_table(rows) + '\n' in README.read_text()
    for row in rows:  # counts of the running nets
        model = timm.create_model(row['model'], device='meta')
        assert int(row['param_count']) == sum(p.numel() for p in model.parameters())
        assert int(row['convs']) == accuracy.count_convolutions(model)
    assert f'[CSV](results/{path.name})' in (BENCHMARKS / 'README.md').read_text()


def test_tables_of_sharing_are_those_of_the_results_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import share_tables

    rows = share_tables.read()
    for page, tables in share_tables.pages(rows).items():
        text = page.read_text()
        for table in tables.values():
            assert text.count(f'\n{table}\n') == 1
        assert share_tables.put(text, tables) == text


def test_tables_of_devices_are_those_of_the_results_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import device_tables

    text = (BENCHMARKS / 'README.md').read_text()
    tables = device_tables.tables(device_tables.read())
    assert device_tables.put(text, tables) == text


@pytest.mark.parametrize('repository', ['', 'https://github.com/org/timm-sharesnet'])
def test_relative_links_are_absolute_on_pypi_once_the_repository_has_an_address(repository: str) -> None:
    code = (ROOT / '.ci' / 'metadata_hook.py').read_text()
    hook: dict[str, Any] = {}
    exec(code[code.index('def absolute_links') :], {'re': re}, hook)
    text = hook['absolute_links'](README.read_text(), repository)
    relative = re.findall(r'\]\((?!https?:|#)[^)]+\)', text)
    assert bool(relative) == (not repository)
    if repository:
        assert '](https://github.com/org/timm-sharesnet/raw/main/hub/sharing.svg)' in text
        assert '](https://github.com/org/timm-sharesnet/blob/main/train_configs/README.md)' in text

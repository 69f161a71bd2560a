"""The README's examples run as they stand, in order and in one session."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch.nn as nn

README = Path(__file__).parents[1] / 'README.md'


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r'```python\n(.*?)```', README.read_text(), re.S)
    assert len(blocks) > 5
    (tmp_path / 'tests').symlink_to(README.parent / 'tests')  # the examples' image; what they write stays here
    monkeypatch.chdir(tmp_path)
    session: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, 'README.md', 'exec'), session)
    assert session['probabilities'].argmax() == 3  # the first image is a cat
    assert not any(isinstance(m, nn.BatchNorm2d) for m in session['folded'].modules())


def test_files_that_it_links_to_are_there() -> None:
    links = re.findall(r'\]\((?!https?:)([^)#]+)\)', README.read_text())
    assert links
    assert not [link for link in links if not (README.parent / link).exists()]

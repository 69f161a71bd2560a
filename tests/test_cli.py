"""What ends a command is said in one line, whatever an error knows of itself."""

import errno

import pytest
from PIL import UnidentifiedImageError

from timm_sharesnet.cli import CommandError, one_line


@pytest.mark.parametrize(
    'error,line',
    [
        (FileNotFoundError(errno.ENOENT, 'No such file or directory', 'a.pth'), 'a.pth: No such file or directory'),
        (PermissionError(errno.EACCES, 'Permission denied', '.tmp/n', None, 'n'), 'n: Permission denied'),  # os.replace
        (OSError(errno.ENOSPC, 'No space left on device'), 'out: No space left on device'),
        (OSError('image file is truncated\n(3 bytes)'), 'out: image file is truncated (3 bytes)'),
        (UnidentifiedImageError(), 'out: UnidentifiedImageError'),
        (OSError(), 'out: OSError'),
        (CommandError('there are no images\n in x'), 'there are no images in x'),
    ],
)
def test_one_line_names_the_file_and_what_is_wrong(error: Exception, line: str) -> None:
    assert one_line(error, 'out') == line

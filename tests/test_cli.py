"""Manners of a command line: exit code, one line, terminals that lack a character, and names that are nearly right."""

import errno
import io
import logging
import sys
import warnings
from typing import Any, Dict, List, Optional, Sequence

import pytest
from PIL import UnidentifiedImageError
from timm.utils import ParseKwargs

from timm_sharesnet.cli import CommandError, Parser, command, concerning, did_you_mean, headline, reason


def failing(error: Optional[BaseException]) -> Any:
    """The `main` of a command that ends in an error."""

    @command('try')
    def main(argv: Sequence[str]) -> None:
        with concerning('out', KeyError):
            if error is not None:
                raise error

    return main


@pytest.mark.parametrize(
    'error,lines',
    [
        (FileNotFoundError(errno.ENOENT, 'No such file or directory', 'a.pth'), ['a.pth: No such file or directory']),
        (PermissionError(errno.EACCES, 'Permission denied', '.tmp/n', None, 'n'), ['n: Permission denied']),
        (OSError(errno.ENOSPC, 'No space left on device'), ['out: No space left on device']),
        (OSError('image file is truncated\n(3 bytes)'), ['out: image file is truncated (3 bytes)']),
        (UnidentifiedImageError(), ['out: UnidentifiedImageError']),
        (OSError(), ['out: OSError']),
        (KeyError('x'), ["out: 'x'"]),
        (CommandError('there are no images\n in a  b'), ['there are no images in a  b']),
        (CommandError('one', 'two'), ['one', 'two']),
        (CommandError('\x1b[31m \udce4'), ['\\x1b[31m \\udce4']),
        (CommandError('x' * 9999), ['x' * 2000]),
        (KeyboardInterrupt(), ['interrupted']),
    ],
    ids=repr,
)
def test_what_is_wrong_is_said_in_a_line_each_and_ends_with_2(
    capsys: Any, error: BaseException, lines: List[str]
) -> None:
    assert failing(error)([]) == 2
    output = capsys.readouterr()
    assert (output.out, output.err) == ('', ''.join(f'try: {line}\n' for line in lines))


def test_what_went_well_ends_with_0_and_bugs_keep_their_traceback(capsys: Any) -> None:
    assert failing(None)([]) == 0
    assert capsys.readouterr().err == ''
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError())([])


def test_arguments_are_those_of_the_process_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: List[Sequence[str]] = []
    monkeypatch.setattr(sys, 'argv', ['try', 'a'])
    main = command('try')(seen.append)
    assert (main(), main(['b'])) == (0, 0)
    assert seen == [['a'], ['b']]


@pytest.mark.parametrize('encoding', ['cp1252', 'ascii', 'utf-8'])
def test_characters_that_an_encoding_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    for name in 'stdout', 'stderr':
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))

    @command('try')
    def main(argv: Sequence[str]) -> None:
        print('\u043a \udce4.png')  # the second a byte that is no UTF-8, as Python has it
        raise CommandError('\u043a  \udce4\x1b\n.png')

    assert main([]) == 2
    letter = '\u043a' if encoding == 'utf-8' else '\\u043a'
    lines = f'{letter} \\udce4.png\n', f'try: {letter}  \\udce4\\x1b .png\n'
    for stream, text in zip((sys.stdout, sys.stderr), lines, strict=True):
        stream.flush()
        stream.buffer.seek(0)
        assert stream.buffer.read().decode(encoding) == text


def test_libraries_are_quiet_while_a_command_runs(capsys: Any, caplog: Any) -> None:
    def remark(argv: Sequence[str] = ()) -> None:
        logging.getLogger('timm').error('a remark')
        warnings.warn('a remark', stacklevel=2)

    assert command('try')(remark)([]) == 0
    assert (capsys.readouterr().err, caplog.messages) == ('', [])
    with pytest.warns(UserWarning, match='a remark'):
        remark()
    assert caplog.messages == ['a remark']


def parse(*argv: str) -> Dict[str, Any]:
    parser = Parser(prog='try')
    parser.add_argument('--model')
    parser.add_argument('--size', type=int)
    parser.add_argument('--model-kwargs', nargs='*', action=ParseKwargs, metavar='KEY=VALUE')
    return {key: value for key, value in vars(parser.parse_args(argv)).items() if value is not None}


@pytest.mark.parametrize(
    'argv,message',
    [
        (['--size', 'big'], "argument --size: invalid int value: 'big'"),
        (['--mod', 'x'], 'unrecognized arguments: --mod x'),
        (['--model-kwargs', 'silu'], '--model-kwargs must be KEY=VALUE'),
        (['--model-kwargs', 'layers={[]: 1}'], '--model-kwargs must be KEY=VALUE'),
    ],
    ids=' '.join,
)
def test_wrong_options_are_errors_of_the_command(argv: List[str], message: str) -> None:
    with pytest.raises(CommandError) as error:
        parse(*argv)
    assert str(error.value) == message


def test_options_are_parsed() -> None:
    argv = ['--model', 'x', '--size', '3', '--model-kwargs', 'act_layer=silu', 'layers=(2,2)']
    assert parse(*argv) == {'model': 'x', 'size': 3, 'model_kwargs': {'act_layer': 'silu', 'layers': (2, 2)}}


def test_errors_of_libraries_are_told_in_a_line() -> None:
    error = RuntimeError('Error(s) in loading:\n\tMissing key.\n\tUnexpected key.')
    assert headline(error) == 'RuntimeError: Error(s) in loading: Missing key.'
    assert reason(error) == 'Error(s) in loading: Missing key. Unexpected key.'
    assert (headline(EOFError()), reason(EOFError())) == ('EOFError:', 'EOFError')


def test_names_that_are_near_are_named() -> None:
    known = ['resnet50', 'resnet50d', 'wrn28_10']
    assert did_you_mean('resnt50', known) == ', did you mean resnet50 or resnet50d?'
    assert did_you_mean('zzz', known) == ''
    assert did_you_mean('zzz', known, ', they are few') == ', they are few'

"""Manners of a command line, the same for each command.

A command is a function of its arguments that raises what is wrong. `@command` makes its `main` of it:

    @command('export')
    def main(argv):
        args = Parser(prog='python -m timm_sharesnet.export', description=__doc__).parse_args(argv)
        with concerning(args.output):
            ...

    if __name__ == '__main__':
        sys.exit(main())

`main(argv=None)` returns the exit code, 0 or 2. With 2, stderr has the name and what is wrong, a line for each argument
of a `CommandError`. Wrong options are such errors, too. The line of an error of the system begins with its file, or
with that of `concerning`. Any other exception is a bug and keeps its traceback. Characters that a terminal or its
encoding lacks are escaped. What libraries log and warn of is not shown.
"""

import argparse
import contextlib
import difflib
import functools
import io
import logging
import re
import sys
import warnings
from typing import Any, Callable, Iterable, Iterator, List, Mapping, NoReturn, Optional, Sequence, Tuple, Type

_LONGEST = 2000  # characters of a line


class CommandError(Exception):
    """What is wrong, in one line for each argument."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `CommandError`s. Options are written out, and the description is shown as it is."""

    def __init__(self, *, allow_abbrev: bool = False, **kwargs: Any) -> None:
        kwargs.setdefault('formatter_class', argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=allow_abbrev, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise CommandError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Tuple[Any, List[str]]:
        """As argparse does it. An error of `timm.utils.ParseKwargs` does not tell its option, so all such are named."""
        try:
            return super().parse_known_args(args, namespace)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as e:
            names = [action.option_strings[-1] for action in self._actions if action.metavar == 'KEY=VALUE']
            raise CommandError(f'{", ".join(names)} must be KEY=VALUE') from e


def command(name: str) -> Callable[[Callable[[Sequence[str]], None]], Callable[..., int]]:
    """Make a command's `main` of a function that takes arguments and raises what is wrong, see the module."""

    def decorate(function: Callable[[Sequence[str]], None]) -> Callable[..., int]:
        @functools.wraps(function)
        def main(argv: Optional[Sequence[str]] = None) -> int:
            for stream in sys.stdout, sys.stderr:
                if isinstance(stream, io.TextIOWrapper):
                    stream.reconfigure(errors='backslashreplace')
            if argv is None:  # the program: torch 2.6 leaves a folder for its end to clean up, which warns
                warnings.simplefilter('ignore')
            try:
                with _quiet():
                    function(sys.argv[1:] if argv is None else argv)
                return 0
            except CommandError as e:
                faults = [str(fault) for fault in e.args]
            except OSError as e:
                faults = [f'{_file(e)}: {reason(e)}' if _file(e) else reason(e)]
            except KeyboardInterrupt:
                faults = ['interrupted']
            for fault in faults:
                print(f'{name}: {printable(fault)}', file=sys.stderr)
            return 2

        return main

    return decorate


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(before)


def _file(error: OSError) -> Any:
    return error.filename2 or error.filename  # the second is where something was to be written


@contextlib.contextmanager
def concerning(path: Any, *kinds: Type[Exception]) -> Iterator[None]:
    """Name a file in errors of the system that name none themselves, and in errors of other kinds."""
    try:
        yield
    except (OSError, *kinds) as e:  # type: ignore[misc]  # mypy takes no unpacked tuple
        if isinstance(e, OSError) and _file(e):
            raise
        raise CommandError(f'{path}: {reason(e)}') from e


def reason(error: BaseException) -> str:
    """What an error says, in one line, or its kind where it says nothing."""
    return _joined((isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__)


def headline(error: BaseException) -> str:
    """Kind and first line of an error, for those of libraries that say much or little."""
    lines = [*str(error).strip().splitlines(), '', '']
    return _joined(f'{type(error).__name__}: {lines[0]}' + (f' {lines[1].strip()}' if lines[0].endswith(':') else ''))


def printable(text: str) -> str:
    """One line without control characters, of bearable length."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in _joined(text)[:_LONGEST])


def _joined(text: str) -> str:
    return re.sub(r'\s*\n\s*', ' ', text.strip())


def did_you_mean(name: str, known: Iterable[str], otherwise: str = '') -> str:
    """The end of a sentence on a name that is not known.

    Args:
        name: What was given.
        known: The names that there are, or spellings with the names that they are for.
        otherwise: How to end the sentence if none is near.
    """
    close = difflib.get_close_matches(name, list(known), 3)
    names = dict.fromkeys(known[c] for c in close) if isinstance(known, Mapping) else close
    return f', did you mean {" or ".join(names)}?' if close else otherwise


def positive(text: str) -> int:
    """The type of an option that takes a positive integer."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f'must be positive, not {text}')
    return number

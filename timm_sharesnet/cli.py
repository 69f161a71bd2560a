"""What the commands have in common: how they say what is wrong, in one line."""


class CommandError(Exception):
    """What is wrong, in one line."""


def reason(error: Exception) -> str:
    """What an error says, in one line, or its kind where it says nothing."""
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return ' '.join(text.split())


def one_line(error: Exception, path: str) -> str:
    """What ended a command. One of the system begins with its file, or with the given one if it knows none."""
    if isinstance(error, CommandError):
        return reason(error)
    named = (error.filename2 or error.filename) if isinstance(error, OSError) else None
    return f'{named or path}: {reason(error)}'

"""Python programs that need not wait for torch: each is forked from a process that imported it, without our hook.

`run` takes what `python` takes: `-c CODE`, `-m MODULE` or a script, and its arguments. The program finds torch imported
as at the end of `import torch`, with or without our hook by its own environment. A program that needs another state of
the interpreter (options of `python`, a `PYTHONPATH`, an encoding of the terminal) is run by `subprocess` instead.
"""

import atexit
import json
import os
import random
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, NoReturn, Optional, Sequence, Union

Arg = Union[str, Path]


class Program:
    """A running program, whose streams are files or pipes of the caller's."""

    def __init__(self, args: Sequence[Arg], streams: Sequence[Any], env: Any = None, cwd: Optional[Arg] = None) -> None:
        self._status, status = os.pipe()
        request = [[str(arg) for arg in args], dict(os.environ if env is None else env), str(cwd or os.getcwd())]
        fds = [*(stream if isinstance(stream, int) else stream.fileno() for stream in streams), status]
        socket.send_fds(_server(), [json.dumps(request).encode()], fds)
        os.close(status)
        (self.pid,) = struct.unpack('i', os.read(self._status, 4))

    def wait(self) -> int:
        (code,) = struct.unpack('i', os.read(self._status, 4))
        os.close(self._status)
        return code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def run(
    args: Sequence[Arg], env: Optional[Dict[str, str]] = None, cwd: Optional[Arg] = None
) -> 'subprocess.CompletedProcess[str]':
    """Run a program to its end, with nothing to read."""
    with tempfile.TemporaryFile('w+') as out, tempfile.TemporaryFile('w+') as err, open(os.devnull) as nothing:
        code = Program(args, [nothing, out, err], env, cwd).wait()
        out.seek(0), err.seek(0)
        return subprocess.CompletedProcess(args, code, out.read(), err.read())


@lru_cache(maxsize=None)
def _server() -> socket.socket:
    """The way to the process that forks: it ends when this one does, and closes its end."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    env = {**os.environ, 'TORCH_DEVICE_BACKEND_AUTOLOAD': '0'}
    subprocess.Popen([sys.executable, __file__, str(its.fileno())], env=env, pass_fds=[its.fileno()])
    its.close()
    return ours


def _serve(way: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    while True:
        request, fds, *_ = socket.recv_fds(way, 1 << 20, 4)
        if not request:
            return
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            pid = os.fork()
            if pid == 0:
                _program(*json.loads(request), fds)
            os.write(fds[3], struct.pack('i', pid))
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.write(fds[3], struct.pack('i', code))
            os._exit(0)
        for fd in fds:
            os.close(fd)


def _program(args: Sequence[str], env: Dict[str, str], cwd: str, fds: Sequence[int]) -> NoReturn:
    for fd in range(3):
        os.dup2(fds[fd], fd)
    os.closerange(3, max(fds) + 1)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    random.seed()
    code = 1
    try:
        _main(*args)
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if not isinstance(e.code, (int, type(None))):
            print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in sys.stdout, sys.stderr:
        stream.flush()
    os._exit(code & 0xFF)


def _main(first: str, *rest: str) -> None:
    import torch

    option = first in ('-c', '-m')
    sys.argv = list(rest) if first == '-m' else [first, *rest[1:]] if first == '-c' else [first, *rest]
    sys.path[0] = '' if option else str(Path(first).resolve().parent)
    if torch._is_device_backend_autoload_enabled():
        torch.__spec__._initializing = True  # as inside of `import torch`, whose last act this is
        torch._import_device_backends()
        torch.__spec__._initializing = False
    if first == '-c':
        sys.modules['__main__'] = ModuleType('__main__')
        exec(rest[0], vars(sys.modules['__main__']))
    elif first == '-m':
        runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
    else:
        runpy.run_path(first, run_name='__main__')


if __name__ == '__main__':
    import torch  # noqa: F401
    import torchvision  # noqa: F401

    _serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)

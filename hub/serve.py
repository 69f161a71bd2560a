#!/usr/bin/env python3
"""Show the page of space/ in a browser on this machine, with the nets that it is published with.

    python hub/serve.py                 http://localhost:8000
    python hub/serve.py --port 8001

The nets are those of the default weights. onnxruntime-web is taken from tests/javascript/node_modules, where `make
javascript` puts it, else from its CDN. Nothing is written but a temporary folder. Ctrl-C ends it.
Exit code 0, or 2 and a line for each fault.
"""

import contextlib
import functools
import http.server
import sys
import tempfile
from pathlib import Path

import catalog
import page

from timm_sharesnet.cli import CommandError, Parser, command, positive, reason

RUNTIME = page.HUB.parent / 'tests' / 'javascript' / 'node_modules' / 'onnxruntime-web' / 'dist'


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files, and tells of errors alone."""

    extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {'.js': 'text/javascript'}

    def log_request(self, code='-', size='-'):
        pass


def make_server(folder, port=0):
    """A server of a folder to this machine alone, on any free port by default.

    Raises:
        CommandError: If another program has the port.
    """
    try:
        return http.server.ThreadingHTTPServer(('127.0.0.1', port), functools.partial(Handler, directory=folder))
    except (OSError, OverflowError) as e:
        raise CommandError(f'port {port}: {reason(e)}; --port takes another') from e


@command('serve.py')
def main(argv):
    parser = Parser(description=__doc__)
    parser.add_argument('--port', type=positive, default=8000, help='of the page (8000)')
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        release = page.default_release(catalog.OURS)
        page.assemble(release, catalog.NAMESPACE, Path(folder), RUNTIME if RUNTIME.is_dir() else None)
        with make_server(folder, args.port) as server:
            print(f'{release.name} at http://localhost:{server.server_port}', flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_forever()


if __name__ == '__main__':
    sys.exit(main())

"""The command, see `check.py`."""

import os
import subprocess
import sys

from .check import main

if __name__ == '__main__':
    if not __debug__:  # timm says much of what is wrong by assertions, which -O takes out
        env = {k: v for k, v in os.environ.items() if k != 'PYTHONOPTIMIZE'}
        sys.exit(subprocess.call([sys.executable, '-m', 'timm_sharesnet.preflight', *sys.argv[1:]], env=env))
    sys.exit(main())

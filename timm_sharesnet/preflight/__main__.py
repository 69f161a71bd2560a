"""The command, see `timm_sharesnet.preflight`."""

import logging
import os
import subprocess
import sys
import warnings

from .check import main

if __name__ == '__main__':
    if not __debug__:  # timm says much of what is wrong by assertions, which -O takes out
        env = {k: v for k, v in os.environ.items() if k != 'PYTHONOPTIMIZE'}
        sys.exit(subprocess.call([sys.executable, '-m', 'timm_sharesnet.preflight', *sys.argv[1:]], env=env))
    logging.disable()  # timm's and torch's own remarks are train.py's to make
    warnings.simplefilter('ignore')
    sys.exit(main())

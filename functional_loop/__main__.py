"""``python -m functional_loop``: the command line."""

import sys

from .cli import main

sys.exit(main())

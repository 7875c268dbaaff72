"""``python -m elit`` is the ``elit`` command."""

import sys

from elit.cli import main

sys.exit(main())

"""``python -m bilevel_at.evaluate RUN [flags]``."""

from __future__ import annotations

import sys

from ..commands.evaluate import PROG, command
from ..commands.flags import main

if __name__ == "__main__":
    sys.exit(main(command, PROG))

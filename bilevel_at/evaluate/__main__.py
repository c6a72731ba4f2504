"""``python -m bilevel_at.evaluate RUN [flags]``."""

from __future__ import annotations

import sys

from .. import flags
from .command import PROG, command

if __name__ == "__main__":
    sys.exit(flags.main(command, PROG))

"""``python -m bilevel_at.report RUN [RUN ...] [--out FOLDER]``."""

from __future__ import annotations

import sys

from ..commands.flags import main
from ..commands.report import PROG, command

if __name__ == "__main__":
    sys.exit(main(command, PROG))

"""Train a robust model from a problem file, and show what it got: ``python -m bilevel_at.run problems/fastbat.py``."""

from __future__ import annotations

import sys

from .commands.flags import main
from .commands.plan import PROG
from .commands.run import run

__all__ = ["run"]

if __name__ == "__main__":
    sys.exit(main(run, PROG))

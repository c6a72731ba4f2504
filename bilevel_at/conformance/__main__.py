"""``python -m bilevel_at.conformance [--json FILE] [--markdown FILE]``."""

from __future__ import annotations

import sys

from ..commands.conformance import PROG, command
from ..commands.flags import main

if __name__ == "__main__":
    sys.exit(main(command, PROG))

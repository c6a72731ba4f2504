"""Write the weights of a run to a file to share: ``bilevel-at export RUN FILE.safetensors``."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InputError
from . import flags

__all__ = ["PROG", "command"]

PROG = "bilevel-at export"
ABOUT = "The weights of a run as a .safetensors file, which says what network they are of, and holds nothing that runs."
EXAMPLES = f"""examples:
  {PROG} runs/fastbat-digits-seed0 fastbat.safetensors
  python -m bilevel_at.evaluate fastbat.safetensors --attacks clean pgd-50-10
  python -c "import bilevel_at as ba; model = ba.load('fastbat.safetensors')\""""


def _options(which: str = "best", half: bool = False) -> None:
    """The flags.

    which: the checkpoint: best, last or last_good.
    half: store weights in 16 bits. The file is half as large; results, which are of other weights then, are left out.
    """


def command(args: Sequence[str]) -> int:
    """Run the command, and return exit status 0.

    Raises:
        InputError: if the arguments are invalid.
    """
    paths = [word for word in args[:2] if not word.startswith("-")]
    usage = f"{PROG} RUN FILE.safetensors"
    options = flags.parse(flags.flags_of(_options), list(args[len(paths) :]), usage, ABOUT, epilogue=lambda: EXAMPLES)
    if len(paths) < 2:
        order = "; they come before flags" if args[len(paths) :] else ""
        raise InputError(f"a run and a file are needed: {usage}{order}")
    from ..runs.shared import card, export  # here: --help needs no network

    path = export(paths[0], paths[1], **options)
    about = card(path)
    print(f"{path}: {about['model']} of {about['file']}, {options['which']} epoch, {path.stat().st_size:,} bytes")
    return 0

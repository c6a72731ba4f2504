"""How the fuzz tests run a case: within a time and a memory, and with an answer or one line at the end."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import warnings

import bilevel_at as ba

CASES = int(os.environ.get("BILEVEL_FUZZ", "600"))
MOST_MEMORY, MOST_SECONDS = 2**30, 30


@contextlib.contextmanager
def alarmed():
    """An action that takes too long ends in TimeoutError; warnings are not shown."""

    def too_long(*_):
        raise TimeoutError(f"no answer within {MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    signal.signal(signal.SIGALRM, before)


def attempt(seed, what, action, tally, naming=""):
    """Run the action; anything but an answer or a line of this library's is a failure that names the seed.

    naming: what the line must name, as a file's path.
    """
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(MOST_SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            action()
        tally["read"] += 1
    except (ba.InputError, ba.BilevelError) as error:
        tally["refused"] += 1
        text = str(error)
        if not text.isprintable() or len(text) > 2000:
            return f"seed {seed}, {what}: not one line to print: {text[:200]!r}"
        if naming not in text:
            return f"seed {seed}, {what}: {naming} is not named: {text[:200]}"
    except BaseException as error:
        return f"seed {seed}, {what}: {type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most)
    return f"seed {seed}, {what}: {grown / 2**20:.0f} MiB" if grown > MOST_MEMORY else None


def conclude(failures, tally):
    print(dict(tally))
    assert not failures, f"{len(failures)} of {sum(tally.values()) + len(failures)} cases:\n" + "\n".join(failures[:40])

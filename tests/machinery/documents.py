"""The Markdown files of the repository, their code blocks, and what the tests of them share."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass

from running import ROOT

sys.path.insert(0, str(ROOT / "docs" / "site"))

FENCE = re.compile(
    r"(?:^<!-- not run here: (?P<why>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)
SAVED = re.compile(r"Save this as `([\w.]+)`")
SHELL = ("sh", "bash")


def files():
    """Every Markdown file but those that are made: README and the like, docs/."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@dataclass
class Block:
    """A fenced block: where, in what language, why it is not run here ("" where it is), the file it is saved as."""

    line: int
    language: str
    code: str
    why: str
    saved: str


def blocks(path):
    """The fenced blocks of a page, in order."""
    text, made, end = path.read_text(encoding="utf-8"), [], 0
    for match in FENCE.finditer(text):
        saved = SAVED.findall(text[end : match.start()])
        line = text[: match.start("code")].count("\n")
        made.append(Block(line, match["language"], match["code"], match["why"] or "", saved[-1] if saved else ""))
        end = match.end()
    return made


def commands(block):
    """The command lines of a shell block as lists of words; comments, and the ends of continued lines, left out."""
    joined = block.code.replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in joined.splitlines() if shlex.split(line, comments=True)]


def pages_with(*languages):
    """The pages that have a block in one of these languages, by name."""
    return {str(p.relative_to(ROOT)): p for p in files() if any(b.language in languages for b in blocks(p))}

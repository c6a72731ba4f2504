"""Docstrings as Markdown: roles become code, stars of formulas stay stars, and lists of fields become lists.

The class at the end is an extension of griffe, which reads the package for the reference pages.
"""

from __future__ import annotations

import re
from typing import Any

ROLE = re.compile(r":(?:py:)?(class|meth|func|data|mod|attr|exc):`~?([^`]+)`")
CODE = re.compile(r"(``.+?``|`[^`]+`|<[^>\s]+>)")
FIELD = re.compile(r"^(\w+(?:, \w+)*): (.*)$")
SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Attributes|Examples?|Note|Warning)s?:$")


def prose(text: str) -> str:
    """Docstring text as Markdown; indented blocks (formulas) are left as they are."""
    lines = _roles(text).split("\n")
    return "\n".join(line if line.startswith("    ") else _escaped(line) for line in lines)


def _roles(text: str) -> str:
    """:class:`~bilevel_at.Adaptive` as `Adaptive`."""
    return ROLE.sub(lambda m: f"`{m[2].rsplit('.', 1)[-1] if m[1] != 'meth' else m[2]}`", text)


def _escaped(line: str) -> str:
    """Stars and underscores outside code as themselves: δ* and ∇_δ are no emphasis."""
    parts = CODE.split(line)
    return "".join(part if i % 2 else re.sub(r"([*_\\<])", r"\\\1", part) for i, part in enumerate(parts))


def docstring(text: str) -> str:
    """A docstring as griffe is to read it: its sections stay, the rest is Markdown.

    Args:
        text: the docstring, without its indentation.
    """
    made, in_section = [], False
    for paragraph in re.split(r"\n[ \t]*\n", _roles(text)):
        lines = paragraph.split("\n")
        if SECTION.match(lines[0]):
            in_section = True
            made.append("\n".join([lines[0], *(_item(line) for line in lines[1:])]))
        elif in_section and lines[0].startswith("    "):
            made.append("\n".join(_item(line) for line in lines))
        elif lines[0].startswith("    "):  # a formula
            made.append(paragraph)
        else:
            in_section = False
            made.append(_fields(lines) if FIELD.match(lines[0]) else "\n".join(map(_escaped, lines)))
    return "\n\n".join(made)


def _item(line: str) -> str:
    """A line of a section; a name before its colon stays as it is."""
    found = re.match(r"^(\s*[\w, .]+: )(.*)$", line)
    return found[1] + _escaped(found[2]) if found else _escaped(line)


def _fields(lines: list[str]) -> str:
    """``name: text`` lines as a list; indented lines go on with the text."""
    made: list[str] = []
    for line in lines:
        found = FIELD.match(line)
        if found:
            names = ", ".join(f"`{name}`" for name in found[1].split(", "))
            made.append(f"- {names}: {_escaped(found[2])}")
        else:
            made.append(("  " if made else "") + _escaped(line.strip()))
    return "\n".join(made)


try:
    import griffe
except ImportError:  # the tests of this file need no griffe
    pass
else:

    class Docstrings(griffe.Extension):
        """Rewrites every docstring before it is parsed."""

        def on_object(self, *, obj: Any, **kwargs: Any) -> None:
            if obj.docstring is not None:
                obj.docstring.value = docstring(obj.docstring.value)

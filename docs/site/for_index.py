"""Prepare a checkout for building what a package index shows: absolute links in README, and the project's addresses.

    python docs/site/for_index.py https://github.com/OWNER/NAME COMMIT
    python -m build

An index shows README without the repository around it. The addresses are those of the repository that is built from,
which the checkout itself does not know, so they are arguments: .github/workflows/build.yml passes its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

from links import rewritten

ROOT = Path(__file__).resolve().parents[2]


def absolute(markdown: str, repository: str, commit: str) -> str:
    """README with absolute links: pictures to their bytes, anything else to the page that shows it."""
    shown, raw = (f"{repository}/{kind}/{commit}/" for kind in ("blob", "raw"))
    return rewritten(markdown, lambda target: shown + target, lambda target: raw + target)


def with_urls(pyproject: str, repository: str) -> str:
    """pyproject.toml with [project.urls]."""
    urls = f'[project.urls]\nRepository = "{repository}"\nIssues = "{repository}/issues"\n'
    urls += f'Changelog = "{repository}/blob/main/CHANGELOG.md"\n\n'
    return pyproject.replace("[project.optional-dependencies]", urls + "[project.optional-dependencies]", 1)


if __name__ == "__main__":
    _, repository, commit = sys.argv
    readme, pyproject = ROOT / "README.md", ROOT / "pyproject.toml"
    readme.write_text(absolute(readme.read_text(encoding="utf-8"), repository, commit), encoding="utf-8")
    pyproject.write_text(with_urls(pyproject.read_text(encoding="utf-8"), repository), encoding="utf-8")

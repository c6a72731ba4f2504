"""What MkDocs does for the site beyond showing docs/: pages made from other files, and links to the repository's files.

Every page of docs/ is plain Markdown whose links hold in the repository. In the site a link to a problem file leads to
that method's page, and a link to any other file outside docs/ to a page that shows it.
"""

from __future__ import annotations

import fnmatch
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
sys.path[:0] = [str(FOLDER), str(ROOT)]

import links  # noqa: E402
import method_pages  # noqa: E402
import notebooks  # noqa: E402

made: dict[str, str] = {}
"""The repository's path of each page that stands for a file outside docs/, by the page's path in the site."""


def on_startup(**_: Any) -> None:
    """Copy the package to where griffe finds solvers/ and problems/ in it, as an installed one has them.

    Before the configuration is read: mkdocstrings leaves out search paths that are not there then.
    """
    place = ROOT / "build" / "reference" / "bilevel_at"
    shutil.rmtree(place, ignore_errors=True)
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "bilevel_at", place, ignore=unwanted)
    for folder in ("solvers", "problems"):
        shutil.copytree(ROOT / folder, place / folder, ignore=unwanted)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and fill in the navigation's patterns."""
    made.clear()

    def add(uri: str, content: str | bytes, source: str) -> None:
        made[uri] = source
        files.append(File.generated(config, uri, content=content))

    for path, uri in links.PAGES.items():
        if (ROOT / path).exists():
            add(uri, (ROOT / path).read_text(encoding="utf-8"), path)
    for name, text in method_pages.pages().items():
        add(f"methods/{name}.md", text, f"problems/{name}.py")
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        text, pictures = notebooks.page(notebook)
        add(f"notebooks/{notebook.stem}.md", text, f"docs/notebooks/{notebook.stem}.md")
        for name, data in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=data))
    pages = [(links.path_of(f.src_uri, made), f.content_string) for f in files.documentation_pages()]
    for path in sorted(links.shown(pages)):
        add(links.uri_of(path), links.listing(path), path)
    uris = sorted(file.src_uri for file in files.documentation_pages())
    config.nav = _filled(config.nav, uris, _named(config.nav))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links to their pages."""
    uri = page.file.src_uri
    if uri.startswith(("methods/", "source/")):  # made, with links of the site
        return markdown
    return links.for_site(markdown, links.path_of(uri, made), uri)


def on_page_content(html: str, **_: Any) -> str:
    """Name files where they are in the checkout, not where griffe has read them."""
    return re.sub(r"build/reference/(?:bilevel_at/(?=(?:solvers|problems)/))?", "", html)


def _named(nav: Any) -> set[str]:
    """The pages that the navigation names."""
    if isinstance(nav, str):
        return set() if "*" in nav else {nav}
    return set().union(*(_named(part) for part in (nav.values() if isinstance(nav, dict) else nav)))


def _filled(nav: list[Any], uris: list[str], taken: set[str]) -> list[Any]:
    """The navigation with each pattern replaced by the pages of its folder that it matches, each once."""
    filled: list[Any] = []
    for entry in nav:
        if isinstance(entry, dict):
            filled += [{title: _filled(v, uris, taken) if isinstance(v, list) else v} for title, v in entry.items()]
        elif "*" in entry:
            deep = entry.startswith("source/")  # its pages are in folders of their own
            match = [u for u in uris if fnmatch.fnmatch(u, entry) and (deep or u.count("/") == entry.count("/"))]
            new = [uri for uri in match if uri not in taken]
            taken.update(new)
            filled += [{"Files": new}] if deep and new else new
        else:
            filled.append(entry)
    return filled

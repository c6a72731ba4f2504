"""Links of Markdown files that hold in the repository, turned into links of the site. Needs nothing but Python."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files outside docs/ that are pages of the site."""

FOLDERS = {"problems": "methods.md", "solvers": "solvers.md", "docs": "index.md", "docs/results": "results/index.md"}
"""Folders that are linked to, and the page that is about them."""

SHOWN = (".md", ".ipynb", ".png", ".json")
"""Files of docs/ that the site has as they are; others have a page that shows them."""

LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml", ".md": "markdown", ".json": "json"}

LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^()\s]+)(\))")
FENCE = re.compile(r"^(\s*)(```|~~~).*?^\1\2\s*$", re.M | re.S)
CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.S)


def targets(markdown: str) -> list[str]:
    """What a file links to, code left out."""
    text = CODE.sub(lambda m: "`" * len(m[0]), FENCE.sub("", markdown))
    return [match[2] for match in LINK.finditer(text)]


def outside(target: str) -> bool:
    """Whether a link leads to another host."""
    return re.match(r"[a-z]+:", target) is not None


def resolve(target: str, page: str) -> tuple[str, str]:
    """(path in the repository, anchor) of a relative link on a page, by that page's path in the repository."""
    path, _, anchor = target.partition("#")
    if not path:
        return page, anchor
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), path)), anchor


def path_of(uri: str, made: Mapping[str, str]) -> str:
    """The path in the repository of a page of the site."""
    return made.get(uri, f"docs/{uri}")


def uri_of(path: str) -> str:
    """Where the site has a file, or the page about a folder, of the repository."""
    if path in PAGES or path in FOLDERS:
        return PAGES.get(path) or FOLDERS[path]
    if re.fullmatch(r"problems/\w+\.py", path) and "__" not in path:
        return f"methods/{posixpath.basename(path)[:-3]}.md"
    if path.startswith("docs/") and not path.startswith("docs/site/") and path.endswith(SHOWN):
        return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
    return f"source/{path}/index.md" if (ROOT / path).is_dir() else f"source/{path}.md"


def shown(pages: Iterable[tuple[str, str]]) -> set[str]:
    """The files and folders that pages (path in the repository, text) link to, and that need a page of their own."""
    linked = {resolve(t, path)[0] for path, text in pages for t in targets(text) if not outside(t)}
    linked |= {file for path in linked if (ROOT / path).is_dir() and path not in FOLDERS for file in inside(path)}
    return {path for path in linked if uri_of(path).startswith("source/") and (ROOT / path).exists()}


def inside(folder: str) -> list[str]:
    """The files of text in a folder, and in those within it."""
    there = sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in LANGUAGES)
    return [path.relative_to(ROOT).as_posix() for path in there]


def listing(path: str) -> str:
    """A page that shows a file, or names those of a folder."""
    if (ROOT / path).is_dir():
        here = posixpath.dirname(uri_of(path))
        lines = [f"- [{file}]({posixpath.relpath(uri_of(file), here)})" for file in inside(path)]
        return f"# {path}\n\n" + "\n".join(lines) + "\n"
    text = (ROOT / path).read_text(encoding="utf-8").rstrip("\n")
    language = LANGUAGES.get(posixpath.splitext(path)[1], "text")
    return f"# {path}\n\n````{language}\n{text}\n````\n"


def rewritten(markdown: str, change: Callable[[str], str], pictures: Callable[[str], str] | None = None) -> str:
    """The Markdown with its relative links changed; code blocks are left as they are.

    Args:
        markdown: the text.
        change: from a link's target to another.
        pictures: the same for pictures; ``change`` if not given.
    """

    def turned(match: re.Match[str]) -> str:
        if outside(match[2]) or match[2].startswith("#"):
            return match[0]
        picture = match[1].startswith("!") and pictures is not None
        return match[1] + (pictures if picture else change)(match[2]) + match[3]

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(turned, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(turned, markdown[end:])])


def for_site(markdown: str, page: str, uri: str) -> str:
    """The Markdown of a page with its relative links turned into the site's.

    Args:
        markdown: the text.
        page: the page's path in the repository.
        uri: and in the site.
    """

    def there(target: str) -> str:
        path, anchor = resolve(target, page)
        return posixpath.relpath(uri_of(path), posixpath.dirname(uri) or ".") + ("#" + anchor if anchor else "")

    return rewritten(markdown, there)

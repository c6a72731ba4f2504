"""The pages: links and anchors hold, every method and public name has its place. The strict build is in .ci/run."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import types

import pytest
from documents import ROOT, files
from for_index import absolute, with_urls
from links import FENCE, outside, resolve, targets
from method_pages import pages, title
from running import PROBLEMS

FILES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files()}
REFERENCE = "\n".join(text for name, text in FILES.items() if name.startswith("docs/reference/"))
DIRECTIVES = set(re.findall(r"^::: ([\w.]+)$", REFERENCE, re.M))
PUBLIC = [
    "",
    "solvers",
    "testing",
    "evaluate",
    "train",
    "diagnose",
    "figures",
    "report",
    "runs",
    "models",
    "data",
    "distributed",
]


def slug(heading):
    """The anchor that GitHub and the site give to a heading."""
    plain = re.sub(r"[*`]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(text):
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)}


@pytest.mark.parametrize("page", FILES)
def test_links_hold(page):
    for target in targets(FILES[page]):
        if outside(target):
            continue
        path, anchor = resolve(target, page)
        assert (ROOT / path).exists(), f"{page} links to {target}"
        assert not path.startswith(".."), f"{page} links out of the repository: {target}"
        assert not anchor or anchor in anchors(FILES[path]), f"{page} links to {target}, which has no such heading"


def test_no_page_needs_another_host():
    """Images, scripts and styles are files of this repository."""
    for page, text in FILES.items():
        assert not re.search(r"!\[[^\]]*\]\(https?:|<(?:img|script|link)\b", FENCE.sub("", text)), page
    assert "font: false" in (ROOT / "mkdocs.yml").read_text()
    for path in (ROOT / "docs" / "assets").iterdir():
        assert "http" not in path.read_text(), path


def test_every_result_is_listed():
    linked = set(targets(FILES["docs/results/index.md"]))
    there = {path.name for path in (ROOT / "docs" / "results").glob("*.md")} - {"index.md"}
    assert there <= linked, "add a line to docs/results/index.md"


@pytest.fixture(scope="module")
def methods():
    return pages()


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_method_has_its_page(name, methods):
    page, source = methods[name], (ROOT / "problems" / f"{name}.py").read_text()
    sections = ("Formula, source", "Arguments", "Recipes", "What it costs", "Figures to expect", "Code")
    assert all(f"\n## {section}" in page for section in sections) and "**When to use it.**" in page
    assert source.rstrip() in page
    module = importlib.import_module(f"bilevel_at.problems.{name}")
    assert all(f"`{argument}`" in page for argument in inspect.signature(module.problem).parameters)
    assert all(f"| `{data}` |" in page for data in module.recipe())
    for target in targets(page):
        path = re.sub(r"#.*|\.md(#.*)?$", "", target)
        assert path in PROBLEMS or (ROOT / "docs" / "methods" / target.partition("#")[0]).resolve().exists(), target


def test_figures_are_the_page_s(methods):
    """digits.json, which the methods' pages show, has what digits.md has."""
    table = json.loads((ROOT / "docs" / "results" / "digits.json").read_text())
    row = table["rows"]["fastbat"]["last pgd-50-10"]
    cell = f"{row['mean']:.1f} ± {row['std']:.1f}"
    assert cell in FILES["docs/results/digits.md"] and cell in methods["fastbat"]
    rows = re.findall(r"^\| (\S+) \|(.+)\|$", FILES["docs/results/digits.md"], re.M)[1:]
    assert [name for name, _ in rows] == list(table["rows"])
    for name, cells in rows:
        written = [f"{n['mean']:.1f} ± {n['std']:.1f}" for n in table["rows"][name].values()]
        assert written == [c.strip() for c in cells.split(" | ")]


def test_titles():
    assert title("Fast-BAT (Zhang et al., 2022): the attacker.") == "Fast-BAT"
    assert title("Standard training: the attacker stays at δ = 0.") == "Standard training"


def named(module, name):
    """How a reference page may name something: where it is public, or where it is defined."""
    value = getattr(module, name)
    home = f"{value.__module__}.{value.__qualname__}" if isinstance(value, type | types.FunctionType) else ""
    return {f"{module.__name__}.{name}", module.__name__, home}


@pytest.mark.parametrize("part", PUBLIC)
def test_every_public_name_is_documented(part):
    module = importlib.import_module(f"bilevel_at.{part}".rstrip("."))
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, types.ModuleType):
            assert value.__doc__ and value.__name__ in DIRECTIVES, name
            continue
        if isinstance(value, type | types.FunctionType):
            text = inspect.cleandoc(value.__doc__ or "")
            assert text and not text.startswith(f"{name}("), f"{module.__name__}.{name} has no docstring"
        assert named(module, name) & DIRECTIVES, f"{module.__name__}.{name} is on no page of docs/reference/"


def test_directives_are_names():
    for directive in DIRECTIVES:
        parts = directive.split(".")
        for cut in range(len(parts), 0, -1):
            try:
                value = importlib.import_module(".".join(parts[:cut]))
            except ModuleNotFoundError:
                continue
            except ImportError as error:
                assert "needs betty-ml" in str(error)  # its names are looked at where it is installed
                break
            for name in parts[cut:]:
                value = getattr(value, name)
            break


def test_a_package_index_has_readme_s_pictures():
    """docs/site/for_index.py makes every link absolute, and adds the project's addresses."""
    there = absolute(FILES["README.md"], "https://host.example/owner/name", "abc123")
    assert all(outside(target) for target in targets(there))
    pictures = re.findall(r"!\[[^\]]*\]\((.*?)\)", there)
    assert len(pictures) == len(re.findall(r"!\[", FILES["README.md"])) > 0
    for picture in pictures:
        path = picture.removeprefix("https://host.example/owner/name/raw/abc123/")
        assert (ROOT / path).read_bytes()[:4] == b"\x89PNG"
    project = with_urls((ROOT / "pyproject.toml").read_text(), "https://host.example/owner/name")
    assert 'Repository = "https://host.example/owner/name"' in project

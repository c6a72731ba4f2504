"""Which file may import which: one way between folders, no circle between files, and no file that knows too much.

Files are parsed, not imported. An import counts wherever it stands: at the top, inside a function, or under
TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

ORDER = [
    "language",  # the flat files of bilevel_at/
    "solvers",
    "testing",
    "interop",  # with other libraries' programs
    "data",
    "models",
    "conformance",  # hypergradients against closed forms
    "evaluate",  # attacks, and what they find
    "runs",  # a run on disk
    "diagnose",
    "figures",
    "train",
    "report",
    "commands",
    "problems",  # the method files, which are users of all of it
]
"""A file imports its own folder and those above it in this list."""

DOORS = {
    "bilevel_at.run",
    "bilevel_at.conformance.__main__",
    "bilevel_at.evaluate.__main__",
    "bilevel_at.report.__main__",
}
"""``python -m`` needs a file in that place; each only calls its command."""


@functools.cache
def modules():
    """Dotted name -> path, of every file of the package; solvers/ and problems/ are mapped into it."""
    found = {}
    for folder, prefix in (
        ("bilevel_at", "bilevel_at"),
        ("solvers", "bilevel_at.solvers"),
        ("problems", "bilevel_at.problems"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([prefix, *(part for part in parts if part != "__init__")])] = path
    return found


@functools.cache
def tree(name):
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


def absolute(node, name):
    """The module an ImportFrom of the file ``name`` is from."""
    if not node.level:
        return node.module or ""
    package = name.split(".") if modules()[name].stem == "__init__" else name.split(".")[:-1]
    base = package[: len(package) - (node.level - 1)]
    return ".".join([*base, *(node.module or "").split(".")]).rstrip(".")


def targets(node, name):
    """What one import statement names, as dotted modules: those of this package as files, others as written."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = absolute(node, name)
        return [f"{module}.{a.name}" if f"{module}.{a.name}" in modules() else module for a in node.names]
    return []


@functools.cache
def imports(name):
    return {target for node in ast.walk(tree(name)) for target in targets(node, name)}


def own(name):
    return {target for target in imports(name) if target in modules()}


def folder(name):
    """The part of the house that a file belongs to."""
    if name in DOORS:
        return "commands"
    part = (name.split(".") + [""])[1]
    return part if part in ORDER else "language"


def circles():
    """Sets of files that import each other, directly or through others."""
    reach = {name: set(own(name)) for name in modules()}
    changed = True
    while changed:
        changed = False
        for name, seen in reach.items():
            more = seen.union(*(reach[other] for other in seen)) if seen else seen
            if more != seen:
                reach[name], changed = more, True
    found = []
    for name in sorted(modules()):
        circle = {other for other in reach[name] if name in reach[other]}
        if circle and circle not in found:
            found.append(circle)
    return found


def test_the_parser_sees_every_import():
    """The tests below would pass on nothing."""
    assert {"bilevel_at.run", "bilevel_at.solvers.full_kkt", "bilevel_at.problems.fgsm"} <= modules().keys()
    assert "bilevel_at.data" in imports("bilevel_at.models")
    assert "rich.console" in imports("bilevel_at.data.bars")  # inside a function
    assert "bilevel_at.train.trainer" in imports("bilevel_at.train")  # under TYPE_CHECKING
    assert len({folder(name) for name in modules()}) == len(ORDER)


def test_no_circle_of_files():
    assert circles() == []


def test_folders_import_one_way():
    upward = {
        (name, target)
        for name in modules()
        for target in own(name)
        if ORDER.index(folder(target)) > ORDER.index(folder(name))
    }
    assert upward == set()


def test_only_doors_lead_up():
    """A door calls its command and nothing else."""
    for name in DOORS:
        assert own(name) <= {n for n in modules() if n.startswith("bilevel_at.commands.")}
        assert len(modules()[name].read_text(encoding="utf-8").splitlines()) < 20
        assert not any(name in own(other) for other in modules())


def top(modules_named):
    return {target.split(".")[0] for target in modules_named}


def test_only_commands_parse_arguments_and_print():
    terminal = {name for name in modules() if top(imports(name)) & {"rich", "tyro", "argparse"}}
    assert {name for name in terminal if folder(name) != "commands"} == {"bilevel_at.data.bars"}  # a bar, for minutes


FILES = {
    "open",
    "load",
    "save",
    "savez",
    "read_text",
    "write_text",
    "read_bytes",
    "write_bytes",
    "unlink",
    "mkdir",
    "print",
}


@pytest.mark.parametrize("name", [name for name in modules() if folder(name) == "evaluate"])
def test_evaluation_is_pure(name):
    """No files, no terminal: attacks, stages, checks and results are values and functions."""
    assert not top(imports(name)) & {"rich", "tyro", "pathlib", "json", "os", "shutil", "tempfile"}
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            assert called not in FILES, f"{modules()[name]}:{node.lineno} calls {called}"


def loaded(name):
    """Everything that importing the file imports at once, packages on the way included."""
    seen, todo = set(), [name]
    while todo:
        module = todo.pop()
        parents = [module.rsplit(".", i)[0] for i in range(1, module.count(".") + 1)]
        for one in [module, *parents]:
            if one in seen:
                continue
            seen.add(one)
            if one in modules():
                todo += [t for node in tree(one).body for t in targets(node, one)]
    return seen


@pytest.mark.parametrize("name", ["bilevel_at", "bilevel_at.runs.recipe", "bilevel_at.train", "bilevel_at.solvers"])
def test_the_language_and_recipes_are_light(name):
    """A problem file imports its recipe: that must not cost what training or evaluating needs."""
    heavy = {"torchvision", "sklearn", "scipy", "matplotlib", "tyro", "rich", "pyautoattack"}
    assert not top(loaded(name)) & heavy
    assert "torch" in top(loaded(name))


def test_importing_the_library_loads_little_more_than_torch():
    """In a fresh process: this library's own files, and none of the packages that its machinery needs."""
    code = """
import sys, torch
before = set(sys.modules)
import bilevel_at
print(*{name.split(".")[0] for name in set(sys.modules) - before} - {"bilevel_at"})
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.split() == [], done


def test_help_loads_nothing_that_draws_or_decodes():
    """Torchvision takes as long to import as torch, and matplotlib a quarter of that."""
    code = """
import contextlib, io, sys
from bilevel_at.run import run
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    run(["--help"])
print(*{name.split(".")[0] for name in sys.modules} & {"torchvision", "matplotlib", "scipy", "sklearn", "pyautoattack"})
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.split() == [], done


RUN_FILES = {f"{which}.pt" for which in ("best", "last", "last_good")} | {
    "config.json",
    "metrics.jsonl",
    "results.json",
    "checks.json",
    "history.npz",
    "commands.json",
    "examples.png",
}


def test_only_runs_knows_how_a_run_lies_on_disk():
    """Elsewhere the names of its files may be spoken of, in messages, but are not paths."""
    for name in modules():
        if folder(name) not in ("runs", "problems"):
            spelt = {node.value for node in ast.walk(tree(name)) if isinstance(node, ast.Constant)} & RUN_FILES
            assert not spelt, f"{modules()[name]} spells {spelt}"
            paths = [n.right for n in ast.walk(tree(name)) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Div)]
            ends = [p.values[-1] for p in paths if isinstance(p, ast.JoinedStr)]
            made = [end.value for end in ends if isinstance(end, ast.Constant)]
            assert ".pt" not in made, f"{modules()[name]} makes a path to a checkpoint"

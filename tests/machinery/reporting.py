"""Run directories made up for a report, and the text of its page."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

import bilevel_at as ba
from bilevel_at.commands.report import command as main
from bilevel_at.report import report

NASTY = "<script>alert('x')</script> & \"q\" $x^2$"

PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg==")
"""A PNG file of one pixel."""


def entry(accuracy, epsilon=0.2, n=100, **more):
    return {"accuracy": accuracy, "n": n, "epsilon": epsilon, "seconds": 0.1, "data": "d" * 16, **more}


def epochs(robust=(0.2, 0.5, 0.4), seconds=1.0, **more):
    return [
        {
            "epoch": i,
            "loss": 2.0 / i,
            "train": 0.1 * i,
            "clean": 0.5 + 0.1 * i,
            "robust": value,
            "attack": "pgd-20-1",
            "implicit_ratio": 0.0,
            "perturbation": 0.2,
            "lr": 0.1 / i,
            "seconds": seconds + 1,
            "train_seconds": seconds * i,
            **more,
        }
        for i, value in enumerate(robust, 1)
    ]


def make(path, *, file="problems/fastat.py", seed=0, results=None, metrics=None, options=None, **config):
    """A run directory as bilevel_at.run leaves it, with the parts a test is about."""
    path = Path(path)
    path.mkdir(parents=True)
    written = {
        "command": ["bilevel_at.run", file, "--seed", str(seed)],
        "file": file,
        "file_sha256": "ab" * 32,
        "problem": {"epsilon": 0.2},
        "solver": {"name": "ZeroIG"},
        "options": {"epochs": 3, "data": "digits", "device": "auto", "seed": seed, **(options or {})},
        "model": "small_cnn",
        "parameters": 1234,
        "versions": {"torch": "2.9"},
        "date": "2026-01-02",
        "machine": {"platform": "Linux", "threads": 1, "device": "A CPU"},
        **config,
    }
    (path / "config.json").write_text(json.dumps(written))
    lines = epochs() if metrics is None else metrics
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if results is None:
        results = {w: {"clean": entry(0.9, 0.0), "pgd-50-10": entry(0.5)} for w in ("best", "last")}
    (path / "results.json").write_text(json.dumps(results))
    return path


class Text(HTMLParser):
    """Rows of tables, paragraphs and captions; and whether every tag that is opened is closed in order."""

    VOID = {"meta", "link", "img", "br"}

    def __init__(self, source):
        super().__init__()
        self.open, self.rows, self.images, self.said = [], [], [], ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag in self.VOID:
            self.images += [dict(attributes)] if tag == "img" else []
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.said += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def made(*runs, out="out"):
    return Text(report(runs, out).read_text(encoding="utf-8"))


def row(text, first):
    return next(cells for cells in text.rows if cells and cells[0].startswith(first))


def complaint(*args):
    with pytest.raises(ba.InputError) as error:
        main([str(a) for a in args])
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    return str(error.value)

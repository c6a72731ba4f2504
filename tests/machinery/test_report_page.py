"""The report's page: its parts, in a browser, and nothing in it that runs."""

from __future__ import annotations

import html
import json
import math
import re
import shutil

import numpy as np
import pytest
from reporting import NASTY, Text, entry, epochs, make, row

from bilevel_at import run as run_module
from bilevel_at.report import report
from bilevel_at.report.page import Cell, Figure, Section, Table, page

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_what_files_say_is_escaped():
    bad = NASTY.replace("/", "")
    a = make(bad, file=f"{NASTY}.py", model=NASTY, command=["bilevel_at.run", NASTY, "\ud800\x1b[0m"])
    results = {
        "best": {"clean": entry(0.9, 0.0), NASTY: entry(0.5), "_hidden@0.4": entry(0.1, 0.4), "_hidden": entry(0.3)}
    }
    metrics = epochs(attack=NASTY)
    b = make(f"_{bad}", file=f"_{bad}.py", results=results, metrics=metrics, options={"data": NASTY})
    (b / "checks.json").write_text(json.dumps({NASTY: {"warnings": [{"name": NASTY, "message": NASTY}]}}))
    for runs, out in (([a, b], "two"), ([b], "one")):
        source = report(runs, out).read_text(encoding="utf-8")
        text = Text(source)
        assert "<script" not in source and NASTY in text.said and "\x1b" not in source
        assert html.escape(NASTY) in source


def test_a_section_is_a_list_of_parts(drawn, tmp_path):
    from bilevel_at.figures.style import plt, save

    save(plt.figure(figsize=(2, 1)), tmp_path / "f.png")
    parts = [
        "words & more",
        Figure(tmp_path / "f.png", "caption"),
        Table(["a", "b"], [[Cell("x", rows=2), "1"], ["", "2"]]),
    ]
    text = Text(page("title", "lead", [("fact", "value")], [Section("One", parts)]))
    assert text.rows == [["a", "b"], ["x", "1"], ["2"]] and "words & more" in text.said
    assert text.images[0]["src"].startswith("data:image/png;base64,") and text.images[0]["alt"] == "caption"


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Two trainings of an epoch or two, and one of a run whose names are hostile; one page of all, one of the first."""
    folder = tmp_path_factory.mktemp("real")
    short = ["--examples", "100", "--test-examples", "50", "--attacks", "clean", "pgd-2-1", "--select", "pgd-2-1"]
    for name, seed in (("fastat", 0), ("fastat", 1), ("fastbat", 0)):
        out = folder / f"{name}-{seed}"
        assert run_module.run([name, "--epochs", "2", "--seed", str(seed), "--out", str(out), *short]) == 0
    hostile = folder / "<img src=x onerror=alert(1)> & 'q'"
    results = {
        "best": {
            "clean": entry(0.9, 0.0),
            "averylongattackname-of-someone-10-20-30": entry(0.41),
            **{f"pgd-{k}-10": entry(0.5 - k / 1000) for k in (10, 20, 30, 40, 50)},
            **{f"pgd-50-10@{k}/255": entry(0.9 - k / 100, k / 255) for k in (8, 16, 24, 32, 64)},
        }
    }
    make(hostile, file=f"{'long' * 20}.py", results=results, metrics=epochs(alignment=0.9))
    runs = [*sorted(folder.glob("fast*")), hostile]
    return runs, report(runs), report(runs[:1])


@pytest.mark.slow
def test_real_runs(real):
    runs, page, _ = real
    text = Text(page.read_text(encoding="utf-8"))
    accuracies = [json.loads((r / "results.json").read_text())["best"]["pgd-2-1"]["accuracy"] for r in runs[:2]]
    mean, std = 100 * np.mean(accuracies), 100 * np.std(accuracies, ddof=1)
    cells = row(text, "fastat 2 seeds")
    assert f"{mean:.1f} ± {std:.1f}" in [cell.removeprefix("▲") for cell in cells]
    assert math.isfinite(mean) and "examples-0.png" in {p.name for p in page.parent.glob("figures/*.png")}
    assert len(text.images) == len(list(page.parent.glob("figures/*.png")))


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    quiet = ["networking", "timer-throttling"]
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-component-update", "--disable-sync", "--no-first-run"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found, args=[*arguments, *(f"--disable-background-{what}" for what in quiet)]
        )
        yield browser
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("which", [1, 2], ids=["several", "one"])
def test_page_in_a_browser(real, chromium, which):
    address = real[which].resolve().as_uri()
    for width in (1200, 390):
        for scheme in ("light", "dark"):
            tab = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            wrong, asked = [], []
            tab.on("console", lambda m, wrong=wrong: wrong.append(m.text) if m.type in ("error", "warning") else None)
            tab.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
            tab.on("request", lambda request, asked=asked: asked.append(request.url))
            tab.goto(address)
            images = tab.eval_on_selector_all("img", "all => all.map(i => [i.complete, i.naturalWidth, i.alt])")
            assert images and all(complete and size > 0 and alt for complete, size, alt in images)
            size = tab.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
            assert size[0] <= size[1], f"the page is {size[0]} wide at {width}"
            assert wrong == []
            assert [url for url in asked if not url.startswith("data:")] == [address]
            tab.close()


def test_page_needs_nothing_else(drawn):
    source = report([make("a"), make("b", seed=1)], "out").read_text(encoding="utf-8")
    assert "<script" not in source and not re.search(r"""(?:src|href)=["'](?!data:|\#)""", source)
    assert 'lang="en"' in source and 'name="viewport"' in source and "<title>" in source


@pytest.mark.slow
@pytest.mark.parametrize("which", [1, 2], ids=["several", "one"])
def test_on_a_telephone_tables_scroll_inside_themselves_and_letters_can_be_read(real, chromium, which):
    tab = chromium.new_page(viewport={"width": 390, "height": 844})
    tab.goto(real[which].resolve().as_uri())
    inside = "[...document.querySelectorAll('{}')].map(e => ({{left: e.getBoundingClientRect().left, "
    inside += "right: e.getBoundingClientRect().right, wide: e.scrollWidth, shown: e.clientWidth, "
    inside += "way: getComputedStyle(e).overflowX}}))"
    tables, figures = (tab.evaluate(inside.format(kind)) for kind in (".scroll", ".paper"))
    for region in (*tables, *figures, *tab.evaluate(inside.format("pre"))):
        assert region["left"] >= 0 and region["right"] <= 390, region
        assert region["wide"] <= region["shown"] + 1 or region["way"] == "auto", region
    assert any(region["wide"] > region["shown"] for region in tables)
    moved = "e => { e.scrollLeft = 1e6; return e.scrollLeft + e.clientWidth >= e.scrollWidth - 1 }"
    assert all(tab.eval_on_selector_all(".scroll, .paper", f"all => all.map({moved})"))  # the end can be reached
    # Figures are drawn with letters of 8 pt or more, at 130 dots an inch.
    scale = tab.eval_on_selector_all(
        "figure img", "all => all.map(i => i.getBoundingClientRect().width / i.naturalWidth)"
    )
    assert scale and all(8 / 72 * 130 * share >= 8 for share in scale), scale
    tab.close()


@pytest.mark.slow
def test_on_a_desk_nothing_scrolls_sideways_but_what_must(real, chromium):
    tab = chromium.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(real[2].resolve().as_uri())
    wide = tab.eval_on_selector_all(".paper", "all => all.map(e => e.scrollWidth - e.clientWidth)")
    assert wide and max(wide) <= 1
    tab.close()

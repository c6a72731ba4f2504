"""How the page looks: the reader's own fonts, light or dark as they have it, narrow enough to read, fit to print."""

from __future__ import annotations

__all__ = ["CSS"]

CSS = """\
:root {
  color-scheme: light dark;
  --ink: #1a1d21; --soft: #5a626b; --line: #d9dde2; --paper: #ffffff; --shade: #f4f6f8; --link: #1f5fa8;
  --grave: #9a3412; --grave-shade: #fff4ec;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e8eb; --soft: #a3abb5; --line: #3a4048; --paper: #16181b; --shade: #1f2327; --link: #8bbcf0;
    --grave: #fdba8c; --grave-shade: #2e211a;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body {
  max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  overflow-wrap: anywhere;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2.75rem 0 .75rem; padding-top: .75rem; }
h2 { border-top: 1px solid var(--line); }
p { margin: .6rem 0; max-width: 48rem; }
.lead { font-size: 1.1rem; margin: 0 0 1.25rem; }
a { color: var(--link); }
code, pre { font: .85rem/1.6 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
pre { background: var(--shade); border-radius: 6px; padding: .8rem 1rem; margin: .6rem 0; overflow-x: auto; }
pre code { overflow-wrap: normal; font-size: inherit; }
.facts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .6rem 1.5rem; margin: 0;
  padding: 1rem 1.1rem; background: var(--shade); border-radius: 8px;
}
.facts dt { font-size: .78rem; color: var(--soft); }
.facts dd { margin: 0; font-size: .93rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; padding: 0; margin: 1rem 0 0; }
nav { font-size: .9rem; }
figure { margin: 1.25rem 0 1.75rem; }
.paper { background: #ffffff; border: 1px solid var(--line); border-radius: 8px; padding: .6rem; text-align: center; }
.paper { overflow-x: auto; }
.paper img { max-width: 100%; height: auto; vertical-align: bottom; }
figcaption { margin-top: .55rem; font-size: .92rem; max-width: 48rem; }
figcaption { color: var(--soft); line-height: 1.5; }
figure.table { margin: 1rem 0 1.25rem; }
.scroll {
  overflow-x: auto; /* a shadow at the side where there is more */
  background: linear-gradient(90deg, var(--paper) 1.5rem, transparent) 0 0 / 3rem 100% no-repeat local,
    linear-gradient(270deg, var(--paper) 1.5rem, transparent) 100% 0 / 3rem 100% no-repeat local,
    linear-gradient(90deg, var(--line), transparent) 0 0 / .8rem 100% no-repeat scroll,
    linear-gradient(270deg, var(--line), transparent) 100% 0 / .8rem 100% no-repeat scroll;
}
.name { white-space: nowrap; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .34rem .6rem; text-align: right; vertical-align: baseline; white-space: nowrap; }
th:first-child { padding-left: 0; }
.word { text-align: left; }
th.word[scope=row] { white-space: normal; min-width: 6.5rem; max-width: 22rem; overflow-wrap: anywhere; }
td.word { white-space: normal; max-width: 22rem; }
td code { font-size: .78rem; white-space: nowrap; }
thead th { font-weight: 600; border-bottom: 1.5px solid var(--ink); vertical-align: bottom; white-space: normal; }
tbody th { font-weight: 500; }
tbody tr.first > * { border-top: 1px solid var(--line); }
tbody tr:first-child > * { border-top: 0; }
tbody tr:last-child > *, tbody th[rowspan] { border-bottom: 1px solid var(--line); }
small { color: var(--soft); white-space: nowrap; }
th small { display: block; font-weight: 400; }
.spread { font-size: .85em; font-weight: 400; color: var(--soft); }
strong { font-weight: 700; }
td strong { position: relative; }
.mark { position: absolute; right: 100%; top: .5em; font-size: .55em; margin-right: .3em; }
.notes { list-style: none; padding: 0; margin: .75rem 0; }
.notes li { padding: .55rem .9rem; margin: .4rem 0; background: var(--shade); border-left: 4px solid var(--line); }
.notes.grave li { background: var(--grave-shade); border-color: var(--grave); }
.notes.grave b { color: var(--grave); }
.notes.grave b::before { content: "\\26A0\\FE0E  "; }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--link); }
@media (max-width: 40rem) {
  body { padding: 1.25rem 1rem 3rem; }
  h1 { font-size: 1.4rem; }
  .facts { grid-template-columns: 1fr 1fr; padding: .8rem; }
  .paper { padding: .3rem; }
  /* Letters of 9 pt on paper have 9 CSS pixels or more: a wide figure scrolls inside its frame. */
  .paper img { max-width: none; width: max(100%, calc(var(--width) * .75)); }
  th, td { padding: .34rem .5rem; }
  th.word[scope=row] { min-width: 5.8rem; }
}
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #333; --line: #bbb; --paper: #fff; --shade: #f4f4f4; }
  :root { --link: #000; --grave: #7c2d12; --grave-shade: #fff; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  figure, table, .notes li { break-inside: avoid; }
  .paper { overflow: visible; }
  h2 { break-after: avoid; }
  pre { white-space: pre-wrap; }
  .scroll { overflow: visible; }
}
"""

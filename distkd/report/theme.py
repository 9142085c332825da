"""The look of the page: one style sheet for light and dark, phone and print, and the legend's line samples."""

from __future__ import annotations

from distkd.report.html import Safe
from distkd.report.plots import ON_DARK, Style, themed

__all__ = ["CSS", "swatch"]

# paper stays white
_IN_THE_DARK = "screen and (prefers-color-scheme: dark)"
_PAPER = " ".join(f"--role-{color[1:]}: {color};" for color in ON_DARK)
_DARK = " ".join(f"--role-{color[1:]}: {dark};" for color, dark in ON_DARK.items())

_SHEET = """
:root { --ink: #16181d; --soft: #5b616e; --paper: #ffffff; --card: #f5f6f8; --grid: #d5d8de; --line: #e2e5ea;
  --good: #00704f; --bad: #b34700; --warn: #fff5e2; --warn-line: #e0a43a; --accent: #0b6aa8; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e8eaee; --soft: #a2a9b6; --paper: #14161a; --card: #1d2026; --grid: #383d47; --line: #2d323b;
    --good: #4cc9a0; --bad: #f29a5c; --warn: #2e261a; --warn-line: #8f6a2a; --accent: #6cb8e8; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 28px 20px 64px; }
header p, .soft { color: var(--soft); }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 36px 0 10px; padding-top: 18px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; margin: 28px 0 8px; }
p { margin: 6px 0; max-width: 84ch; }
a { color: var(--accent); text-underline-offset: 2px; }
nav { margin-top: 10px; display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 14px; }
code, pre { font: 0.92em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { overflow-wrap: anywhere; }
pre { background: var(--card); padding: 12px 14px; border-radius: 6px; overflow-x: auto; margin: 8px 0; }

.flow { display: flex; flex-wrap: wrap; gap: 10px 14px; align-items: stretch; margin: 16px 0; }
.flow > div { background: var(--card); border-radius: 8px; padding: 10px 16px; flex: 1 1 220px; }
.flow > .arrow { background: none; flex: 0 0 auto; align-self: center; padding: 0; font-size: 22px;
  color: var(--soft); }
.flow b { display: block; font-size: 12px; letter-spacing: 0.02em; color: var(--soft); font-weight: 600; }
ul.verdicts { list-style: none; padding: 0; margin: 16px 0 22px; display: grid; gap: 8px; }
ul.verdicts li { border-left: 4px solid var(--soft); background: var(--card); padding: 9px 14px;
  border-radius: 0 8px 8px 0; }
ul.verdicts li.gain { border-color: var(--good); }
ul.verdicts li.loss { border-color: var(--bad); }
ul.verdicts small { display: block; color: var(--soft); font-size: 13px; font-variant-numeric: tabular-nums; }
.verdict { font-weight: 650; }
.gain .verdict, td .gain { color: var(--good); }
.loss .verdict, td .loss { color: var(--bad); }
.notice { background: var(--warn); border: 1px solid var(--warn-line); border-radius: 8px; padding: 10px 14px;
  margin: 18px 0; }
.notice p { margin: 0; max-width: none; }
.notice ul { margin: 6px 0 2px; padding-left: 20px; }

.scroll { overflow-x: auto; margin: 4px 0 10px; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; min-width: 50%; }
.caption { color: var(--soft); font-size: 13px; margin: 16px 0 0; }
th, td { padding: 7px 8px; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; font-size: 12.5px; line-height: 1.3; vertical-align: bottom;
  white-space: normal; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); font-weight: 600;
  padding-left: 0; }
th small, td small { display: block; color: var(--soft); font-weight: 400; font-size: 11.5px; line-height: 1.45; }
td .evidence { white-space: normal; min-width: 84px; line-height: 1.3; margin-top: 2px; }
td .gain, td .loss { font-weight: 650; }
table.left td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.left thead th { text-align: left; }
table.facts thead { display: none; }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--accent); padding: 4px 0; }

.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 14px; margin: 8px 0; }
.legend span, .role { display: inline-flex; align-items: center; gap: 7px; }
.swatch { flex: none; vertical-align: middle; }
.panels { display: grid; gap: 18px 22px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); }
.panels.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); margin-top: 18px; }
.panels.square { grid-template-columns: repeat(auto-fill, minmax(min(100%, 240px), 1fr)); }
.panels.rows { grid-template-columns: minmax(0, 1fr); margin-top: 14px; }
.panels.rows figure { overflow-x: auto; }
.panels.rows svg { width: auto; max-width: none; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; font-size: 13.5px; margin-bottom: 4px; }
figure svg { width: 100%; height: auto; display: block; }

@media (max-width: 600px) {
  main { padding: 18px 14px 48px; }
  h1 { font-size: 22px; }
  th, td { padding: 6px 8px; }
  th:first-child { max-width: 42vw; white-space: normal; }
  .flow > .arrow { width: 100%; text-align: center; line-height: 1; transform: rotate(90deg); }
  .flow > div:not(.arrow) { flex-basis: 100%; }
}
@media print {
  nav { display: none; }
  main { max-width: none; }
  figure, tr { break-inside: avoid; }
}
"""

CSS = f":root {{ color-scheme: light dark; {_PAPER} }}\n@media {_IN_THE_DARK} {{ :root {{ {_DARK} }} }}\n{_SHEET}"

_MARKS = {
    "o": '<circle cx="17" cy="7" r="3.6"/>',
    "s": '<rect x="13.6" y="3.6" width="6.8" height="6.8"/>',
    "^": '<path d="M17 2.6 L21.2 10.4 L12.8 10.4 Z"/>',
    "v": '<path d="M17 11.4 L21.2 3.6 L12.8 3.6 Z"/>',
    "D": '<path d="M17 2.4 L21.6 7 L17 11.6 L12.4 7 Z"/>',
    "P": '<path d="M15.4 2.6h3.2v2.8h2.8v3.2h-2.8v2.8h-3.2v-2.8h-2.8v-3.2h2.8z"/>',
    "X": '<path d="M13.4 5.2l1.8-1.8 1.8 1.8 1.8-1.8 1.8 1.8-1.8 1.8 1.8 1.8-1.8 1.8-1.8-1.8-1.8 1.8-1.8-1.8 1.8-1.8z"/>',  # noqa: E501
}
_DASHES = {"-": "", ":": "2 3", "--": "6 3", "-.": "7 3 2 3"}


def swatch(style: Style) -> Safe:
    """The line sample of a role, the same in legend and table as in the plots."""
    color = themed(style.color)
    return Safe(
        f'<svg class="swatch" width="34" height="14" aria-hidden="true" style="fill:{color};stroke:none">'
        f'<line x1="0" y1="7" x2="34" y2="7" style="stroke:{color}" stroke-width="2" '
        f'stroke-dasharray="{_DASHES[style.dash]}"/>{_MARKS[style.marker]}</svg>'
    )

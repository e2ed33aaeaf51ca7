"""Style sheet of the pages: light and dark by the reader's preference, one column on narrow screens."""

# Variables for a light background, on pages and in pictures of their own.
LIGHT = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --panel: #ffffff; --ink: #16202c; --soft: #51606f; --line: #d9dfe6;
  --all: #b9c4d0; --kept: #1f5fd0; --good: #0b6e3e; --bad: #b3261e; --heat: 31 95 208;
  --c1: #1f5fd0; --c2: #c8450a; --c3: #0b7a4b; --c4: #8b2fc9; --c5: #0e7490; --c6: #cc1f78; --c7: #7c4a1e;
  --c8: #6b7300; --c9: #c02a20; }
"""

# What charts need, on pages and in pictures of their own.
CHARTS = """
.all { fill: var(--all); } .kept { fill: var(--kept); } .grid { stroke: var(--line); }
.reference { stroke: var(--ink); stroke-dasharray: 4 3; }
.c0 { --own: var(--ink); } .c1 { --own: var(--c1); } .c2 { --own: var(--c2); } .c3 { --own: var(--c3); }
.c4 { --own: var(--c4); } .c5 { --own: var(--c5); } .c6 { --own: var(--c6); } .c7 { --own: var(--c7); }
.c8 { --own: var(--c8); } .c9 { --own: var(--c9); }
.trend { fill: none; stroke: var(--own); stroke-width: 1.6; } .bar { stroke: var(--own); stroke-width: 1.2; }
.dashed { stroke-dasharray: 5 4; }
.mark { fill: var(--own); stroke: var(--panel); stroke-width: .2; } .star { fill: var(--ink); }
.hollow { fill: var(--panel); stroke: var(--own); stroke-width: .35; }
.halo { paint-order: stroke; stroke: var(--panel); stroke-width: 3px; }
.tick, .axis { fill: var(--soft); font-size: 12px; } .end { text-anchor: end; } .middle { text-anchor: middle; }
"""

_PAGE = """
@media (prefers-color-scheme: dark) { :root {
  --page: #10151b; --panel: #19212a; --ink: #e8edf2; --soft: #a3b1bf; --line: #33404d;
  --all: #4b5a69; --kept: #7fb0ff; --good: #6fd39b; --bad: #ff9a92; --heat: 127 176 255;
  --c1: #7fb0ff; --c2: #ff9a63; --c3: #5fd39a; --c4: #c99bff; --c5: #5cc8de; --c6: #ff8cc6; --c7: #d3a67c;
  --c8: #c6cf5a; --c9: #ff8f87; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
.skip { position: absolute; left: -999px; }
.skip:focus { left: 1rem; top: 1rem; background: var(--panel); padding: .5rem 1rem; }
header, main, footer { max-width: 1080px; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 0 0 .25rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
p { margin: .25rem 0 .75rem; } .note, figcaption, caption, footer { color: var(--soft); }
section { background: var(--panel); border: 1px solid var(--line); border-radius: 12px;
  padding: 1.25rem 1.4rem; margin: 1.25rem 0; }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; list-style: none; padding: 0; margin: .8rem 0 0; }
a { color: var(--kept); }
dl.stats { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: .8rem; margin: 1.4rem 0 0; }
dl.stats div { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: .6rem .9rem; }
dt { color: var(--soft); font-size: .82rem; } dd { margin: 0; font-size: 1.05rem; font-weight: 600;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
figure { margin: 0; overflow-x: auto; } svg.wide { min-width: 620px; }
svg { display: block; width: 100%; height: auto; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem 1.75rem;
  margin: .75rem 0 1.25rem; }
.chart .tick, .chart .axis { font-size: 13px; }
.legend { display: flex; flex-wrap: wrap; align-content: start; gap: .2rem 1.1rem; list-style: none;
  padding: 0; margin: .4rem 0; }
.legend li { display: flex; align-items: center; gap: .4rem; font-size: .85rem; overflow-wrap: anywhere; }
svg.swatch { flex: none; width: 30px; }
.gap { display: flex; justify-content: flex-end; align-items: center; gap: 0 .8rem; }
.gap span { min-width: 10.5rem; } svg.interval { width: 240px; } .zero { stroke: var(--soft); }
.whisker { stroke: var(--own); stroke-width: 2; } .interval .good { --own: var(--good); fill: var(--good); }
.interval .bad { --own: var(--bad); fill: var(--bad); } .interval .unclear { --own: var(--soft); fill: var(--soft); }
.study th[scope=row] { min-width: 10rem; } .study td { white-space: nowrap; }
.compared { width: 100%; } .compared th[scope=row] { overflow-wrap: break-word; }
.compared td, .compared thead th { white-space: nowrap; }
.compared th:nth-child(2) { width: 9rem; } .compared th:last-child { width: 6rem; }
.keys { display: flex; flex-wrap: wrap; gap: 0 1rem; } .keys .key { margin-left: 0; }
.key.line { height: 0; border-top: 3px solid var(--own); vertical-align: .25em; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 0 1.75rem; }
.beside > div { border-top: 3px solid var(--line); padding-top: .3rem; } .beside > .kept { border-color: var(--kept); }
.samples .file { color: var(--soft); font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .9em; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; vertical-align: -.05em;
  margin: 0 .3em 0 .8em; }
.key.all { background: var(--all); } .key.kept { background: var(--kept); }
.small-multiples { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .9rem 1.1rem;
  margin-top: 1rem; }
.small-multiples figcaption { font-size: .82rem; border-top: 1px solid var(--line); padding-top: .15rem; }
.small-multiples strong { color: var(--ink); overflow-wrap: anywhere; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)); gap: .6rem; list-style: none;
  padding: 0; margin: .4rem 0 1rem; }
.samples li { font-size: .76rem; line-height: 1.35; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.samples img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 6px;
  background: var(--page); border: 3px solid transparent; image-rendering: pixelated; }
.samples .differs img { border-color: var(--bad); }
.samples .score { display: block; font-weight: 600; margin-top: .2rem; }
.samples .right { color: var(--good); } .samples .wrong { color: var(--bad); font-weight: 600; }
.samples .other { color: var(--soft); } .samples span { display: block; }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
caption { text-align: left; padding-bottom: .35rem; font-size: .88rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th[scope=row], thead th:first-child { text-align: left; font-weight: 600; }
thead th { color: var(--soft); font-weight: 600; }
.side { display: flex; flex-wrap: wrap; gap: 0 2.5rem; } .side .scroll { flex: 0 1 auto; max-width: 30rem; }
.provenance thead th { text-align: left; } .provenance td { text-align: left; overflow-wrap: anywhere; }
.provenance th { vertical-align: top; white-space: nowrap; }
code { font: .85em ui-monospace, "DejaVu Sans Mono", monospace; }
summary { cursor: pointer; color: var(--kept); margin: .5rem 0; }
:focus-visible { outline: 2px solid var(--kept); outline-offset: 2px; }
footer { padding-bottom: 2.5rem; font-size: .85rem; }
@media (max-width: 32rem) { header, main, footer { padding-left: .6rem; padding-right: .6rem; }
  section { padding: 1rem .8rem; } th, td { padding: .3rem .35rem; }
  .fits svg.wide { min-width: 0; } .fits .tick, .fits .axis { font-size: 17px; }
  .compared, .compared thead, .compared tbody, .compared caption { display: block; }
  .compared tr { display: grid; grid-template-columns: 6.2rem 1fr 4.6rem; border-bottom: 1px solid var(--line); }
  .compared th, .compared td { border: 0; } .compared th:first-child { grid-column: 1 / -1; padding-bottom: 0; }
  .compared th:nth-child(n) { width: auto; }
  .compared td:nth-child(2), .compared thead th:nth-child(2) { text-align: left; }
  .gap { flex-wrap: wrap; } .gap span { min-width: 0; } svg.interval { width: 100%; } }
@media print { body { background: none; } section { break-inside: avoid; } nav { display: none; } }
"""

STYLE = LIGHT + CHARTS + _PAGE

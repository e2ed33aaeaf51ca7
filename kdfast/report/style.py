"""Style sheet of the pages: light and dark by the reader's preference, one column on narrow screens."""

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --panel: #ffffff; --ink: #16202c; --soft: #51606f; --line: #d9dfe6;
  --all: #b9c4d0; --kept: #1f5fd0; --good: #0b6e3e; --bad: #b3261e; --heat: 31 95 208; }
@media (prefers-color-scheme: dark) { :root {
  --page: #10151b; --panel: #19212a; --ink: #e8edf2; --soft: #a3b1bf; --line: #33404d;
  --all: #4b5a69; --kept: #7fb0ff; --good: #6fd39b; --bad: #ff9a92; --heat: 127 176 255; } }
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
.all { fill: var(--all); } .kept { fill: var(--kept); } .grid { stroke: var(--line); }
.reference { stroke: var(--ink); stroke-dasharray: 4 3; }
.tick, .axis { fill: var(--soft); font-size: 12px; } .end { text-anchor: end; } .middle { text-anchor: middle; }
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
@media print { body { background: none; } section { break-inside: avoid; } nav { display: none; } }
"""

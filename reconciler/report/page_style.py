"""The style of the status page: light and dark, phone and desktop; part of the file, since nothing is loaded."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --panel: #f6f8fa; --blue: #0550ae;
  --ok: #116329; --ok-paper: #dafbe1; --warning: #6f4400; --warning-paper: #fff3c4; --error: #a40e26; --error-paper: #ffe5e8; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #0d1117; --ink: #e6edf3; --soft: #9aa5b1; --line: #30363d; --panel: #161b22; --blue: #79c0ff;
  --ok: #7ee787; --ok-paper: #0f2d18; --warning: #f2cc60; --warning-paper: #33270a; --error: #ff9aa2; --error-paper: #3c1419; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0 0 .5rem; font-size: 1.6rem; line-height: 1.2; }
h2 { margin: 2rem 0 .5rem; font-size: 1.15rem; }
.summary { margin: 0; padding: .75rem 1rem; border-inline-start: .35rem solid; border-radius: .25rem; font-size: 1.05rem; }
.summary.ok { background: var(--ok-paper); border-color: var(--ok); }
.summary.warning { background: var(--warning-paper); border-color: var(--warning); }
.summary.error { background: var(--error-paper); border-color: var(--error); }
.ok strong { color: var(--ok); } .warning strong { color: var(--warning); } .summary.error strong { color: var(--error); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .5rem; margin: 0; }
dl div { padding: .5rem .75rem; background: var(--panel); border-radius: .25rem; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; }
table { width: 100%; border-collapse: collapse; }
th, td { padding: .5rem .75rem .5rem 0; border-bottom: 1px solid var(--line); text-align: start; vertical-align: top; }
tbody th { min-width: 11rem; } td[data-label="On this node"] { min-width: 10rem; }
thead th { color: var(--soft); font-size: .85rem; font-weight: 600; }
.tasks, .since { display: block; color: var(--soft); font-size: .85rem; font-weight: 400; }
.state { white-space: nowrap; font-weight: 600; }
.active .state { color: var(--ok); } .pending .state { color: var(--warning); } .failed .state { color: var(--error); }
span.error { color: var(--error); }
progress { display: block; width: 100%; max-width: 16rem; height: .7rem; accent-color: var(--blue); }
ol { margin: 0; padding: 0; list-style: none; }
li { padding: .35rem 0; border-bottom: 1px solid var(--line); }
time { font-variant-numeric: tabular-nums; color: var(--soft); }
code { font-family: ui-monospace, monospace; font-size: .9em; }
figure { margin: 0 0 1rem; }
figcaption, footer { color: var(--soft); font-size: .85rem; }
svg { display: block; width: 100%; height: auto; font-size: 12px; }
svg text { fill: var(--soft); } svg .axis { fill: none; stroke: var(--line); }
svg .line { fill: none; stroke: var(--blue); stroke-width: 2; } svg .area { fill: var(--blue); opacity: .15; }
@media (max-width: 40rem) {
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, tbody, tr, th, td { display: block; }
  tr { padding: .75rem 0; border-bottom: 1px solid var(--line); }
  th, td, tbody th, td[data-label="On this node"] { min-width: 0; border: 0; padding: .15rem 0; }
  td[data-label]::before { content: attr(data-label) ": "; color: var(--soft); font-size: .85rem; }
  progress { max-width: none; }
  svg { font-size: 22px; }
}
@media (prefers-reduced-motion: no-preference) { html { scroll-behavior: smooth; } }
@media print { body { max-width: none; } }
"""

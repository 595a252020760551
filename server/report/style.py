"""How the report looks, on a screen and on paper: black on white, nothing from outside, nothing that runs."""

__all__ = ["HEAD"]

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>%s</title>
<style>
:root { --ink: #1a1a1a; --faint: #5f6368; --line: #e4e6e8; --mark: #0072b2; color-scheme: light;
  --serif: Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, "Liberation Serif", serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 17px/1.6 var(--serif);
  -webkit-print-color-adjust: exact; print-color-adjust: exact; overflow-wrap: break-word; }
main { max-width: 50rem; margin: 0 auto; padding: 4.5rem 1.5rem 6rem; }
h1 { font-size: 2.35rem; line-height: 1.15; font-weight: 600; letter-spacing: -.01em; margin: .4rem 0 .7rem; }
h2 { font-size: 1.4rem; line-height: 1.25; font-weight: 600; margin: 4rem 0 .8rem; }
h3 { font: 600 .95rem/1.4 var(--sans); margin: 2rem 0 .5rem; }
p { margin: 0 0 .9rem; max-width: 42rem; }
.eyebrow, .about, .note, figcaption, .legend { font-family: var(--sans); color: var(--faint); }
.eyebrow { font-size: .8rem; letter-spacing: .07em; text-transform: uppercase; margin: 0; }
.about { font-size: .9rem; line-height: 1.55; }
.verdict { font-size: 1.2rem; line-height: 1.55; margin: 2rem 0 0; max-width: none; }
.note, figcaption { font-size: .84rem; line-height: 1.5; max-width: 42rem; }
figcaption { margin: .35rem 0 0; }
.ended { border-left: 3px solid #d55e00; padding-left: 1rem; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1.6rem 1.5rem;
  margin: 2.4rem 0 0; padding: 1.5rem 0 1.4rem; border-top: 1px solid var(--ink); border-bottom: 1px solid var(--line);
  font-family: var(--sans); }
.numbers div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.numbers dd { margin: 0; font-size: 1.65rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.numbers dd small { font-size: .9rem; color: var(--faint); white-space: nowrap; }
.numbers dt { color: var(--faint); font-size: .82rem; line-height: 1.4; }
figure { margin: 1.2rem 0 2rem; break-inside: avoid; }
svg { display: block; overflow: visible; width: 100%%; height: auto; font: 11px var(--sans); stroke-linecap: round;
  stroke-linejoin: round; }
svg text { font-variant-numeric: tabular-nums; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem 1.2rem; }
.two h3, figure h3 { margin: 0 0 .4rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.3rem; font-size: .8rem; margin: .5rem 0 0; max-width: none; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .45em; vertical-align: -.06em;
  border: 1px solid #0002; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%%; font: .8rem/1.4 var(--sans); font-variant-numeric: tabular-nums;
  margin: .6rem 0 .8rem; }
th, td { text-align: left; padding: .38rem .75rem .38rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  font-weight: 400; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--faint); border-bottom: 1px solid var(--ink); vertical-align: bottom; }
td.n, th.n { text-align: right; white-space: nowrap; }
thead th.n { white-space: normal; }
tr.apart > * { font-weight: 650; }
th[scope=row] { overflow-wrap: anywhere; min-width: 7.5rem; }
dl.words { display: grid; grid-template-columns: minmax(8rem, 13rem) 1fr; gap: .45rem 1.2rem; margin: 1rem 0;
  font: .9rem/1.5 var(--sans); }
dl.words dt { color: var(--faint); }
dl.words dd { margin: 0; overflow-wrap: anywhere; }
dl.digests dd { font: .78rem/1.7 var(--mono); }
code, pre { font-family: var(--mono); font-size: .82em; }
pre { line-height: 1.55; margin: .8rem 0 1.2rem; white-space: pre-wrap; overflow-wrap: anywhere; }
pre.commands { background: #f5f6f7; padding: .9rem 1.1rem; }
pre.study { columns: 16rem; column-gap: 1.6rem; font-size: .72em; line-height: 1.5; }
pre.study span { display: block; break-inside: avoid; }
pre.study b { font-weight: 700; }
ul { margin: 0 0 1rem; padding-left: 1.15rem; max-width: 42rem; }
li { margin-bottom: .4rem; }
@media (max-width: 40rem) { figure { overflow-x: auto; } figure > svg { min-width: 36rem; }
  body { font-size: 16px; } main { padding-top: 2rem; } .two { grid-template-columns: 1fr; }
  dl.words { grid-template-columns: 1fr; gap: 0; } dl.words dd { margin-bottom: .6rem; } }
@page { size: A4; margin: 17mm 17mm 19mm; }
@media print { body { font-size: 10.2pt; } main { max-width: none; padding: 0; } h1 { font-size: 22pt; }
  h2 { font-size: 13.5pt; margin-top: 2.2rem; } h2, h3 { break-after: avoid; } .verdict { font-size: 12pt; }
  .numbers { grid-template-columns: repeat(4, 1fr); gap: 1rem; } .numbers dd { font-size: 15pt; }
  tr, li, pre.commands, .numbers, dl.words { break-inside: avoid; } thead { display: table-header-group; }
  p { orphans: 3; widows: 3; } pre.study { columns: 3; font-size: 6.6pt; }
  dl.words { font-size: 8.8pt; }
  dl.digests dd { font-size: 7.6pt; }
  .note, figcaption, .legend { font-size: 8pt; } .scroll { overflow: visible; } table { font-size: 8pt; }
  th, td { padding: .3rem .6rem .3rem 0; } }
</style>
</head>
"""

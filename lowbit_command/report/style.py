"""The look of a report: colours for light and dark, type, layout. Everything else takes colours from here by name."""

CSS = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--text:#1b2130;--soft:#5c6678;--edge:#e1e5ec;--grid:#e9ecf1;
--c0:#a3adbd;--c1:#2f6bde;--c2:#dd6b20;--c3:#0f9488;--c4:#8a5cf0;--c5:#d0307f;--c6:#7c8a12;
--good:#12805c;--goodbg:#e2f5ed;--warn:#9a5b00;--warnbg:#fdf0d8;--bad:#c22f2f;--badbg:#fde8e7;--fill:#eef1f6}
@media(prefers-color-scheme:dark){:root{--page:#0f1217;--card:#171b22;--text:#e6eaf2;--soft:#98a3b6;--edge:#2a313d;
--grid:#242b36;--c0:#667085;--c1:#6fa0ff;--c2:#ff9a5c;--c3:#3fcdbd;--c4:#b598ff;--c5:#ff7bb6;--c6:#c3d155;
--good:#5cd6a5;--goodbg:#12332a;--warn:#f2bd66;--warnbg:#3a2c12;--bad:#ff8a84;--badbg:#3d1b1d;--fill:#222934}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);overflow-wrap:anywhere;
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1208px;margin:0 auto;padding:28px 16px 40px}
header{display:flex;flex-wrap:wrap;gap:6px 12px;align-items:center;margin-bottom:18px}
h1{font-size:25px;line-height:1.25;margin:0;font-weight:650;letter-spacing:-.01em}
h2{font-size:17px;margin:30px 0 10px;font-weight:650}
h3{font-size:14px;margin:0 0 8px;font-weight:600;display:flex;flex-wrap:wrap;gap:0 10px;justify-content:space-between}
h3 small,.soft{color:var(--soft);font-weight:400;font-size:13px}
header p{margin:0;flex-basis:100%;color:var(--soft);font-size:14px}
.pill{font-size:13px;font-weight:600;padding:2px 10px;border-radius:20px}
.finished{color:var(--good);background:var(--goodbg)}.running{color:var(--c1);background:var(--fill)}
.interrupted{color:var(--warn);background:var(--warnbg)}.failed{color:var(--bad);background:var(--badbg)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px}
.tile,.card{background:var(--card);border:1px solid var(--edge);border-radius:12px;padding:14px 16px;min-width:0}
.tile b{display:block;font-size:20px;line-height:1.3;font-weight:620;white-space:nowrap;
font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:13px}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:12px}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:12px}
.wide{grid-column:1/-1}.card+.card.gap,.gap{margin-top:12px}
.problem{border-color:var(--bad);margin-bottom:12px}.problem b{color:var(--bad)}
svg.chart{display:block;width:100%;height:auto}
svg text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;fill:var(--soft);
font-variant-numeric:tabular-nums}
svg .ty{text-anchor:end}svg .tx{text-anchor:middle}svg .end{text-anchor:end}
svg .grid{stroke:var(--grid)}svg .axis{stroke:var(--soft);stroke-opacity:.55}
svg .mark{stroke:var(--soft);stroke-dasharray:3 4}svg .bad{stroke:var(--bad);stroke-width:2;fill:none}
svg .line,svg .raw{fill:none;stroke:currentColor;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
svg .raw{stroke-width:1;stroke-opacity:.3}svg .band{fill:currentColor;fill-opacity:.17}svg circle{fill:currentColor}
svg .bars{fill:currentColor}svg .p{fill:transparent}svg .p:hover{fill:var(--soft);fill-opacity:.13}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}
.c4{color:var(--c4)}.c5{color:var(--c5)}.c6{color:var(--c6)}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;margin:6px 0 0;padding:0;list-style:none;font-size:13px}
.legend i,td i.key,th i.key{display:inline-block;width:11px;height:11px;border-radius:3px;background:currentColor;
margin-right:7px;vertical-align:-1px}
.legend span{color:var(--text)}
.stack{display:flex;height:26px;border-radius:7px;overflow:hidden;gap:2px;background:var(--fill);margin:2px 0 10px}
.stack i{display:block;background:currentColor;min-width:2px}
.meter{display:block;height:8px;border-radius:5px;background:var(--fill);min-width:60px}
.meter i{display:block;height:8px;border-radius:5px;background:currentColor}
table{border-collapse:collapse;width:100%;font-size:14px}
th{text-align:left;font-weight:600;color:var(--soft);font-size:13px}
td,th{padding:5px 12px 5px 0;border-bottom:1px solid var(--edge);vertical-align:top}
tr:last-child td{border-bottom:0}td:last-child,th:last-child{padding-right:0}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.k{color:var(--soft)}td.bar{width:34%;vertical-align:middle}
.was{color:var(--soft)}.low{color:var(--bad);font-weight:600}
.scroll{overflow-x:auto}
details{margin-top:12px}details.card{padding-bottom:12px}
summary{cursor:pointer;font-weight:600;font-size:14px}details[open] summary{margin-bottom:10px}
pre{margin:8px 0 0;font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
footer{margin-top:30px;color:var(--soft);font-size:13px}
.narrow{display:none!important}
@media(max-width:760px){.broad{display:none!important}.narrow{display:block!important}main{padding:18px 12px 28px}
h1{font-size:21px}.tile b{font-size:18px}.tiles{grid-template-columns:repeat(2,1fr);gap:8px}
.tile,.card{padding:12px}.fold td.bar,.fold .head{display:none!important}
.fold tr{display:grid;grid-template-columns:repeat(auto-fit,minmax(96px,1fr));gap:0 8px;padding:5px 0;
border-bottom:1px solid var(--edge)}.fold tr:last-child{border:0}
.fold td,.fold td.n{border:0;padding:0;text-align:left}.fold td:first-child{grid-column:1/-1;font-weight:600}
.fold td[data-head]:before{content:attr(data-head);display:block;color:var(--soft);font-size:12px}
.fold td.k+td{grid-column:1/-1}}
@media print{body{background:#fff}.card,.tile{break-inside:avoid}}
"""

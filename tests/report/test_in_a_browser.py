"""Pages opened in headless Chromium, at two widths: nothing is wider than the page, cut off or unreadable."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
from support.report_records import example

from lowbit_command.report.compare import compare
from lowbit_command.report.page import page

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
WIDTHS = (1280, 400)
# What is measured in each frame. smallest: of the text in charts, in pixels as shown.
SCRIPT = """<script>
function measure(view) {
  const document = view.contentDocument, page = document.documentElement, told = {};
  const shown = e => e.getClientRects().length > 0, rect = e => e.getBoundingClientRect();
  const style = e => view.contentWindow.getComputedStyle(e);
  const all = query => [...document.querySelectorAll(query)].filter(shown);
  const clipped = e => { for (let a = e.parentElement; a; a = a.parentElement)
    if (style(a).overflowX !== 'visible') return true; return false; };
  const overlap = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  document.querySelectorAll('details').forEach(e => e.open = true);
  told.width = page.clientWidth;
  told.wider = page.scrollWidth - page.clientWidth;
  told.outside = all('main *').filter(e => !clipped(e)
    && (rect(e).right > page.clientWidth + .5 || rect(e).left < -.5)).map(e => e.outerHTML.slice(0, 80));
  told.cut = all('svg text').filter(e => { const box = rect(e), frame = rect(e.closest('svg'));
    return box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1
      || box.top < frame.top - 1; }).map(e => e.textContent);
  told.overlaps = all('svg').flatMap(svg => { const texts = [...svg.querySelectorAll('text')];
    return texts.flatMap((a, i) => texts.slice(i + 1).filter(b => overlap(rect(a), rect(b)))
      .map(b => a.textContent + ' over ' + b.textContent)); });
  told.smallest = Math.min(...all('svg text').map(e => rect(e).height));
  told.crushed = all('td,th').filter(e => e.textContent.length > 4 && rect(e).width < 36).map(e => e.textContent);
  told.charts = all('svg').length;
  told.blank = all('.line').filter(e => e.getAttribute('d').includes('L') && rect(e).width < 5).length;
  return told;
}
onload = () => { const out = document.createElement('output');
  out.textContent = JSON.stringify([...document.querySelectorAll('iframe')].map(measure)); document.body.append(out); };
</script>"""


def measured(pages: Sequence[str], folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the script finds in each page at each width: all of them are frames of one document."""
    names = [(page, width) for page in range(len(pages)) for width in WIDTHS]
    frames = [f'<iframe srcdoc="{escape(pages[page])}" style="width:{w}px;height:900px;border:0">' for page, w in names]
    file = folder / "frames.html"
    file.write_text(f"<meta charset=utf-8>{SCRIPT}{'</iframe>'.join(frames)}</iframe>", encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1400,900"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<output>(.*?)</output>", done.stdout, re.S)
    assert found, done.stderr[-2000:]
    for (number, width), told in zip(names, json.loads(unescape(found[1])), strict=True):
        assert told["width"] == width
        yield f"page {number} at {width}", told


@pytest.mark.skipif(not BROWSER, reason="no chromium is installed (Debian: apt-get install chromium)")
def test_nothing_overflows_is_cut_off_or_too_small(tmp_path: Path) -> None:
    record = example(steps=700)
    record.layers = {f"{'deeply.nested.' * 9}{name}": found for name, found in [*record.layers.items()][:3]}
    record.config["trainer"]["default_root_dir"] = "/a/" + "very_long_folder_name_without_any_break/" * 6
    several = compare([record, example(400, 1, 32), example(500, 2, name="gpt-nf4")])
    too_wide = page(record).replace("<main>", '<main><div style="width:1500px;height:1px">wide</div>')
    found = dict(measured([page(record), several, too_wide], tmp_path))
    assert found["page 2 at 400"]["wider"] > 1000, "the measurement sees what it should"
    for where, told in found.items():
        if "page 2" in where:
            continue
        problems = {
            name: told[name] for name in ("wider", "outside", "cut", "overlaps", "crushed", "blank") if told[name]
        }
        assert not problems, (where, problems)
        assert told["smallest"] > 10, where
        assert told["charts"] >= 4, where

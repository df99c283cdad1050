"""Check a report in a real browser: Chromium opens it at several widths at once, and a script reports what is wrong at each.

One page shows the report in a frame of each width, so even widths below a browser's smallest window can be tried. The frames
show a copy of the report to which axe-core and the script `PROBE` are added.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import axe_core_python

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
MISSING = "no browser found: `make test` installs one where it can; CHROMIUM=/path/to/chrome names another"
HEIGHT = 2000

PROBE = """
// What sticks out of the page, what is cut off without a mark, and which texts of a figure overlap.
function named(element) {
  const figure = element.closest("figure, section, header, nav");
  return `${figure?.id || figure?.tagName || "page"}: ${element.tagName} ${element.textContent.trim().slice(0, 40)}`;
}
function stickingOut() {
  const width = document.documentElement.clientWidth;
  return [...document.querySelectorAll("main *")].filter((element) => {
    if (element.closest(".scroll, pre, svg, .skip, .modebar-container") || !element.checkVisibility()) return false;
    const box = element.getBoundingClientRect();
    return box.width > 0 && (box.right > width + 1 || box.left < -1);
  }).map(named);
}
function silentlyCut() {
  return [...document.querySelectorAll(".scroll")].filter((box) =>
    box.checkVisibility() && box.scrollWidth > box.clientWidth + 1 && !box.classList.contains("more")).map(named);
}
function overlapping() {
  const found = [];
  for (const figure of document.querySelectorAll("figure.plot")) {
    const texts = [...figure.querySelectorAll("h3, .legend li, figcaption, svg.main-svg text")].filter((one) =>
      one.textContent.trim() && one.checkVisibility()).map((one) => [one, one.getBoundingClientRect()]);
    texts.forEach(([one, a], index) => texts.slice(index + 1).forEach(([other, b]) => {
      const turned = (element) => /rotate\\((?!0[,)])/.test(element.getAttribute("transform") ?? "");
      if (turned(one) && turned(other)) return;  // the boxes of slanted labels overlap, the labels do not
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (across > 2 && down > 4) found.push(`${named(one)} | ${other.textContent.trim().slice(0, 40)}`);
    }));
  }
  return found;
}
async function probe() {
  while (!document.documentElement.dataset.figures) await new Promise((done) => setTimeout(done, 50));
  for (const fold of document.querySelectorAll("details")) fold.open = true;
  await new Promise((done) => setTimeout(done, 1500));
  const faults = (await axe.run({ exclude: ["svg"] }, { resultTypes: ["violations"] })).violations;
  const accessibility = faults.map((one) => `${one.id}: ${one.nodes.length} x ${one.nodes[0].html.slice(0, 160)}`);
  const background = getComputedStyle(document.body).backgroundColor;
  const found = { background, stickingOut: stickingOut(), silentlyCut: silentlyCut(), overlapping: overlapping() };
  parent.postMessage({ width: innerWidth, accessibility, ...found }, "*");
}
probe();
"""

COLLECT = """
const found = [];
addEventListener("message", ({ data }) => {
  found.push(data);
  document.getElementById("found").textContent = JSON.stringify(found);
});
"""


def dumped(page: Path, profile: Path, *options: str) -> str:
    """The HTML of a page that a headless browser has opened from disk, after the scripts of the page have run."""
    assert CHROMIUM, MISSING
    quiet = ["disable-quic", "no-first-run", "disable-background-networking", "disable-component-update", "disable-sync"]
    headless = ["headless", "no-sandbox", "disable-gpu", f"user-data-dir={profile}", "virtual-time-budget=20000"]
    command = [CHROMIUM, *(f"--{option}" for option in (*quiet, *headless, *options)), "--dump-dom", page.resolve().as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


def seen(report: Path, scratch: Path, widths: tuple[int, ...], *, dark: bool) -> dict[int, dict[str, Any]]:
    """For each width, what `PROBE` and axe-core found: what sticks out, is cut off unmarked, overlaps, or is not accessible."""
    scratch.mkdir()
    axe = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text()
    probed = report.read_text().replace("</body>", f"<script>{axe}</script><script>{PROBE}</script></body>")
    (scratch / "report.html").write_text(probed)
    frames = "".join(f'<iframe src="report.html" width="{width}" height="{HEIGHT}"></iframe>' for width in widths)
    page = scratch / "frames.html"
    page.write_text(f'<!doctype html><script>{COLLECT}</script><pre id="found">[]</pre>{frames}')
    document = dumped(
        page, scratch / "profile", f"blink-settings=preferredColorScheme={0 if dark else 1}", "window-size=1500,2000"
    )
    (found,) = re.findall('<pre id="found">(.*?)</pre>', document, re.DOTALL)
    return {one.pop("width"): one for one in json.loads(html.unescape(found))}

"""A real browser without a window: what a page looks like there, and whether anything is wrong with it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

needs_browser = pytest.mark.skipif(PROGRAM is None, reason="needs a browser: apt install chromium")

MEASURE = """
const found = { width: innerWidth, page: document.documentElement.scrollWidth, texts: 0, hover: "",
  overlaps: [], outside: [], clipped: [], small: [] };
const boxes = (texts) => texts.map(text => [text.textContent, text.getBoundingClientRect()]);
document.querySelectorAll("figure svg").forEach(svg => {
  const frame = svg.getBoundingClientRect(), all = boxes([...svg.querySelectorAll("text")]);
  all.forEach(([text, box], number) => {
    found.texts++;
    if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1)
      found.outside.push(text);
    if (box.height < 10) found.small.push(text);
    all.slice(number + 1).forEach(([other, place]) => {
      const beside = box.left >= place.right || place.left >= box.right;
      const above = box.top >= place.bottom - 2 || place.top >= box.bottom - 2;
      if (!beside && !above) found.overlaps.push(text + " and " + other); });
  });
});
document.querySelectorAll("h1, .tile b, .legend, p, .card strong, .wide").forEach(part => {
  const wide = part.scrollWidth > part.clientWidth + 1;
  if (wide && getComputedStyle(part).display !== "inline") found.clipped.push(part.textContent);
});
const svg = document.querySelector("svg[data-x]");
if (svg) {
  const box = svg.getBoundingClientRect();
  const middle = { clientX: box.left + box.width / 2, clientY: box.top + 50, bubbles: true };
  svg.dispatchEvent(new PointerEvent("pointermove", middle));
  found.hover = svg.closest("figure").querySelector("output").textContent;
}
parent.postMessage(JSON.stringify(found), "*");
"""

FRAME = """<!doctype html><pre id="found"></pre><script>
addEventListener("message", event => { document.getElementById("found").textContent = event.data; });
</script><iframe src="%s" style="border: 0; width: %dpx; height: 900px"></iframe>"""
"""A window has a least width, a frame has none."""


def browse(*options):
    """Run the browser once, and return what it printed on both streams."""
    command = [PROGRAM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


def dump(address, *options):
    """The page as the browser has it after its scripts ran, and what the page complained about."""
    done = browse("--dump-dom", *options, address)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, complaints


def measure(page, width, tmp_path):
    """What is where on the page at a width: sizes, texts that overlap, leave their drawing or are cut off.

    The page allows no script but its own, so a copy of it is measured whose policy is left out.
    """
    text = page.read_text()
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', text)
    assert policy, "the page has a policy"
    copy = tmp_path / f"measured-{width}.html"
    copy.write_text(text.replace(policy[0], "").replace("</body>", f"<script>{MEASURE}</script></body>"))
    frame = tmp_path / f"frame-{width}.html"
    frame.write_text(FRAME % (copy.as_uri(), width))
    found, complaints = dump(frame.as_uri(), "--window-size=1400,1000", "--virtual-time-budget=3000")
    assert complaints == []
    measured = re.search(r'<pre id="found">(.*?)</pre>', found, re.DOTALL)
    assert measured, "the script ran to its end"
    return json.loads(measured[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))

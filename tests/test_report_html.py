"""report.html in a real browser: it loads, every picture is there, nothing is wider than the screen. Skipped without Chromium."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--virtual-time-budget=5000"]
LOOK = """<script>
const errors = []; addEventListener("error", e => errors.push(e.message));
addEventListener("load", () => {
  const found = {images: [...document.images].map(i => i.naturalWidth), wide: document.documentElement.scrollWidth, screen: innerWidth,
    small: [...document.querySelectorAll("td, p, pre")].filter(e => parseFloat(getComputedStyle(e).fontSize) < 11).length,
    titles: [...document.querySelectorAll("h1, h2")].map(e => e.textContent), errors: errors};
  const out = document.createElement("pre"); out.id = "found"; out.textContent = JSON.stringify(found); document.body.append(out);
});</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [400, 1400])
def test_the_report_is_readable(finished, tmp_path, width):
    report = (finished / "out" / "benchmark" / "report.html").read_text()
    assert not re.search(r"(src|href)=.?(https?:|/|\w+\.png)", report)  # self-contained
    frame = f'<iframe src="inside.html" width="{width}" height="900" style="border:0"></iframe>'  # windows have a least width, frames none
    (tmp_path / "inside.html").write_text(report.replace("</html>", LOOK + "</html>"))
    (tmp_path / "page.html").write_text(
        f"<!doctype html><body style='margin:0'>{frame}<script>addEventListener('load', () => setTimeout(() => "
        "document.body.append(frames[0].document.getElementById('found').cloneNode(true)), 500));</script>"
    )
    command = [BROWSER, *FLAGS, "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1600,1000"]
    page = subprocess.run([*command, "--dump-dom", f"file://{tmp_path / 'page.html'}"], capture_output=True, text=True, timeout=120)
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', page.stdout, re.DOTALL)[1]))
    assert found["errors"] == [] and found["screen"] == width
    assert len(found["images"]) == 7 and min(found["images"]) > 0
    assert found["wide"] <= width  # wide tables scroll inside their own boxes
    assert found["small"] == 0 and "The six targets" in found["titles"]

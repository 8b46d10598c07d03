"""The HTML page of a run in a browser: how it is laid out, and that nothing of it runs or asks anybody."""

from __future__ import annotations

import html
import http.server
import json
import re
import shutil
import subprocess
import threading

import pytest
from reports import whole_report, whole_run

from hfkd.report.page import build_page
from hfkd.report.plots import draw_plots

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome")

# Loads the page into frames of several widths, with nothing of its own style, and says what it finds there.
MEASURE = """<!DOCTYPE html><title>measure</title><body>%s<pre id="found"></pre><script>
onload = () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument;
    found[frame.width] = {
      wide: page.documentElement.scrollWidth,
      broken: [...page.images].filter((one) => !one.naturalWidth).length,
      pictures: page.images.length,
      styled: frame.contentWindow.getComputedStyle(page.querySelector("main")).maxWidth,
      left: page.querySelector("h1").getBoundingClientRect().left,
      id: page.documentElement.id,
    };
  }
  document.getElementById("found").textContent = JSON.stringify(found);
};
</script></body>"""


@pytest.fixture
def asked():
    """A server on this machine: its address, and the paths that it was asked for."""
    paths: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", paths
    server.shutdown()
    server.server_close()


def show(path, folder, *arguments: str) -> tuple[str, list[str]]:
    """Open a page without a window: its elements as they are after all is loaded, and what the console says."""
    ended = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *("--disable-component-update", "--no-first-run", "--enable-logging=stderr", "--log-level=0"),
            *("--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", f"--user-data-dir={folder / 'profile'}"),
            *("--virtual-time-budget=4000", *arguments, "--dump-dom", f"file://{path}"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0 and "<html" in ended.stdout, ended.stderr[-2000:]
    return ended.stdout, [line for line in ended.stderr.splitlines() if "CONSOLE" in line]


def payload(address: str) -> str:
    """Markup that marks the page when it runs, and asks the server when it is loaded."""
    return (
        f'</style></title></pre></code><img src="{address}/picture" onerror="document.documentElement.lang = 0">'
        f'<script>document.documentElement.id = "pwned"; fetch("{address}/fetched")</script>'
        f'<link rel="stylesheet" href="{address}/style">'
    )


def poisoned(value, poison: str):
    """The same data with markup after every text."""
    if isinstance(value, dict):
        return {name: poisoned(item, poison) for name, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item, poison) for item in value]
    return value + poison if isinstance(value, str) else value


def test_nothing_runs_and_nobody_is_asked(tmp_path, asked):
    """Prevents somebody else's rows from running in the browser of who reads the report, or from telling a server
    that it was read. The same markup unescaped is found to do both, so that the test can see it.
    """
    address, paths = asked
    poison = payload(address)
    naked = tmp_path / "naked.html"
    naked.write_text(f"<!DOCTYPE html><html><body><p>{poison}</p></body></html>", encoding="utf-8")
    dom, console = show(naked, tmp_path)
    assert 'id="pwned"' in dom and {"/picture", "/style"} <= set(paths) and console
    paths.clear()

    report = tmp_path / "report.html"
    pictures = {path.name: path.read_bytes() for path in draw_plots(tmp_path / "plots", whole_report())}
    text = build_page(poisoned(whole_run(), poison), poisoned(whole_report(), poison), pictures, poison)
    report.write_text(text, encoding="utf-8")
    dom, console = show(report, tmp_path)
    assert paths == [] and console == []
    assert "pwned" not in re.findall(r"<html[^>]*>", dom)[0] and "<script" not in dom
    assert dom.count("<img") == len(pictures) == 5

    # The policy holds by itself too, should an escape ever be forgotten.
    report.write_text(text.replace('<main id="main">', f'<main id="main">{poison}'), encoding="utf-8")
    dom, console = show(report, tmp_path)
    assert paths == [] and "pwned" not in re.findall(r"<html[^>]*>", dom)[0]
    assert any("Content Security Policy" in line for line in console)


def test_it_fits_phones_and_desks(tmp_path):
    """Prevents a page that has to be pushed sideways, a style that its own policy refuses, and broken pictures."""
    pictures = {path.name: path.read_bytes() for path in draw_plots(tmp_path / "plots", whole_report())}
    run = whole_run()
    run["command"].append("x" * 300)
    text = build_page(run, whole_report(), pictures, "card " + "y" * 300)
    frames = "".join(
        f'<iframe width="{width}" height="900" srcdoc="{html.escape(text)}"></iframe>' for width in (320, 400, 1200)
    )
    path = tmp_path / "measure.html"
    path.write_text(MEASURE % frames, encoding="utf-8")
    dom, console = show(path, tmp_path)
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom)[1]))
    assert console == [] and set(found) == {"320", "400", "1200"}
    for width, page in found.items():
        assert page["wide"] <= int(width), found
        assert page["pictures"] == 5 and page["broken"] == 0
        assert page["styled"] == "960px", "the style was not applied"
    assert found["400"]["left"] < 20 < found["1200"]["left"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_light_or_dark_as_the_reader_wants(scheme, tmp_path):
    """Prevents a page that shines in the dark, or pictures whose words vanish there: they stay on white paper."""
    import matplotlib.image

    path = tmp_path / "report.html"
    pictures = {
        path.name: path.read_bytes()
        for path in draw_plots(tmp_path / "plots", {"loss_history": [{"step": 1, "loss": 1.0}]})
    }
    path.write_text(build_page({}, {}, pictures), encoding="utf-8")
    picture = tmp_path / "screen.png"
    number = {"dark": 0, "light": 1}[scheme]
    show(
        path,
        tmp_path,
        f"--blink-settings=preferredColorScheme={number}",
        "--window-size=1200,2200",
        f"--screenshot={picture}",
    )
    image = matplotlib.image.imread(picture)[..., :3]
    assert (image[5, 5].mean() < 0.2) == (scheme == "dark")
    white = (image > 0.99).all(axis=-1).mean()
    assert 0.15 < white < 0.5 if scheme == "dark" else white > 0.8

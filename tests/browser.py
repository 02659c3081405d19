"""Try the page of tools/web_demo.py in a real browser: upload a photograph, wait for the prediction, take a screenshot.

    pip install gradio playwright
    python tests/browser.py --photo photo.jpg                     in a folder with checkpoints/, or with --checkpoint
    python tests/browser.py --photo photo.jpg --browser /usr/bin/chromium

Starts the page, opens it in headless Chromium, uploads the photograph, compares the class on the page with the
network's prediction, and writes screenshot.png. Exit status: 0 if they agree, else 1; 3 if there is no browser to try.
"""

import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # common/, models/, tools/
from common.checkpoint import find_checkpoint, load_checkpoint  # noqa: E402
from common.device import choose_device  # noqa: E402
from common.extras import require  # noqa: E402
from common.options import Name, UserError, run  # noqa: E402
from tools.web_demo import Predictor  # noqa: E402

PHOTO: Name = "photo.jpg"  # image to upload
CHECKPOINT: str = ""  # file that train.py saved; "": the newest checkpoints/*/best.pth, else "seedlings"
BROWSER: str = ""  # path of Chromium; "": the one of `playwright install`
SCREENSHOT: Name = "screenshot.png"  # file to write

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]


def main():
    problem = find_problem(BROWSER or None)
    if problem:
        print(f"skipped: {problem}")
        return 3
    if not Path(PHOTO).is_file():
        raise UserError(f"there is no file {PHOTO}; give an image with --photo")
    checkpoint = find_checkpoint(CHECKPOINT)
    expected, *_ = Predictor(load_checkpoint(checkpoint), choose_device("cpu"), 5)(PHOTO)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "tools" / "web_demo.py", "--checkpoint", checkpoint, "--port", port]
    server = subprocess.Popen(list(map(str, command)))
    try:
        wait_for(f"http://127.0.0.1:{port}", server)
        shown = upload(f"http://127.0.0.1:{port}", PHOTO, BROWSER or None, SCREENSHOT)
    finally:
        server.terminate()
        server.wait()
    predicted = next(iter(expected))
    print(f"the page says {shown.strip()!r}, the network {predicted!r}; {SCREENSHOT}")
    return 0 if shown.strip() == predicted else 1


def find_problem(browser_path):
    """What is missing to try the page, with the remedy; "" if nothing is."""
    try:
        playwright, _ = require("playwright.sync_api", "gradio")
        with playwright.sync_playwright() as running:
            path = browser_path or running.chromium.executable_path
    except UserError as error:
        return str(error)
    if not Path(path).is_file():
        return f"there is no browser {path}; run playwright install chromium, or set BROWSER to one that is installed"
    return ""


def wait_for(address, server, seconds=120):
    """Wait until the page responds."""
    for _ in range(seconds):
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            if server.poll() is not None:
                raise UserError("tools/web_demo.py ended by itself; see its message above") from None
            time.sleep(1)
    raise UserError(f"{address} does not respond within {seconds} s; start tools/web_demo.py by hand to see why")


def upload(address, photo, browser_path, screenshot):
    """Upload `photo` in a browser; returns the class that the page shows."""
    [playwright] = require("playwright.sync_api")
    with playwright.sync_playwright() as running, tempfile.TemporaryDirectory() as profile:
        browser = running.chromium.launch_persistent_context(
            profile, executable_path=browser_path, args=FLAGS, viewport=dict(width=1100, height=1000)
        )
        page = browser.new_page()
        page.goto(address)
        page.locator("input[type=file]").first.set_input_files(photo)
        label = page.get_by_test_id("label-output-value")
        label.wait_for(timeout=60_000)
        page.wait_for_timeout(2000)  # until the second image is drawn, too
        page.screenshot(path=screenshot)
        text = label.inner_text()
        browser.close()
    return text


if __name__ == "__main__":
    run(main)

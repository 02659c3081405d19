"""Try the page of tools/demo.py in a real browser: upload a photograph, wait for the answer, take a screenshot.

    pip install gradio playwright
    python -m tests.browser photo.jpg                     in a folder with checkpoints/, or with --checkpoint
    python -m tests.browser photo.jpg --browser /usr/bin/chromium

Starts the page, opens it in headless Chromium, uploads the photograph, compares the class on the page with test.py's
own answer, and leaves screenshot.png. Exit status: 0 if they agree, else 1.
"""

import argparse
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.checkpoint import find_checkpoint, load_checkpoint  # noqa: E402
from common.device import choose_device  # noqa: E402
from tools.demo import Answers  # noqa: E402

OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
OPTIONS += ["--disable-background-networking", "--disable-component-update"]


def wait_for(address, server, seconds=120):
    """Wait until the page answers."""
    for _ in range(seconds):
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            if server.poll() is not None:
                sys.exit("the page ended by itself")
            time.sleep(1)
    sys.exit(f"{address} does not answer")


def ask(address, photo, browser_path, screenshot):
    """Upload `photo` in a browser; returns the text of the page's answer."""
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        browser = playwright.chromium.launch_persistent_context(
            profile, executable_path=browser_path, args=OPTIONS, viewport=dict(width=1100, height=1000)
        )
        page = browser.new_page()
        page.goto(address)
        page.locator("input[type=file]").first.set_input_files(photo)
        label = page.get_by_test_id("label-output-value")
        label.wait_for(timeout=60_000)
        page.wait_for_timeout(2000)  # until the second picture is drawn, too
        page.screenshot(path=screenshot)
        text = label.inner_text()
        browser.close()
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo")
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--browser", default=None, help="Chromium's path; default: the one of `playwright install`")
    parser.add_argument("--screenshot", default="screenshot.png")
    options = parser.parse_args()
    checkpoint = find_checkpoint(options.checkpoint)
    expected, _ = Answers(load_checkpoint(checkpoint), choose_device("cpu"))(options.photo)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "tools" / "demo.py", "--checkpoint", checkpoint, "--port", port]
    server = subprocess.Popen(list(map(str, command)))
    try:
        wait_for(f"http://127.0.0.1:{port}", server)
        shown = ask(f"http://127.0.0.1:{port}", options.photo, options.browser, options.screenshot)
    finally:
        server.terminate()
        server.wait()
    right = shown.strip() == next(iter(expected))
    print(f"the page says {shown.strip()!r}, the network {next(iter(expected))!r}; {options.screenshot}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())

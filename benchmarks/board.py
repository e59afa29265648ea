"""How soon the board is there: until `finery webui` tells its address, until a browser shows the page, and from tab to tab; medians.

python benchmarks/board.py [--runs 5]    (needs the package playwright and a Chromium; FINERY_CHROMIUM names one that is not found)
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TABS = ("chat", "export", "data", "runs", "train")


def measured(chromium: Any, home: Path) -> dict[str, float]:
    """Seconds of each, of a server and a window of their own."""
    began = time.perf_counter()
    said = home / "said"
    command = [sys.executable, "-P", "-m", "finery", "webui", "--port", "0"]
    with said.open("w") as out:
        server = subprocess.Popen(command, cwd=home, stdout=out, stderr=subprocess.STDOUT)
    context = chromium.new_context(locale="en-US")
    try:
        while (address := re.search(r"the page is at (\S+)", said.read_text())) is None:
            if server.poll() is not None:
                raise SystemExit(said.read_text())
            time.sleep(0.01)
        found = {"until the address is told": time.perf_counter() - began}
        page = context.new_page()
        began = time.perf_counter()
        page.goto(address[1])
        page.wait_for_function("window.tabsRestored === true")
        found["until the first page can be used"] = time.perf_counter() - began
        page.wait_for_timeout(3000)
        taken = []
        for tab in TABS:
            began = time.perf_counter()
            page.click(f"#tab-{tab}-button")
            page.wait_for_function("tab => location.hash === `#${tab}`", arg=tab)
            taken.append(time.perf_counter() - began)
        return {**found, "until another tab is open": statistics.median(taken)}
    finally:
        context.close()
        server.terminate()
        server.wait(30)


def main() -> None:
    """Print a table."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    path = os.environ.get("FINERY_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    with sync_playwright() as play, tempfile.TemporaryDirectory() as folder:
        chromium = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        every = []
        for number in range(runs):
            home = Path(folder) / str(number)
            home.mkdir()
            every.append(measured(chromium, home))
        chromium.close()
    print(f"{'what':<34} {'median s':>9} {'slowest s':>10}")
    for name in every[0]:
        times = [one[name] for one in every]
        print(f"{name:<34} {statistics.median(times):>9.2f} {max(times):>10.2f}")


if __name__ == "__main__":
    main()

"""A real browser for the tests: headless, without a profile, watched for what it asks the network for and what it complains about."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

BROWSERS = ("google-chrome", "chromium", "chromium-browser")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--disable-dev-shm-usage", "--force-color-profile=srgb", "--disable-search-engine-choice-screen"),
)


class Browser:
    """A window that opens pages in a given width and colour scheme."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.ask("Accessibility.enable")
        driver.get("about:blank")
        self.complaints(), self.requests()  # those of the browser's own first page

    def ask(self, command: str, **parameters: Any) -> dict[str, Any]:
        return self.driver.execute_cdp_cmd(command, parameters)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def open(self, url: str, *, width: int = 1280, dark: bool = False, print_it: bool = False) -> None:
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media="print" if print_it else "", features=[scheme])
        self.driver.get(url)

    def complaints(self) -> list[str]:
        """What the console says since the last call, warnings too."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The addresses asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def accessible(self) -> list[dict[str, Any]]:
        """What a screen reader is told: one record an element, in order."""
        nodes = self.ask("Accessibility.getFullAXTree")["nodes"]
        found = []
        for node in nodes:
            if not node.get("ignored"):
                properties = {item["name"]: item["value"].get("value") for item in node.get("properties", ())}
                found.append({"role": node["role"]["value"], "name": node.get("name", {}).get("value", ""), **properties})
        return found


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser; the test is skipped where none is installed, and fails there if NETTRIM_NEEDS_BROWSER is set, as CI does."""
    binary, driver = next(filter(None, map(shutil.which, BROWSERS)), None), shutil.which("chromedriver")
    if binary is None or driver is None:
        reason = f"no {'chromedriver' if binary else 'Chromium'} on PATH: install Debian's chromium and chromium-driver (or Chrome and its driver)"
        assert not os.environ.get("NETTRIM_NEEDS_BROWSER"), reason
        pytest.skip(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        try:
            yield Browser(window)
        finally:
            window.quit()

"""Headless Chromium for the tests of web pages; they are skipped without selenium, chromium or chromedriver."""

import shutil
import time

import pytest


def open_browser(*arguments: str):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium or chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    # for root in a container: no sandbox, little shared memory
    usual = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1200")
    for argument in (*usual, *arguments):
        options.add_argument(argument)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def wait_for(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, f"waited for {seconds} s"
        time.sleep(0.1)
    return result


def addresses(browser) -> list[str]:
    """What the page has requested."""
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    return [name for name in loaded if not name.startswith(("data:", "blob:"))]

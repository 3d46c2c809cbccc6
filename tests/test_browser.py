"""The report in a real browser: every picture is there, nothing is fetched, nothing complains, a phone can read it."""

import tempfile
from pathlib import Path
from typing import Any

import browser
import pytest
from studies import NAMES, comparison, page, study

from experiments.pages.report import Provenance

pytestmark = pytest.mark.slow

WIDTHS = "[document.documentElement.scrollWidth, innerWidth]"
BROKEN = "[...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.alt)"
LONG = "a_strategy_with_a_very_long_name:and=options:" + "x" * 60


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    usual = study()
    long = study(family=[*usual.family, comparison(LONG, 0.02, "positive", target="y" * 60)])
    provenance = Provenance({"jax": "z" * 200}, "--a=" + "b" * 300, "run")
    file.write_text(page(long, {"clothes": NAMES}, provenance=provenance), encoding="utf-8")
    return file


@pytest.fixture
def tab():
    path = browser.executable()
    if path is None:
        pytest.skip("there is no chromium, chromium-browser or google-chrome on the PATH")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, browser.tab(path, Path(folder)) as opened:
        for domain in ("Page", "Runtime", "Log", "Network"):
            opened.call(f"{domain}.enable")
        yield opened


def shown(tab: browser.Tab, file: Path, width: int) -> None:
    tab.call("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 600)
    tab.call("Page.navigate", until="Page.loadEventFired", url=file.as_uri())


def value(tab: browser.Tab, expression: str) -> Any:
    return tab.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]


def complaints(tab: browser.Tab) -> list[dict[str, Any]]:
    kinds = {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"}
    return [event for event in tab.events if event["method"] in kinds]


def fetched(tab: browser.Tab, file: Path) -> list[str]:
    """What was asked for besides the page itself and the data within it."""
    addresses = [
        event["params"]["request"]["url"] for event in tab.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert file.as_uri() in addresses
    return [url for url in addresses if url != file.as_uri() and not url.startswith("data:")]


@pytest.mark.parametrize("width", [390, 1200])
def test_the_report_opens_whole_and_alone(tab, report, width):
    shown(tab, report, width)
    assert value(tab, "document.images.length") == 16
    assert value(tab, BROKEN) == []
    assert fetched(tab, report) == []
    assert complaints(tab) == []
    content, window = value(tab, WIDTHS)
    assert content <= window == width


def test_the_browser_sees_what_would_be_wrong(tab, tmp_path):
    """A page with each of these faults, so that the test above is known to notice them."""
    file = tmp_path / "bad.html"
    fault = "<p style='width: 2000px'>wide</p><img alt='lost' src='lost.png'><script>console.error('x'); y</script>"
    file.write_text(f"<meta name='viewport' content='width=device-width'>{fault}", encoding="utf-8")
    shown(tab, file, 390)
    assert value(tab, BROKEN) == ["lost"]
    assert fetched(tab, file) == [(tmp_path / "lost.png").as_uri()]
    assert {"Runtime.exceptionThrown", "Runtime.consoleAPICalled"} <= {event["method"] for event in complaints(tab)}
    content, _ = value(tab, WIDTHS)
    assert content > 390


@pytest.mark.parametrize(("scheme", "paper"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(22, 22, 22)")])
def test_the_page_follows_the_reader_s_scheme(tab, report, scheme, paper):
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    shown(tab, report, 390)
    assert value(tab, "getComputedStyle(document.body).backgroundColor") == paper

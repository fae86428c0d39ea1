"""The report in a real Chromium: what a reader does, and what must not happen."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slotlab.masks.labels import masks_to_labels
from slotlab.pictures import palette
from slotlab.report.options import PageOptions
from slotlab.report.server import LiveReport, serve
from slotlab.report.write import write_report
from slotlab.runs import checkpoint
from slotlab.runs.loaded import load_run
from slotlab.scoring.metrics import shown
from tests.reporting import disc_store, make_run

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e '.[dev]'")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium here: apt-get install chromium chromium-driver"),
]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip
WAIT_SECONDS = 30
SUM = "const d = arguments[0].getContext('2d').getImageData(0, 0, arguments[0].width, arguments[0].height).data;"
HASH = SUM + "let h = 0; for (const v of d) h = (Math.imul(h, 31) + v) | 0; return h;"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs and their report."""
    folder = tmp_path_factory.mktemp("browser")
    store = disc_store(folder / "discs.zarr")
    runs = [make_run(folder / "one", store), make_run(folder / "two", store, "pixel")]
    write_report(runs, folder / "report.html", options=PageOptions(videos=2))
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER, env={**os.environ}))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, home: Path) -> Any:
    """The report, freshly opened and ready; whatever the console says afterwards fails the test."""
    for log in ("browser", "performance"):
        browser.get_log(log)
    show(browser, "light")
    browser.get((home / "report.html").as_uri())
    browser.execute_script("try { localStorage.clear(); } catch {}")
    ready = "return document.documentElement.dataset.ready !== undefined"
    WebDriverWait(browser, WAIT_SECONDS).until(lambda b: b.execute_script(ready))
    yield browser
    assert browser.get_log("browser") == []


def show(browser: Any, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def canvas(page: Any, kind: str = "run") -> Any:
    return page.find_element(By.CSS_SELECTOR, f'#card-0 canvas[data-panel="{kind}"]')


def pixels(page: Any, kind: str = "run") -> int:
    """A number that changes with the canvas."""
    found: int = page.execute_script(HASH, canvas(page, kind))
    return found


def choose(page: Any, group: str, value: str) -> None:
    page.execute_script("arguments[0].click()", page.find_element(By.CSS_SELECTOR, f'#{group} input[value="{value}"]'))


def until_changed(page: Any, before: int, kind: str = "run") -> int:
    WebDriverWait(page, WAIT_SECONDS).until(lambda _: pixels(page, kind) != before)
    return pixels(page, kind)


def test_nothing_is_loaded(page: Any) -> None:
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith("file:") for url in asked)
    assert all(url.startswith(("file:", "data:", "blob:", "chrome:")) for url in asked)  # chrome: its own first page


def test_the_numbers_are_those_of_eval(page: Any, home: Path) -> None:
    rows = page.find_elements(By.CSS_SELECTOR, "#table-summary tbody tr.run")
    for row, name in zip(rows, ("one", "two"), strict=True):
        expected = json.loads((home / name / "eval-validation.json").read_text())
        keys = list(shown("summary"))
        cells = row.find_elements(By.TAG_NAME, "td")[: len(keys)]
        assert [cell.text.split()[0] for cell in cells] == [f"{expected[key]:.3f}".replace("-", "−") for key in keys]
        assert [float(cell.get_attribute("data-value")) for cell in cells] == [expected[key] for key in keys]


def test_the_canvas_decides_as_the_evaluation_does(page: Any, home: Path) -> None:
    loaded = load_run(home / "one")
    split = loaded.store["validation"]
    name = page.find_element(By.CSS_SELECTOR, "#card-0 h3").text
    video = next(v for v, row in split.manifest.items() if row.id == name)
    masks = loaded.segment(split, video).masks_on_grid
    expected = masks_to_labels(masks, split.spec.frame_size).numpy()
    for t in range(len(expected)):
        found = page.execute_script(f"return Array.from(cards[0].runs[0].decide({t}).labels)")
        assert (np.array(found).reshape(expected[t].shape) == expected[t]).mean() > 0.999


def test_pixels_of_unknown_truth_are_striped(page: Any) -> None:
    page.execute_script("cards[0].ignored = new Uint8Array(cards[0].truth.length); cards[0].ignored.fill(1, 0, 512)")
    both = "return [cards[0].frames[0].data, cards[0].picture('truth', null).data].map((d) => Array.from(d))"
    frame, shown = (np.array(pixels).reshape(32, 32, 4)[..., :3] for pixels in page.execute_script(both))
    y, x = np.indices((32, 32))
    stripes = np.array([palette.rgb(colour) for colour in palette.IGNORED])[(x + y) // palette.STRIPE % 2]
    expected = np.clip(stripes * (0.45 + 0.75 * frame.mean(-1, keepdims=True) / 255), 0, 255)
    assert np.abs(shown - expected)[:16].max() <= 1 < np.abs(shown - expected)[16:].max()


def test_the_slider_moves_the_frames_by_keyboard(page: Any) -> None:
    slider = page.find_element(By.CSS_SELECTOR, "#card-0 .slider")
    frame, slots, truth = (pixels(page, kind) for kind in ("frame", "run", "truth"))
    slider.send_keys(Keys.ARROW_RIGHT)
    until_changed(page, frame, "frame")
    assert pixels(page) != slots and pixels(page, "truth") != truth
    assert page.find_element(By.CSS_SELECTOR, "#card-0 .frame-number").text.startswith("2 /")
    assert slider.get_attribute("aria-valuetext").startswith("frame 2 of")
    slider.send_keys(Keys.ARROW_LEFT)
    WebDriverWait(page, WAIT_SECONDS).until(lambda _: pixels(page) == slots)


def test_every_toggle_changes_the_pixels(page: Any) -> None:
    seen = {"slots": pixels(page)}
    for view in ("frame", "truth", "single", "confidence"):
        choose(page, "views", view)
        seen[view] = pixels(page)
    assert len(set(seen.values())) == 5
    assert seen["frame"] == pixels(page, "frame") and seen["truth"] == pixels(page, "truth")
    choose(page, "views", "slots")
    assert pixels(page) == seen["slots"]
    page.execute_script("arguments[0].click()", page.find_element(By.ID, "boundaries"))
    assert pixels(page) != seen["slots"]
    page.execute_script("arguments[0].click()", page.find_element(By.ID, "boundaries"))
    choose(page, "colours", "slot")
    assert pixels(page) != seen["slots"]


def test_slots_are_shown_one_by_one(page: Any) -> None:
    seen = set()
    for chip in page.find_elements(By.CSS_SELECTOR, '#card-0 .chip input[data-run="0"]'):
        page.execute_script("arguments[0].click()", chip)
        seen.add(pixels(page))
    assert len(seen) == 5
    assert page.find_element(By.CSS_SELECTOR, '#views input[value="single"]').is_selected()


def test_keys_work_without_a_mouse(page: Any) -> None:
    body, before = page.find_element(By.TAG_NAME, "body"), pixels(page)
    body.send_keys("5" if page.find_elements(By.CSS_SELECTOR, '#views input[value="truth"]') else "4")
    assert page.find_element(By.CSS_SELECTOR, '#views input[value="confidence"]').is_selected()
    body.send_keys("3")
    assert pixels(page) == before
    body.send_keys("b")
    assert page.find_element(By.ID, "boundaries").is_selected()

    page.find_element(By.TAG_NAME, "h1").click()
    reached: list[str] = []
    for _ in range(60):
        page.switch_to.active_element.send_keys(Keys.TAB)
        active = page.switch_to.active_element
        reached.append(
            active.get_attribute("id") or active.get_attribute("class") or active.get_attribute("name") or ""
        )
        outlined = "return getComputedStyle(arguments[0]).outlineStyle"
        if "slider" in reached[-1]:
            assert page.execute_script(outlined, active) != "none"
            break
    assert {"view", "boundaries", "play", "slider"} <= set(reached), reached


def test_it_plays(page: Any) -> None:
    before = pixels(page, "frame")
    play = page.find_element(By.CSS_SELECTOR, "#card-0 .play")
    play.send_keys(Keys.SPACE)
    until_changed(page, before, "frame")
    play.send_keys(Keys.SPACE)
    assert play.get_attribute("aria-pressed") == "false"


def test_light_and_dark(page: Any) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = page.execute_script(ground)
    show(page, "dark")
    dark = page.execute_script(ground)
    assert light != dark
    page.find_element(By.ID, "theme").click()
    assert page.execute_script(ground) == light


def test_charts_tell_their_values(page: Any) -> None:
    chart = page.find_element(By.CSS_SELECTOR, "#chart-train-loss svg")
    page.execute_script("arguments[0].focus()", chart)
    chart.send_keys(Keys.ARROW_RIGHT)
    assert "step 1" in page.find_element(By.ID, "tip").text
    chart.send_keys(Keys.ARROW_RIGHT)
    assert "step 2" in page.find_element(By.ID, "tip").text


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_it_fits_every_width(page: Any, width: int) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_everything_has_a_name(page: Any) -> None:
    """Controls and pictures say what they are to those who cannot see them."""
    nameless = page.execute_script("""
        const named = (e) => e.getAttribute("aria-label") || e.labels?.[0]?.textContent.trim() || e.textContent.trim();
        return [...document.querySelectorAll("button, input, canvas, svg[role=img], a, summary")]
          .filter((e) => !named(e)).map((e) => e.outerHTML.slice(0, 120));
    """)
    assert nameless == []


def test_a_served_page_follows_its_run_and_keeps_the_readers_place(browser: Any, home: Path) -> None:
    live = LiveReport([home / "one"], options=PageOptions(videos=2))
    live.refresh()

    def eventually(script: str) -> None:
        WebDriverWait(browser, WAIT_SECONDS).until(lambda b: b.execute_script(f"return {script}"))

    with serve(live, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.get_log("browser")
        browser.get(f"http://127.0.0.1:{server.server_port}/")
        eventually("document.documentElement.dataset.ready !== undefined")
        eventually("document.getElementById('live').textContent === 'finished'")

        with (home / "one" / "metrics.jsonl").open("a") as log:
            log.write(json.dumps({"step": 7, "loss": 0.5}) + "\n")
        eventually("document.querySelector('#chart-train-loss svg').dataset.chart.includes(',7.0,0.5]')")

        browser.execute_script("window.before = true; setMode('confidence'); cards[0].seek(2);")
        state = checkpoint.folder(home / "one") / "state.json"
        os.utime(state, (time.time() + 5, time.time() + 5))
        live.refresh()
        eventually("window.before === undefined && document.documentElement.dataset.ready !== undefined")
        place = browser.execute_script("return [view.mode, cards[0].t, cards[0].slider.value]")
        assert place == ["confidence", 2, "2"]
        assert browser.get_log("browser") == []

        server.shutdown()
    eventually("document.getElementById('live').classList.contains('lost')")

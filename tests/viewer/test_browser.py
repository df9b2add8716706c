"""The page in a headless Chromium: what is drawn, what a click changes, what is asked for, and what goes wrong."""

import io
import re
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from braindino.viewer.neighbours import read_tables
from braindino.viewer.scans import ScanShelf, given_source, prepared_sources
from braindino.viewer.server import TOKEN_HEADER
from braindino.viewer.session import Session
from braindino.viewer.token_planes import LoadedEncoder
from tests.viewer.conftest import MARK_INTENSITY
from tests.viewer.test_view import extract, prepare

SECONDS = 60
AXIAL_SHARE = 0.66
DARK_RED = np.array([103, 0, 31])


class Viewer:
    """The open page."""

    def __init__(self, watched, client) -> None:
        self.watched, self.page, self.client = watched, watched.page, client

    def text(self, name: str) -> str:
        return self.page.inner_text(f"#{name}")

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"{what}; state {self.state()}, errors {self.watched.errors}"
            self.page.wait_for_timeout(20)

    def state(self) -> str:
        return self.page.evaluate("document.body.dataset.state")

    def wait_for_map(self) -> None:
        self.wait(lambda: self.state() == "ready" and self.text("map-time") != "–", "no map came")

    def pixels(self) -> np.ndarray:
        """(height, width, 3) int of the canvas."""
        return np.asarray(Image.open(io.BytesIO(self.page.locator("#canvas").screenshot())).convert("RGB")).astype(int)

    def axial(self) -> np.ndarray:
        pixels = self.pixels()
        return pixels[:, : int(AXIAL_SHARE * pixels.shape[1])]

    def click(self, x: float, y: float) -> None:
        """A click into the canvas, and what it asks for."""
        with self.page.expect_response(lambda response: response.url.endswith("/api/similarity")):
            self.page.locator("#canvas").click(position={"x": x, "y": y})
        self.wait(lambda: self.state() == "ready", "the click is not answered")

    def voxel(self) -> list[int]:
        return [int(word) for word in self.text("at-voxel").split(", ")]


@pytest.fixture
def view(serve, chromium_page) -> Callable[[Session], Viewer]:
    ports: list[str] = []

    def start(session: Session) -> Viewer:
        client = serve(session)
        ports.append(str(client.server.server_port))
        chromium_page.page.goto(client.server.url)
        return Viewer(chromium_page, client)

    yield start
    ours = rf"(blob:)?http://127\.0\.0\.1:({'|'.join(ports)})/|data:"
    assert not [address for address in chromium_page.requests if not re.match(ours, address)], "asked somebody else"


@pytest.fixture
def shown(view, phantom_session) -> Viewer:
    viewer = view(phantom_session)
    viewer.wait_for_map()
    return viewer


def test_the_scan_and_a_first_map_are_shown(shown) -> None:
    render = shown.page.locator("#toggle-render")
    render.click()  # chosen by hand, it stays as chosen however slow this machine draws
    if render.get_attribute("aria-pressed") == "false":  # it was on before
        render.click()
    assert render.get_attribute("aria-pressed") == "true"
    pixels = shown.pixels()
    assert pixels.shape == (716, 940, 3)
    spread = pixels.max(axis=2) - pixels.min(axis=2)
    assert (pixels.max(axis=2) > 60).mean() > 0.1, "the canvas is not blank"
    assert (spread[:, :620] > 40).mean() > 0.05, "the map has colours"
    for top, bottom in ((0, 230), (240, 470), (480, 716)):
        assert (pixels[top:bottom, 640:].max(axis=2) > 60).mean() > 0.03, "each of the other planes and the rendering"
    assert shown.text("title").startswith("scan")
    assert "44 × 60 × 26" in shown.text("facts") and "2 × 1.5 × 3 mm" in shown.text("facts")
    assert re.fullmatch(r"slice \d+ of 256", shown.text("map-slice"))
    assert shown.text("at-similarity").startswith("1.000")
    assert shown.text("legend").split("\n") == ["2: 0.32 ml", "7: 1.8 ml"]
    assert not shown.watched.errors


def test_the_token_does_not_stay_in_the_address(shown) -> None:
    assert shown.page.url == f"http://127.0.0.1:{shown.client.server.server_port}/"
    shown.page.reload()
    shown.wait_for_map()
    assert not shown.watched.errors


def test_a_click_on_the_mark_is_a_click_on_its_voxel(shown, phantom) -> None:
    x, y, z = phantom.voxel
    page = shown.page
    page.locator("#on-similarity").uncheck()
    page.locator("#on-segmentation").uncheck()
    page.locator("#layer").fill(str(z))
    shown.wait(lambda: shown.voxel()[2] == z and shown.state() == "ready", "the slice was not chosen")
    axial = shown.axial()
    # Grey and white; the crosshair is yellow. The mark is the largest white thing.
    white = axial.min(axis=2) > 225
    rows, columns = np.nonzero(white)
    assert len(rows) > 500
    middle = float(np.median(columns)), float(np.median(rows))
    shown.click(*middle)
    assert shown.voxel() == [x, y, z]
    assert shown.text("at-intensity") == str(MARK_INTENSITY)
    expected = np.array([-2.0, 1.5, 3.0]) * (17, 37, 14) + (131, -22, 47)
    assert shown.text("at-mm") == ", ".join(f"{value:.1f}" for value in expected)
    assert shown.text("at-label") == "2"
    assert shown.text("at-similarity").startswith("1.000")
    assert re.match(rf"voxel {x}, {y}, {z} · patch \d+, \d+ of 16 × 16", shown.text("reference").replace("\n", " "))
    # The map lies under the crosshair: with each patch in one colour, all around the point is dark red.
    page.locator("#draw-patches").click()
    page.locator("#on-similarity").check()
    page.locator("#opacity-similarity").fill("100")
    shown.wait(lambda: shown.state() == "ready" and "drawn" not in shown.text("at-similarity"), "patches are not drawn")
    assert shown.text("at-similarity") == "1.000"
    around = shown.axial()[int(middle[1]) - 4 : int(middle[1]) + 5, int(middle[0]) - 4 : int(middle[0]) + 5]
    assert (np.abs(around - DARK_RED).max(axis=2) < 40).any()
    assert not shown.watched.errors


def test_a_click_elsewhere_changes_the_map_and_the_numbers(shown) -> None:
    pixels, reference, span = shown.axial(), shown.text("reference"), shown.text("map-range")
    rows, columns = np.nonzero((pixels.max(axis=2) > 60) & (pixels.max(axis=2) - pixels.min(axis=2) > 5))
    shown.click(float(np.percentile(columns, 15)), float(np.percentile(rows, 60)))
    assert shown.text("reference") != reference
    assert shown.text("map-range") != span
    assert (np.abs(shown.axial() - pixels).max(axis=2) > 30).mean() > 0.05
    assert re.match(r"\d\.\d\d s: encoder 0\.00, map 0\.\d\d, drawing \d\.\d\d", shown.text("map-time"))
    assert not shown.watched.errors


def test_scrolling_keeps_the_reference_and_maps_another_slice(shown) -> None:
    reference = shown.text("reference").split("·")[0]
    before = shown.voxel()
    shown.page.keyboard.press("ArrowUp")
    shown.wait(lambda: shown.voxel()[2] == before[2] + 1, "the key did nothing")
    shown.wait(lambda: "reference on" in shown.text("map-slice"), "no map of the other slice")
    assert shown.text("reference").split("·")[0] == reference
    shown.page.locator("#canvas").hover(position={"x": 300, "y": 350})
    shown.page.mouse.wheel(0, 100)
    shown.wait(lambda: shown.voxel()[2] != before[2] + 1, "the wheel did nothing")
    shown.wait_for_map()
    shown.page.keyboard.press("Enter")
    shown.wait(lambda: "reference on" not in shown.text("map-slice"), "the reference was not moved")
    assert shown.text("reference").split("·")[0] != reference
    assert not shown.watched.errors


def test_outside_the_brain_nothing_is_shown_and_that_is_said(shown) -> None:
    shown.page.locator("#layer").fill("0")
    shown.wait(lambda: shown.page.locator("#outside").is_visible(), "nothing is said")
    assert "box around the brain" in shown.text("outside")
    assert shown.text("at-similarity") == "–"
    shown.page.locator("#layer").fill("13")
    shown.wait(lambda: not shown.page.locator("#outside").is_visible(), "it is still said")
    assert not shown.watched.errors


def test_blocks_and_encoders_are_chosen(view, phantom, tiny_encoder) -> None:
    other = LoadedEncoder("encoder-1", "another", tiny_encoder.encoder)
    source = given_source(phantom.scan, mask=phantom.mask, segmentation=None)
    viewer = view(Session(ScanShelf([source]), [tiny_encoder, other], {}))
    viewer.wait_for_map()
    page = viewer.page
    blocks = page.locator("#blocks button")
    assert blocks.count() == 4
    assert blocks.nth(3).get_attribute("aria-checked") == "true", "the last block first"
    maps = [viewer.axial()]
    with page.expect_request(lambda request: '"block":0' in (request.post_data or "")):
        blocks.nth(0).click()
    viewer.wait_for_map()
    maps.append(viewer.axial())
    with page.expect_request(lambda request: '"block":2' in (request.post_data or "")):
        page.keyboard.press("2")
    viewer.wait_for_map()
    maps.append(viewer.axial())
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (np.abs(maps[first] - maps[second]).max(axis=2) > 5).mean() > 0.05, "each block has a map of its own"
    assert blocks.nth(2).get_attribute("aria-checked") == "true"
    with page.expect_request(lambda request: '"encoder":"encoder-1"' in (request.post_data or "")):
        page.select_option("#encoder", label="another")
    viewer.wait_for_map()
    with page.expect_request(lambda request: '"encoder":"encoder-0"' in (request.post_data or "")):
        page.keyboard.press("Escape")
        page.locator("#canvas").focus()
        page.keyboard.press("e")
    viewer.wait_for_map()
    # The mask is an outline in its own colour.
    green = (np.abs(viewer.axial() - np.array([53, 194, 154])).max(axis=2) < 40).sum()
    page.locator("#on-mask").check()
    page.locator("#opacity-mask").fill("100")
    assert (np.abs(viewer.axial() - np.array([53, 194, 154])).max(axis=2) < 40).sum() > green + 200
    assert not viewer.watched.errors


def test_nearest_slices_are_listed_and_opened(view, tiny_encoder, tmp_path) -> None:
    scans = prepare(tmp_path / "prepared", subjects=3)
    extract(tmp_path / "features", tmp_path / "prepared", scans, tiny_encoder)
    tables = read_tables([tmp_path / "features"], [tiny_encoder])
    viewer = view(Session(ScanShelf(prepared_sources(tmp_path / "prepared")), [tiny_encoder], tables))
    page = viewer.page
    viewer.wait(lambda: viewer.state() == "choosing", "no list of scans")
    assert "Choose a scan" in viewer.text("cover-text")
    assert page.locator("#scan-list button").count() == 3
    page.fill("#filter", "SUB-1 t1")
    assert page.locator("#scan-list button").count() == 1
    page.locator("#scan-list button").click()
    viewer.wait_for_map()
    assert viewer.text("title").startswith("sub-1")
    assert page.locator("#on-mask").count() == 1, "the prepared mask is offered"
    page.locator("#find-near").click()
    viewer.wait(lambda: page.locator("#near-list img").count() == 2, "no thumbnails")
    names = [name.split("\n") for name in page.locator("#near-list button").all_inner_texts()]
    assert sorted(name[1] for name in names) == ["sub-0", "sub-2"]
    assert float(names[0][0].replace("−", "-")) >= float(names[1][0].replace("−", "-"))
    assert page.evaluate("[...document.querySelectorAll('#near-list img')].every((each) => each.naturalWidth > 20)")
    page.locator("#near-list button").first.click()
    viewer.wait(lambda: viewer.text("title").startswith(names[0][1]), "the neighbour was not opened")
    viewer.wait_for_map()
    assert not viewer.watched.errors


def test_an_error_of_the_server_is_shown_with_the_next_step(view, tiny_encoder, tmp_path) -> None:
    prepare(tmp_path, subjects=2)
    viewer = view(Session(ScanShelf(prepared_sources(tmp_path)), [tiny_encoder], {}))
    viewer.wait(lambda: viewer.state() == "choosing", "no list of scans")
    (tmp_path / "raw" / "s1" / "scan.nii.gz").write_text("no longer a scan")
    viewer.page.locator("#scan-list button").nth(1).click()
    viewer.wait(lambda: viewer.page.locator("#error").is_visible(), "nothing is told")
    assert "not a NIfTI file but text" in viewer.text("error-what")
    assert "Traceback" not in viewer.text("error")
    # The next scan opens all the same, and the message is gone.
    viewer.page.locator("#scan-list button").nth(0).click()
    viewer.wait_for_map()
    assert not viewer.page.locator("#error").is_visible()
    # The browser itself reports the status.
    assert viewer.watched.errors and all("422" in error for error in viewer.watched.errors)


def test_without_the_token_the_page_says_where_to_find_it(serve, phantom_session, chromium_page) -> None:
    client = serve(phantom_session)
    chromium_page.page.goto(f"http://127.0.0.1:{client.server.server_port}/")
    chromium_page.page.wait_for_selector("#error:visible")
    assert "token" in chromium_page.page.inner_text("#error-what")
    assert "behind the #" in chromium_page.page.inner_text("#error-next")


def test_another_page_of_the_same_browser_gets_nothing(serve, phantom_session, chromium_page) -> None:
    """A page of another origin cannot read an answer, not even with the token, nor show the viewer in a frame."""
    client = serve(phantom_session)
    other = serve(phantom_session)
    page = chromium_page.page
    page.goto(f"http://localhost:{other.server.server_port}/niivue-license.txt")
    target = f"http://127.0.0.1:{client.server.server_port}"
    answer = page.evaluate(
        """async ([address, header, token]) => {
            const tries = [{}, { headers: { [header]: token } }, { mode: "no-cors" }];
            return Promise.all(tries.map((options) => fetch(address, options).then((r) => r.text(), () => "refused")));
        }""",
        [f"{target}/api/scene", TOKEN_HEADER, client.server.token],
    )
    assert answer == ["refused"] * 3


def test_clicks_that_come_faster_than_the_encoder_end_with_the_last(view, phantom, tiny_encoder) -> None:
    source = given_source(phantom.scan, mask=None, segmentation=None)
    session = Session(ScanShelf([source]), [tiny_encoder], {})
    viewer = view(session)
    viewer.wait_for_map()
    gate, asked = threading.Event(), []
    similarity = session.planes.similarity

    def slow(*args, **kwargs):
        asked.append(kwargs["voxel"])
        gate.wait(SECONDS)
        return similarity(*args, **kwargs)

    session.planes.similarity = slow
    for x in (250, 280, 310, 340):
        viewer.page.locator("#canvas").click(position={"x": x, "y": 350})
    last = viewer.voxel()
    viewer.wait(lambda: viewer.page.locator("#working").is_visible(), "nobody says that it works")
    assert "looking" in viewer.text("working")
    gate.set()
    viewer.wait(
        lambda: viewer.state() == "ready" and viewer.text("reference").startswith(f"voxel {last[0]}, "), "the last"
    )
    assert len(asked) == 2, "the first and the last"
    assert asked[-1] == last
    assert not viewer.watched.errors


def test_a_picture_is_saved_with_its_scale_and_its_words(shown) -> None:
    with shown.page.expect_download() as download:
        shown.page.locator("#save-picture").click()
    assert download.value.suggested_filename == "scan.png"
    picture = np.asarray(Image.open(download.value.path()).convert("RGB")).astype(int)
    canvas = shown.pixels()
    assert picture.shape[0] == canvas.shape[0] + 78 and picture.shape[1] == canvas.shape[1]
    assert np.abs(picture[: canvas.shape[0]] - canvas).mean() < 2
    strip = picture[canvas.shape[0] :]
    assert (np.abs(strip - DARK_RED).max(axis=2) < 12).any() and (np.abs(strip - [5, 48, 97]).max(axis=2) < 12).any()
    assert (strip[:, :400].min(axis=2) > 180).sum() > 200, "words"


def test_without_an_encoder_the_scan_is_shown_alone(view, phantom) -> None:
    viewer = view(Session(ScanShelf([given_source(phantom.scan, mask=phantom.mask, segmentation=None)]), [], {}))
    viewer.wait(lambda: viewer.state() == "ready", "no scan")
    assert "No encoder was given" in viewer.text("map-section")
    assert viewer.page.locator("#on-similarity").count() == 0
    pixels = viewer.axial()
    assert (pixels.max(axis=2) > 60).mean() > 0.1
    viewer.page.keyboard.press("ArrowDown")
    viewer.page.keyboard.press("r")
    viewer.page.keyboard.press("?")
    assert viewer.page.locator("#keys").is_visible()
    assert not viewer.watched.errors


def test_a_rendering_that_takes_too_long_is_turned_off_and_can_be_turned_on(shown) -> None:
    page = shown.page
    # A machine that draws slowly: half a second passes whenever somebody looks at the clock.
    page.evaluate(
        "{ const now = performance.now.bind(performance); let x = 0; performance.now = () => now() + (x += 500); }"
    )
    page.locator("#draw-patches").click()
    shown.wait_for_map()
    page.locator("#draw-smooth").click()
    shown.wait_for_map()
    shown.wait(lambda: page.locator("#toggle-render").get_attribute("aria-pressed") == "false", "it is still on")
    assert "without a graphics card" in shown.text("render-note")
    page.keyboard.press("r")
    assert page.locator("#toggle-render").get_attribute("aria-pressed") == "true"
    assert not page.locator("#render-note").is_visible()
    page.locator("#draw-patches").click()
    shown.wait_for_map()
    assert page.locator("#toggle-render").get_attribute("aria-pressed") == "true", "chosen by hand"
    assert not shown.watched.errors

"""The report in a real browser, opened from the disk: it fits, it links, it loads nothing from elsewhere."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

MAX_SIZE = 8 * 2**20


@pytest.fixture(scope="module")
def report(full_project: Path) -> Path:
    return full_project / "report"


def pages_of(report: Path) -> list[Path]:
    return sorted(report.rglob("*.html"))


def path_of(address: str) -> Path:
    return Path(unquote(urlsplit(address).path))


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_is_wider_than_the_window_in_light_and_dark(report, chromium_page, width, scheme):
    page = chromium_page.page
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    grounds = set()
    for path in pages_of(report):
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), path.name
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds == {"rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 24, 29)"}
    assert chromium_page.errors == []


def test_letters_stand_out_from_their_ground_in_light_and_dark(report, chromium_page):
    page = chromium_page.page
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.goto((report / "index.html").as_uri())
        ground, *inks = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor,"
            " ...['body', 'td a', 'figcaption', 'nav a', 'figure svg text'].map(each => {"
            " const style = getComputedStyle(document.querySelector(each));"
            " return each.includes('svg') ? style.fill : style.color; })]"
        )
        for ink in inks:
            assert contrast(ink, ground) >= 4.5, f"{scheme}: {ink} on {ground}"


def contrast(first: str, second: str) -> float:
    """The ratio of WCAG 2."""

    def luminance(text: str) -> float:
        shares = [int(part) / 255 for part in text.partition("(")[2].rstrip(")").split(",")[:3]]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_every_link_leads_to_a_file_below_the_folder_and_to_a_place_on_the_page(report, chromium_page):
    page = chromium_page.page
    places, links = {}, {}
    for path in pages_of(report):
        page.goto(path.as_uri())
        places[path] = set(page.evaluate("[...document.querySelectorAll('[id]')].map(each => each.id)"))
        links[path] = page.evaluate("[...document.querySelectorAll('a')].map(each => each.href)")
    assert sum(map(len, links.values())) > 60
    for path, addresses in links.items():
        for address in addresses:
            assert address.startswith("file://"), address
            target = path_of(address)
            assert target.is_file() and target.is_relative_to(report.parent), f"{path.name}: {address}"
            fragment = unquote(urlsplit(address).fragment)
            assert not fragment or fragment in places[target], f"{path.name}: {address}"


def test_all_pictures_can_be_seen_and_drawings_have_a_size(report, chromium_page):
    page = chromium_page.page
    count = 0
    for path in pages_of(report):
        page.goto(path.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
        sizes = page.evaluate(
            "(async () => { const all = [...document.images]; await Promise.all(all.map(each => each.decode()));"
            " return all.map(each => each.naturalWidth); })()"
        )
        drawn = page.evaluate(
            "[...document.querySelectorAll('figure svg')].map(each => each.getBoundingClientRect().width)"
        )
        assert all(size > 0 for size in (*sizes, *drawn)), path.name
        assert all(page.evaluate("[...document.images].map(each => each.alt)")), path.name
        count += len(sizes) + len(drawn)
    assert count > 20


def test_nothing_is_asked_for_but_the_files_of_the_folder_and_the_console_is_silent(report, chromium_page):
    page = chromium_page.page
    for path in pages_of(report):
        page.goto(path.as_uri())
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.scripts.length") == 0
    asked = [address for address in chromium_page.requests if not address.startswith("data:image/png")]
    assert asked == [path.as_uri() for path in pages_of(report)]
    assert chromium_page.errors == []


def test_a_click_on_an_estimate_arrives_at_its_cases_and_from_there_at_a_scan(report, chromium_page):
    page = chromium_page.page
    page.goto((report / "index.html").as_uri())
    page.get_by_role("link", name="0.850 [0.750, 0.950]").click()
    page.wait_for_url("**/cases/adni-ours.html#labels-1")
    heading = page.locator("#labels-1 h2")
    assert heading.inner_text() == "100% of the labels"
    assert 0 <= heading.bounding_box()["y"] < 800, "the browser has scrolled to it"
    worst = page.locator("#labels-1 tbody tr").first
    # AD was given 1 - 12/13 in the last subject, an odd one.
    assert "c/sub-11" in worst.inner_text() and "0.077" in worst.inner_text()
    worst.get_by_role("link").click()
    page.wait_for_url("**/scans.html#scan-*")
    row = page.locator(f"tr:has([id='{page.url.partition('#')[2]}'])")
    assert "sub-11" in row.inner_text()
    page.get_by_role("link", name="← report").click()
    page.wait_for_url("**/report/index.html")


def test_a_click_on_a_dice_arrives_at_the_cases_with_their_outlines(report, chromium_page):
    page = chromium_page.page
    page.goto((report / "index.html").as_uri())
    page.get_by_role("link", name="0.650 ± 0.210").click()
    page.wait_for_url("**/cases/segmentation-ours.html")
    worst = page.locator("#cases tbody tr").first
    assert worst.inner_text().split()[:4] == ["1", "sub-01_ses-1", "sub-01_ses-1", "0.500"]
    worst.get_by_role("link", name="outlines").click()
    picture = page.locator("[id='outline-sub-01_ses-1'] img")
    assert picture.evaluate("each => each.naturalWidth") == 900
    assert picture.bounding_box()["y"] < 800


def test_names_with_markup_are_shown_as_they_are(report, chromium_page):
    page = chromium_page.page
    page.goto((report / "index.html").as_uri())
    assert page.locator("b", has_text="bold").count() == 0
    assert page.get_by_text("<b>bold<-b>").count() > 0


def test_paper_figures_of_every_kind_stand_on_the_page_with_their_files(report):
    names = {path.stem for path in (report / "figures").glob("*.pdf")}
    assert names == {"ratios", "strata", "knn", "os_cox-survival", "adni-calibration", "robustness", "cka"}
    for name in names:
        assert all((report / "figures" / f"{name}.{ending}").is_file() for ending in ("svg", "png", "tsv"))
    assert sum(path.stat().st_size for path in report.rglob("*") if path.is_file()) < MAX_SIZE

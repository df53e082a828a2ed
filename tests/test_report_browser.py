"""The report in a real browser: it loads nothing, sorts, and can be read on a phone, in the dark and on paper."""

import pytest

from pages import HOSTILE, complaints, contrast, load, requests
from results import HEAD, noise_result, probe_result
from whisper_at_cli.probe.report.page import Source, render_report


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    probes = [Source("a.zarr", probe_result()), Source("b.zarr", probe_result(backbone="base"))]
    path.write_text(render_report(probes, [Source("n.json", noise_result())], [Source("h.json", HEAD)]), "utf-8")
    return path


def names(browser):
    return [row.text for row in browser.find_elements("css selector", "table.classes:first-of-type tbody th")][:3]


def test_it_loads_nothing_but_itself(browser, report):
    load(browser, report)
    assert requests(browser) == [report.as_uri()] and complaints(browser) == []
    assert len(browser.find_elements("css selector", "svg.chart")) == 6


def test_a_heading_sorts_and_a_second_click_turns_the_order_over(browser, report):
    load(browser, report)
    headings = browser.find_elements("css selector", "table.classes thead button")
    headings[3].click()  # layer 3: dog 0.7, rain 0.2, sea waves undefined
    assert names(browser) == ["dog", "rain", "sea waves"]
    headings[3].click()
    assert names(browser) == ["rain", "dog", "sea waves"]  # what is undefined stays last
    headings[0].click()
    assert names(browser) == ["dog", "rain", "sea waves"]
    headings[0].click()
    assert names(browser) == ["sea waves", "rain", "dog"]
    assert browser.find_element("css selector", "th[aria-sort]").get_attribute("aria-sort") == "descending"


@pytest.mark.parametrize("width", [380, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_it_is_readable_on_a_phone_and_in_the_dark(browser, report, width, dark):
    load(browser, report, width=width, height=800, dark=dark)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    for selector in ("h1", ".soft", ".note", "td", "figcaption", "dt", "dd", "summary"):
        assert contrast(browser, selector) >= 4.5, selector
    tick = browser.execute_script("return document.querySelector('.tick').getBoundingClientRect().height")
    assert tick >= 9  # pixels; the drawing shrinks with the screen
    for selector in (".classes .h20", ".confusion .h20"):
        assert contrast(browser, selector) >= 4.5, selector


def test_it_prints_with_its_folded_numbers_and_its_shades(browser, report):
    load(browser, report)
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert browser.execute_script("return document.querySelectorAll('details:not([open])').length") == 0
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert browser.execute_script("return document.querySelectorAll('details[open]').length") == 0
    heat = "return getComputedStyle(document.querySelector('.heat')).printColorAdjust"
    assert browser.execute_script(heat) == "exact"
    assert len(browser.execute_cdp_cmd("Page.printToPDF", {})["data"]) > 10000


def test_hostile_names_are_shown_and_not_run(browser, tmp_path):
    result = probe_result(backbone=HOSTILE)
    for row in result["layers"]:
        row["class_f1"] = {HOSTILE: 0.5, "rain": 0.4}
    path = tmp_path / "hostile.html"
    path.write_text(render_report([Source(HOSTILE, result)], title=HOSTILE), "utf-8")
    load(browser, path)
    assert browser.execute_script("return typeof hacked") == "undefined"
    assert not browser.find_elements("css selector", "img")
    assert browser.execute_script("return document.querySelector('h1').textContent") == HOSTILE

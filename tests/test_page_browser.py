"""The page of a transcription in a real browser: it loads nothing, and does what its help says."""

import numpy as np
import pytest

from conftest import write_wav
from pages import HOSTILE, complaints, contrast, load, requests, wait_for
from whisper_at_cli.heads.tagging.captions import write_captions
from whisper_at_cli.heads.tagging.cues import plan_cues
from whisper_at_cli.heads.tagging.page import render_page, write_page

CLASSES = ["dog", "rain", "sea_waves"]
TIME = "(1000 * document.getElementById('audio').currentTime)"


def made_result():
    """Ten segments of 4 s with four words each; rain throughout, dogs from 12 to 16 s; windows of 2 s."""
    segments = []
    for i in range(10):
        text = [f" word{i}{k}" for k in range(4)]
        words = [
            {"word": w, "start": 4 * i + k, "end": 4 * i + k + 0.9, "probability": 0.9} for k, w in enumerate(text)
        ]
        segments.append({"id": i, "start": 4.0 * i, "end": 4 * i + 3.9, "text": "".join(text), "words": words})
    tags = [
        {"start": 2.0 * i, "end": 2.0 * i + 2, "labels": [
            {"name": "rain", "probability": 0.3 + i / 50, "logit": 0.0},
            *([{"name": "dog", "probability": 0.9, "logit": 2.0}] if i in (6, 7) else [])]}
        for i in range(20)
    ]  # fmt: skip
    events = [
        {"start": 12.0, "end": 16.0, "label": "dog", "probability": 0.9},
        {"start": 30.0, "end": 32.0, "label": "sea_waves", "probability": 0.7},
    ]
    return {
        "audio": "made.wav", "model": "tiny.en", "language": "en", "duration": 40.0, "segments": segments,
        "text": "".join(s["text"] for s in segments), "tags": tags, "events": events,
        "head": {"head": "tl-tr", "backbone": "tiny.en", "class_names": CLASSES}, "settings": {},
    }  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    tone = 0.1 * np.sin(np.arange(40 * 8000) * 0.3)
    return write_page(made_result(), folder / "made.html", write_wav(folder / "made.wav", tone, 8000))


@pytest.fixture
def opened(browser, page):
    load(browser, page)
    wait_for(browser, "audio.readyState >= 1")
    return browser


def press(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    chain = ActionChains(browser)
    for key in keys:
        chain.send_keys(key)
    chain.perform()


def click(browser, selector, nth=0):
    browser.find_elements("css selector", selector)[nth].click()


def click_timeline(browser, row, time):
    """A click of the pointer where a class is at a time (ms), or on its name (None)."""
    from selenium.webdriver.common.action_chains import ActionChains

    canvas = browser.find_element("id", "canvas")
    width, edge = browser.execute_script(
        "const w = scroller.clientWidth; return [w, Math.round(Math.min(Math.max(w * .28, 84), 190))]"
    )
    x = 20 if time is None else edge + (width - edge) * time / 40000
    y = 22 + 20 * row + 10
    at = (x - canvas.size["width"] / 2, y - canvas.size["height"] / 2)
    ActionChains(browser).move_to_element_with_offset(canvas, round(at[0]), round(at[1])).click().perform()


def time_is(browser, ms, slack=60):
    wait_for(browser, f"Math.abs({TIME} - {ms}) <= {slack}")


def test_it_loads_nothing_but_itself(opened, page):
    assert requests(opened) == [page.as_uri()]
    assert complaints(opened) == []
    assert opened.execute_script("return audio.error === null && audio.duration") == pytest.approx(40, abs=0.1)
    painted = opened.execute_script(
        """const {width, height} = canvas, d = canvas.getContext('2d').getImageData(0, 0, width, height).data;
        return new Set(Array.from({length: d.length / 4}, (_, i) => d[4*i] << 16 | d[4*i+1] << 8 | d[4*i+2])).size;"""
    )
    assert painted > 20


def test_a_click_on_a_word_a_segment_a_sound_or_a_tag_goes_there(opened):
    click(opened, ".w", 22)
    time_is(opened, 22000)
    assert opened.find_element("css selector", ".w.now").text == "word52"
    click(opened, ".time", 3)
    time_is(opened, 12000)
    click(opened, ".sound", 1)
    time_is(opened, 30000)
    assert opened.find_element("css selector", ".sound.now").text.startswith("sea waves")
    click_timeline(opened, 0, 15000)  # on the dogs, whose event begins at 12 s
    time_is(opened, 12000)
    click_timeline(opened, 2, 25000)  # rain has no event: the window's beginning
    time_is(opened, 24000)
    click_timeline(opened, 2, None)  # its name: where it is most probable
    time_is(opened, 38000)
    assert opened.find_element("css selector", ".segment.now").text.endswith("word90 word91 word92 word93")


def test_the_pointer_tells_class_probability_and_event(browser, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains

    overlapping = made_result()
    overlapping["tags"].append(
        {"start": 13.0, "end": 15.0, "labels": [{"name": "dog", "probability": 0.95, "logit": 3.0}]}
    )
    load(browser, write_page(overlapping, tmp_path / "overlapping.html"))
    click_timeline(browser, 0, 13500)  # in two windows: the more probable one is told
    assert browser.find_element("id", "pointed").text == "dog · 95 % at 0:13–0:15 · event 0:12–0:16, 90 %"
    click_timeline(browser, 2, 5000)
    assert browser.find_element("id", "pointed").text == "rain · 34 % at 0:04–0:06"
    ActionChains(browser).move_to_element(browser.find_element("css selector", "h1")).perform()
    assert browser.find_element("id", "pointed").text == ""


def test_the_keyboard_plays_pauses_and_moves(opened):
    from selenium.webdriver.common.keys import Keys

    press(opened, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    time_is(opened, 10000)
    press(opened, Keys.ARROW_LEFT)
    time_is(opened, 5000)
    press(opened, "j")
    time_is(opened, 8000)
    press(opened, Keys.ARROW_DOWN)
    time_is(opened, 12000)
    press(opened, "k")
    time_is(opened, 8000)
    press(opened, Keys.ARROW_UP)
    time_is(opened, 4000)
    press(opened, *"0123456789")
    time_is(opened, 4000)
    press(opened, " ")
    wait_for(opened, f"!audio.paused && {TIME} > 5100")
    assert opened.find_element("css selector", ".w.now").text in ("word11", "word12")
    press(opened, " ")
    wait_for(opened, "audio.paused")


def test_space_plays_after_a_click_on_a_button_and_types_in_the_filter(opened):
    click(opened, ".time", 2)
    press(opened, " ")
    wait_for(opened, "!audio.paused")
    press(opened, " ")
    wait_for(opened, "audio.paused")
    click(opened, "#filter")
    press(opened, " ")
    assert opened.execute_script("return audio.paused && filter.value") == " "


def test_a_question_mark_shows_the_help_and_escape_closes_it(opened):
    from selenium.webdriver.common.keys import Keys

    press(opened, "?")
    assert opened.execute_script("return help.open")
    press(opened, Keys.ESCAPE)
    assert not opened.execute_script("return help.open")


def test_the_filter_leaves_the_classes_that_were_asked_for(opened):
    click(opened, "#filter")
    press(opened, "sea w")
    assert opened.find_element("css selector", "summary").text == "1 of 3 classes"
    shown = [e.text for e in opened.find_elements("css selector", ".sound") if e.is_displayed()]
    assert [text.split(" 0:")[0] for text in shown] == ["sea waves"]
    opened.execute_script("filter.value = ''; filter.dispatchEvent(new Event('input'))")
    click(opened, "#events-only")
    assert opened.find_element("css selector", "summary").text == "2 of 3 classes"
    click(opened, "#events-only")
    click(opened, "summary")
    wait_for(opened, "document.querySelectorAll('.chips .button').length === 5")
    click(opened, ".chips .button", 2)
    assert opened.find_element("css selector", "summary").text == "2 of 3 classes"


def test_zooming_in_scrolls_to_the_position_and_fit_shows_all_again(opened):
    click(opened, ".w", 22)
    for _ in range(3):
        press(opened, "+")
    wait_for(opened, "scroller.scrollWidth > 4 * scroller.clientWidth")
    wait_for(opened, "!playhead.hidden && scroller.scrollLeft > 0")
    click(opened, "#fit")
    wait_for(opened, "scroller.scrollWidth <= scroller.clientWidth")


def test_the_text_follows_the_position_without_moving_the_timeline(browser, page):
    load(browser, page, height=620)
    wait_for(browser, "audio.readyState >= 1")
    click_timeline(browser, 2, 37000)
    wait_for(browser, "document.querySelector('.segment.now').getBoundingClientRect().bottom <= innerHeight")
    assert browser.execute_script("return document.querySelectorAll('.segment')[9].classList.contains('now')")
    assert browser.execute_script("return scrollY") == 0


@pytest.mark.parametrize("width", [380, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_it_is_readable_on_a_narrow_screen_and_in_the_dark(browser, page, width, dark):
    load(browser, page, width=width, height=800, dark=dark)
    wait_for(browser, "audio.readyState >= 1")
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    light = browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(252, 252, 251)"
    assert light is not dark
    click(browser, ".w", 5)
    for selector in (".said", ".w.now", ".segment.now .said", ".time", ".sound", "h1", "header .soft", ".legend"):
        assert contrast(browser, selector) >= 4.5, selector
    assert browser.execute_script("return parseFloat(getComputedStyle(document.querySelector('.said')).fontSize)") >= 16


def test_the_theme_button_turns_the_page_over(opened):
    before = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
    click(opened, "#theme")
    assert opened.execute_script("return getComputedStyle(document.body).backgroundColor") != before
    click(opened, "#theme")
    assert opened.execute_script("return getComputedStyle(document.body).backgroundColor") == before


def test_hostile_names_are_shown_and_not_run(browser, tmp_path):
    hostile = made_result() | {"audio": HOSTILE.replace("/", ""), "model": HOSTILE}
    hostile["segments"][0]["text"] = hostile["events"][0]["label"] = HOSTILE
    hostile["tags"][0]["labels"][0]["name"] = HOSTILE
    load(browser, write_page(hostile, tmp_path / "hostile.html"))
    click(browser, "summary")
    wait_for(browser, "document.querySelectorAll('.chips .button').length > 2")
    assert browser.execute_script("return typeof hacked") == "undefined"
    assert not browser.find_elements("css selector", "img")
    assert HOSTILE.replace("/", "") in browser.title
    said = browser.execute_script("return document.querySelector('.said').textContent")
    assert said == HOSTILE


def test_without_audio_time_runs_all_the_same(browser, tmp_path):
    load(browser, write_page(made_result(), tmp_path / "silent.html"))
    click(browser, ".time", 4)
    assert browser.find_element("id", "clock").text == "0:16 / 0:40"
    press(browser, " ")
    wait_for(browser, "document.getElementById('clock').textContent.startsWith('0:17')")
    press(browser, " ")
    assert browser.find_element("id", "silent").text == "Play"


def test_linked_audio_plays_from_beside_the_page(browser, page):
    linked = page.with_name("linked.html")
    linked.write_text(render_page(made_result(), page.with_name("made.wav"), embed=False, folder=page.parent))
    load(browser, linked)
    wait_for(browser, "audio.readyState >= 1")
    assert requests(browser) == [linked.as_uri(), page.with_name("made.wav").as_uri()]
    click(browser, ".w", 10)
    time_is(browser, 10000)


def test_three_hours_of_tags_load_in_seconds_and_draw_within_a_frame(browser, tmp_path):
    rng = np.random.default_rng(0)
    names = [f"class {i}" for i in range(527)]
    tags = [
        {"start": 0.4 * i, "end": 0.4 * i + 0.4, "labels": [
            {"name": names[(i // 50 + k * k) % 527], "probability": p, "logit": 0.0} for k, p in enumerate(row)]}
        for i, row in enumerate(rng.random((27000, 12)).tolist())
    ]  # fmt: skip
    long = made_result() | {"tags": tags, "duration": 10800.0}
    path = write_page(long, tmp_path / "long.html")
    assert path.stat().st_size < 4e6
    load(browser, path)
    loaded = browser.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert 0 < loaded < 5000
    drawn = browser.execute_async_script(
        """const done = arguments[0], ask = window.requestAnimationFrame;
        let spent = 0, frames = 0, i = 0;
        window.requestAnimationFrame = (f) => ask((t) => {
          const began = performance.now();
          f(t);
          spent += performance.now() - began;
          frames++;
        });
        const step = () => { scroller.scrollTop = i * 200; i++ < 20 ? setTimeout(step, 40) : done(spent / frames); };
        step();"""
    )
    assert drawn < 50


def test_the_browser_reads_the_vtt_captions_as_they_were_planned(opened):
    given = made_result()
    given["segments"][0]["text"] = " <b>1 < 2 & --> 3</b> "
    del given["segments"][0]["words"]
    given["segments"].append({"id": 10, "start": 3700.0, "end": 3702.0, "text": " Later."})
    read = opened.execute_async_script(
        """const done = arguments[1], track = document.createElement('track');
        track.src = URL.createObjectURL(new Blob([arguments[0]], {type: 'text/vtt'}));
        const plain = (cue) => [1000 * cue.startTime, 1000 * cue.endTime, cue.getCueAsHTML().textContent];
        track.onload = () => done([...track.track.cues].map(plain));
        track.onerror = () => done(null);
        audio.append(track);
        track.track.mode = 'showing';""",
        write_captions(given, "vtt"),
    )
    planned = plan_cues(given)
    assert [(round(start), round(end)) for start, end, _ in read] == [(cue.start, cue.end) for cue in planned]
    expected = ["\n".join([*(f"[{s.label}]" for s in cue.sounds), *cue.speech]) for cue in planned]
    assert [text for _, _, text in read] == expected
    assert expected[0] == "<b>1 < 2 & --> 3</b>" and (read[-1][0], read[-1][1]) == (3700000, 3702000)

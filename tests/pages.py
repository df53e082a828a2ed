"""What the tests of HTML pages share: reading a page as a parser does, and driving it in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from html.parser import HTMLParser

HOSTILE = '</script><img src=x onerror="hacked=1">\'&amp;\u2028{{body}}'


class Elements(HTMLParser):
    """Every element that a page has, with its attributes; the text outside scripts and styles."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.text, self._within, self.scripts, self.styles = "", "", [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._within = tag if tag in ("script", "style") else ""
        if tag in ("script", "style"):
            (self.scripts if tag == "script" else self.styles).append("")

    def handle_endtag(self, tag):
        self._within = ""

    def handle_data(self, data):
        if self._within:
            (self.scripts if self._within == "script" else self.styles)[-1] += data
        else:
            self.text += data

    def named(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def assert_nothing_got_out(page: str) -> Elements:
    """No text of a user became an element, an attribute or a program, and nothing is fetched."""
    found = Elements(page)
    assert not found.named("img") and not found.named("link") and not found.named("iframe")
    assert {attributes.get("type") for attributes in found.named("script")} <= {None, "application/json"}
    assert sum("type" not in attributes for attributes in found.named("script")) == 1
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
    assert not [a for _, a in found.elements for name in ("src", "href") if "://" in (a.get(name) or "")]
    policy = next(a["content"] for a in found.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for kind, text in (("script", found.scripts[-1]), ("style", found.styles[0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    return found


def load(browser, path, *, width=1200, height=900, dark=False) -> None:
    """Open a page, and fail if it asked for anything but itself or complained."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get("about:blank")
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(path.as_uri())
    assert complaints(browser) == []


def complaints(browser) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def requests(browser) -> list[str]:
    """Addresses that were asked for since the page was opened, data within the page left out."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith(("data:", "about:", "blob:"))]


def wait_for(browser, condition: str, seconds: float = 10) -> None:
    """Until a JavaScript expression is true."""
    end = time.monotonic() + seconds
    while not browser.execute_script(f"return Boolean({condition})"):
        assert time.monotonic() < end, f"still not so: {condition}"
        time.sleep(0.03)


def contrast(browser, selector: str) -> float:
    """Of an element's text and what is behind it, as WCAG counts it. What is see-through is mixed by the browser."""
    ink, ground = browser.execute_script(
        """const pen = document.createElement('canvas').getContext('2d');
        let element = document.querySelector(arguments[0]);
        const ink = getComputedStyle(element).color, layers = [];
        for (; element; element = element.parentElement) layers.unshift(getComputedStyle(element).backgroundColor);
        const drawn = () => [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
        const fill = (colour) => { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); };
        layers.forEach(fill);
        const ground = drawn();
        fill(ink);
        return [drawn(), ground];""",
        selector,
    )
    light, dark = sorted((_luminance(ink), _luminance(ground)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: list[int]) -> float:
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (number / 255 for number in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

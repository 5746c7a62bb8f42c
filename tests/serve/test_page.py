"""The page in a real browser: what a person does, and what the server's answers make of it."""

import re
import shutil

import pytest

from serve_sample import make_world, running
from skimlm.serve.guard import Limits

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
expect = playwright.expect


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as run:
        made = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser):
    """A page that may speak to its own server alone, and must not complain."""
    context = browser.new_context()
    made = context.new_page()
    made.problems = []
    made.asked = []
    made.on("pageerror", lambda error: made.problems.append(str(error)))
    made.on("console", lambda m: m.type == "error" and made.problems.append(m.text))
    made.on("request", lambda request: made.asked.append(request.url))
    yield made
    context.close()


def ask(page, text):
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def test_a_conversation_with_a_skill(world, page):
    with running(*world, limits=Limits(tokens=24)) as (address, engine):
        page.goto(address)
        expect(page).to_have_title("tiny")
        expect(page.get_by_label("Message", exact=True)).to_be_focused()
        page.get_by_label(re.compile("tidy-notes")).check()
        expect(page.locator("#chosen")).to_have_text(re.compile("1 chosen, [0-9]+ tokens saved"))
        ask(page, "What now?")
        first = page.locator("#messages > li.assistant").first
        expect(first.locator(".facts")).to_contain_text("tokens")
        expect(first.locator(".facts")).to_contain_text("first after")
        expect(first.locator(".facts")).to_contain_text("of skills saved")
        expect(page.locator("#messages > li.user .text")).to_have_text("What now?")
        ask(page, "And <b>then</b>?\n```\ncode\n```")
        expect(page.locator("#messages > li")).to_have_count(4)
        expect(page.locator("#messages > li.user").nth(1).locator("b")).to_have_count(0)
        expect(page.locator("#messages > li.user").nth(1).locator("pre")).to_have_text("code")
        last = page.locator("#messages > li.assistant").last
        expect(last.locator(".facts")).to_be_visible()
        sent = engine.prompt_tokens
        last.get_by_role("button", name="Retry").click()
        expect(page.locator("#messages > li.assistant").last.locator(".facts")).to_be_visible()
        assert engine.prompt_tokens > sent
        expect(page.locator("#messages > li")).to_have_count(4)
        page.get_by_role("button", name="New chat").click()
        expect(page.locator("#messages > li")).to_have_count(0)
        page.get_by_label("Message", exact=True).press("ArrowUp")
        expect(page.get_by_label("Message", exact=True)).to_have_value("")
        assert not page.problems and all(url.startswith(address) for url in page.asked)


def test_copying_and_asking_the_same_again(world, browser):
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    with running(*world, limits=Limits(tokens=12)) as (address, _):
        page.goto(address)
        ask(page, "What now?")
        answer = page.locator("#messages > li.assistant")
        answer.get_by_role("button", name="Copy").click()
        expect(answer.get_by_role("button", name="Copied")).to_be_visible()
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied and copied == answer.locator(".text").inner_text()
        page.get_by_label("Message", exact=True).press("ArrowUp")
        expect(page.get_by_label("Message", exact=True)).to_have_value("What now?")
    context.close()


@pytest.mark.parametrize("how", ["button", "key"])
def test_stopping(world, page, slow, how):
    with running(*world) as (address, engine):
        page.goto(address)
        ask(page, "What now?")
        stop = page.get_by_role("button", name="Stop")
        expect(stop).to_be_visible()
        expect(page.locator("#messages > li.assistant .text")).not_to_be_empty()
        stop.click() if how == "button" else page.keyboard.press("Escape")
        expect(page.locator("#messages > li.assistant .facts")).to_contain_text("stopped")
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        page.wait_for_timeout(300)
        assert not engine.running


def test_errors_are_told_and_can_be_tried_again(world, page):
    with running(*world, limits=Limits(tokens=8)) as (address, _):
        page.goto(address)
        ask(page, "x" * 5000)
        expect(page.get_by_role("status")).to_contain_text("the model reads 4,096")
        expect(page.locator("#messages > li.error")).to_have_count(1)
        page.route("**/v1/chat/completions", lambda route: route.abort())
        page.get_by_role("button", name="New chat").click()
        ask(page, "What now?")
        expect(page.get_by_role("status")).to_have_text("the server cannot be reached")
        page.unroute("**/v1/chat/completions")
        page.get_by_role("button", name="Retry").click()
        expect(page.locator("#messages > li.assistant .facts")).to_contain_text("first after")
        expect(page.get_by_role("status")).to_have_text("")


def test_a_connection_that_drops_keeps_what_came(world, page):
    with running(*world) as (address, _):
        page.goto(address)
        part = 'data: {"choices": [{"delta": {"content": "Half an"}, "finish_reason": null}]}\n\n'
        page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(body=part, content_type="text/event-stream"),
        )
        ask(page, "What now?")
        expect(page.get_by_role("status")).to_have_text("the connection was lost")
        expect(page.locator("#messages > li.assistant .text")).to_have_text("Half an")
        expect(page.get_by_role("button", name="Retry")).to_be_visible()


def test_a_key_is_asked_for_and_kept(world, page):
    with running(*world, limits=Limits(key="secret-1", tokens=4)) as (address, _):
        page.goto(address)
        for key in ("wrong", "secret-1"):
            page.get_by_label("This server asks for an API key.").fill(key)
            page.keyboard.press("Enter")
        expect(page).to_have_title("tiny")
        ask(page, "What now?")
        expect(page.locator("#messages > li.assistant .facts")).to_contain_text("tokens")
        page.reload()
        expect(page).to_have_title("tiny")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_it_fits_and_can_be_read(world, browser, scheme, width):
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 700})
    page = context.new_page()
    with running(*world, limits=Limits(tokens=40)) as (address, _):
        page.goto(address)
        expect(page).to_have_title("tiny")
        ask(page, "What now? " + "word" * 100)
        expect(page.locator("#messages > li.assistant .facts")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        box = page.get_by_role("button", name="Send").bounding_box()
        assert box["y"] + box["height"] <= 700 and box["x"] + box["width"] <= width
        colors = page.evaluate(
            "[...document.querySelectorAll('body, .quiet, #send, .text')].map(e => {"
            " const s = getComputedStyle(e); return [s.color, s.backgroundColor] })"
        )
        back = colors[0][1]
        for front, own in colors:
            assert contrast(front, own if own != "rgba(0, 0, 0, 0)" else back) >= 4.5
    context.close()


def contrast(one, other):
    """The ratio of luminances that WCAG asks 4.5 of."""

    def luminance(color):
        values = [int(v) / 255 for v in re.findall(r"\d+", color)[:3]]
        r, g, b = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)

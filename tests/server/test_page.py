"""The page at `/` in a real headless browser: give a picture, ask, see both turns, the views and the account."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.browser import Browser, find_browser
from tests.server.running import CROP, Running, picture
from vtengine.engine.base import Request

Serve = Callable[..., Running]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no headless browser is installed")
    one = Browser(program, tmp_path_factory.mktemp("browser"))
    yield one
    one.close()


def drop(browser: Browser, data: bytes) -> None:
    """A file dropped on the page, as the browser delivers it."""
    browser.evaluate(f"""(() => {{
        const bytes = Uint8Array.from(atob("{base64.b64encode(data).decode()}"), c => c.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], "dropped.png", {{type: "image/png"}}));
        document.getElementById("drop").dispatchEvent(
            new DragEvent("drop", {{bubbles: true, cancelable: true, dataTransfer: transfer}}));
    }})()""")
    browser.wait("!document.getElementById('preview').hidden")


def ask(browser: Browser, question: str) -> None:
    browser.evaluate(f"""(() => {{
        const field = document.getElementById("question");
        field.value = {question!r};
        field.dispatchEvent(new Event("input"));
        document.getElementById("ask").click();
    }})()""")


def text(browser: Browser) -> str:
    value: str = browser.evaluate("document.getElementById('out').innerText")
    return value


def test_drop_ask_and_watch(serve: Serve, browser: Browser, tmp_path: Path) -> None:
    server = serve(slow=0.004, profile="vtengine")
    browser.open(server.url + "/")
    browser.wait("model")
    drop(browser, picture())
    ask(browser, "What is it?")
    browser.wait("document.querySelectorAll('.turn').length === 1")
    browser.wait("document.querySelector('.think').textContent.length > 2")
    assert browser.evaluate("document.querySelector('.answer').textContent") == "", "turn 1 streams before the answer"
    browser.wait("document.getElementById('account')")
    shown = text(browser)
    assert browser.evaluate("document.querySelector('.turn:nth-child(2) .answer').textContent") == "a red ball"
    assert "low view, 84 x 56, 6 visual tokens" in shown and "high view, 168 x 112, 24 visual tokens" in shown
    assert '{"name": "resize_image"' in shown and "30 visual tokens" in shown and "125 %" in shown
    assert browser.evaluate("document.querySelectorAll('#account tr').length") == 4
    assert browser.evaluate("[...document.querySelectorAll('canvas')].map(c => c.width).join()") == "84,168"
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
    assert all(url.startswith((server.url, "data:", "blob:")) for url in browser.requests), "works without a network"
    assert browser.messages == []


def test_the_picture_drawn_is_that_of_the_view(serve: Serve, browser: Browser) -> None:
    """A crop shows its part of the original."""

    def replies(request: Request) -> str:
        return CROP if len(request.images) == 1 else "<answer>white</answer>"

    browser.open(serve(replies, profile="vtengine").url + "/")
    browser.wait("model")
    drop(browser, picture())
    ask(browser, "What is in the corner?")
    browser.wait("document.getElementById('account')")
    assert "crop, 56 x 56" in text(browser)
    corner = "[...document.querySelectorAll('canvas')[1].getContext('2d').getImageData(1, 1, 1, 1).data].join()"
    assert browser.evaluate(corner) == "255,255,255,255"


def test_stop_cancels_the_episode(serve: Serve, browser: Browser) -> None:
    server = serve(slow=0.05)
    backend: Any = server.backend
    browser.open(server.url + "/")
    browser.wait("model")
    drop(browser, picture())
    ask(browser, "What is it?")
    browser.wait("document.querySelectorAll('.turn').length === 1")
    browser.evaluate("document.getElementById('stop').click()")
    browser.wait("document.querySelector('.error')?.textContent === 'Stopped.'")
    browser.wait("!document.getElementById('ask').disabled")
    for _ in range(100):
        if backend.active == 0:
            break
        browser.evaluate("new Promise(done => setTimeout(done, 20))")
    assert backend.active == 0 and backend.abandoned == 1


def test_errors_are_said(serve: Serve, browser: Browser) -> None:
    server = serve(keys=["a-long-secret"])
    browser.open(server.url + "/")
    browser.wait("!document.getElementById('keyrow').hidden")
    browser.evaluate("""(() => {
        const field = document.getElementById("key");
        field.value = "a-long-secret";
        field.dispatchEvent(new Event("change"));
    })()""")
    browser.wait("model")
    browser.evaluate("document.getElementById('budget').value = 2")
    drop(browser, picture())
    ask(browser, "What is it?")
    browser.wait("document.querySelector('.error')")
    assert "6 visual tokens, the budget is 2" in text(browser)


def test_the_example_picture_and_hostile_text(serve: Serve, browser: Browser) -> None:
    server = serve(lambda _: "<think><img src=x onerror='window.owned=1'></think><answer><b>bold</b></answer>")
    browser.open(server.url + "/")
    browser.wait("model")
    browser.evaluate("document.getElementById('example').click()")
    browser.wait("!document.getElementById('ask').disabled")
    browser.evaluate("document.getElementById('ask').click()")
    browser.wait("document.getElementById('account') || document.querySelector('.error')")
    assert "visual tokens" in text(browser)
    assert browser.evaluate("document.querySelector('.answer').textContent") == "<b>bold</b>"
    assert browser.evaluate("window.owned === undefined && document.querySelector('#out img') === null")


def test_without_a_picture_and_after_one_was_removed(serve: Serve, browser: Browser) -> None:
    server = serve(lambda _: "<think>2 and 2</think><answer>4</answer>", profile="vtengine")
    said = list(browser.messages)
    browser.open(server.url + "/")
    browser.wait("model")
    ask(browser, "2 + 2?")
    browser.wait("document.getElementById('account')")
    assert browser.evaluate("document.querySelector('.answer').textContent") == "4"
    assert "visual tokens" not in text(browser) and browser.evaluate("document.querySelector('canvas')") is None
    drop(browser, picture())
    browser.evaluate("document.getElementById('remove').click()")
    browser.wait("document.getElementById('preview').hidden")
    ask(browser, "3 + 1?")
    browser.wait("document.getElementById('account')")
    assert [request.images for request in server.backend.requests] == [(), ()]  # type: ignore[attr-defined]
    assert browser.messages == said

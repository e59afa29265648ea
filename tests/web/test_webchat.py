"""The chat page in a real browser, with a model that says what it is told to."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from serving import until

Open = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, webchat: Any) -> Iterator[Open]:
    """Opens windows; nothing that they ask for may be elsewhere, and no script may fail."""
    contexts: list[Any] = []
    faults: list[str] = []

    def open_window(**settings: Any) -> Any:
        context = browser.new_context(locale=settings.pop("locale", "en-US"), **settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(webchat.url)
        page.wait_for_selector("#message textarea")
        page.wait_for_function("document.querySelector('#talk') !== null")
        return page

    webchat.engine.delay = 0.0
    yield open_window
    for context in contexts:
        context.close()
    assert not faults


USER, BOT = '#talk [data-testid="user"]', '#talk [data-testid="bot"]'
DONE = """number => document.querySelectorAll('#talk [data-testid="user"]').length === number
    && document.querySelector('#how')?.innerText.includes('token') && document.querySelector('#send')?.offsetParent !== null"""


def say(page: Any, text: str, ends: bool = True) -> None:
    number = page.locator(USER).count() + 1
    page.fill("#message textarea", text)
    page.press("#message textarea", "Enter")
    if ends:
        page.wait_for_function(DONE, arg=number)


def bubbles(page: Any) -> list[str]:
    return [text.strip() for text in page.locator(f"{USER}, {BOT}").all_inner_texts()]


def lines(page: Any) -> set[str]:
    return {line.strip() for line in page.inner_text("body").splitlines() if line.strip()}


def shows(page: Any, right: Callable[[list[str]], bool]) -> None:
    """The talk is as it should be; its parts are drawn one after the other, so that a look may come too early."""
    assert until(lambda: right(bubbles(page)), 15), bubbles(page)


def test_a_talk(opened: Open, webchat: Any) -> None:
    """Enter sends, Shift+Enter does not; what was said, the system text and the settings reach the model."""
    page = opened()
    page.fill("#system textarea", "Be brief.")
    page.fill("#set-max_new_tokens input", "77")
    page.press("#set-max_new_tokens input", "Tab")
    page.fill("#message textarea", "hello")
    page.press("#message textarea", "Shift+Enter")
    assert page.input_value("#message textarea") == "hello\n"
    page.press("#message textarea", "Enter")
    page.wait_for_function(DONE, arg=1)
    shows(page, lambda said: said == ["hello", "Hi there, 你好!"])
    assert page.input_value("#message textarea") == ""
    assert "<|im_start|>system\nBe brief.<|im_end|>" in webchat.engine.prompts[-1]
    assert webchat.engine.asks[-1].options.max_new_tokens == 77
    say(page, "18 degrees")
    shows(page, lambda said: said[-1:] == ["It is 18 degrees in Rome."])
    assert "Hi there, 你好!" in webchat.engine.prompts[-1]


def test_two_windows_do_not_mix(opened: Open) -> None:
    one, other = opened(), opened()
    say(one, "hello")
    say(other, "18 degrees")
    shows(one, lambda said: said == ["hello", "Hi there, 你好!"])
    shows(other, lambda said: said == ["18 degrees", "It is 18 degrees in Rome."])


def test_an_answer_streams_and_stops_and_stays(opened: Open, webchat: Any) -> None:
    page = opened()
    webchat.engine.delay = 0.01
    num_stopped = len(webchat.engine.stopped)
    say(page, "count", ends=False)
    page.wait_for_function("document.querySelector('#talk')?.innerText.includes('0 1 2 3 4')")
    page.click("#stop")
    page.wait_for_selector("#send", state="visible")
    assert until(lambda: len(webchat.engine.stopped) > num_stopped), "the engine writes no further"
    page.wait_for_function("document.querySelector('#how')?.innerText.includes('stopped')")
    said = bubbles(page)[-1]
    assert said.startswith("0 1 2 3 4") and "1999" not in said
    webchat.engine.delay = 0.0
    say(page, "hello")
    assert bubbles(page)[1] == said and said[-20:] in webchat.engine.prompts[-1], "what was said stays in the talk"


def test_a_closed_window_ends_its_answer(opened: Open, webchat: Any) -> None:
    page = opened()
    webchat.engine.delay = 0.01
    num_stopped = len(webchat.engine.stopped)
    say(page, "count", ends=False)
    page.wait_for_function("document.querySelector('#talk')?.innerText.includes('0 1 2 3 4')")
    page.close()
    assert until(lambda: len(webchat.engine.stopped) > num_stopped, 10)


def test_retry_edit_and_clear(opened: Open, webchat: Any) -> None:
    page = opened()
    say(page, "hello")
    num_asked = len(webchat.engine.asks)
    page.click("#retry")
    assert until(lambda: len(webchat.engine.asks) == num_asked + 1)
    page.wait_for_function(DONE, arg=1)
    shows(page, lambda said: said == ["hello", "Hi there, 你好!"])
    page.click("#edit")
    page.wait_for_function("document.querySelector('#message textarea')?.value === 'hello'")
    shows(page, lambda said: said == [])
    say(page, "18 degrees")
    shows(page, lambda said: said == ["18 degrees", "It is 18 degrees in Rome."])
    page.click("#clear")
    page.wait_for_function("!document.querySelector('#talk [data-testid=\"user\"]')")
    say(page, "hello")
    assert "18 degrees" not in webchat.engine.prompts[-1]


def test_tags_are_text_and_nothing_runs(opened: Open) -> None:
    """In what the model says, and in what the user says."""
    page = opened()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    say(page, 'attack <script>window.hit = 1</script> <img src=x onerror="window.hit = 1">')
    shows(page, lambda said: len(said) == 2 and "fenced" in said[1])
    user, bot = bubbles(page)
    assert user == 'attack <script>window.hit = 1</script> <img src=x onerror="window.hit = 1">'
    assert '<script>window.hit = 1</script><img src="http://192.0.2.1/x.png" onerror="window.hit = 1">' in bot
    assert "<i>code</i>" in bot and "<b>fenced</b>" in bot and "a < b &amp; c" in bot
    say(page, "think")
    page.wait_for_selector("#talk details")
    page.wait_for_timeout(300)
    assert page.evaluate("window.hit") is None
    assert not [url for url in asked if "127.0.0.1" not in url and not url.startswith(("data:", "blob:"))], asked


def test_tags_that_are_drawn_run_nothing(opened: Open) -> None:
    page = opened()
    page.click("#more button")
    page.uncheck("#escape_html input")
    say(page, "attack")
    page.wait_for_timeout(300)
    assert "<script>" not in bubbles(page)[-1]
    assert page.evaluate("window.hit") is None


def test_thoughts_are_folded(opened: Open) -> None:
    page = opened()
    say(page, "think")
    details = page.locator("#talk details")
    assert details.get_attribute("open") is None
    assert page.locator("#talk details summary").inner_text() == "Thought"
    details.locator("summary").click()
    assert "Two & <b>two</b>." in details.inner_text() and "</details><img" in details.inner_text()
    shows(page, lambda said: said[-1].endswith("Four."))


def test_tools_and_their_results(opened: Open, webchat: Any) -> None:
    """What is typed is looked at while it is typed; of a call, the result is asked for."""
    page = opened()
    page.fill("#tools textarea", '[{"nam": "weather"}]')
    page.wait_for_function("document.querySelector('#tools-said .bad')?.innerText.includes(\"with a 'name'\")")
    say(page, "weather", ends=False)
    page.wait_for_selector("text=should be a function schema")
    assert page.input_value("#message textarea") == "weather", "nothing was said"
    page.fill("#tools textarea", '[{"name": "weather", "parameters": {"type": "object"}}]')
    page.wait_for_function("document.querySelector('#tools-said')?.innerText === '1 tools: weather'")
    say(page, "weather")
    page.wait_for_function("document.querySelector('#message label span')?.innerText === 'Result of weather'")
    shows(page, lambda said: "Let me see." in said[-1] and '"city": "Rome ``` <b>"' in said[-1])
    say(page, "18 degrees")
    page.wait_for_function("document.querySelector('#message label span')?.innerText === 'Message'")
    assert "<tool_response>\n18 degrees\n</tool_response>" in webchat.engine.prompts[-1]
    shows(page, lambda said: said[-1:] == ["It is 18 degrees in Rome."])


def test_a_setting_that_does_not_fit_is_told(opened: Open) -> None:
    page = opened()
    page.fill("#set-seed input", "many")
    say(page, "hello", ends=False)
    page.wait_for_selector("text='seed' should be a whole number")
    assert bubbles(page) == [] and page.input_value("#message textarea") == "hello"


def test_every_text_changes_with_the_language(opened: Open) -> None:
    """At once, and no English is left."""
    page = opened()
    say(page, "hello")
    page.click("#more button")
    before = lines(page)
    page.click("#language input")
    page.get_by_role("option", name="中文").click()
    page.wait_for_function("document.querySelector('#send')?.innerText.includes('发送')")
    page.wait_for_function("document.querySelector('#how')?.innerText.includes('个 token')")
    page.wait_for_selector("#message textarea[placeholder='回车发送，Shift+回车换行']")
    same = {"hello", "Hi there, 你好!", "model", "0", "1", "-2", "2", "▼"}
    assert until(lambda: before & lines(page) <= same, 15), before & lines(page)
    assert page.get_attribute("#message textarea", "placeholder") == "回车发送，Shift+回车换行"
    assert "个 token" in page.inner_text("#how")


@pytest.mark.parametrize(("locale", "label"), [("ru-RU", "Отправить"), ("ko", "보내기"), ("fr", "Send")])
def test_the_browser_s_language_is_taken(opened: Open, locale: str, label: str) -> None:
    page = opened(locale=locale)
    page.wait_for_function(f"document.querySelector('#send')?.innerText.trim() === '{label}'")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(opened: Open, scheme: str) -> None:
    """Nothing is wider than the screen, in either colour."""
    page = opened(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True, color_scheme=scheme)
    say(page, "count", ends=False)
    page.wait_for_selector(BOT)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("document.body.classList.contains('dark')") is (scheme == "dark")
    with contextlib.suppress(Exception):
        page.click("#stop")


def test_keys_alone(opened: Open) -> None:
    """Every button is reached by Tab."""
    page = opened()
    page.focus("#message textarea")
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.closest('[id]')?.id"))
    assert {"send", "retry", "edit", "clear"} <= reached

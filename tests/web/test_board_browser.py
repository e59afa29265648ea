"""The board in a real browser, against the real server: tune, watch, leave, come back, stop, go on, talk, export."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from board_server import LONGEST, Served, Window, serving
from finery.files import cache_folder
from finery.web.app import TABS
from finery.web.texts import LANGUAGES, texts
from serving import until

TRAP = '<img src="x" onerror="window.hit=1"><b class="hit">bold</b>'
"""Shown as text, or the test fails."""
Open = Callable[..., Window]


@pytest.fixture(scope="module")
def served(browser: Any, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("board"), tiny_model) as board:
        yield board


@pytest.fixture
def opened(browser: Any, served: Served) -> Iterator[Open]:
    """Opens windows of browsers of their own; in none of them anything may go wrong, and none may ask for what is elsewhere."""
    windows: list[tuple[Any, Window]] = []

    def open_window(tab: str = "", **settings: Any) -> Window:
        context = browser.new_context(**{"locale": "en-US", "viewport": {"width": 1280, "height": 900}, **settings})
        window = Window(context.new_page(), served.url)
        windows.append((context, window))
        window.open(tab)
        return window

    yield open_window
    for context, window in windows:
        context.close()
        assert window.faults == []


@pytest.fixture(scope="module")
def trapped(served: Served) -> Path:
    """The folder `traps` of the board: a set whose rows, whose name and whose file hold HTML."""
    folder = served.home / "traps"
    folder.mkdir()
    records = [{"instruction": f"What is {n}? {TRAP}", "input": "", "output": f"{n} {TRAP}"} for n in range(24)]
    (folder / "rows.json").write_text(json.dumps(records))
    (folder / f"{TRAP.replace('/', '')}.json").write_text(json.dumps(records))
    (folder / "dataset_info.json").write_text(json.dumps({"sums": {"file_name": "rows.json"}, TRAP: {"file_name": "rows.json"}}))
    return folder


def tiny_run(window: Window, model: Path, name: str, epochs: str) -> None:
    """Fill in a run of the tiny model."""
    window.fill("top-model_path", str(model))
    window.fill("train-dataset_dir", "traps")
    window.choose("train-dataset", "sums")
    window.page.keyboard.press("Escape")
    for key, value in {"num_train_epochs": epochs, "cutoff_len": "128", "gradient_accumulation_steps": "1"}.items():
        window.fill(f"train-{key}", value)
    window.fill("train-output_dir", name, "Enter")


def step_of(window: Window) -> int:
    return int(re.search(r"step ([\d,]+) of", window.until("train-progress", r"step [\d,]+ of"))[1].replace(",", ""))  # type: ignore[index]


def test_a_run_outlives_its_window(opened: Open, served: Served, trapped: Path, tiny_model: Path) -> None:
    """Rows, start, curve; another browser, and another server, find the run, stop it and let it go on; then it is talked to."""
    one = opened()
    tiny_run(one, tiny_model, "long", "5000")
    one.click("train-preview_btn")
    assert TRAP in one.until("train-preview_samples", "24 samples")
    assert one.page.locator("#train-preview_samples .learnt").count() and one.no_script_ran()
    one.click("train-start_btn")
    one.until("train-loss_viewer", "smoothed")
    before = one.page.locator("#train-loss_viewer g path").first.get_attribute("d")
    drawn = "before => document.querySelector('#train-loss_viewer g path')?.getAttribute('d') !== before"
    one.page.wait_for_function(drawn, arg=before, timeout=LONGEST)
    step = step_of(one)
    one.leaves = True
    one.page.close()
    served.kill()
    served.start()

    other = opened()
    other.until("train-progress", "running")
    assert step_of(other) >= step
    other.click("train-stop_btn")
    other.until("train-progress", "^stopped")
    stopped_at = step_of(other)
    folder = next(served.home.glob("saves/*/lora/long"))
    other.fill("train-config_path", f"{folder.relative_to(served.home)}/run.yaml", "Enter")
    other.click("train-arg_load_btn")
    other.holds("train-output_dir", str(folder.relative_to(served.home)))
    other.click("train-start_btn")
    other.until("train-progress", "running · step")
    assert step_of(other) > stopped_at
    other.until("train-output_box", "going on")  # until it is drawn anew, it shows what the run before has printed
    other.click("train-stop_btn")
    other.until("train-progress", "^stopped")
    talks(other)


def talks(window: Window) -> None:
    """The newest run is what answers; the base answers beside it."""
    window.tab("chat")
    window.until("chat-source", r"lora/long")
    window.click("chat-load_btn")
    window.until("chat-info_box", "^Loaded: .*lora/long")
    window.fill("chat-set-max_new_tokens", "300")
    window.fill("chat-message", TRAP, "Enter")
    window.until("chat-how", "tokens/s")
    window.page.wait_for_selector("#chat-send", state="visible", timeout=LONGEST)
    window.until("chat-talk", re.escape(TRAP))
    assert window.no_script_ran()
    window.page.click("#section-chat-both button")
    window.fill("chat-both_question", TRAP, "Enter")
    window.until("chat-tuned_answer", "Tuned model")
    window.page.wait_for_function("document.querySelector('#chat-tuned_answer pre')?.textContent.length > 0", timeout=LONGEST)
    window.until("chat-base_answer", "Base model")
    assert window.no_script_ran()
    window.click("chat-unload_btn")
    window.until("chat-info_box", "No model")


def test_the_command_that_is_shown_runs_in_a_shell(opened: Open, served: Served, trapped: Path, tiny_model: Path) -> None:
    window = opened()
    window.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tiny_run(window, tiny_model, "by-shell", "1")
    window.click("train-cmd_preview_btn")
    window.until("train-command", "llamafactory-cli train")
    window.page.locator("#train-command button").first.click()
    copied = "navigator.clipboard.readText()"  # the button is done before the clipboard is
    assert until(lambda: window.page.evaluate(copied).startswith("llamafactory-cli train"), 15), window.page.evaluate(copied)
    command = window.page.evaluate(copied)
    place = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{place}:{os.environ['PATH']}"}
    ran = subprocess.run(["sh", "-c", command], cwd=served.home, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    assert len(list(served.home.glob("saves/*/lora/by-shell/adapter_model.safetensors"))) == 1


# ------------------------------------------------------------------ languages

OF = {"chat": ("chat", "infer"), "data": ("data", "entry")}
SAID = """() => [...document.querySelectorAll('[id]')].filter(one => /^(top|train|eval|chat|export|data|entry|runs|infer)-/.test(one.id))
    .map(one => [one.id, one.textContent, [...one.querySelectorAll('[placeholder]')].map(field => field.placeholder)])"""


def unsaid(window: Window, language: str) -> tuple[set[str], list[str]]:
    """The parts of the page that have texts, and which of their texts in a language they do not show."""
    spoken, seen, missing = texts(language), set(), []
    for element, text, placeholders in window.page.evaluate(SAID):
        told = {} if element == "chat-more" else spoken.part(element.replace("-", ".", 1))  # which is the chat box's own
        shown = [text, *placeholders]
        for way in ("label", "info", "placeholder"):
            if way in told:
                seen.add(element)
                missing += [] if any(told[way] in one for one in shown) else [f"{element}: {told[way]}"]
        if element.endswith("_btn") and told["value"] not in text:
            missing.append(f"{element}: {told['value']}")
    return seen, missing


def settled(window: Window, language: str, tab: str, wanted: set[str] | None) -> tuple[set[str], list[str]]:
    """`unsaid`, when the wanted parts are there and nothing comes any more; where none are known yet, nothing has to come for longer."""
    seen: set[str] = set()
    missing: list[str] = []
    same, enough = 0, 10 if wanted is None else 1
    for _ in range(400):
        before = seen
        seen, missing = unsaid(window, language)
        seen = {id for id in seen if id.partition("-")[0] in OF.get(tab, (tab,))}  # other tabs stay in the page once they were open
        same = same + 1 if seen == before else 0
        if not missing and seen and same >= enough and wanted in (None, seen):
            break
        window.page.wait_for_timeout(150)
    return seen, missing


def test_every_tab_in_every_language(opened: Open) -> None:
    """Chosen in the page, each part says what it has to in that language; the choice is there again when the page is opened anew."""
    window = opened()
    first: dict[str, set[str]] = {}
    for language in [*list(LANGUAGES)[1:], "en"]:
        window.speak(language)
        for tab in TABS:
            window.tab(tab)
            seen, missing = settled(window, language, tab, first.get(tab))
            assert missing == [], (language, tab)
            assert first.setdefault(tab, seen) == seen
        if language == "zh":
            window.open("runs")
            assert settled(window, language, "runs", first["runs"]) == (first["runs"], [])
    assert sum(map(len, first.values())) > 60, {tab: len(seen) for tab, seen in first.items()}
    asked = opened(locale="ko-KR")
    asked.until("tab-train-button", texts("ko").part("tabs.train")["label"])


# ------------------------------------------------------------------ windows


def test_two_windows_and_a_refresh_on_every_tab(opened: Open) -> None:
    """What is typed in one window is not in another one; a window holds it, and the open tab, when it is loaded anew."""
    one, other = opened(), opened()
    one.fill("train-max_samples", "77")
    other.fill("train-max_samples", "88")
    one.keeps("train-max_samples", "77")
    other.keeps("train-max_samples", "88")
    one.speak("ru")
    one.until("train-start_btn", texts("ru").part("train.start_btn")["value"])
    assert "Start" in other.text("train-start_btn")
    for window, number, tabs in ((one, "77", [*list(TABS)[1:], "train"]), (other, "88", ["runs"])):
        for tab in tabs:
            window.tab(tab)
            window.reload()
            window.is_at(tab)
        window.tab("train")
        window.holds("train-max_samples", number)
    one.until("train-start_btn", texts("ru").part("train.start_btn")["value"])


SLOW = """() => {
    const fetched = window.fetch;
    window.asked = 0;
    window.fetch = async (...told) => {
        if (String(told[0]).includes("/queue/join")) {
            window.asked += 1;
            await new Promise(later => setTimeout(later, 1500));
        }
        return fetched(...told);
    };
}"""


def test_a_tab_that_answers_late_does_not_take_the_place_of_the_next(opened: Open) -> None:
    """Over a slow line the tab that is seen stays in the address, and follows its job."""
    window = opened()
    window.page.evaluate(SLOW)
    window.click("tab-runs-button")
    window.click("tab-train-button")
    window.page.wait_for_timeout(5000)  # what comes late has come, and has changed nothing
    window.is_at("train")
    asked = window.page.evaluate("window.asked")
    window.page.wait_for_function("asked => window.asked > asked", arg=asked)


# ------------------------------------------------------------------ attacks


def test_html_stays_text_and_paths_stay_inside(opened: Open, served: Served, trapped: Path) -> None:
    run = served.home / "saves" / "traps" / "lora" / TRAP.replace("/", "")
    run.mkdir(parents=True)
    (run / "trainer_log.jsonl").write_text(json.dumps({"current_steps": 1, "total_steps": 2, "loss": 1.5}) + "\n")
    window = opened("runs")
    window.until("tab-runs", re.escape(run.name))
    assert window.no_script_ran()
    window.tab("data")
    window.until("data-sets", "identity")  # while a list is on its way, Gradio asks for no other one
    window.fill("data-dataset_dir", "traps", "Enter")
    window.until("data-sets", re.escape(TRAP))
    window.page.locator("#data-sets button", has_text=TRAP).first.click()
    window.until("data-samples", re.escape(TRAP))
    assert window.no_script_ran()
    window.fill("data-dataset_dir", "../..", "Enter")
    window.page.wait_for_selector("text=outside of what this page may touch")
    window.tab("train")
    for model in ("/etc", "../../secret"):
        window.fill("top-model_path", model)
        window.until("top-verdict", "outside of what this page may touch")
        window.click("train-cmd_preview_btn")
        window.page.wait_for_selector(f"text='model_name_or_path' names {model}")
    window.fill("top-model_path", TRAP)
    window.click("train-start_btn")
    window.page.wait_for_selector("text=no data set is chosen")
    assert window.no_script_ran()


# ------------------------------------------------------------------ the demo, as somebody who never saw a YAML file


def tune_talk_export(window: Window, seconds: int, says: str, **typed: str) -> None:
    """The path of the docs; what the tuned model says of who it is has what the pattern `says` finds."""
    window.click("top-demo_btn")
    window.holds("train-output_dir", "example")
    clicks = window.clicks
    for name, value in typed.items():
        window.fill(f"train-{name}", value)
    window.clicks = clicks  # the path is the same without them
    window.click("train-start_btn")
    window.until("train-loss_viewer", "smoothed", seconds * 1000)
    window.until("train-progress", "^finished", seconds * 1000)
    window.tab("chat")
    window.click("chat-load_btn")
    window.until("chat-info_box", "^Loaded: SmolLM2-135M-Instruct .*lora/example")
    window.fill("chat-message", "Who are you?", "Enter")
    window.until("chat-how", "tokens/s")
    window.page.wait_for_selector("#chat-send", state="visible", timeout=LONGEST)
    answer = window.page.locator('#chat-talk [data-testid="bot"]').last
    assert until(lambda: re.search(says, answer.inner_text()), 60), answer.inner_text()
    window.tab("export")
    window.click("export-start_btn")
    window.until("export-report", "is what was trained", seconds * 1000)


@pytest.mark.real
def test_the_demo_takes_less_than_ten_clicks(opened: Open, real_model: Path) -> None:
    window = opened()
    tune_talk_export(window, 400, r"\S", max_samples="6", cutoff_len="128")
    assert window.clicks < 10


@pytest.mark.slow
@pytest.mark.real
def test_the_whole_demo_and_its_pictures(
    opened: Open, served: Served, real_model: Path, tmp_path_factory: pytest.TempPathFactory, browser: Any
) -> None:
    """The example as it is: the tuned model knows its new name, and the base does not. Every tab is drawn with it."""
    window = opened()
    tune_talk_export(window, 1200, "Finn")
    assert window.clicks < 10
    folder = Path(os.environ.get("FINERY_PICTURES") or tmp_path_factory.mktemp("pictures"))
    folder.mkdir(parents=True, exist_ok=True)
    for language, question in (("en", "Who are you?"), ("zh", "你是谁？")):
        window.speak(language)
        if language != "en":  # a talk is gone when the page is loaded anew
            window.tab("chat")
            window.fill("chat-message", question, "Enter")
            window.until("chat-how", "token")
        both_say(window, "What is your name?")
        window.tab("data")
        window.page.click("#data-sets button[data-set=identity]")
        window.until("data-samples", "Finn|name")
        for tab in TABS:
            window.tab(tab)
            draw(window, served, folder / f"board-{tab}-{language}.png")
    phone = opened(viewport={"width": 400, "height": 800}, color_scheme="dark")
    for tab in TABS:
        phone.open(tab)
        draw(phone, served, folder / f"board-{tab}-phone.png")
        assert phone.page.evaluate("document.documentElement.scrollWidth") <= 400
    assert len(list(folder.glob("*.png"))) == 3 * len(TABS)


def both_say(window: Window, question: str) -> None:
    """Asked for its name, the tuned model tells the new one, and its base does not."""
    window.tab("chat")
    window.page.click("#section-chat-both button")
    window.fill("chat-both_question", question, "Enter")
    window.until("chat-tuned_answer", "Finn")
    assert "Finn" not in window.text("chat-base_answer")


NAMELESS = """places => {
    const told = text => places.reduce((said, [path, name]) => said.replaceAll(path, name), text);
    const nodes = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (nodes.nextNode()) {
        const text = nodes.currentNode.data;
        if (told(text) !== text) nodes.currentNode.data = told(text);
    }
    for (const field of document.querySelectorAll("input, textarea")) field.value = told(field.value);
}"""
"""A picture shows no path of the machine on which it was drawn."""


def draw(window: Window, served: Served, file: Path) -> None:
    """A picture of the whole page, in few colours."""
    from PIL import Image

    window.page.wait_for_timeout(3000)  # its curves and lists follow their clock
    window.page.evaluate(NAMELESS, [[str(served.home), "~/finery"], [str(cache_folder()), "~/.cache/finery"]])
    window.page.screenshot(path=file, full_page=True)
    with Image.open(file) as drawn:
        few = drawn.convert("RGB").quantize(128)
    few.save(file, optimize=True)

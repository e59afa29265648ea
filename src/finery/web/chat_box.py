"""The chat box: a talk with a model, for any page that has one. What is said in one window stays in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from html import escape
from typing import Any

import gradio as gr

from finery.errors import UserError
from finery.talks.answering import Answering
from finery.talks.options import TalkOptions
from finery.talks.speaker import Speaker
from finery.talks.talk import Talk, tool_names
from finery.web.bubbles import bubbles
from finery.web.fields import field_words, widget
from finery.web.texts import FIRST, texts

_REFRESH_SECONDS = 0.07
_MOST_TALKS = 64  # that are answered at the same time, in all windows; the engine has its own limit

CSS = """
.chat-talk { height: max(300px, calc(100dvh - 300px)) !important; }
.chat-talk details { margin: 0 0 .6rem; color: var(--body-text-color-subdued); }
.chat-talk details summary { cursor: pointer; font-size: .9em; }
.chat-talk details > div { border-left: 2px solid var(--border-color-primary); margin: .4rem 0 0 .2rem; padding-left: .8rem; }
.chat-talk .top-panel { display: none; }
.chat-talk .placeholder, .chat-talk .placeholder * { color: var(--body-text-color-subdued); }
.chat-how { min-height: 1.3rem; margin: -.6rem 0; }
.chat-how, .chat-how * { font-size: .82rem; color: var(--body-text-color-subdued); }
.chat-tools-said { font-size: .82rem; line-height: 1.4; margin: -.6rem 0 0; padding: 0 .2rem; }
.chat-tools-said .bad { color: var(--error-text-color, #b91c1c); }
.dark .chat-tools-said .bad { color: #fca5a5; }
.chat-tools textarea { font-family: var(--font-mono); font-size: .82rem; }
@media (max-width: 640px) {
  .chat-talk { height: 58dvh !important; }
  .chat-send { flex: 1 0 100%; }
}
"""


class Session:
    """What one window holds."""

    def __init__(self) -> None:
        self.talk = Talk()
        self.last: Answering | None = None  # the answer that is on its way, or came last

    @property
    def busy(self) -> bool:
        """Whether an answer is on its way."""
        return self.last is not None and self.last.finish is None


class ChatBox:
    """Built inside of `gr.Blocks`. `speaker` tells who answers; nothing where no model is loaded."""

    def __init__(
        self,
        speaker: Callable[[], Speaker | None],
        options: TalkOptions,
        shows_thinking: bool = True,
        prefix: str = "",
        language: str = FIRST,
    ) -> None:
        """`prefix` goes before the ids of its elements; it is drawn in `language`."""
        self.drawn_in = language
        self.prefix = prefix
        self.speaker = speaker
        self.options = options
        self.session = gr.State(Session(), time_to_live=24 * 3600, delete_callback=_end)
        self.language = gr.State(language)
        self._named: list[tuple[Any, Callable[[str], dict[str, Any]]]] = []  # components, and their texts in a language
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=320):
                self._build_talk()
            with gr.Column(scale=1, min_width=280):
                self._build_settings(shows_thinking)
        self._wire()

    def _id(self, name: str) -> str:
        return self.prefix + name

    def _name(self, component: Any, key: str) -> Any:
        """Let a component have the texts of a key."""
        self._named.append((component, lambda language: texts(language).part(f"box.{key}")))
        return component

    def _build_talk(self) -> None:
        words = texts(self.drawn_in).told["box"]
        self.shown = gr.Chatbot(
            elem_id=self._id("talk"), elem_classes="chat-talk", buttons=["copy"], show_label=False, feedback_options=None, **words["talk"]
        )
        self._name(self.shown, "talk")
        self.how = gr.Markdown("", elem_id=self._id("how"), elem_classes="chat-how")
        with gr.Row(equal_height=True):
            self.message = gr.Textbox(elem_id=self._id("message"), lines=1, max_lines=10, scale=5, autofocus=True, **words["message"])
            self.send = self._name(
                gr.Button(elem_id=self._id("send"), elem_classes="chat-send", variant="primary", scale=0, min_width=110, **words["send"]),
                "send",
            )
            self.stop = self._name(
                gr.Button(
                    elem_id=self._id("stop"),
                    elem_classes="chat-send",
                    variant="stop",
                    scale=0,
                    min_width=110,
                    visible=False,
                    **words["stop"],
                ),
                "stop",
            )
        with gr.Row():
            for name in ("retry", "edit", "clear"):
                button = gr.Button(elem_id=self._id(name), size="sm", min_width=100, **words[name])
                setattr(self, name, self._name(button, name))

    def _build_settings(self, shows_thinking: bool) -> None:
        words = texts(self.drawn_in).told["box"]
        self.system = self._name(gr.Textbox(elem_id=self._id("system"), lines=2, max_lines=12, **words["system"]), "system")
        self.tools = self._name(
            gr.Textbox(elem_id=self._id("tools"), elem_classes="chat-tools", lines=2, max_lines=16, **words["tools"]), "tools"
        )
        self.tools_said = gr.HTML("", elem_id=self._id("tools-said"), elem_classes="chat-tools-said", visible=False)
        self.settings: dict[str, Any] = {}
        rest = [name for name in type(self.options).model_fields if name not in self.options.first]
        for group, names, opened in (("sampling", self.options.first, True), ("more", rest, False)):
            with self._name(gr.Accordion(open=opened, elem_id=self._id(group), **words[group]), group):
                for name in names:
                    self.settings[name] = widget(self.options, name, self._id(f"set-{name}"), self.drawn_in)
                    self._named.append((self.settings[name], lambda language, name=name: field_words(type(self.options), name, language)))
                if group == "more":
                    self.escapes = self._name(gr.Checkbox(True, elem_id=self._id("escape_html"), **words["escape_html"]), "escape_html")
        if not shows_thinking:
            self.settings["enable_thinking"].visible = False

    def _wire(self) -> None:
        said_with = [self.session, self.language, self.escapes, self.system, self.tools, *self.settings.values()]
        shown = [self.shown, self.message, self.send, self.stop, self.how]
        answers: dict[str, Any] = {
            "outputs": shown,
            "show_progress": "hidden",
            "concurrency_limit": _MOST_TALKS,
            "concurrency_id": "answers",
            "api_visibility": "private",
        }
        plain: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
        gr.on([self.message.submit, self.send.click], self._say, [self.message, *said_with], trigger_mode="once", **answers)
        self.retry.click(self._retry, said_with, trigger_mode="once", **answers)
        self.stop.click(_end, self.session, None, **plain)
        gr.on([self.clear.click, self.shown.clear], self._clear, [self.session, self.language], [*shown], **plain)
        self.edit.click(self._edit, [self.session, self.language, self.escapes], [self.shown, self.message], **plain)
        self.tools.change(self._look_at_tools, [self.tools, self.language], self.tools_said, trigger_mode="always_last", **plain)
        self.escapes.change(self._shown, [self.session, self.language, self.escapes], self.shown, **plain)

    retry: gr.Button
    edit: gr.Button
    clear: gr.Button

    @property
    def named(self) -> list[Any]:
        """The components that `in_language` gives new texts, in its order."""
        return [self.language, *(component for component, _ in self._named), self.message, self.shown, self.tools_said, self.how]

    def in_language(self, language: str, session: Session, escapes: bool, tools: str) -> list[Any]:
        """All texts of the box."""
        named = [type(component)(**words(language)) for component, words in self._named]
        message = gr.Textbox(**_asking(session.talk, language))
        shown = gr.Chatbot(bubbles(session.talk, session.last, language, escapes), **texts(language).part("box.talk"))
        return [language, *named, message, shown, self._look_at_tools(tools, language), _how(session.last, language)]

    @property
    def inputs(self) -> list[Any]:
        """What `in_language` is given beside the language."""
        return [self.session, self.escapes, self.tools]

    def _say(self, text: str, session: Session, language: str, *rest: Any) -> Iterator[tuple[Any, ...]]:
        """Say what was typed. Where it cannot be answered, nothing was said and the text stays."""
        if not text.strip() or session.busy:
            yield _unchanged()
            return
        yield from self._answer(session, language, rest, lambda: session.talk.say(text.strip()), "")

    def _retry(self, session: Session, language: str, *rest: Any) -> Iterator[tuple[Any, ...]]:
        """Answer anew."""
        if session.busy:
            yield _unchanged()
        elif not session.talk.due and not any(message.role in ("assistant", "function") for message in session.talk.messages):
            gr.Warning(texts(language).say("talk_nothing_to_retry"))
            yield _unchanged()
        else:
            yield from self._answer(session, language, rest, lambda: None if session.talk.due else session.talk.take_back(), None)

    def _answer(
        self, session: Session, language: str, rest: tuple[Any, ...], change: Callable[[], None], left: str | None
    ) -> Iterator[tuple[Any, ...]]:
        """Change the talk, answer if that is due, and show it as it comes; `left` is what stays in the message's field."""
        (escapes, system, tools, *values), before = rest, list(session.talk.messages)
        try:
            options = self.options.changed(
                **{name: None if value == "" else value for name, value in zip(self.settings, values, strict=True)}
            )
            session.talk.tell(system)
            session.talk.offer(tools)
            change()
            session.last = self._speaker(language).begin(session.talk, options) if session.talk.due else None
        except UserError as error:
            session.talk.messages[:] = before
            gr.Warning("\n".join(error.complaints))
            yield _unchanged()
            return
        answering = session.last
        yield _drawn(session, language, escapes, left)
        drawn = time.monotonic()
        for _ in answering or ():
            if time.monotonic() - drawn > _REFRESH_SECONDS:
                drawn = time.monotonic()
                yield _drawn(session, language, escapes, None)
        yield _drawn(session, language, escapes, None)

    def _speaker(self, language: str) -> Speaker:
        if (speaker := self.speaker()) is None:
            raise UserError(texts(language).say("talk_no_model"))
        return speaker

    def _clear(self, session: Session, language: str) -> tuple[Any, ...]:
        """Begin anew, in any case."""
        _end(session)
        session.talk, session.last = Talk(), None
        return _drawn(session, language, True, None)

    def _edit(self, session: Session, language: str, escapes: bool) -> tuple[Any, ...]:
        """Take the last question back into the field, with all that came after it."""
        talk = session.talk
        if session.busy or not talk.question:
            gr.Warning(texts(language).say("talk_nothing_to_edit"))
            return gr.skip(), gr.skip()
        text = talk.question
        talk.forget_question()
        return bubbles(talk, None, language, escapes), gr.Textbox(text, **_asking(talk, language))

    def _shown(self, session: Session, language: str, escapes: bool) -> list[Any]:
        return bubbles(session.talk, session.last, language, escapes)

    def _look_at_tools(self, tools: str, language: str) -> gr.HTML:
        """What is to be said beside the field of tools."""
        told, fault = self._told_of_tools(tools, language)
        text = f"<span role={'alert class=bad' if fault else 'status'}>{escape(told)}</span>"
        return gr.HTML(text if told else "", visible=bool(told))

    def _told_of_tools(self, tools: str, language: str) -> tuple[str, bool]:
        """A sentence, and whether it tells of a fault."""
        try:
            names = tool_names(tools)
        except UserError as error:
            return texts(language).say("talk_bad_tools", why=str(error)), True
        speaker = self.speaker()
        if names and speaker is not None and speaker.dialect is None:
            return texts(language).say("talk_no_dialect"), True
        return texts(language).say("talk_tools", count=len(names), names=", ".join(names)) if names else "", False


def _end(session: Session) -> None:
    """Stop the answer that is on its way, if one is: it ends by itself then, with what was said."""
    if session.last is not None and session.busy:
        session.last.stop()


def _asking(talk: Talk, language: str) -> dict[str, Any]:
    """The texts of the message's field: a result, where the model waits for one."""
    owed = talk.owed
    words = texts(language).part("box.result" if owed else "box.message")
    return {**words, "label": words["label"].format(name=owed[0].name)} if owed else dict(words)


def _unchanged() -> tuple[Any, ...]:
    return (gr.skip(),) * 5


def _drawn(session: Session, language: str, escapes: bool, text: str | None) -> tuple[Any, ...]:
    """Talk, field, buttons and the line below; `text` is what the field is to hold, if something else than before."""
    busy = session.busy
    words: dict[str, Any] = _asking(session.talk, language)
    message = gr.skip() if busy and text is None else gr.Textbox(**words) if text is None else gr.Textbox(text, **words)
    shown = bubbles(session.talk, session.last, language, escapes)
    return shown, message, gr.Button(visible=not busy), gr.Button(visible=busy), _how(session.last, language)


def _how(answering: Answering | None, language: str) -> str:
    """How fast it went, and why it ended."""
    if answering is None or answering.first_seconds is None:
        return ""
    rate, first = answering.tokens_per_second or 0.0, answering.first_seconds
    told = texts(language).say("talk_speed", tokens=answering.num_tokens, rate=f"{rate:.1f}", first=f"{first:.2f}")
    end = texts(language).say(f"talk_{answering.finish}") if answering.finish in ("length", "stopped") else ""
    return f"{told}, {end}" if end else told

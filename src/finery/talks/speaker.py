"""Who answers in a talk: a loaded model, its template and the way in which it calls tools."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from functools import cached_property
from typing import Any

from finery.data.answers import dialect_of
from finery.data.dialects.base import Dialect, read_tools
from finery.data.reading import reader_for
from finery.data.sample import BadRecord, Message
from finery.data.template import Template
from finery.engines.base import Ask, Engine, GenerationOptions
from finery.errors import UserError
from finery.run import Run
from finery.talks.answering import Answering
from finery.talks.options import TalkOptions
from finery.talks.talk import Talk
from finery.training.preparation import run_template


class Speaker:
    """Answers in any number of talks at a time, from any thread."""

    def __init__(self, engine: Engine, template: Template, run: Run) -> None:
        self.engine = engine
        self.template = template
        self.run = run
        self.options = TalkOptions.of(run)
        self._turn = threading.Lock()  # tokenizers and templates are used by one at a time

    @property
    def name(self) -> str:
        """What the model is called by the user."""
        return str(self.run.model.model_name_or_path).rstrip("/").rpartition("/")[2]

    @cached_property
    def dialect(self) -> Dialect | None:
        """In which the model calls tools; nothing where it does not, or in no way that Finery reads."""
        with self._turn:
            return dialect_of(self.template)

    @cached_property
    def chooses_thinking(self) -> bool:
        """Whether it makes a difference to this model that it is told to think."""
        one, other = (self._template(thinks).prompt_ids([Message("user", "Hi")]) for thinks in (True, False))
        return one != other

    def begin(self, talk: Talk, options: TalkOptions) -> Answering:
        """The answer that is due; raises `UserError` where it cannot be given."""
        tools = talk.tools
        dialect = self.dialect if tools else None
        try:
            with self._turn:
                template = self._template(options.enable_thinking)
                prompt = template.prompt_ids(talk.messages, talk.system, tools)
                reader = reader_for(template, prompt, dialect, read_tools(tools), self._clean(options))
        except BadRecord as error:
            raise UserError(str(error)) from None
        drawn: dict[str, Any] = {name: getattr(options, name) for name in GenerationOptions.model_fields}
        drawn["skip_special_tokens"] = False  # the marks of thoughts and calls may be some
        return Answering(talk, self.engine.begin(Ask(prompt, GenerationOptions(**drawn), seed=options.seed)), reader)

    def _clean(self, options: TalkOptions) -> Any:
        words = self.template.spelled.every.pattern
        return (lambda text: words.sub("", text)) if options.skip_special_tokens else str

    def _template(self, thinks: bool) -> Template:
        if thinks == bool(self.run.template.enable_thinking):
            return self.template
        return self._other

    @cached_property
    def _other(self) -> Template:
        """The template of answers that think where the run's do not, or the other way round."""
        chosen = self.run.template.model_copy(update={"enable_thinking": not self.run.template.enable_thinking})
        return run_template(replace(self.run, template=chosen), copy.deepcopy(self.template.tokenizer))

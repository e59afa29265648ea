"""The models that this page's process answers with: the chosen one, and its base beside it; all windows share them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from finery.compat import free_memory
from finery.data.template import Template
from finery.engines.base import Engine
from finery.errors import UserError
from finery.run import Run
from finery.talks.speaker import Speaker

Opener = Callable[[Run], tuple[Engine, Template]]
BASE_KEYS = ("adapter_name_or_path", "served_adapters", "output_dir")
"""What makes a model another one than its base."""


class Loaded:
    """One model at a time, and its base where that is asked for."""

    def __init__(self, open_engine: Opener | None = None) -> None:
        self._open = open_engine
        self._turn = threading.Lock()
        self.keys: dict[str, Any] | None = None
        self.speaker: Speaker | None = None
        self.base: Speaker | None = None

    def load(self, keys: Mapping[str, Any]) -> Speaker:
        """Put this model in the place of the one before; raises `UserError`, and then none is loaded."""
        with self._turn:
            self._close()
            self.speaker = self._speaker(keys)
            self.keys = dict(keys)
            return self.speaker

    def load_base(self) -> Speaker | None:
        """The base of what is loaded, loaded once; the same where nothing was tuned, and nothing where nothing is loaded."""
        with self._turn:
            if self.keys is None or self.base is not None:
                return self.base
            plain = {key: value for key, value in self.keys.items() if key not in BASE_KEYS}
            self.base = self.speaker if plain == self.keys else self._speaker(plain)
            return self.base

    def unload(self) -> None:
        """Give their memory back; answers on their way end."""
        with self._turn:
            self._close()

    def _speaker(self, keys: Mapping[str, Any]) -> Speaker:
        if self._open is None:
            raise UserError("this page loads no models")
        run = Run.from_dict(dict(keys))
        return Speaker(*self._open(run), run)

    def _close(self) -> None:
        if self.speaker is None:
            return
        for speaker in {self.speaker, self.base} - {None}:
            speaker.engine.close()  # type: ignore[union-attr]
        self.keys = self.speaker = self.base = None
        free_memory()  # before the next one wants it

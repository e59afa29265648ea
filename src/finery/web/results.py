"""What runs have written, one of them shown: read from files, so that every window shows the same, whoever started it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import gradio as gr

from finery.errors import UserError
from finery.jobs import Job, find
from finery.web.board import Board
from finery.web.live import Live
from finery.web.watching import folder_of

MOST_LISTED = 200


class Results(ABC):
    """A list of results below what one tab starts; that of the chosen job comes by itself, as soon as there is one."""

    tab: ClassVar[str]
    files: ClassVar[Sequence[str]]  # one of these makes a folder a result
    reads: ClassVar[Sequence[str]] = ()  # parts beside the list that choose what is shown

    def __init__(self, board: Board, live: Live) -> None:
        self.board, self.live = board, live
        tab = self.tab
        board.add(f"{tab}.result_of", gr.Dropdown, choices=[], value=None, allow_custom_value=True)
        board.parts[f"{tab}.followed"] = gr.State("")  # the job and the state of its files that were shown last
        self.shows = self.draw()
        self._wire()

    @abstractmethod
    def draw(self) -> list[str]:
        """Draw what shows a result; returns the ids of its parts."""

    @abstractmethod
    def show(self, folder: Path, held: Mapping[str, Any]) -> dict[str, Any]:
        """Updates of all that `draw` has drawn; raises `UserError` for files that say nothing."""

    @abstractmethod
    def nothing(self) -> dict[str, Any]:
        """Updates that show no result."""

    @abstractmethod
    def folders(self, held: Mapping[str, Any]) -> Iterator[Path]:
        """Where results of this model may lie."""

    def _wire(self) -> None:
        board, tab, parts = self.board, self.tab, self.board.parts
        model = ["top.model_name", "top.model_path", "top.finetuning_type"]
        self.read_ids = [f"{tab}.result_of", *self.reads]
        self.held_ids = [*model, f"{tab}.job", f"{tab}.followed", *self.read_ids]
        followed = [parts[f"{tab}.progress"].change, parts[f"{tab}.job"].change]
        every = [f"{tab}.result_of", f"{tab}.followed", *self.shows]
        board.on(followed, self.follow, self.held_ids, every)
        board.on(parts[f"tabs.{tab}"].select, self.opened, self.held_ids, every)
        board.on(parts[f"{tab}.result_of"].input, lambda held: self.look(self._from_its_start(held)), self.read_ids, self.shows)
        board.on(parts[f"{tab}.result_of"].focus, lambda held: gr.update(choices=self.there(held)), self.held_ids, [f"{tab}.result_of"])

    def there(self, held: Mapping[str, Any]) -> list[str]:
        """Folders with results, the newest first, as the list has them."""
        found = [(stamp, folder) for folder in self.folders(held) if (stamp := self.stamp(folder))]
        return [self.board.roots.named(folder) for _, folder in sorted(found, reverse=True)[:MOST_LISTED]]

    def look(self, held: Mapping[str, Any]) -> dict[str, Any]:
        """The chosen result; nothing where none is chosen."""
        if not (name := held[f"{self.tab}.result_of"]):
            return {}
        folder = self.board.roots.path(name, "result_of")
        if not self.stamp(folder):
            raise UserError(f"{name} holds no result")
        return self.show(folder, held)

    def opened(self, held: Mapping[str, Any]) -> dict[str, Any]:
        """The tab is looked at: the newest result is shown where none is."""
        id, there = f"{self.tab}.result_of", self.there(held)
        if held[id] or held[f"{self.tab}.followed"] or not there:
            return {id: gr.update(choices=there)}
        return {id: gr.update(choices=there, value=there[0]), **self.look({**held, id: there[0]})}

    def follow(self, held: Mapping[str, Any]) -> dict[str, Any]:
        """The chosen job's result, as soon as there is one, and again as it grows; not where another one is looked at since.

        Until then nothing is shown: what an earlier one has written is not taken for this one's.
        """
        id, tab = held[f"{self.tab}.job"], self.tab
        is_new = not held[f"{tab}.followed"].startswith(f"{id} ")
        try:
            folder = self._of(find(id)) if id else None
            if folder is None:
                return {f"{tab}.result_of": None, f"{tab}.followed": f"{id} ", **self.nothing()} if id and is_new else {}
            name, stamp = self.board.roots.named(folder), f"{id} {self.stamp(folder)}"
            is_new = is_new or held[f"{tab}.followed"] == f"{id} "
            if stamp == held[f"{tab}.followed"] or (not is_new and name != held[f"{tab}.result_of"]):
                return {}
            shown = self.look({**(self._from_its_start(held) if is_new else held), f"{tab}.result_of": name})
        except UserError:  # a job that is gone, or one of a shell that stood elsewhere
            return {}
        return {f"{tab}.result_of": gr.update(choices=self.there(held), value=name), f"{tab}.followed": stamp, **shown}

    def _from_its_start(self, held: Mapping[str, Any]) -> dict[str, Any]:
        return {**held, **dict.fromkeys(self.reads)}

    def _of(self, job: Job) -> Path | None:
        """The folder of what a job itself has written."""
        began, folder = job.status().began, folder_of(job)
        if not began or folder is None:
            return None
        fresh = [(stamp, path) for path in (folder, self.aside(folder)) if (stamp := self.stamp(path)) >= began]
        return max(fresh)[1] if fresh else None

    def aside(self, folder: Path) -> Path:
        """Where a run puts what it does not let pass."""
        return folder

    def stamp(self, folder: Path) -> float:
        """When a result was written last; 0 where there is none."""
        return max((path.stat().st_mtime for name in self.files for path in folder.glob(name)), default=0.0)


def below(folder: Path) -> Iterator[Path]:
    """The folders in a folder."""
    yield from (path for path in (folder.iterdir() if folder.is_dir() else ()) if path.is_dir() and not path.name.startswith("."))

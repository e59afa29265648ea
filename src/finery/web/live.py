"""A job as it goes: progress, curves, output; what stands under the controls of every tab that starts one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from finery.errors import UserError
from finery.jobs import find, jobs
from finery.web.board import Board
from finery.web.curves import Curve, picture
from finery.web.texts import Texts
from finery.web.watching import Seen, bar, listed, loss_curves, output, rates, see, warnings

EVERY_SECONDS = 2.0


class Live:
    """The parts by which one tab watches a job, and those that stop it."""

    def __init__(self, board: Board, tab: str, verb: str, has_curves: bool = True) -> None:
        self.board, self.tab, self.verb, self.has_curves = board, tab, verb, has_curves
        with gr.Row():
            board.add(f"{tab}.job", gr.Dropdown, choices=[], value=None, scale=3, allow_custom_value=True)
            board.add(f"{tab}.stop_btn", gr.Button, variant="stop", size="sm", min_width=90, scale=0, interactive=False)
            board.add(f"{tab}.kill_btn", gr.Button, variant="secondary", size="sm", min_width=90, scale=0, visible=False)
        board.add(f"{tab}.progress", gr.HTML)
        board.add(f"{tab}.warnings", gr.HTML)
        if has_curves:
            with gr.Row():
                board.add(f"{tab}.loss_viewer", gr.HTML, scale=3, min_width=320)
                board.add(f"{tab}.rate_viewer", gr.HTML, scale=2, min_width=280)
        board.add(f"{tab}.output_box", gr.HTML)
        self.drawn = gr.State("")  # the signature of the curves that this page shows
        self.timer = gr.Timer(EVERY_SECONDS, active=tab == "train")  # the tab that is seen first
        board.parts[f"{tab}.drawn"] = self.drawn
        self._wire()

    @property
    def shows(self) -> list[str]:
        """The ids of all that `look` renews."""
        names = ["job", "progress", "warnings", "output_box", "stop_btn", "kill_btn", "drawn"]
        return [f"{self.tab}.{name}" for name in [*names, *(("loss_viewer", "rate_viewer") if self.has_curves else ())]]

    def _wire(self) -> None:
        board, tab = self.board, self.tab
        watched = [f"{tab}.job", f"{tab}.drawn"]
        board.on([self.timer.tick, board.parts[f"{tab}.job"].change], self.look, watched, self.shows)
        board.on(board.parts[f"{tab}.job"].focus, lambda held: gr.update(choices=listed()), [], [f"{tab}.job"])
        for name, now in (("stop_btn", False), ("kill_btn", True)):
            click = board.parts[f"{tab}.{name}"].click
            board.on(click, lambda held, now=now: self._stop(held, now), watched, self.shows)

    def look(self, held: Mapping[str, Any]) -> dict[str, Any]:
        """What the page shows of its job now."""
        spoken = self.board.texts
        id = held[f"{self.tab}.job"]
        if not id:
            return {f"{self.tab}.progress": f"<p>{spoken.say('no_job')}</p>"}
        try:
            seen = see(find(id))
        except UserError as error:
            return {f"{self.tab}.progress": f"<p>{error}</p>"}
        return self._updates(seen, spoken, held[f"{self.tab}.drawn"])

    def _updates(self, seen: Seen, spoken: Texts, drawn: str) -> dict[str, Any]:
        tab, runs = self.tab, not seen.status.has_ended
        if seen.signature == drawn and not runs:
            return {}
        found = {
            f"{tab}.progress": bar(seen, spoken),
            f"{tab}.warnings": warnings(seen),
            f"{tab}.output_box": output(seen),
            f"{tab}.stop_btn": gr.update(interactive=runs),
            f"{tab}.kill_btn": gr.update(visible=seen.status.state == "stopping"),
        }
        if seen.signature != drawn:
            found[f"{tab}.drawn"] = seen.signature
            found[f"{tab}.job"] = gr.update(choices=listed())
        if self.has_curves and seen.signature != drawn:
            found[f"{tab}.loss_viewer"] = picture(spoken.say("loss"), loss_curves(seen.lines, spoken), spoken.say("no_points"))
            rate = Curve(spoken.say("rate"), rates(seen.lines), "c0")
            found[f"{tab}.rate_viewer"] = picture(rate.name, [rate], spoken.say("no_points"))
        return found

    def _stop(self, held: Mapping[str, Any], now: bool) -> dict[str, Any]:
        if not held[f"{self.tab}.job"]:
            raise UserError("no job is chosen")
        find(held[f"{self.tab}.job"]).stop(now=now)
        return self.look(held)

    def watch(self, id: str | None = None) -> Any:
        """An update of the list of jobs that chooses one: `id`, else the newest of this tab's that runs, else its newest."""
        mine = [job for job in reversed(jobs()) if self.verb in (job.name or "train").partition("-")[0]]
        running = [job for job in mine if not job.status().has_ended]
        return gr.update(choices=listed(), value=id or next((job.id for job in [*running, *mine]), None))

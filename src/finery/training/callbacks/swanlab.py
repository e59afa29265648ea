"""SwanLab: the course of a run on swanlab.cn or a board of one's own, and a message to Lark when it ends."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finery.compat import have, need
from finery.options import Finding, OptionGroup, PathText
from finery.training.callbacks.base import Callback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["SwanLab"]

PUBLIC = "swanlab_public_config.json"
"""Where the run can be looked at, for whoever shows a link."""


class SwanLab(Callback):
    """Passes what happens on to the callback that the swanlab package has for transformers."""

    class Options(OptionGroup):
        use_swanlab: bool = False
        """Follow the run with SwanLab."""
        swanlab_project: str | None = "llamafactory"
        """SwanLab's project."""
        swanlab_workspace: str | None = None
        """SwanLab's workspace; not given, the one of the key's owner."""
        swanlab_run_name: str | None = None
        """What the run is called there; not given, as run_name, or else SwanLab makes up a name."""
        swanlab_mode: Literal["cloud", "local"] = "cloud"
        """Send the figures to SwanLab (cloud), or keep them in files here (local)."""
        swanlab_api_key: str | None = None
        """The key of your SwanLab account, where SWANLAB_API_KEY or an earlier login has none; it is never written down."""
        swanlab_logdir: PathText | None = None
        """SwanLab's own folder; not given, swanlog in the working directory."""
        swanlab_lark_webhook_url: str | None = None
        """The address of a Lark bot that tells when the run ends; it is never written down."""
        swanlab_lark_secret: str | None = None
        """The secret that the Lark bot's messages are signed with."""

    tracker = "swanlab"
    inner: Any = None

    @classmethod
    def wanted(cls, options: Any) -> bool:
        """`use_swanlab: true`."""
        return options.use_swanlab

    @property
    def secrets(self) -> Sequence[str]:
        """The key, the address and its secret."""
        given = (self.options.swanlab_api_key, self.options.swanlab_lark_webhook_url, self.options.swanlab_lark_secret)
        return [secret for secret in given if secret]

    def check(self, run: Any) -> Iterator[Finding]:
        """The package must be there, and a secret has an address."""
        options = self.options
        if options.use_swanlab and not have("swanlab"):
            yield Finding("use_swanlab", 'needs a package that is not installed: pip install "finery[track]"')
        elif options.use_swanlab and options.swanlab_mode == "local" and not have("swanboard"):
            yield Finding("swanlab_mode", "is 'local': to look at it you will need pip install 'swanlab[dashboard]'", fatal=False)
        if options.swanlab_lark_secret and not options.swanlab_lark_webhook_url:
            yield Finding("swanlab_lark_secret", "needs 'swanlab_lark_webhook_url', whose messages it signs")

    def on_train_begin(self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any) -> None:
        """Log in, and begin SwanLab's run."""
        self._pass_on("on_train_begin", args, state, control, kwargs)
        if state.is_world_process_zero and self.options.swanlab_mode == "cloud":
            found = {"cloud": {"experiment_url": need("swanlab").get_run().url}}
            (Path(str(args.output_dir)) / PUBLIC).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    def on_log(self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any) -> None:
        """Send figures."""
        self._pass_on("on_log", args, state, control, kwargs)

    def on_evaluate(self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any) -> None:
        """Send what was measured."""
        self._pass_on("on_evaluate", args, state, control, kwargs)

    def on_save(self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any) -> None:
        """Tell where the newest checkpoint is."""
        self._pass_on("on_save", args, state, control, kwargs)

    def on_train_end(self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any) -> None:
        """What is measured after the last step may still come: the package ends its run with the process."""
        self._pass_on("on_train_end", args, state, control, kwargs)

    def _pass_on(self, hook: str, args: Any, state: Any, control: Any, kwargs: Mapping[str, Any]) -> None:
        if state.is_world_process_zero:
            self.inner = self.inner or self._build(args.run_name)
            getattr(self.inner, hook)(args, state, control, **kwargs)

    def _build(self, run_name: str | None) -> Any:
        """Logged in, with the bot if there is one."""
        options = self.options
        swanlab = need("swanlab")
        if options.swanlab_api_key and options.swanlab_mode == "cloud":
            swanlab.login(api_key=options.swanlab_api_key, save=False)
        if options.swanlab_lark_webhook_url:
            from swanlab.plugin.notification import LarkCallback  # type: ignore[import-not-found]

            swanlab.merge_callbacks(LarkCallback(webhook_url=options.swanlab_lark_webhook_url, secret=options.swanlab_lark_secret))
        from swanlab.integration.transformers import SwanLabCallback  # type: ignore[import-not-found]

        return SwanLabCallback(
            project=options.swanlab_project,
            workspace=options.swanlab_workspace,
            experiment_name=options.swanlab_run_name or run_name,
            mode={"cloud": "online", "local": "local"}[options.swanlab_mode],
            log_dir=options.swanlab_logdir,
        )

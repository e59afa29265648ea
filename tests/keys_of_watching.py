"""Cases of the keys that say what watches a run, and when it is enough. `test_every_key.py` runs them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from watched import Bench, Case, evaluated_at, says

MEASURED = {"val_size": 4, "eval_strategy": "steps", "eval_steps": 1, "finetuning_type": "full", "learning_rate": 3.0, "max_steps": 4}
"""It gets worse from the first step on."""

TRAINED: dict[str, Case] = {
    "early_stopping_steps": Case(
        1,
        lambda run: (evaluated_at(run)[-1], says("training stops")(run)),
        ((4, False), (2, True)),
        MEASURED | {"lr_scheduler_type": "constant"},
    ),
    "on_nonfinite": Case("skip", says("The step is skipped"), (False, True), {"learning_rate": 1e30, "max_steps": 3}),
    "save_verify": Case(True, says("loaded anew, what was saved gives a loss of"), (False, True)),
}


@contextmanager
def swanlab(bench: Bench) -> Iterator[list[tuple[str, Any]]]:
    """What a package with swanlab's interface is told."""
    calls: list[tuple[str, Any]] = []

    def told(name: str) -> Callable[..., Any]:
        return lambda *_, **how: calls.append((name, how))

    class Inner:
        def __init__(self, **how: Any) -> None:
            calls.append(("callback", how))

        def __getattr__(self, hook: str) -> Callable[..., Any]:
            return told(hook)

    class Lark:
        def __init__(self, **how: Any) -> None:
            calls.append(("lark", how))

    package, inner, plugin, lark = (
        ModuleType(f"swanlab{name}") for name in ("", ".integration.transformers", ".plugin", ".plugin.notification")
    )
    run = type("Run", (), {"url": "https://swanlab.example", "id": "one"})
    vars(package).update(login=told("login"), merge_callbacks=told("merge_callbacks"), get_run=lambda: run)
    vars(inner).update(SwanLabCallback=Inner)
    vars(lark).update(LarkCallback=Lark)
    with bench.patch.context() as patch:
        for module in (package, inner, plugin, lark, ModuleType("swanlab.integration")):
            patch.setitem(sys.modules, module.__name__, module)
        for place in ("finery.training.callbacks.swanlab", "finery.compat"):
            patch.setattr(f"{place}.have", lambda _: True)
        yield calls


def tells(key: str, value: Any, name: str, field: str, wanted: tuple[Any, Any]) -> Callable[[Bench], None]:
    """A case that looks at what the package is told with the default and with the other value."""

    def case(bench: Bench) -> None:
        beside = {"swanlab_lark_webhook_url": "https://bot.example"} if key == "swanlab_lark_secret" else {}
        found = []
        for changes in ({}, {key: value}):
            with swanlab(bench) as calls:
                assert not bench.train(**{"use_swanlab": True, **beside, **changes}).complaint
            found.append(next((how.get(field) for called, how in calls if called == name), None))
        assert tuple(found) == wanted

    return case


def use_swanlab(bench: Bench) -> None:
    for value, wanted in ((False, 0), (True, 1)):
        with swanlab(bench) as calls:
            bench.train(use_swanlab=value)
        assert sum(name == "callback" for name, _ in calls) == wanted


OTHERS: dict[str, Callable[[Bench], None]] = {
    "use_swanlab": use_swanlab,
    "swanlab_project": tells("swanlab_project", "mine", "callback", "project", ("llamafactory", "mine")),
    "swanlab_workspace": tells("swanlab_workspace", "ours", "callback", "workspace", (None, "ours")),
    "swanlab_run_name": tells("swanlab_run_name", "first", "callback", "experiment_name", (None, "first")),
    "swanlab_mode": tells("swanlab_mode", "local", "callback", "mode", ("online", "local")),
    "swanlab_logdir": tells("swanlab_logdir", "boards", "callback", "log_dir", (None, "boards")),
    "swanlab_api_key": tells("swanlab_api_key", "abc", "login", "api_key", (None, "abc")),
    "swanlab_lark_webhook_url": tells("swanlab_lark_webhook_url", "https://bot", "lark", "webhook_url", (None, "https://bot")),
    "swanlab_lark_secret": tells("swanlab_lark_secret", "xyz", "lark", "secret", (None, "xyz")),
}

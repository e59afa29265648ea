"""What the trainer's own keys need: of each other, and of packages that may not be installed."""

from collections.abc import Iterator, Mapping
from typing import Any

from finery.compat import have
from finery.options import Finding

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "swanlab": "swanlab", "trackio": "trackio"}
"""What `report_to` may name of the trackers that we know, and the package that each needs."""

INSTEAD = {
    **{f"galore_{kind}": "set 'use_galore: true' instead" for kind in ("adamw", "adamw_8bit", "adafactor")},
    **{
        f"galore_{kind}_layerwise": "set 'use_galore: true' and 'galore_layerwise: true' instead"
        for kind in ("adamw", "adamw_8bit", "adafactor")
    },
    "apollo_adamw": "set 'use_apollo: true' instead",
    "apollo_adamw_layerwise": "set 'use_apollo: true' and 'apollo_layerwise: true' instead",
}
"""Values of `optim` that transformers would step or save in a way that does not fit, and what serves."""


def check_rest(rest: Mapping[str, Any], saves: bool) -> Iterator[Finding]:
    """`rest` holds what is handed to the trainer; `saves` tells whether checkpoints are written."""
    for key in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
        if rest.get(key) and not rest.get("dataloader_num_workers"):
            yield Finding(key, "needs 'dataloader_num_workers' to be 1 or more")
    named = rest.get("report_to") or ()
    for name in (named,) if isinstance(named, str) else named:
        if name in TRACKERS and not have(TRACKERS[name]):
            yield Finding("report_to", f"names {name!r}, which is not installed: pip install {TRACKERS[name]}")
    optim = rest.get("optim", "")
    if optim in INSTEAD:
        yield Finding("optim", f"is {optim!r}: {INSTEAD[optim]}")
    if optim == "grokadamw" and saves:
        yield Finding("optim", "is 'grokadamw', whose state cannot be saved: set 'save_strategy' to no")

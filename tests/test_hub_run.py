"""A whole run from a hub: model and data set are named, downloaded, trained, and found again in the cache."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_hub import FakeHub, serving

DATA = b'[{"instruction": "Say one", "input": "", "output": "one"}, {"instruction": "Say two", "input": "", "output": "two"}]'


@pytest.mark.parametrize(("variable", "revision"), [("USE_NO_OTHER_HUB", "main"), ("USE_MODELSCOPE_HUB", "master")])
def test_training_from_a_hub(
    variable: str, revision: str, keys: Callable[..., dict[str, Any]], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in a process of its own, since both clients keep the first address that they are given."""
    if variable == "USE_MODELSCOPE_HUB":
        pytest.importorskip("modelscope")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv(variable, "1")
    hub = FakeHub()
    hub.add("models/org/tiny", revision, {path.name: path.read_bytes() for path in tiny_model.iterdir()})
    hub.add("datasets/org/counts", revision, {"data.json": DATA})
    (tmp_path / "dataset_info.json").write_text(json.dumps({"counts": {"hf_hub_url": "org/counts", "ms_hub_url": "org/counts"}}))
    given = keys(model_name_or_path="org/tiny", dataset="counts", dataset_dir=str(tmp_path), cache_dir=str(tmp_path / "hub"), max_steps=1)
    words = [f"{key}={json.dumps(value)}" for key, value in given.items()]

    def finery(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "finery", *command], env=os.environ, capture_output=True, text=True, timeout=300)

    with serving(hub, monkeypatch):
        trained = finery("train", *words)
        assert trained.returncode == 0, trained.stderr[-2000:]
        assert any("counts" in path for path, _ in hub.asked)
    # the hub is gone: the model is taken from the cache
    said = finery("chat", *words, "max_new_tokens=2", "--prompt", "Say one")
    assert said.returncode == 0, said.stderr[-2000:]
    assert "taking the trained model in" in said.stderr

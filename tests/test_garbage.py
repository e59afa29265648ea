"""What is called from Python again and again leaves no model in memory and no file open."""

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import finery
from finery.commands.chat import open_engine
from finery.errors import UserError
from finery.web.loaded import Loaded

Keys = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def nothing_is_collected_by_chance() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def models() -> int:
    """How many are in memory, among what is no longer used but not collected, too."""
    from transformers import PreTrainedModel

    return sum(issubclass(type(thing), PreTrainedModel) for thing in gc.get_objects())


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files as Linux tells them")
def test_models_go_when_the_work_is_done(keys: Keys, tmp_path: Path) -> None:
    given = keys(output_dir=str(tmp_path / "out"))

    def train_export_and_chat(name: str) -> tuple[int, int]:
        trained = given | {"output_dir": str(tmp_path / name)}
        folder = finery.train(trained)
        exported = finery.export(trained | {"adapter_name_or_path": str(folder), "export_dir": str(tmp_path / f"{name}-merged")})
        served = {key: value for key, value in given.items() if key in ("model_name_or_path", "template")}
        finery.chat(served | {"model_name_or_path": str(exported), "max_new_tokens": 2}, [{"role": "user", "content": "Hi"}])
        return models(), open_files()

    before = models()
    first = train_export_and_chat("one")
    assert first[0] == before
    assert train_export_and_chat("two") == first


def test_a_run_that_fails_leaves_no_model(keys: Keys, tmp_path: Path) -> None:
    before = models()
    with pytest.raises(UserError):
        finery.train(keys(output_dir=str(tmp_path / "out"), resume_from_checkpoint=str(tmp_path / "nowhere")))
    assert models() == before


def test_the_page_gives_a_model_s_memory_back(keys: Keys) -> None:
    before = models()
    loaded = Loaded(open_engine)
    loaded.load({"model_name_or_path": keys()["model_name_or_path"]})
    assert models() > before
    loaded.unload()
    del loaded
    assert models() == before

"""What every registered part promises, asked of each by its name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines.opening import opened
from finery.data.formats import FORMATS
from finery.data.formats.base import Columns, Tags
from finery.data.rows import ROWS
from finery.data.rows.base import IGNORED, Row, RowOptions
from finery.data.sample import BadRecord, Message, Sample
from finery.data.template import TemplateOptions, load_template, template_names
from finery.engines import ENGINES
from finery.engines.base import GenerationOptions
from finery.methods import METHODS
from finery.models.adapters import ADAPTERS
from finery.models.head import teach
from finery.models.load import load_model
from finery.options import OptionGroup
from finery.registry import Registry
from finery.training.callbacks import CALLBACKS

EVERY = [(registry, name) for registry in (METHODS, ADAPTERS, ENGINES, CALLBACKS) for name in registry.names()]
SAMPLE = Sample(
    (Message("user", "Who are you?"), Message("assistant", "I am small."), Message("user", "Sure?"), Message("assistant", "Yes."))
)


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(tiny_model))


@pytest.mark.parametrize(("registry", "name"), EVERY, ids=lambda value: value if isinstance(value, str) else value.kind)
def test_options_are_frozen_and_explained(registry: Registry, name: str) -> None:
    options = registry[name].Options()
    assert isinstance(options, OptionGroup)
    for key, field in type(options).model_fields.items():
        assert field.description, f"{key} has no help"
        with pytest.raises(ValueError, match="frozen"):
            setattr(options, key, getattr(options, key))


def test_no_two_parts_own_a_key() -> None:
    from finery.run import all_options

    owned = [key for group in all_options().values() if group is not OptionGroup for key in group.model_fields]
    assert sorted(owned) == sorted(set(owned))


@pytest.mark.parametrize("name", FORMATS.names())
@pytest.mark.parametrize(
    "record", [{}, {"instruction": None}, {"conversations": []}, {"conversations": [{"from": "gpt"}]}, {"instruction": 3}]
)
def test_a_format_refuses_with_a_reason(name: str, record: dict[str, Any]) -> None:
    with pytest.raises(BadRecord, match=r"\w"):
        FORMATS[name](Columns(), Tags()).read(record)


@pytest.mark.parametrize("name", ROWS.names())
@pytest.mark.parametrize("template", [None, *template_names()])
def test_rows_keep_their_promises(name: str, template: str | None, tokenizer: Any) -> None:
    if template in ("chatglm3", "yuan"):  # they look tokens up by name
        words = ["[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<sep>"]
        tokenizer.add_special_tokens({"additional_special_tokens": words})
    for cutoff in (5, 30, 500):
        rows = ROWS[name](load_template(TemplateOptions(template=template), tokenizer), RowOptions(cutoff_len=cutoff))
        encoded = rows.encode(SAMPLE)
        assert bool(encoded.rows) != bool(encoded.reason)
        assert all(len(row.ids) == len(row.labels) <= cutoff for row in encoded.rows)
        late = rows.template.late_end  # learnt where another token stands
        assert all(((row.labels == IGNORED) | (row.labels == row.ids) | (row.labels == late)).all() for row in encoded.rows)
        assert all(row.num_supervised for row in encoded.rows)
    short = Row(np.asarray([1, 2], np.int32), np.asarray([IGNORED, 2], np.int32))
    batch = rows.collate([*encoded.rows, short])
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(len(encoded.rows) + 1, max(len(row.ids) for row in encoded.rows))}


@pytest.mark.parametrize("name", METHODS.names())
def test_a_loss_is_a_sum_with_its_weight(name: str, tiny_model: Path, tokenizer: Any) -> None:
    method = METHODS[name](METHODS[name].Options())
    rows = ROWS[method.rows](load_template(TemplateOptions(), tokenizer), RowOptions(cutoff_len=500))
    encoded = list(rows.encode(SAMPLE).rows)
    model = load_model(tiny_model, torch.float32, False).eval()
    teach(model)
    with torch.no_grad():
        one, two = (method.loss(model, rows.collate(encoded * count)) for count in (1, 2))
    assert float(one.weight) == method.weight(encoded)
    assert float(two.total) == pytest.approx(2 * float(one.total), rel=1e-5)
    assert float(two.weight) == 2 * float(one.weight)


@pytest.mark.parametrize("name", ADAPTERS.names())
def test_an_adapter_starts_where_the_model_is_and_trains_something(name: str, tiny_model: Path) -> None:
    adapter = ADAPTERS[name](ADAPTERS[name].Options())
    ids = torch.arange(3, 20)[None]
    plain = load_model(tiny_model, torch.float32, False).eval()
    with torch.no_grad():
        wanted = plain(input_ids=ids).logits
        model = adapter.apply(load_model(tiny_model, torch.float32, False)).eval()
        assert torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-6)
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert adapter.config_file.endswith(".json")
    assert adapter.model_file.endswith(".safetensors")


@pytest.mark.parametrize("name", ENGINES.names())
def test_an_engine_streams_stops_and_can_be_left(name: str, tiny_model: Path, tokenizer: Any) -> None:
    """More is asked of it in tests/engines/test_contract.py."""
    greedy = GenerationOptions.model_validate({"do_sample": False, "max_new_tokens": 12})
    prompt = tokenizer("Who are you?")["input_ids"]
    with opened(name, tiny_model) as engine:
        whole = engine.generate(prompt, greedy)
        assert whole
        assert "".join(engine.stream(prompt, greedy)) == whole
        stream: Any = engine.stream(prompt, GenerationOptions.model_validate({"do_sample": False, "max_new_tokens": 100_000}))
        next(stream)
        stream.close()  # comes back at once, and not after a hundred thousand tokens
    first = tokenizer(whole)["input_ids"][0]
    with opened(name, tiny_model, stop_ids=frozenset([first])) as engine:
        assert len(engine.generate(prompt, greedy)) < len(whole)


@pytest.mark.parametrize("name", CALLBACKS.names())
def test_a_callback_can_be_joined_with_the_trainers(name: str) -> None:
    from transformers import TrainerCallback

    part = CALLBACKS[name]
    joined = type(part.__name__, (part, TrainerCallback), {})(part.Options(), ("loss",))
    hooks = {hook for hook in vars(part) if hook.startswith("on_")}
    assert hooks
    assert all(hasattr(TrainerCallback, hook) for hook in hooks), "a hook that nobody calls"
    joined.close()


def test_parts_of_other_packages_join_by_an_entry_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import finery.registry
    from finery.methods.sft import SFT

    (tmp_path / "elsewhere.py").write_text("from finery.methods.sft import SFT\n\nclass Mine(SFT):\n    pass\n")
    info = tmp_path / "elsewhere-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[finery.methods]\nmine = elsewhere:Mine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("_entry_points", "_of_all_packages"):  # as a process finds them that begins now
        found: Callable[..., Any] = getattr(finery.registry, name)
        monkeypatch.setattr(finery.registry, name, found.__wrapped__)  # type: ignore[attr-defined]
    assert "mine" in METHODS.names()
    assert issubclass(METHODS["mine"], SFT)

"""The server under a mixed load: half an hour in `make soak`; and what the pages say of speed is what the kept runs have shown."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from load import GROWTH, failed, soak

DOCS = Path(__file__).parents[2] / "docs"


def kept(name: str) -> dict[str, Any]:
    return json.loads((DOCS / name).read_text(encoding="utf-8"))


@pytest.mark.slow
def test_half_an_hour_of_mixed_load() -> None:
    from finery.models.demo_model import demo_model

    report = soak(float(os.environ.get("FINERY_SOAK_MINUTES", "30")), 32, str(demo_model()))
    assert not failed(report), report


def test_a_fault_or_growth_fails_a_load() -> None:
    good = {"faults": 0, "server_alive": True, "growth": GROWTH}
    assert not failed(good)
    assert failed(good | {"faults": 1}) and failed(good | {"growth": GROWTH + 0.001}) and failed(good | {"server_alive": False})


@pytest.mark.parametrize("page", ["serving.md", "serving_zh.md"])
def test_the_page_tells_the_kept_soak(page: str) -> None:
    report, text = kept("soak/serving.json"), (DOCS / page).read_text(encoding="utf-8")
    assert report["command"] == "python tests/load.py --minutes 30 --clients 32"
    assert report["minutes"] >= 30 and report["clients"] == 32 and not failed(report)
    assert f"{report['requests']:,}" in text and f"{report['growth']:.2%}" in text


@pytest.mark.parametrize("page", ["serving.md", "serving_zh.md"])
def test_the_page_tells_the_kept_figures(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    found = kept("serving/against_others.json")
    for name, digits in (("together", 1), ("alone", 1), ("first_token_seconds", 3)):
        ours, peer, theirs = (found[who][name] for who in ("finery", "peer", "transformers"))
        to_peer, to_theirs = (found[f"ratio_to_{who}"][name] for who in ("peer", "transformers"))
        assert f"| {ours:.{digits}f} | {peer:.{digits}f} ({to_peer:.2f} ×) | {theirs:.{digits}f} ({to_theirs:.2f} ×) |" in text
    assert found["finery"]["same_text"] is True and found["answers_in_turn"] >= 4 and found["later_ends_earlier"] is True


@pytest.mark.parametrize("page", ["predict.md", "predict_zh.md"])
def test_the_page_tells_the_kept_figures_of_predictions(page: str) -> None:
    text, found = (DOCS / page).read_text(encoding="utf-8"), kept("serving/predict.json")
    for name in ("seconds", "predict_seconds"):
        assert all(f"{found[name][who]:.1f}" in text for who in ("finery", "peer")), name
        assert f"{found[name]['ratio']:.2f}" in text

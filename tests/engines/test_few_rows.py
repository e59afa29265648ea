"""Products of few rows: what torch gives, and for each row the very bits that it gives alone."""

import pytest
import torch
from torch import nn

from finery.engines.functions import few_rows as module_of_few_rows
from finery.engines.functions.few_rows import MOST_ROWS, few_rows, is_right, serve_few_rows
from finery.engines.functions.native_weights import Weights
from finery.models.kernels import native

pytestmark = pytest.mark.skipif(not native.serves(torch.zeros(1)), reason="needs a C compiler")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "inner", "outer"), [(1, 16, 1), (2, 48, 7), (3, 31, 64), (5, 16, 33), (8, 576, 100), (15, 64, 17), (140, 128, 40)]
)
def test_products_are_torchs_and_rows_do_not_see_each_other(rows: int, inner: int, outer: int, dtype: torch.dtype) -> None:
    dice = torch.Generator().manual_seed(rows)
    weight, weights = torch.randn(outer, inner, generator=dice).to(dtype), Weights()
    for bias in (None, torch.randn(outer, generator=dice)):
        x, matrix = torch.randn(rows, inner, generator=dice), weights.matrix([(weight, bias)])
        assert matrix.is_bf16 == (dtype == torch.bfloat16)
        found = few_rows(x, matrix)
        assert torch.allclose(found, nn.functional.linear(x, weight.float(), bias), atol=1e-4, rtol=1e-4)
        assert torch.equal(found, torch.cat([few_rows(row[None], matrix) for row in x]))
    assert is_right(dtype)


def test_numbers_that_are_none_stay_so() -> None:
    x, weights = torch.zeros(2, 16), Weights()
    x[1, 3] = float("nan")
    found = few_rows(x, weights.matrix([(torch.ones(4, 16), None)]))
    assert bool(torch.isfinite(found[0]).all()) and bool(torch.isnan(found[1]).all())


def test_layers_use_it_for_few_rows_alone() -> None:
    """Weights that bf16 holds without loss are read as bf16, with the same result."""
    torch.manual_seed(0)
    exact, other = nn.Linear(32, 8), nn.Linear(20, 8)
    exact.weight.data = exact.weight.data.bfloat16().float()
    model = nn.ModuleList([exact, other, nn.Embedding(3, 3)]).eval()
    assert serve_few_rows(model) == 2
    assert serve_few_rows(model) == 0, "they do so already"
    assert [one.forward.args[1].is_bf16 for one in (exact, other)] == [1, 0]  # type: ignore[attr-defined]
    for one in (exact, other):
        x, many = torch.randn(2, 3, one.in_features), torch.randn(MOST_ROWS + 1, one.in_features)
        with torch.no_grad():
            assert torch.allclose(one(x), nn.functional.linear(x, one.weight, one.bias), atol=1e-5)
            assert torch.equal(one(many), nn.functional.linear(many, one.weight, one.bias))
        assert one(x).requires_grad, "where gradients are wanted, torch's product serves"


def test_without_memory_torch_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_of_few_rows, "free_bytes", lambda device: 100)
    assert serve_few_rows(nn.ModuleList([nn.Linear(32, 8)])) == 0

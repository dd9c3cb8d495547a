"""Products of few rows made the other way are the same products, and leave no trace in the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_hybrid.core.rows import Rows
from hf_hybrid.models import products
from hf_hybrid.models.cached import CachedRunner
from hf_hybrid.models.products import FewRows, flipped, most_rows
from tests.models_for_tests import tiny

CPU = torch.device("cpu")


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine is, ``flipped`` is taken for the faster way, even for small weights."""
    monkeypatch.setattr(products, "most_rows", lambda threads: 64)
    monkeypatch.setattr(products, "_SMALL", 0)


def few_rows(model: nn.Module, dtype: torch.dtype = torch.float32) -> FewRows:
    return FewRows(model, CPU, dtype)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 64])
def test_it_is_the_product(rows: int) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 96), torch.randn(160, 96)
    product = flipped(x, weight)
    exact = x.double() @ weight.double().T  # (rows, 160)
    # 96 products of the order of 1 are added, each rounded to 2 ** -24 of a sum that stays below 100.
    assert product.shape == (rows, 160) and product.is_contiguous()
    assert (product - exact).abs().max() < 96 * 100 * 2**-24


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [lambda x: x, lambda x: x[None], lambda x: x.reshape(2, 3, 48), lambda x: x.T.contiguous().T]
)
@torch.no_grad()
def test_a_layer_as_before(faster: None, bias: bool, shape: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 80, bias=bias)
    x = shape(torch.randn(6, 48))
    before = layer(x)
    with few_rows(nn.Sequential(layer)).of(6):
        assert "forward" in layer.__dict__
        inside = layer(x)
    assert inside.shape == before.shape and inside.is_contiguous()
    torch.testing.assert_close(inside, before)
    assert torch.equal(layer(x), before)


@torch.no_grad()
def test_one_row_and_many_are_the_hosts(faster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, made = nn.Linear(48, 80), []
    monkeypatch.setattr(products, "flipped", lambda x, weight: made.append(len(x)) or flipped(x, weight))
    found = few_rows(nn.Sequential(layer))
    with found.of(1):
        assert "forward" not in layer.__dict__
    for rows in (1, 2, found.most, found.most + 1):  # a head has fewer rows than its pass
        with found.of(40):
            layer(torch.randn(rows, 48))
    assert made == [2, found.most]


def test_no_trace_is_left_behind_an_error(faster: None) -> None:
    model = nn.Sequential(nn.Linear(48, 80), nn.Linear(80, 48))
    with pytest.raises(RuntimeError), few_rows(model).of(4), torch.no_grad():
        model(torch.randn(4, 47))
    assert not any("forward" in layer.__dict__ for layer in model)


@torch.no_grad()
def test_two_passes_of_one_model_at_a_time(faster: None) -> None:
    """As of two threads: the one that ends first leaves the other with the host's products."""
    layer = nn.Linear(48, 80)
    found = few_rows(nn.Sequential(layer))
    with found.of(4):
        with found.of(4):
            pass
        assert torch.isfinite(layer(torch.randn(4, 48))).all()
    assert "forward" not in layer.__dict__


class _Subclass(nn.Linear):
    pass


class _Quantised(Tensor):
    pass


def _with_own_forward(layer: nn.Linear) -> nn.Linear:
    layer.forward = layer.forward  # type: ignore[method-assign]  # as accelerate and others do
    return layer


def _quantised(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(_Quantised), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        _Subclass(48, 80),
        _with_own_forward(nn.Linear(48, 80)),
        _quantised(nn.Linear(48, 80)),
        nn.Linear(48, 80, dtype=torch.bfloat16),
        nn.Linear(48, 80, device="meta"),
        nn.utils.parametrizations.weight_norm(nn.Linear(48, 80)),
    ],
    ids=["subclass", "own forward", "quantised", "bfloat16", "offloaded", "parametrised"],
)
def test_layers_that_do_more_are_let_alone(faster: None, layer: nn.Linear) -> None:
    own = dict(layer.__dict__)
    plain = nn.Linear(48, 80)
    with few_rows(nn.Sequential(layer, plain)).of(4):
        assert "forward" in plain.__dict__
        assert layer.__dict__.get("forward") is own.get("forward")
    assert layer.__dict__.get("forward") is own.get("forward")


def _compiled_in_place() -> nn.Module:
    model = nn.Sequential(nn.Linear(48, 80))
    model.compile()
    return model


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch.compile
@pytest.mark.parametrize("compiled", [lambda: torch.compile(nn.Linear(48, 80)), _compiled_in_place])
def test_a_compiled_model_is_let_alone(faster: None, compiled: Callable[[], nn.Module]) -> None:
    assert few_rows(compiled()).kind == "packed"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_let_alone(faster: None, dtype: torch.dtype) -> None:
    layer = nn.Linear(48, 80, dtype=dtype)
    found = few_rows(nn.Sequential(layer), dtype)
    with found.of(4):
        assert "forward" not in layer.__dict__
    assert (found.most, found.kind) == (0, "packed")


def test_hooks_of_a_layer_run(faster: None) -> None:
    layer, seen = nn.Linear(48, 80), []
    layer.register_forward_hook(lambda *_: seen.append(1))
    with few_rows(nn.Sequential(layer)).of(4), torch.no_grad():
        layer(torch.randn(4, 48))
    assert seen == [1]


@torch.no_grad()
def test_a_weight_that_is_replaced_later_counts(faster: None) -> None:
    """Such as by an adapter that is merged between two calls."""
    layer = nn.Linear(48, 80)
    found = few_rows(nn.Sequential(layer))
    layer.weight = nn.Parameter(torch.ones(80, 48))
    layer.bias = nn.Parameter(torch.zeros(80))
    with found.of(4):
        assert torch.equal(layer(torch.ones(4, 48)), torch.full((4, 80), 48.0))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("flipped", {1: 1, 2: 2, 3: 4, 4: 4, 8: 8, 9: 16, 15: 16, 16: 16, 17: 17}),
        ("packed", {1: 1, 2: 5, 4: 5, 5: 5, 9: 9}),
        ("other", {1: 1, 2: 2, 3: 3, 9: 9}),
    ],
)
def test_filled(faster: None, kind: str, expected: dict[int, int]) -> None:
    found = few_rows(nn.Linear(48, 80))
    found.kind = kind
    assert {rows: found.filled(rows) for rows in expected} == expected


def test_measured_on_this_machine_once() -> None:
    assert most_rows(torch.get_num_threads()) in {0, 4, 16, 64}
    hits = most_rows.cache_info().hits
    most_rows(torch.get_num_threads())
    assert most_rows.cache_info().hits == hits + 1


def test_a_pass_of_the_runner(faster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of a pass of five rows as without (of one row: up to what it reads of the five)."""
    torch.manual_seed(0)
    model: Any = tiny("llama").float()
    made: list[int] = []
    monkeypatch.setattr(products, "flipped", lambda x, weight: made.append(len(x)) or flipped(x, weight))
    tokens = torch.randint(3, 20, (1, 6))

    def logits(most: int) -> list[Tensor]:
        runner = CachedRunner(model, 1)
        assert runner.products.most == 64
        runner.products.most = most
        if not most:
            runner.products._forwards = []
        found = []
        for chosen in (slice(0, 5), slice(5, 6)):
            columns = torch.arange(6)[None, chosen]
            rows = Rows.clean(columns, torch.zeros_like(columns))
            found.append(runner.run(tokens[:, chosen], rows, columns.shape[1]).logits.clone())
            runner.commit()
        return found

    five, one = logits(64)
    assert set(made) == {5}
    made.clear()
    five_before, one_before = logits(0)
    assert not made
    torch.testing.assert_close(five, five_before)
    torch.testing.assert_close(one, one_before)

"""The row rule against the table it is written from.

Catches: an anchor test with <= instead of < (the answer leaks into its own block), positions compared across spans (an
    overrun part
is seen only in part), clean rows that see noisy ones, padding that sees or is seen, a closure that stops too early, and
drawings in the docstring that no longer show what the code does.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_hybrid.core import rows as rows_module
from hf_hybrid.core.rows import PADDING, Rows, transitive_closure, visible


def sees(q: dict[str, int], k: dict[str, int], depends: Tensor) -> bool:
    """The table of the module, one cell at a time."""
    if q["span"] == PADDING or k["span"] == PADDING:
        return False
    if k["noisy"]:
        return bool(q["noisy"]) and q["block"] == k["block"]
    if q["span"] != k["span"]:
        return bool(depends[q["span"], k["span"]])
    return k["position"] < q["anchor"] if q["noisy"] else k["position"] <= q["position"]


def cell(rows: Rows, b: int, r: int) -> dict[str, int]:
    return {name: int(getattr(rows, name)[b, r]) for name in ("position", "span", "noisy", "anchor", "block")}


def oracle(queries: Rows, keys: Rows, depends: Tensor) -> Tensor:
    batch, num_queries = queries.position.shape
    out = torch.zeros(batch, num_queries, keys.position.shape[1], dtype=torch.bool)
    for b in range(batch):
        for q in range(num_queries):
            for k in range(keys.position.shape[1]):
                out[b, q, k] = sees(cell(queries, b, q), cell(keys, b, k), depends[b])
    return out


def random_rows(g: torch.Generator, batch: int, count: int, spans: int) -> Rows:
    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (batch, count), generator=g)

    return Rows(draw(0, 6), draw(PADDING, spans), draw(0, 2).bool(), draw(0, 7), draw(0, 3))


def random_depends(g: torch.Generator, batch: int, spans: int) -> Tensor:
    return transitive_closure(torch.rand(batch, spans, spans, generator=g).tril() > 0.6)


@pytest.mark.parametrize("seed", range(6))
def test_visible_is_the_table(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    depends = random_depends(g, 3, 4)
    queries, keys = random_rows(g, 3, 7, 4), random_rows(g, 3, 11, 4)
    got = visible(queries, keys, depends)
    assert got.shape == (3, 7, 11) and got.dtype == torch.bool
    assert torch.equal(got, oracle(queries, keys, depends))


def test_padding_sees_nothing_and_is_not_seen() -> None:
    g = torch.Generator().manual_seed(7)
    rows = random_rows(g, 2, 20, 3)
    seen = visible(rows, rows, torch.ones(2, 3, 3, dtype=torch.bool))
    padding = rows.span == PADDING
    assert padding.any() and seen.any()
    assert not seen[padding].any()
    assert not seen.transpose(1, 2)[padding].any()


def test_permuted_rows_permute_the_mask() -> None:
    g = torch.Generator().manual_seed(8)
    rows, depends = random_rows(g, 2, 9, 3), random_depends(g, 2, 3)
    order = torch.randperm(9, generator=g)
    moved = rows.select(order)
    assert torch.equal(visible(moved, moved, depends), visible(rows, rows, depends)[:, order][:, :, order])


def test_an_overrun_span_is_wholly_visible_to_a_dependent_one() -> None:
    # Span 0 was planned for positions 0-3 and grew to 7; span 1 starts at 4 all the same.
    grown = Rows.clean(torch.arange(8).unsqueeze(0), torch.zeros(1, 8, dtype=torch.long))
    later = Rows.clean(torch.tensor([[4]]), torch.tensor([[1]]))
    assert visible(later, grown, torch.tensor([[[1, 0], [1, 1]]]).bool()).all()
    assert not visible(later, grown, torch.eye(2).bool().unsqueeze(0)).any()


def drawing(rows: Rows, depends: Tensor, names: str) -> list[str]:
    seen = visible(rows, rows, depends)[0].tolist()
    lines = ["  " + " ".join(names)]
    return lines + [
        f"{name} " + " ".join("x" if s else "." for s in line) for name, line in zip(names, seen, strict=True)
    ]


def drawn(lines: list[str]) -> bool:
    """True: the docstring holds ``lines`` below one another (a neighbour drawing may be beside them)."""
    text = (rows_module.__doc__ or "").splitlines()
    return any(
        all(line in text[start + i] for i, line in enumerate(lines)) for start in range(len(text) - len(lines) + 1)
    )


def make(position: list[int], span: list[int], noisy: list[int], anchor: list[int], block: list[int]) -> Rows:
    whole = [torch.tensor([field]) for field in (position, span, noisy, anchor, block)]
    return Rows(whole[0], whole[1], whole[2].bool(), whole[3], whole[4])


def test_the_drawings_of_the_docstring() -> None:
    alone = torch.ones(1, 1, 1, dtype=torch.bool)
    causal = Rows.clean(torch.arange(3).unsqueeze(0), torch.zeros(1, 3, dtype=torch.long))
    assert drawn(drawing(causal, alone, "abc"))
    block = make([0, 1, 2, 3], [0] * 4, [0, 0, 1, 1], [0, 0, 2, 2], [0] * 4)
    assert drawn(drawing(block, alone, "abmm"))
    # t at 0; A at 1 with m at 2; B at 4 with n at 5.
    spans = make([0, 1, 4, 2, 5], [0, 1, 2, 1, 2], [0, 0, 0, 1, 1], [0, 0, 0, 2, 5], [0, 0, 0, 0, 1])
    depends = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]).bool()
    assert drawn(drawing(spans, depends, "tABmn"))
    assert not drawn(["  a b c", "a x x x"])  # the search itself can fail


@pytest.mark.parametrize("spans", [0, 1, 2, 3, 5, 9, 17])
def test_closure_is_warshalls(spans: int) -> None:
    g = torch.Generator().manual_seed(spans)
    depends = torch.rand(4, spans, spans, generator=g) < 1.2 / max(spans, 1)
    expected = depends.clone()
    for b in range(4):
        for i in range(spans):
            expected[b, i, i] = True
        for via in range(spans):
            for i in range(spans):
                for j in range(spans):
                    expected[b, i, j] |= expected[b, i, via] & expected[b, via, j]
    assert torch.equal(transitive_closure(depends), expected)


@pytest.mark.parametrize("spans", [2, 3, 4, 5, 8, 9, 33])
def test_closure_follows_the_longest_chain(spans: int) -> None:
    chain = torch.ones(spans, spans).tril(-1).triu(-1).bool()
    assert torch.equal(transitive_closure(chain), torch.ones(spans, spans).tril().bool())

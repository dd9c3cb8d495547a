"""The numbers of the bench of drafting.

Bugs these tests catch: a ratio upside down, or of means; repeats of different prompts paired; seconds compared where
answers differ in length.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from speculation_for_tests import SETTINGS

from benchmarks import speculation as task
from benchmarks.speculation import Journal


def answer(seconds: float, tokens: int = 10, **changes: Any) -> dict[str, Any]:
    values = {"seconds": seconds, "tokens": [1] * tokens, "passes": 5, "accepted": None, "share_off": None}
    return {**values, "difference": None, "peak_memory_mb": 100.0, **changes}


def test_results_are_medians_of_paired_ratios(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", SETTINGS)
    plain = {"a": (4.0, 4.0, 8.0), "b": (1.0, 1.0, 1.0), "c": (6.0, 6.0, 6.0)}
    own = {"a": (2.0, 1.0, 2.0), "b": (2.0, 2.0, 1.0), "c": (2.0, 2.0, 2.0)}  # ratios 2 4 4; 0.5 0.5 1; 3 3 3
    right = {"position": 3, "right": True}
    for repeat in range(3):
        for prompt in plain:
            ours = answer(own[prompt][repeat], accepted=float(repeat), peak_memory_mb=110.0)
            if prompt == "b" and repeat == 1:
                ours["difference"] = right
            if prompt == "c":
                ours["difference"] = {**right, "right": False}
            answers = {"speculative": ours, "plain": answer(plain[prompt][repeat])}
            answers["stock_lookup"] = answer(plain[prompt][repeat] / 2)
            about = {"kind": "answers", "repeat": repeat, "category": "edit", "prompt": prompt, "second": False}
            journal.append({**about, "answers": answers})
            again = {"plain": answer(2.0), "speculative": answer(0.5)}
            journal.append({**about, "second": True, "answers": again})
    results = {(result.method, result.second): result for result in task.speculation_results(journal)}
    assert list(results)[:3] == [("plain", False), ("stock_lookup", False), ("speculative", False)]
    ours = results["speculative", False]
    assert (ours.ratio, ours.worst_prompt, ours.worst_ratio, ours.ratio_to_stock) == (3.0, "b", 0.5, 1.5)
    assert (ours.prompts, ours.equal, ours.right) == (3, 1, 2)
    assert {found["prompt"] for found in ours.differences} == {"b", "c"}
    assert ours.accepted == 1.0 and ours.tokens_per_pass == 2.0
    assert ours.tokens_per_second == pytest.approx(30 / 6)  # medians of seconds: 2, 2, 2
    assert ours.peak_memory_ratio == pytest.approx(1.1)
    assert results["plain", False].ratio == 1.0 and results["stock_lookup", False].ratio == 2.0
    second = results["speculative", True]
    assert second.ratio == 4.0 and second.gain_of_memory == pytest.approx(4 / 3)  # 4/4, 4/0.5, 4/3


def test_tokens_count_where_answers_differ_in_length(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", SETTINGS)
    answers = {"plain": answer(1.0, 10), "speculative": answer(1.0, 5)}
    about = {"kind": "answers", "repeat": 0, "category": "edit", "prompt": "a", "second": False}
    journal.append({**about, "answers": answers})
    assert [result.ratio for result in task.speculation_results(journal)] == [1.0, 0.5]

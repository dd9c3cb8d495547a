"""The card and the README's table come from measured JSON alone.

Catches: a number typed into the template or the table, a column that shows another field, metadata that the Hub would
refuse, a run without right answers or without parts, markers that are lost when the table is replaced.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from hf_hybrid.hub.card import BEGIN, END, CardError, main, read_results, render_table, update_readme, write_card


def result(name: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "strategy": name,
        "settings": {},
        "baseline": False,
        "seconds_per_answer": seconds,
        "speedup": 0.4321 / seconds,
        "speedup_interval": [1.23, 4.56],
        "speedup_prompts": 150,
        "speedup_all": 2.34,
        "tokens_per_forward": 7.89,
        "num_forwards": 20.5,
        "seconds_to_first_text": None,
        "field_exact_match": 0.987,
        "answer_exact_match": 0.876,
        "answer_exact_match_interval": [0.81, 0.92],
        "equal_to": None,
        "equal_share": None,
        **more,
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    data = {
        "command": "hf-hybrid bench",
        "commit": "abc123",
        "versions": {"torch": "9.9.9"},
        "device": {"type": "cpu", "processor": "Abacus", "threads": 2, "dtype": "float32"},
        "num_prompts": 208,
        "batch_size": 1,
        "shape": {
            "countries": 13,
            "prompt_tokens": 145.0,
            "answer_tokens": 164.0,
            "parts": 5.0,
            "longest_to_mean_part": 1.54,
        },
        "results": [
            result("host", 0.4321, baseline=True),
            result("verified", 0.1, equal_to="host", equal_share=0.995),
        ],
    }
    path = tmp_path / "results.json"
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    save_file({"a": torch.zeros(1000, 1500), "b": torch.zeros(500)}, folder / "model.safetensors")
    (folder / "training.json").write_text(json.dumps({"recipe": "tiny", "steps": 77}))
    return folder


def test_table_shows_the_measured_numbers(results: Path) -> None:
    table = render_table(read_results(results))
    row = next(line for line in table.splitlines() if line.startswith("| `verified`"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "`verified`",
        "0.100",
        "4.32x (1.23-4.56)",
        "2.34x",
        "7.9",
        "20.5",
        "-",
        "98.7%",
        "87.6% (81%-92%)",
    ]
    assert "`host` (baseline)" in table and "never seen, one at a time, float32" in table
    assert "both answers are right (150 of 208)" in table
    assert "`verified` wrote the same text as `host` on 99.5% of the prompts." in table


def numbers_in(value: Any) -> list[float]:
    """Every number of a JSON value, those inside its strings too."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers_in(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    if isinstance(value, str):
        return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", value)]
    return [float(value)] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def test_every_number_of_the_table_is_in_the_json(results: Path) -> None:
    data = read_results(results)
    known = numbers_in(data)
    table = render_table(data).replace("95 % intervals", "intervals")  # the level is the code's, not the run's
    shown = re.findall(r"\d+(?:\.\d+)?", table)
    assert len(shown) > 30

    def measured(number: str) -> bool:
        digits = len(number.partition(".")[2])
        return any(number in (f"{value:.{digits}f}", f"{100 * value:.{digits}f}") for value in known)

    assert [number for number in shown if not measured(number)] == []


def test_what_was_not_measured_is_a_dash(results: Path) -> None:
    data = read_results(results)
    data["device"] |= {"type": "cuda", "processor": "Chip"}
    data["shape"] |= {"parts": None, "longest_to_mean_part": None}
    data["results"] = [result("host", 0.4321, speedup=None, speedup_interval=None, speedup_all=None)]
    table = render_table(data)
    assert "| `host` | 0.432 | - | - | 7.9 |" in table
    assert "float32, Chip, one" in table and "CPU" not in table and "None" not in table


def test_card_has_metadata_and_no_number_of_its_own(results: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "cards" / "README.md"
    write_card(checkpoint, [results], out)
    card = ModelCard.load(out)
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.license == "apache-2.0" and "hf_hybrid" in (card.data.tags or [])
    measured = card.text.partition("## Measured")[2].partition("## Data")[0]
    assert render_table(read_results(results)) in measured
    assert "1.5 million parameters" in card.text and "77 steps" in card.text
    rest = measured.replace(render_table(read_results(results)), "")
    assert re.findall(r"\d[\d.]*", rest) == ["123", "9.9.9."]  # commit abc123 and the version


def test_readme_keeps_what_is_around_the_table(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# A\n{BEGIN}\nold\n{END}\nrest\n")
    main([str(results), "--readme", str(readme)])
    text = readme.read_text()
    assert text.startswith(f"# A\n{BEGIN}\n") and text.endswith(f"{END}\nrest\n")
    assert "old" not in text and render_table(read_results(results)) in text
    update_readme(readme, results)
    assert readme.read_text() == text


def test_bad_input_is_named(results: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(CardError, match=r"broken\.json is not what"):
        read_results(broken)
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    with pytest.raises(CardError, match="markers"):
        update_readme(readme, results)
    with pytest.raises(CardError, match=r"training\.json"):
        write_card(tmp_path, [results], tmp_path / "card.md")

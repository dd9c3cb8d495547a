"""The tables of cards and of the README come from measured JSON alone.

Catches: a number typed into a table, a column that shows another field, a run without right answers or without parts,
groups that are left out, markers that are lost when the table is replaced.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_hybrid.hub.tables import (
    BEGIN,
    END,
    CardError,
    read_results,
    render_passes,
    render_summary,
    render_table,
    update_readme,
)
from tests.hub.results_for_tests import bench_results, numbers_in, shown_in, unmeasured, write_results


def row(table: str, name: str, which: int = 0) -> list[str]:
    lines = [line for line in table.splitlines() if line.startswith(f"| `{name}` ")]
    return [cell.strip() for cell in lines[which].strip("|").split("|")]


def test_a_table_shows_the_measured_numbers() -> None:
    data = bench_results()
    table, verified = render_table(data), data["results"][1]
    low, high = verified["speedup_interval"]
    right, least, most = verified["answer_exact_match"], *verified["answer_exact_match_interval"]
    assert row(table, "verified") == [
        "`verified`",
        f"{verified['seconds_per_answer']:.3f}",
        f"{verified['speedup']:.2f}x ({low:.2f}-{high:.2f})",
        f"{verified['speedup_all']:.2f}x",
        f"{verified['tokens_per_forward']:.1f}",
        f"{verified['num_forwards']:.1f}",
        "-",
        f"{100 * verified['field_exact_match']:.1f}%",
        f"{100 * right:.1f}% ({100 * least:.0f}%-{100 * most:.0f}%)",
    ]
    assert "`host` (baseline)" in table and "never seen, in batches of 91009, float91007" in table
    counted = [result["speedup_prompts"] for result in data["results"]]
    assert f"both answers are right ({min(counted)} to {max(counted)} of 91008)" in table
    assert "`verified` wrote the same text as `host` on 91.0% of the prompts." in table


def test_the_summary_shows_time_and_right_answers() -> None:
    data = bench_results()
    whole, short = row(render_table(data), "verified"), row(render_summary(data), "verified")
    assert short == [whole[0], whole[1], whole[2], whole[8]]  # name, seconds, speedup, answers right
    assert render_table(data).splitlines()[0].startswith(render_summary(data).splitlines()[-1].partition(". ")[0])
    assert "91015" not in render_summary(data), "no groups"


def test_the_groups_are_shown() -> None:
    data = bench_results()
    table = render_table(data)
    assert "| | 91015: speedup | prompts | answers right | 91016: speedup |" in table
    cells = [cell for group in data["groups"] for cell in (group["results"][1],)]
    assert row(table, "verified", which=1) == [
        "`verified`",
        *(
            text
            for r in cells
            for text in (f"{r['speedup']:.2f}x", str(r["speedup_prompts"]), f"{100 * r['answer_exact_match']:.1f}%")
        ),
    ]
    data["groups"] = data["groups"][:1]
    assert "91015" not in render_table(data)  # one group is the whole run


def test_every_number_of_the_tables_is_in_the_json() -> None:
    data = bench_results()
    text = f"{render_table(data)}\n{render_passes(data)}\n{render_summary(data)}"
    assert len(shown_in(text)) >= 60
    assert unmeasured(text, numbers_in(data)) == []


def test_what_was_not_measured_is_a_dash() -> None:
    data = bench_results()
    data["device"] |= {"type": "cuda", "processor": "Chip"}
    data["shape"] |= {"parts": None, "longest_to_mean_part": None}
    data["results"][0] |= {"speedup": None, "speedup_interval": None, "speedup_all": None}
    del data["groups"], data["pass_costs"]
    table = render_table(data)
    assert row(table, "host")[2:4] == ["-", "-"]
    assert "float91007, Chip, one" in table and "CPU" not in table and "None" not in table
    assert render_passes(data) == ""


def test_a_readme_keeps_what_is_around_the_table(tmp_path: Path) -> None:
    results = write_results(tmp_path / "results.json")
    readme = tmp_path / "README.md"
    readme.write_text(f"# A\n{BEGIN}\nold\n{END}\nrest\n")
    update_readme(readme, results)
    text = readme.read_text()
    assert text.startswith(f"# A\n{BEGIN}\n") and text.endswith(f"{END}\nrest\n")
    assert "old" not in text and render_summary(read_results(results)) in text
    update_readme(readme, results)
    assert readme.read_text() == text


def test_bad_input_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(CardError, match=r"broken\.json is not what"):
        read_results(broken)
    with pytest.raises(CardError, match=r"nothing\.json is not what"):
        read_results(tmp_path / "nothing.json")
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    with pytest.raises(CardError, match="markers"):
        update_readme(readme, write_results(tmp_path / "results.json"))

"""A card is made from the files of a checkpoint, from measured results and from a text about it.

Catches: a number typed into the template, into a text or into the code; metadata that the Hub would refuse or that says
more than the folder holds; a card for the shipped checkpoint alone; commands in a card that do not run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from typer.testing import CliRunner

from hf_hybrid.checkpoints import bundled
from hf_hybrid.cli import app
from hf_hybrid.hub.card import write_card
from hf_hybrid.hub.tables import CardError, render_table
from tests.hub.results_for_tests import (
    bench_results,
    numbers_in,
    shown_in,
    unmeasured,
    write_results,
    write_tiny_folder,
)

ROOT = Path(__file__).resolve().parents[2]
CARDS = ROOT / "model_cards"
HELD_OUT = 137
ABOUT = """---
license: apache-2.0
language: en
data:
- {name: the book, licence: public domain, source: a library}
widget:
- text: "Once"
---
It has $parameters million parameters.

## What it does

It writes.

## Data

$held_out groups are held out, $measured measured, $steps steps.

## Limits

It cannot read.
"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_results(tmp_path / "results.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = write_tiny_folder(tmp_path / "tiny")
    lines = [{"countries": [f"isle {n}", f"isle {n + 1}"]} for n in range(HELD_OUT - 1)]
    (made / "test_set.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return made


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "about.md"
    path.write_text(ABOUT)
    return path


def headings(card: Any) -> list[str]:
    return re.findall(r"^#+ (.*)$", card.text, flags=re.M)


def test_metadata_is_what_the_hub_reads(folder: Path, results: Path, text: Path) -> None:
    out = write_card(folder, [results], about=text, base_model="alice/base", relation="finetune")
    assert out == folder / "README.md"
    read = metadata_load(out)
    assert read == {
        "license": "apache-2.0",
        "language": "en",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "model_name": "tiny",
        "base_model": "alice/base",
        "base_model_relation": "finetune",
        "widget": [{"text": "Once"}],
        "tags": ["hf_hybrid", "planned-diffusion", "block-diffusion", "speculative"],
    }
    card = ModelCard.load(out)
    assert card.data.to_dict() == ModelCardData(**read).to_dict()
    assert headings(card) == ["tiny", "What it does", "Run it", "Measured", "Data", "Provenance", "Limits"]
    assert render_table(bench_results()) in card.text
    assert "1.5 million parameters" in card.text and "91,100 steps" in card.text
    assert (
        "Base model: `alice/base` (finetune)." in card.text and "the book (public domain), from a library." in card.text
    )
    assert "commit abc91002; torch 91.003, hf_hybrid 91.004" in card.text and "$" not in card.text


def test_no_number_is_typed(folder: Path, results: Path, text: Path) -> None:
    card = write_card(folder, [results], about=text).read_text()
    files = [results, folder / "config.json", folder / "training.json"]
    known = [number for path in files for number in numbers_in(json.loads(path.read_text()))]
    assert len(shown_in(card)) > 70
    counted = [HELD_OUT, "1.5"]  # groups of held-out prompts, million parameters
    assert unmeasured(card.replace("apache-2.0", ""), [*known, *counted]) == []


@pytest.mark.parametrize(
    "path", [ROOT / "hf_hybrid/hub/card_template.md", *CARDS.glob("*/about.md")], ids=lambda p: p.name
)
def test_templates_and_texts_hold_no_number(path: Path) -> None:
    prose = path.read_text(encoding="utf-8").replace("apache-2.0", "")
    assert shown_in(prose) == []


def test_a_checkpoint_that_nobody_told_about(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "plain", hf_hybrid=None)
    (folder / "training.json").unlink()
    card = ModelCard.load(write_card(folder, licence="mit"))
    assert headings(card) == ["plain", "Run it", "Measured", "Provenance", "Limits"]
    assert card.data.tags == ["hf_hybrid", "speculative"] and card.data.license == "mit"
    assert "Nothing was measured yet" in card.text and "(`llama`, 1.5 million parameters)" in card.text
    assert "planned" not in card.text and 'strategy="speculative", drafter="suffix"' in card.text


def test_it_says_what_the_folder_can_do_without_the_plugin(folder: Path, results: Path, text: Path) -> None:
    without = write_card(folder, [results], about=text).read_text()
    assert "trust_remote_code" not in without and "custom_generate" not in without
    assert "loads these weights too, and writes token by token" in without
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("HF_HYBRID = True\n")
    (folder / "generation_config.json").write_text(json.dumps({"hf_hybrid": {"strategy": "planned_diffusion"}}))
    card = write_card(folder, [results], about=text)
    assert metadata_load(card)["tags"][:2] == ["hf_hybrid", "custom_generate"]
    assert "Without `trust_remote_code=True` transformers says nothing, knows no `strategy=`" in card.read_text()
    assert "model.generate(**inputs)  # planned_diffusion" in card.read_text()


def test_a_picture_lies_beside_the_card(folder: Path, results: Path, text: Path, tmp_path: Path) -> None:
    picture = tmp_path / "frontier.png"
    picture.write_bytes(b"picture")
    card = write_card(folder, [results], about=text, picture=picture)
    assert "](frontier.png)" in card.read_text() and (folder / "frontier.png").read_bytes() == b"picture"
    with pytest.raises(CardError, match=r"no picture .*none\.png"):
        write_card(folder, [results], about=text, picture=tmp_path / "none.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("license: apache-2.0\n", ""), "a card names a licence"),
        (("language: en", "langauge: en"), "unknown metadata 'langauge'; choose from license"),
        (("language: en", "language: {a: 1}"), "language must be str or list"),
        (("language: en", "language: [en"), "cannot be read"),
        (("licence: public domain, ", ""), "an entry of data has a name, a licence"),
        (("language: en", "base_model_relation: finetune"), "needs a base_model"),
        (("language: en", "base_model: a/b\nbase_model_relation: cousin"), "choose from finetune"),
        (("$steps", "$epochs"), r"\$epochs is not known of this checkpoint; known: name, parameters"),
        (("$steps", "5 $"), "a dollar sign is written"),
    ],
)
def test_a_bad_text_is_named(folder: Path, text: Path, results: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in ABOUT
    text.write_text(ABOUT.replace(*change))
    with pytest.raises(CardError, match=message):
        write_card(folder, [results], about=text)
    assert not (folder / "README.md").exists()


def test_a_bad_folder_is_named(tmp_path: Path, text: Path) -> None:
    with pytest.raises(CardError, match=r"has no config\.json"):
        write_card(tmp_path, about=text)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CardError, match="must hold a JSON object"):
        write_card(tmp_path, about=text)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CardError, match="no safetensors"):
        write_card(tmp_path, about=text)
    with pytest.raises(CardError, match="no text on the checkpoint"):
        write_card(write_tiny_folder(tmp_path / "tiny"), about=tmp_path / "nothing.md")


def test_the_command_writes_it(folder: Path, results: Path, text: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench:begin -->\n<!-- bench:end -->\n")
    options = ["--results", results, "--about", text, "--name", "alice/tiny", "--readme", readme]
    done = CliRunner().invoke(app, ["card", *map(str, [folder, *options])])
    assert done.exit_code == 0, done.output
    assert done.output.split() == [str(folder / "README.md"), str(readme)]
    assert 'name = "alice/tiny"' in (folder / "README.md").read_text() and "| `verified`" in readme.read_text()
    failed = CliRunner().invoke(app, ["card", str(folder), "--readme", str(readme)])
    assert failed.exit_code == 2 and "--readme needs --results" in failed.output
    failed = CliRunner().invoke(app, ["card", str(folder)])
    assert failed.exit_code == 1 and "error: a card names a licence" in failed.output


def test_the_card_of_the_shipped_checkpoint_is_the_measured_one(tmp_path: Path) -> None:
    results = CARDS / "results" / "hybrid-pocket.json"
    picture = ROOT / "docs" / "frontier.png"
    folder, shipped = bundled("hybrid-pocket"), CARDS / "hybrid-pocket"
    fresh = write_card(
        folder, [results], tmp_path / "README.md", about=shipped / "about.md", picture=picture, portable=True
    )
    assert (shipped / "README.md").read_text(encoding="utf-8") == fresh.read_text(encoding="utf-8")
    assert (shipped / "frontier.png").read_bytes() == picture.read_bytes()
    lines = (folder / "test_set.jsonl").read_text(encoding="utf-8").splitlines()
    names = {name for line in lines for name in json.loads(line)["countries"]}
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    training["history"] = training["history"][-1:]  # the whole curve would hold any number
    files = [results, folder / "config.json"]
    known = [number for path in files for number in numbers_in(json.loads(path.read_text(encoding="utf-8")))]
    million = AutoModelForCausalLM.from_pretrained(folder).num_parameters() / 1e6
    text = fresh.read_text(encoding="utf-8").replace("apache-2.0", "")
    assert unmeasured(text, [*known, *numbers_in(training), len(names), million]) == []


def test_the_commands_of_a_card_run() -> None:
    card = (CARDS / "hybrid-pocket" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", card, re.S)
    assert blocks[0].count("model.generate(") == 5
    # Here it is a folder; the plain line is left to the host.
    block = blocks[0].replace('name = "hybrid-pocket"', f"name = {str(bundled('hybrid-pocket'))!r}")
    block = block.replace("(**inputs", "(**inputs, max_new_tokens=40")
    scope: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), scope)
    assert isinstance(scope["model"], LlamaForCausalLM)

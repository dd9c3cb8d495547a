"""Every table that lists strategies, settings, drafters or forms agrees with every other; what is missing is named.

Catches: a strategy that the engine, the command line, the pages, a card, the bench or the contract of imports does not
know; a setting or a value of it in a page that ``generate()`` refuses; a drafter that nobody documents or proves; a
visibility that training does not show; caps of a plan in another order than their settings.
"""

from __future__ import annotations

import ast
import configparser
import difflib
import inspect
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

from transformers import GenerationConfig

import hf_hybrid
from hf_hybrid import Drafter
from hf_hybrid.checkpoints import BUNDLED, bundled
from hf_hybrid.cli.tune import CHOSEN
from hf_hybrid.config import SETTING_NAMES, SETTINGS, PlannedDiffusionSettings, SpeculativeSettings, settings_for
from hf_hybrid.core.plan import PlanLimits
from hf_hybrid.core.selection import Score
from hf_hybrid.decoding import WRITERS
from hf_hybrid.evaluation import CANDIDATES, SWEEP
from hf_hybrid.hub import custom_generate
from hf_hybrid.hub.card import read_checkpoint, write_card
from hf_hybrid.hub.push import write_repository_card
from hf_hybrid.training.layout import Form
from tests.cli_for_tests import call
from tests.equivalence.test_speculative_draws import DRAFTERS
from tests.models_for_tests import hybrid

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def agree(where: str, found: Iterable[str], wanted: Iterable[str] = SETTINGS) -> None:
    found, wanted = set(found), set(wanted)
    assert found == wanted, f"{where}: missing {sorted(wanted - found)}, unknown {sorted(found - wanted)}"


def named_in(text: str) -> set[str]:
    """The strategies that a text names as code."""
    return {name for name in SETTINGS if re.search(rf"[`\"']{name}[`\"']", text)}


def tables(page: str, head: str) -> list[list[str]]:
    """The first column, below the heading, of every Markdown table whose first heading is ``head``."""
    found: list[list[str]] = []
    for block in re.findall(r"(?:^\|.*\|$\n)+", page + "\n", re.M):
        first = [line.split("|")[1].strip() for line in block.splitlines()]
        if first[0] == head:
            found.append(first[2:])
    return found


def values(kind: type, name: str) -> set[str]:
    """The words that a setting takes."""
    return set(get_args(get_type_hints(kind)[name]))


# Strategies.


def test_every_strategy_has_settings_a_class_and_a_module_of_its_own() -> None:
    agree("WRITERS", WRITERS)
    assert len(set(WRITERS.values())) == len({*SETTINGS.values()}) == len(SETTINGS), "each has its own"
    contract = configparser.ConfigParser()
    contract.read(ROOT / "setup.cfg")
    folder = contract["importlinter:contract:strategies"]["modules"].strip().removesuffix(".*")
    assert {made.__module__.rpartition(".")[0] for made in WRITERS.values()} == {folder}
    modules = {path.stem for path in (ROOT / folder.replace(".", "/")).glob("*.py")} - {"__init__"}
    agree(folder, modules, {made.__module__.rpartition(".")[2] for made in WRITERS.values()})


def test_the_pages_have_a_table_of_strategies() -> None:
    found = [(page.name, column) for page in PAGES for column in tables(page.read_text("utf-8"), "`strategy=`")]
    assert found, "no page has a table with the heading `strategy=`"
    for page, column in found:
        agree(page, {name for cell in column for name in re.findall(r"^`(\w+)`", cell)})


def test_every_strategy_is_an_option_and_is_measured() -> None:
    for command, others in (("generate", {"host"}), ("serve", set())):
        told = call(command, *(["a"] if command == "generate" else []), "--strategy", "none of them", code=2).output
        choices = re.sub(r"[^\w', ]", " ", told.partition("is not one of")[2])
        agree(f"hf-hybrid {command} --strategy", re.findall(r"'(\w+)'", choices), {*SETTINGS, *others})
    agree("CANDIDATES", {one.strategy for one in CANDIDATES if one.strategy is not None})
    agree("the sweep that tune reads", {one.strategy for one in SWEEP if one.strategy in CHOSEN}, CHOSEN)
    for strategy, (family, names) in CHOSEN.items():
        assert set(names) <= {field.name for field in fields(SETTINGS[strategy])}, strategy
        swept = [one for one in SWEEP if one.name.split()[0] == family]
        assert swept and {one.strategy for one in swept} == {strategy}
        assert {name for one in swept for name in one.settings} >= set(names), strategy


def test_every_card_names_every_strategy(tmp_path: Path) -> None:
    agree("custom_generate", named_in(inspect.getdoc(custom_generate.generate) or ""))
    host = hybrid()
    write_repository_card(host, tmp_path, "me/tiny")
    agree("repository_card.md", named_in((tmp_path / "README.md").read_text("utf-8")))
    for name in BUNDLED:
        agree(f"modes of {name}", read_checkpoint(bundled(name)).modes)
        card = write_card(bundled(name), out=tmp_path / "card.md", licence="mit")
        agree(f"the card of {name}", named_in(card.read_text("utf-8")))
        agree(f"model_cards/{name}", named_in((ROOT / "model_cards" / name / "README.md").read_text("utf-8")))
        stored = read_checkpoint(bundled(name)).generation["hf_hybrid"]
        for strategy in SETTINGS:
            assert type(settings_for(strategy, {}, stored)) is SETTINGS[strategy]


# Settings.


def test_pages_name_settings_and_values_that_exist() -> None:
    host = {*vars(GenerationConfig()), *inspect.signature(hf_hybrid.HybridGenerationMixin.generate).parameters}
    found = 0
    for page in PAGES:
        for code in re.findall(r"^```py\w*\n(.*?)^```$|`([^`\n]+)`", page.read_text("utf-8"), re.M | re.S):
            for name, value in re.findall(r"(?<![\w.-])([a-z_]+)=([^\s,()`|]+)", "".join(code)):
                near = difflib.get_close_matches(name, SETTING_NAMES, n=1, cutoff=0.8)
                assert name in SETTING_NAMES | host or not near, f"{page.name}: {name}= is no setting; {near[0]} is"
                try:
                    said = ast.literal_eval(value.rstrip("."))
                except (ValueError, SyntaxError):
                    continue
                if name in SETTING_NAMES and not (name == "drafter" and said not in values(SpeculativeSettings, name)):
                    own = next(key for key, kind in SETTINGS.items() if name in {field.name for field in fields(kind)})
                    settings_for(own, {name: said})
                    found += 1
                assert name != "strategy" or said in (*SETTINGS, None), f"{page.name}: strategy={value}"
    assert found > 10


def test_words_that_two_places_know_are_the_same() -> None:
    agree("forms of training", get_args(Form), {"plain", *values(PlannedDiffusionSettings, "visibility")})
    agree("selection", get_args(Score), values(PlannedDiffusionSettings, "selection"))
    caps = {field.name: number for number, field in enumerate(fields(PlanLimits), 20)}
    assert PlannedDiffusionSettings(**caps).limits == PlanLimits(**caps)  # type: ignore[arg-type]
    known = {field.name: field.default for field in fields(PlannedDiffusionSettings)}
    assert PlanLimits() == PlanLimits(**{name: known[name] for name in caps})


# Drafters.


def test_every_drafter_is_in_the_page_and_in_the_tables_of_the_proofs() -> None:
    (column,) = tables((ROOT / "docs" / "speculative.md").read_text("utf-8"), "`drafter=`")
    said = " ".join(column)
    agree("names in docs/speculative.md", re.findall(r"`\"(\w+)\"`", said), values(SpeculativeSettings, "drafter"))
    public = [value for name in hf_hybrid.__all__ if isinstance(value := getattr(hf_hybrid, name), type)]
    drafters = {value.__name__ for value in public if issubclass(value, Drafter)} - {"Drafter"}
    agree("classes in docs/speculative.md", re.findall(r"\b(\w+Drafter)\b", said), drafters)
    made = [make() for _, make, _ in DRAFTERS.values()]
    proved = {drafter if isinstance(drafter, str) else type(drafter).__name__ for drafter in made}
    wanted = drafters | values(SpeculativeSettings, "drafter")
    agree("DRAFTERS of tests/equivalence/test_speculative_draws.py", proved & wanted, wanted)
    measured = {one.settings.get("drafter") for one in CANDIDATES if one.strategy == "speculative"}
    agree("CANDIDATES", {str(one) for one in measured}, values(SpeculativeSettings, "drafter"))

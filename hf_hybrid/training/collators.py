"""Batches of static shape: clean rows first, then noisy blocks until the rows are full."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_hybrid.core.grammars import grammar_of
from hf_hybrid.core.noising import draw_times, hide
from hf_hybrid.core.rows import PADDING
from hf_hybrid.core.tokens import ControlTokens, VocabularyError
from hf_hybrid.training.examples import Example, Part
from hf_hybrid.training.layout import IGNORE, Form, Layout, Stretch, lay_out


@dataclass(frozen=True)
class CollatorSettings:
    """How batches are laid out and noised.

    Attributes:
        num_rows: rows of an example, clean and noisy together; noisy blocks fill what the clean rows leave.
        max_spans: width of the ``depends`` matrix.
        forms: relative weights of the answer forms (`hf_hybrid.training.layout.Form`).
        block_lengths: relative weights of window lengths; include every length used in decoding.
        whole_share: share of the blocks that hold a whole stretch at once.
        trunk_share: share of the blocks cut from trunk text and plans of planned examples.
        structure_weight: weight of clean targets that decide the structure of an answer: control tags, ``eos`` and the
            first token of a label. length_weight: weight of targets that are a planned length.
        guessed_lengths: share of the planned lengths that are shown as random ones (see ``lay_out``).
        all_masked: share of the blocks with every position hidden. lowest_noise: lowest noise level of the others.
        noisy_rows: False: clean rows alone, for a model that only writes token by token, such as a drafter.
        window_decay: weight of a noisy target relative to the one before it in its block, in (0, 1]. A draft is
            accepted up to its first error, so the first positions of a window matter most (DFlash, arXiv 2602.06036).
    """

    num_rows: int = 640
    max_spans: int = 20
    forms: Mapping[Form, float] | None = None
    block_lengths: Mapping[int, float] | None = None
    whole_share: float = 0.04
    trunk_share: float = 0.12
    all_masked: float = 0.5
    structure_weight: float = 1.0
    length_weight: float = 1.0
    guessed_lengths: float = 0.0
    lowest_noise: float = 0.1
    window_decay: float = 1.0
    noisy_rows: bool = True


class TooLong(ValueError):
    """An example whose clean rows do not fit; the message says how many rows it needs."""


class HybridCollator:
    """Turns examples into batches: lays them out, cuts noisy blocks, hides tokens.

    Calling it with a list of ``(index, Example)`` gives int64 tensors ``(batch, rows)``: ``input_ids``, ``position``,
    ``span``, ``noisy`` (bool), ``anchor``, ``block``, ``target`` (``IGNORE`` where there is no term in the loss) and
    ``depends`` (bool ``(batch, spans, spans)``). Everything is a function of ``seed`` and the indices, so a resumed
    run sees the same batches.
    """

    def __init__(self, control: ControlTokens, pad_token_id: int, settings: CollatorSettings, seed: int = 0):
        if control.noise.filler is None:
            raise VocabularyError(
                "windows are trained beyond the end of a text, and the model has no filler token for that; add it with "
                "hf_hybrid.prepare_vocabulary(model, tokenizer)"
            )
        self.noise, self.grammar = control.noise, grammar_of(control)
        self.pad, self.settings, self.seed = pad_token_id, settings, seed
        self.forms = dict(settings.forms or {"plain": 0.35, "sparse": 0.2, "dag": 0.4, "dense": 0.05})
        self.block_lengths = dict(settings.block_lengths or {4: 0.15, 8: 0.5, 16: 0.3, 32: 0.05})

    def __call__(self, examples: Sequence[tuple[int, Example]]) -> dict[str, Tensor]:
        """The batch of ``examples``; raises ``TooLong`` where clean rows or spans do not fit."""
        sequences = [self._rows(index, example) for index, example in examples]
        batch = {name: torch.tensor([s[name] for s in sequences]) for name in sequences[0] if name != "depends"}
        batch["noisy"] = batch["noisy"].bool()
        spans = self.settings.max_spans
        depends = torch.zeros(len(sequences), spans, spans, dtype=torch.bool)
        for b, sequence in enumerate(sequences):
            for s, seen in enumerate(sequence["depends"]):
                depends[b, s, list(seen)] = True
        batch["depends"] = depends
        return batch

    def _rows(self, index: int, example: Example) -> dict[str, list]:
        rng = random.Random(f"{self.seed}:{index}")
        form = rng.choices(list(self.forms), weights=list(self.forms.values()))[0]
        layout = lay_out(example, form, self.grammar, rng, guessed_lengths=self.settings.guessed_lengths)
        clean = len(layout.tokens)
        if clean > self.settings.num_rows or len(layout.depends) > self.settings.max_spans:
            raise TooLong(
                f"example {index} needs {clean} rows and {len(layout.depends)} spans; "
                f"there are num_rows={self.settings.num_rows} and max_spans={self.settings.max_spans}"
            )
        blocks = self._cut(layout, self.settings.num_rows - clean, rng) if self.settings.noisy_rows else []
        out: dict[str, list[Any]] = {
            "input_ids": layout.tokens,
            "position": layout.position,
            "span": layout.span,
            "noisy": [0] * clean,
            "anchor": [0] * clean,
            "block": [0] * clean,
            "target": layout.target,
            "weight": self._weights(example, layout.target) + self._decay(blocks),
        }
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        self._noise(blocks, out, generator)
        missing = self.settings.num_rows - len(out["input_ids"])
        filler = {"input_ids": self.pad, "span": PADDING, "target": IGNORE}
        for name, values in out.items():
            values += [filler.get(name, 0)] * missing
        out["depends"] = layout.depends
        return out

    def _weights(self, example: Example, target: list[int]) -> list[float]:
        """Weight of every clean row's loss; the rare tokens that decide the structure of an answer may count more."""
        grammar, settings = self.grammar, self.settings
        lengths = grammar.guesses
        structure = {*grammar.banned, grammar.end} - lengths - {grammar.part_end}
        structure |= {part.label[0] for piece in example.pieces for part in piece if isinstance(part, Part)}
        weights = dict.fromkeys(structure, settings.structure_weight) | dict.fromkeys(lengths, settings.length_weight)
        return [float(weights.get(token, 1.0)) for token in target]

    def _decay(self, blocks: list[tuple[Stretch, int, int]]) -> list[float]:
        """Weight of every noisy row's loss; rows of a dense round, which is unmasked in any order, weigh the same."""
        decay = self.settings.window_decay
        return [1.0 if stretch.whole else decay**i for stretch, _, length in blocks for i in range(length)]

    def _cut(self, layout: Layout, room: int, rng: random.Random) -> list[tuple[Stretch, int, int]]:
        """Draw blocks ``(stretch, offset, length)`` that fill ``room`` rows."""
        spans = [stretch for stretch in layout.stretches if stretch.tail]
        trunk = [stretch for stretch in layout.stretches if not stretch.tail]
        lengths, weights = list(self.block_lengths), list(self.block_lengths.values())
        blocks: list[tuple[Stretch, int, int]] = []
        for stretch in layout.stretches:
            if stretch.whole and len(stretch.tokens) <= room:
                blocks.append((stretch, 0, len(stretch.tokens)))
                room -= len(stretch.tokens)
        spans = [stretch for stretch in spans if not stretch.whole]
        while room > 0 and (spans or trunk):
            pool = trunk if trunk and (not spans or rng.random() < self.settings.trunk_share) else spans
            stretch = rng.choices(pool, weights=[len(p.tokens) for p in pool])[0]
            if rng.random() < self.settings.whole_share:
                offset, length = 0, len(stretch.tokens) + rng.randrange(4)
            else:
                offset, length = rng.randrange(len(stretch.tokens)), rng.choices(lengths, weights)[0]
            length = min(length, room)
            blocks.append((stretch, offset, length))
            room -= length
        return blocks

    def _noise(self, blocks: list[tuple[Stretch, int, int]], out: dict[str, list], generator: torch.Generator) -> None:
        """Append the rows of the blocks: hidden positions show the mask token and have their own token as target."""
        if not blocks:
            return
        longest = max(length for _, _, length in blocks)
        eligible = torch.zeros(len(blocks), longest, dtype=torch.bool)  # (blocks, length), True: may be hidden
        for b, (stretch, offset, length) in enumerate(blocks):
            # Positions behind a plan have no target: a block that hid only those would have no term in the loss.
            eligible[b, : length if stretch.tail else min(length, len(stretch.tokens) - offset)] = True
            for fixed in stretch.fixed:
                if 0 <= fixed - offset < length:
                    eligible[b, fixed - offset] = False
        times = draw_times(len(blocks), generator, self.settings.all_masked, self.settings.lowest_noise)
        hidden = hide(times, eligible, generator).tolist()
        for b, (stretch, offset, length) in enumerate(blocks):
            size = len(stretch.tokens)
            for i in range(length):
                behind = offset + i >= size
                token = self.noise.filler if behind else stretch.tokens[offset + i]
                scored = hidden[b][i] and (not behind or stretch.tail)
                shown = not hidden[b][i] and (not behind or stretch.tail)
                out["input_ids"].append(token if shown else self.noise.mask)
                out["target"].append(token if scored else IGNORE)
            out["position"] += range(stretch.start + offset, stretch.start + offset + length)
            out["span"] += [stretch.span_at(offset)] * length
            out["noisy"] += [1] * length
            out["anchor"] += [stretch.start + offset] * length
            out["block"] += [b + 1] * length

"""Slow-motion oracles of speculative sampling with ``acceptance="rejection"``: the drafters of the package, over tables
of exact probabilities of a vocabulary of six, four tokens at most, 100,000 texts at once.

A text is written token by token. At each step a drafter has a token on trial, or none, and says what it was drawn from;
the rule keeps it or replaces it. A pass of the pipeline ends where a token is replaced, or behind the last of a draft.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import torch
from torch import Tensor

import hf_hybrid
from hf_hybrid import Draft, SuffixDrafter, Text
from hf_hybrid.core.acceptance import keyed_noise, keyed_uniform, reject, sample
from hf_hybrid.core.rows import Rows
from hf_hybrid.decoding.sampling import DRAW
from hf_hybrid.decoding.speculative import _ACCEPT, _REDRAW
from hf_hybrid.models.cached import CachedRunner
from tests.equivalence.test_speculative_law import HORIZON, PROMPT, VOCAB, model, warped
from tests.models_for_tests import tiny

LENGTH = 3
"""Most tokens of a draft. Of four tokens the last is never drafted: a pass writes one more than it checks."""
MASK, END, HYBRID_VOCAB = 6, 7, 14


@cache
def windowed(seed: int) -> Any:
    """A model with a mask token and tags, which it never writes: to text it is one of six tokens."""
    host = tiny("llama", seed=seed, vocab_size=HYBRID_VOCAB, eos_token_id=END, pad_token_id=0)
    bias = torch.zeros(HYBRID_VOCAB, dtype=host.dtype)
    bias[VOCAB:] = -1e4
    bias[:VOCAB] = torch.tensor([1.5, 0.0, 1.0, -1.0, 0.5, 0.0])  # so that a window often expects what will stand
    host.get_output_embeddings().bias = torch.nn.Parameter(bias)
    tags = {"par": 8, "topic": 9, "async": 10, "sync": 11, "spad": 12}
    host.config.hf_hybrid = {"mask_token_id": MASK, **tags, "lengths": [[2, 13]], "depends": []}
    return hf_hybrid.enable(host)


MODELS: dict[str, Callable[[], Any]] = {
    "target": model,
    "smaller": lambda: model(seed=8, layers=1),
    "hybrid": lambda: windowed(4),
    "window": lambda: windowed(9),
}


def prefixes(length: int) -> Tensor:
    """The prompt and every text of ``length`` tokens behind it, in the order of their codes."""
    texts = torch.cartesian_prod(*[torch.arange(VOCAB)] * length).reshape(-1, length) if length else torch.zeros(1, 0)
    return torch.cat([PROMPT.expand(len(texts), -1), texts.long()], dim=1)  # (vocab ** length, 3 + length)


@cache
def table(name: str, penalty: float) -> list[Tensor]:
    """For every length, what follows each text of it: probabilities ``(vocab ** length, vocab)``."""
    host = MODELS[name]()
    with torch.no_grad():
        found = [warped(host, penalty)(ids, host(ids).logits[:, -1]) for ids in map(prefixes, range(HORIZON))]
    return [scores.softmax(dim=-1)[:, :VOCAB] for scores in found]


@cache
def windows(name: str, length: int, opens: int, cut: int) -> Tensor:
    """The last clean row and ``opens`` noisy ones behind every text: scores ``(vocab ** length, 1 + opens, vocab)``.

    Args:
        cut: so many columns are the vocabulary before the warpers act, as a drafter's padding is cut off.
    """
    ids = prefixes(length)
    count, size = ids.shape
    shape = (count, size + opens)
    noisy = (torch.arange(size + opens) >= size).expand(shape)
    position = torch.arange(size + opens).expand(shape)
    zero = torch.zeros(shape, dtype=torch.long)
    rows = Rows(position, zero, noisy, torch.where(noisy, size, zero), noisy.long())
    tokens = torch.cat([ids, torch.full((count, opens), MASK)], dim=1)
    logits = CachedRunner(MODELS[name](), count).run(tokens, rows, 1 + opens).logits[..., :cut]
    logits = logits.clone()
    logits[:, 1:, VOCAB:] = float("-inf")  # tags are no text
    scores = warped(MODELS[name](), 1.0)(None, logits.reshape(-1, cut))
    return scores.reshape(count, 1 + opens, cut)[..., :VOCAB]


@cache
def noise(salt: int, t: int, draws: int) -> Tensor:
    """Of token ``t`` of the answer for the seeds 0 to ``draws``, ``(draws, vocab)``."""
    return keyed_noise([seed ^ salt for seed in range(draws)], [3 + t] * draws, VOCAB)


@cache
def uniform(t: int, draws: int) -> Tensor:
    """Alike, what decides whether a drafted token stands, ``(draws,)``."""
    return keyed_uniform([seed ^ _ACCEPT for seed in range(draws)], [3 + t] * draws)


class Drawn:
    """A drafter that draws, and says from what.

    Args:
        law: step, code of the text so far and place in the draft, to probabilities ``(draws, vocab)``.
        honest: False: it claims to draw evenly.
    """

    def __init__(self, law: Callable[[int, Tensor, Tensor], Tensor], honest: bool = True):
        self.law, self.honest = law, honest

    def on_trial(self, t: int, code: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """The token that is on trial at step ``t``, ``(draws,)``, -1: none; what it was drawn from."""
        probabilities = self.law(t, code, place)
        tokens = sample(probabilities.log(), noise(DRAW, t, len(code)))
        return tokens, probabilities if self.honest else torch.full_like(probabilities, 1 / VOCAB)

    def ended(self, t: int, code: Tensor, place: Tensor, out: Tensor, checked: Tensor, over: Tensor) -> None:
        """``over``, True: the pass ends with ``out``, which stands behind ``code`` and ``place`` tokens that stood;
        ``checked``, True: a token was on trial there."""


def smaller_model(t: int, code: Tensor, place: Tensor) -> Tensor:
    """Of a model that reads what it drafts."""
    return table("smaller", 1.0)[t][code]


def window_of_another(t: int, code: Tensor, place: Tensor) -> Tensor:
    """Of a window behind the text at which the pass began, as wide as there is room."""
    found = torch.zeros(len(code), VOCAB, dtype=torch.double)
    for before in range(min(t, LENGTH - 1) + 1):
        opens = min(LENGTH, HORIZON - 1 - (t - before)) - 1
        mine = place == before
        scores = windows("window", t - before, opens, VOCAB)  # (texts, 1 + opens, vocab)
        found[mine] = scores[code[mine] // VOCAB**before, before].softmax(dim=-1)
    return found


class Certain(Drawn):
    """A drafter that says nothing of probabilities; ``drafted`` ``(draws, LENGTH)``, -1: nothing."""

    def __init__(self, draws: int):
        self.drafted = torch.full((draws, LENGTH), -1)

    def on_trial(self, t: int, code: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Its draft, taken for certain; behind the last token of it there is none."""
        padded = torch.nn.functional.pad(self.drafted, (0, 1), value=-1)
        tokens = padded.gather(1, place[:, None])[:, 0]
        return tokens, torch.nn.functional.one_hot(tokens.clamp(min=0), VOCAB).double()


class Same(Certain):
    """The same draft always."""

    def __init__(self, draws: int, tokens: list[int]):
        super().__init__(draws)
        self.drafted[:] = torch.tensor(tokens)


class Copies(Certain):
    """A ``SuffixDrafter`` for every history of passes: what each drafted, what stood, what came instead."""

    def __init__(self, draws: int, make: Callable[[], SuffixDrafter]):
        super().__init__(draws)
        drafter, text = make(), Text(0, PROMPT[0].tolist(), PROMPT.shape[1])
        drafter.prepare(model(), VOCAB, 1)
        drafter.begin(text)
        self.histories = [(drafter, text, self._draft(drafter, text))]
        self.at = torch.zeros(draws, dtype=torch.long)  # index of the history of each text
        self.drafted[:] = self._padded(0)

    def ended(self, t: int, code: Tensor, place: Tensor, out: Tensor, checked: Tensor, over: Tensor) -> None:
        """One history more for every way in which a pass ended."""
        keys = ((self.at * (LENGTH + 1) + place) * VOCAB + out)[over]
        ways, which = keys.unique(return_inverse=True)
        first = len(self.histories)
        for way in ways.tolist():
            self._go_on(way // VOCAB // (LENGTH + 1), way // VOCAB % (LENGTH + 1), way % VOCAB)
        self.at[over] = first + which
        self.drafted[over] = torch.stack([self._padded(first + i) for i in range(len(ways))])[which]

    def _go_on(self, history: int, stood: int, out: int) -> None:
        drafter, text, draft = deepcopy(self.histories[history])
        checked = [*draft.tokens[:stood], out]
        drafter.learn(text, draft, stood, checked)
        text.tokens += checked
        self.histories.append((drafter, text, self._draft(drafter, text)))

    def _draft(self, drafter: SuffixDrafter, text: Text) -> Draft:
        text.room = HORIZON - 1 - (len(text.tokens) - text.prompt_length)
        sampler: Any = None  # nothing is drawn
        return drafter.propose([text], LENGTH, sampler)[0]

    def _padded(self, history: int) -> Tensor:
        tokens = list(self.histories[history][2].tokens)
        return torch.tensor(tokens + [-1] * (LENGTH - len(tokens)))


class OwnWindow(Certain):
    """``drafter="self"``: the window that every pass carries drafts for the next one."""

    def __init__(self, draws: int, threshold: float):
        super().__init__(draws)
        self.threshold = threshold

    def ended(self, t: int, code: Tensor, place: Tensor, out: Tensor, checked: Tensor, over: Tensor) -> None:
        """Where the whole draft stood and the window expected ``out``, what it put behind, as far as it is sure."""
        drafted = torch.full_like(self.drafted, -1)
        room = HORIZON - 2 - t
        if room > 0:
            scores = windows("hybrid", t, min(LENGTH, HORIZON + 1 - t), HYBRID_VOCAB)[code, 1:]
            good = ~checked
            for place_ in range(1 + min(room, LENGTH - 1)):
                tokens = sample(scores[:, place_], noise(0, t + place_, len(code)))  # the noise of plain sampling
                sure = scores[:, place_].softmax(dim=-1).gather(1, tokens[:, None])[:, 0] >= self.threshold
                good = good & (sure if place_ else tokens == out)
                if place_:
                    drafted[:, place_ - 1] = torch.where(good, tokens, -1)
        self.drafted = torch.where(over[:, None], drafted, self.drafted)


def written(tables: list[Tensor], drafter: Drawn, draws: int) -> Tensor:
    """Codes of the texts of the seeds 0 to ``draws``, ``(draws,)``.

    Args:
        tables: of the model (``table``).
    """
    code = torch.zeros(draws, dtype=torch.long)
    place = torch.zeros(draws, dtype=torch.long)  # of a token in the draft of its pass
    for t, target in enumerate(tables[:-1]):
        redraw = noise(_REDRAW, t, draws)
        tokens, claimed = drafter.on_trial(t, code, place)
        checked = tokens >= 0
        out, stands = reject(target[code], claimed, tokens.clamp(min=0), uniform(t, draws), redraw)
        out = torch.where(checked, out, sample(target[code].log(), redraw))
        stands = stands & checked
        drafter.ended(t, code, place, out, checked, ~stands)
        place = torch.where(stands, place + 1, 0)
        code = code * VOCAB + out
    return code * VOCAB + sample(tables[-1][code].log(), noise(_REDRAW, HORIZON - 1, draws))


def plain(tables: list[Tensor], draws: int) -> Tensor:
    """The same for plain sampling, with the noise that a seed names."""
    code = torch.zeros(draws, dtype=torch.long)
    for t, target in enumerate(tables):
        code = code * VOCAB + sample(target[code].log(), noise(0, t, draws))
    return code

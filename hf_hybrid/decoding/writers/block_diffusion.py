"""Block diffusion: masks of one block are filled over a few denoising passes, blocks left to right.

Source: Arriola et al., "Block Diffusion: Interpolating Between Autoregressive and Diffusion Language Models", 2025,
section 3; parallel settling by confidence as in Wu et al., "Fast-dLLM", 2025, section 3.3. Ours differs in one point:
the pass that commits clean rows also gives the first open position in autoregressive quality. A block as long as the
answer is plain masked diffusion.
"""

from __future__ import annotations

from hf_hybrid.config import BlockDiffusionSettings, Settings
from hf_hybrid.core.lane import AcceptRule, Lane, Window
from hf_hybrid.decoding.call import Context
from hf_hybrid.decoding.output import DecodingError
from hf_hybrid.decoding.writer import Shared, Writer


class Blocks(Shared):
    """How the lanes of a call settle, and which ids they know."""

    def __init__(self, context: Context, settings: Settings):
        control = context.call.control
        assert isinstance(settings, BlockDiffusionSettings)
        if control is None:
            raise DecodingError(
                "block_diffusion needs a mask token, and the model has none; add one with "
                "hf_hybrid.prepare_vocabulary(model, tokenizer) and train it"
            )
        self.length = settings.window_length
        noise = control.noise
        self.filler = noise.filler
        self.forbidden = tuple(token for token in noise.banned if token != noise.filler)
        self.rule = AcceptRule(
            checked=False,
            threshold=settings.confidence_threshold,
            selection=settings.selection,
            steps=settings.max_denoising_steps,
            commit=settings.commit,
        )


class BlockDiffusion(Writer):
    """The prompt as a trunk that grows by windows of masked positions."""

    shared: Blocks

    @classmethod
    def share(cls, context: Context, settings: Settings) -> Blocks:
        """See ``Writer.share``."""
        return Blocks(context, settings)

    def take_over(self, trunk: Lane) -> None:
        """A window behind it."""
        trunk.rule, trunk.window = self.shared.rule, Window(self.shared.length)

    def settled(self, lane: Lane, tokens: list[int]) -> None:
        """The answer ends with its lane."""
        self.canvas.finished = lane.done

    def stage(self) -> str:
        """Always ``text``."""
        return "text"

    def forbidden(self, lane: Lane) -> tuple[int, ...]:
        """Control tags are no text; behind the end a window may hold the filler."""
        return self.shared.forbidden

    def terminators(self, lane: Lane) -> dict[int, bool]:
        """``eos``, and the filler (if the model has one) where a window put it without ``eos``."""
        return super().terminators(lane) | ({} if self.shared.filler is None else {self.shared.filler: False})

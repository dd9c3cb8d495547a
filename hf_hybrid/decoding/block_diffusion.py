"""Block diffusion: masks of one block are filled over a few denoising passes, blocks left to right.

Source: Arriola et al., "Block Diffusion: Interpolating Between Autoregressive and Diffusion Language Models", 2025,
section 3; parallel settling by confidence as in Wu et al., "Fast-dLLM", 2025, section 3.3. Ours differs in one point:
the pass that commits clean rows also gives the first open position in autoregressive quality. A block as long as the
answer is plain masked diffusion.
"""

from __future__ import annotations

from hf_hybrid.config import BlockDiffusionSettings
from hf_hybrid.core.canvas import Canvas, Lane
from hf_hybrid.decoding.call import Context
from hf_hybrid.decoding.output import DecodingError
from hf_hybrid.decoding.strategy import Strategy


class BlockDiffusion(Strategy):
    """The prompt as a trunk that grows by windows of masked positions."""

    def __init__(self, context: Context):
        super().__init__(context)
        settings, control = context.call.settings, context.call.control
        assert isinstance(settings, BlockDiffusionSettings)
        if control is None:
            raise DecodingError(
                "block_diffusion needs a mask token, and the model has none; add one with "
                "hf_hybrid.prepare_vocabulary(model, tokenizer) and train it"
            )
        self.settings = settings
        noise = control.noise
        self.filler = noise.filler
        self.controls = tuple(token for token in noise.banned if token != noise.filler)

    def begin(self, canvas: Canvas, line: int) -> None:
        """One lane: the prompt, with a window behind it."""
        trunk = Lane("trunk", canvas.new_span(), 0, list(canvas.prompt), limit=len(canvas.prompt) + canvas.budget)
        trunk.positions = canvas.positions
        trunk.window, trunk.verified = self.settings.window_length, False
        canvas.lanes.append(trunk)

    def settled(self, canvas: Canvas, lane: Lane, tokens: list[int], line: int) -> None:
        """The answer ends with its lane."""
        canvas.finished = lane.done

    def stage(self, canvas: Canvas) -> str:
        """Always ``text``."""
        return "text"

    def forbidden(self, lane: Lane) -> tuple[int, ...]:
        """Control tags are no text; behind the end a window may hold the filler."""
        return self.controls

    def terminators(self, lane: Lane) -> dict[int, bool]:
        """``eos``, and the filler (if the model has one) where a window put it without one."""
        return super().terminators(lane) | ({} if self.filler is None else {self.filler: False})

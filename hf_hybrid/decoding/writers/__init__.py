"""Ways of writing an answer: the table of writers by strategy; their settings are in ``hf_hybrid.config.SETTINGS``."""

from __future__ import annotations

from hf_hybrid.decoding.writer import Writer
from hf_hybrid.decoding.writers.autoregressive import Autoregressive
from hf_hybrid.decoding.writers.block_diffusion import BlockDiffusion
from hf_hybrid.decoding.writers.planned_diffusion import PlannedDiffusion
from hf_hybrid.decoding.writers.speculative import Speculative

WRITERS: dict[str, type[Writer]] = {
    "autoregressive": Autoregressive,
    "block_diffusion": BlockDiffusion,
    "planned_diffusion": PlannedDiffusion,
    "speculative": Speculative,
}
"""Strategy name -> class."""

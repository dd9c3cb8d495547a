"""Decoding: ids in, ids out. Strategies stand in the literal table ``STRATEGIES``."""

from hf_hybrid.decoding.engine import STRATEGIES, decode
from hf_hybrid.decoding.output import Answer, GenerationReport, HybridGenerateOutput, SpanReport
from hf_hybrid.decoding.processors import PlanLogitsProcessor, Processors
from hf_hybrid.decoding.strategy import Call, Context, DecodingError, Strategy

__all__ = [
    "STRATEGIES",
    "Answer",
    "Call",
    "Context",
    "DecodingError",
    "GenerationReport",
    "HybridGenerateOutput",
    "PlanLogitsProcessor",
    "Processors",
    "SpanReport",
    "Strategy",
    "decode",
]

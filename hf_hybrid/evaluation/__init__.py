"""One harness for every comparison: same weights, same prompts, same process, candidates interleaved."""

from hf_hybrid.evaluation.candidates import CANDIDATES, GRID, Candidate
from hf_hybrid.evaluation.harness import Measurement, Run, even_subset, measure
from hf_hybrid.evaluation.passes import PassCost, pass_costs
from hf_hybrid.evaluation.report import Result, environment, results_of, shape_of, to_json
from hf_hybrid.evaluation.statistics import bootstrap_interval, paired_ratios

__all__ = [
    "CANDIDATES",
    "GRID",
    "Candidate",
    "Measurement",
    "PassCost",
    "Result",
    "Run",
    "bootstrap_interval",
    "environment",
    "even_subset",
    "measure",
    "paired_ratios",
    "pass_costs",
    "results_of",
    "shape_of",
    "to_json",
]

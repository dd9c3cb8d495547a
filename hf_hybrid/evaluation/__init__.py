"""One harness for every comparison: same weights, same prompts, same process, candidates interleaved."""

from hf_hybrid.evaluation.candidates import CANDIDATES, FEEDBACK, SWEEP, Candidate, in_types
from hf_hybrid.evaluation.frontier import PlotError, check_plots, draw_frontier
from hf_hybrid.evaluation.harness import Measurement, Run, even_subset, measure
from hf_hybrid.evaluation.load_cost import Compared, LoadingCost, ProcessError, compared, loading_cost
from hf_hybrid.evaluation.pass_costs import PassCost, pass_costs
from hf_hybrid.evaluation.report import Result, environment, groups_of, kinds_of, results_of, shape_of, to_json
from hf_hybrid.evaluation.statistics import bootstrap_interval, paired_ratios

__all__ = [
    "CANDIDATES",
    "FEEDBACK",
    "SWEEP",
    "Candidate",
    "Compared",
    "LoadingCost",
    "Measurement",
    "PassCost",
    "PlotError",
    "ProcessError",
    "Result",
    "Run",
    "bootstrap_interval",
    "check_plots",
    "compared",
    "draw_frontier",
    "environment",
    "even_subset",
    "groups_of",
    "in_types",
    "kinds_of",
    "loading_cost",
    "measure",
    "paired_ratios",
    "pass_costs",
    "results_of",
    "shape_of",
    "to_json",
]

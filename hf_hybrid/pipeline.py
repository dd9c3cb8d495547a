"""``pipeline("hybrid-text-generation")``: text generation whose results also hold the plan, the parts and the report.

``pipeline("text-generation", model=enabled_model, strategy=...)`` needs nothing from here: the host hands arguments
that it does not know to ``generate()``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TextGenerationPipeline
from transformers.pipelines import PIPELINE_REGISTRY

from hf_hybrid.decoding.output import GenerationReport, plans_as_data
from hf_hybrid.mixin import enable
from hf_hybrid.routing import named_strategy

TASK = "hybrid-text-generation"


class HybridTextGenerationPipeline(TextGenerationPipeline):
    """The host's ``TextGenerationPipeline`` (strings, chats, batches, all its arguments) with plan, parts and report.

    ``{"generated_text": ..., "plan": {"rounds": [...]} or None, "spans": [...], "report": {...} or None}``, all of it
    plain data for JSON: the plan as ``hf-hybrid plan`` prints it, a span per part in text order (``SpanReport`` with
    its text), the numbers of a ``GenerationReport`` (seconds, passes, tokens). Without a strategy the host decodes, and
    there is no plan, span or report. The model is enabled in place; ``stop_strings`` need no ``tokenizer=``. Behind a
    chat whose last turn is the assistant's, that turn is continued without a plan.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        enable(self.model)

    def preprocess(self, prompt_text: Any, *args: Any, **kwargs: Any) -> Any:
        """Make the host's inputs, and record whether the prompt ends inside an answer: ids alone do not tell."""
        inputs: Any = super().preprocess(prompt_text, *args, **kwargs)
        messages = getattr(prompt_text, "messages", None)  # of a chat
        asked = kwargs.get("continue_final_message")
        goes_on = messages is not None and (messages[-1]["role"] == "assistant" if asked is None else asked)
        inputs["continues"] = torch.tensor([[goes_on]])  # (1, 1); the host pads and joins tensors alone
        return inputs

    def _forward(self, model_inputs: Any, **generate_kwargs: Any) -> dict[str, Any]:
        # The host keeps only the tensors that ``self.model.generate()`` returns. So a copy of this pipeline runs it,
        # with a witness as its model; other threads may be using this pipeline.
        continues = [bool(goes_on) for goes_on in model_inputs.pop("continues").flatten().tolist()]
        witness = _Witness(self.model, self.tokenizer, continues)
        double = copy.copy(self)
        double.model = witness  # type: ignore[assignment]
        outputs: Any = super(HybridTextGenerationPipeline, double)._forward(model_inputs, **generate_kwargs)
        prompts, each = outputs["generated_sequence"].shape[:2]
        reports = witness.reports if witness.reports is not None else [None] * (prompts * each)
        # A list per prompt: the host takes batches apart along the first dimension.
        return {**outputs, "reports": [reports[i * each : (i + 1) * each] for i in range(prompts)]}

    def postprocess(self, model_outputs: dict[str, Any], *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        """Make the records of one prompt, one per returned sequence."""
        outputs = dict(model_outputs)
        reports = outputs.pop("reports")
        if isinstance(reports[0], list):  # a batch of one is not taken apart on the way
            reports = reports[0]
        records: Any = super().postprocess(outputs, *args, **kwargs)
        return [record | self._details(report) for record, report in zip(records, reports, strict=True)]

    def _details(self, report: GenerationReport | None) -> dict[str, Any]:
        if report is None:
            return {"plan": None, "spans": [], "report": None}
        tokenizer: Any = self.tokenizer
        plan = plans_as_data(report.plans, tokenizer.decode) if report.plans else None
        return {
            "plan": plan,
            "spans": [span.as_data(tokenizer.decode) for span in report.spans],
            "report": report.as_data(),
        }


def register_pipeline() -> None:
    """Let ``pipeline("hybrid-text-generation", model=...)`` be called in this process; a second call changes nothing.

    ``pipeline("text-generation", ..., pipeline_class=HybridTextGenerationPipeline)`` needs no registration.
    """
    if TASK in PIPELINE_REGISTRY.supported_tasks:
        return
    PIPELINE_REGISTRY.register_pipeline(
        TASK, pipeline_class=HybridTextGenerationPipeline, pt_model=AutoModelForCausalLM, type="text"
    )
    # With this mark save_pretrained() would copy this file beside the weights, as code to be trusted; and a folder with
    # such code is refused by everyone who does not trust it, whether this package is there or not.
    del HybridTextGenerationPipeline._registered_impl  # type: ignore[attr-defined]


class _Witness:
    """A model for one call of ``generate()`` that keeps the reports."""

    def __init__(self, model: Any, tokenizer: Any, continues: list[bool]):
        self._model, self._tokenizer, self._continues = model, tokenizer, continues
        self.reports: Any = None  # a GenerationReport per sequence, None when the host wrote

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **kwargs: Any) -> Any:
        config: Any = kwargs.get("generation_config")
        asked = kwargs.get("return_dict_in_generate", getattr(config, "return_dict_in_generate", None))
        if config is None:
            kwargs["return_dict_in_generate"] = True
        else:  # the host warns when a config comes together with other arguments
            kwargs["generation_config"] = config = copy.deepcopy(config)
            config.return_dict_in_generate = True
        if any(self._continues) and named_strategy(self._model, kwargs) is not None:
            each = kwargs.get("num_return_sequences", getattr(config, "num_return_sequences", None)) or 1
            kwargs.setdefault("continue_final_message", [goes_on for goes_on in self._continues for _ in range(each)])
        output = self._model.generate(**{"tokenizer": self._tokenizer, **kwargs})
        self.reports = getattr(output, "report", None)
        return output if asked and self.reports is None else output.sequences

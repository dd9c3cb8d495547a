"""Carry out a plan of one's own: which parts, how long, and what each may read."""

import torch
from transformers import AutoTokenizer

from hf_hybrid import AutoHybridModelForCausalLM, Plan, Span
from hf_hybrid.checkpoints import bundled

RECORD = "Capital: Port Amel\nPopulation: 4,512,000\nArea: 12,300 sq km\nSummary: Geography, People"


def main() -> None:
    folder = bundled("hybrid-pocket")
    model = AutoHybridModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def label(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False).input_ids)

    parts = (Span(label("## Geography\n"), 24), Span(label("## People\n"), 24))
    plan = Plan((*parts, Span(label("## Summary\n"), 32, depends=(0, 1))))
    inputs = tokenizer(RECORD, return_tensors="pt")
    ids = model.generate(**inputs, strategy="planned_diffusion", plan=plan, max_new_tokens=300)
    print(tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()

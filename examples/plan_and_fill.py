"""Write one answer by planned diffusion and look at its plan and its parts."""

import torch
from transformers import AutoTokenizer

from hf_hybrid import AutoHybridModelForCausalLM
from hf_hybrid.checkpoints import bundled

RECORD = "Capital: Port Amel\nAirports: 7 (2024)\nPopulation: 4,512,000\nClimate: mild, wet winters\nArea: 12,300 sq km"


def main() -> None:
    folder = bundled("hybrid-pocket")
    model = AutoHybridModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(RECORD, return_tensors="pt")
    output = model.generate(**inputs, strategy="planned_diffusion", max_new_tokens=300, return_dict_in_generate=True)
    report = output.report[0]
    for span in report.spans:
        print(f"{tokenizer.decode(span.label).strip()}: planned {span.planned}, written {len(span.tokens)} tokens")
    print(f"{report.num_tokens} tokens in {report.num_forwards} passes")
    print(tokenizer.decode(output.sequences[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()

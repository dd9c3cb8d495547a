"""A drafter of one's own for speculative decoding: it knows the headings, and the model checks every token."""

import torch
from transformers import AutoTokenizer

from hf_hybrid import AutoHybridModelForCausalLM, Draft, Drafter
from hf_hybrid.checkpoints import bundled

RECORD = "Capital: Port Amel\nAirports: 7 (2024)\nPopulation: 4,512,000\nClimate: mild, wet winters\nArea: 12,300 sq km"
HEADINGS = ("## Geography\n", "## People\n", "## Government\n", "## Transportation\n")


class Headings(Drafter):
    name = "headings"

    def __init__(self, tokenizer):
        self.known = [tokenizer(heading, add_special_tokens=False).input_ids for heading in HEADINGS]

    def propose(self, texts, length, sampler):
        return [Draft(self.rest(text.tokens[text.prompt_length :])) for text in texts]

    def rest(self, written):
        for heading in self.known:
            for begun in range(len(heading) - 1, 0, -1):
                if written[-begun:] == heading[:begun]:
                    return heading[begun:]
        return []


def main() -> None:
    folder = bundled("hybrid-pocket")
    model = AutoHybridModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(RECORD, return_tensors="pt")
    options = {"drafter": Headings(tokenizer), "max_new_tokens": 300, "return_dict_in_generate": True}
    output = model.generate(**inputs, strategy="speculative", adaptive=False, **options)
    print(output.report[0].drafting)
    print(tokenizer.decode(output.sequences[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()

"""Stream an answer in text order while its parts are written at the same time."""

from threading import Thread

import torch
from transformers import AutoTokenizer, TextIteratorStreamer

from hf_hybrid import AutoHybridModelForCausalLM
from hf_hybrid.checkpoints import bundled

RECORD = "Capital: Port Amel\nAirports: 7 (2024)\nPopulation: 4,512,000\nClimate: mild, wet winters\nArea: 12,300 sq km"


def main() -> None:
    folder = bundled("hybrid-pocket")
    model = AutoHybridModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = {"strategy": "planned_diffusion", "max_new_tokens": 300, "streamer": streamer}
    thread = Thread(target=model.generate, kwargs={**tokenizer(RECORD, return_tensors="pt"), **options})
    thread.start()
    for piece in streamer:
        print(piece, end="", flush=True)
    thread.join()


if __name__ == "__main__":
    main()

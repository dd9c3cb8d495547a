"""What a stored folder of a release must write, by whoever loads it; knows nothing of ``hf_hybrid``.

python stored_release.py FOLDER ANSWERS: as a user without the package, into the file ANSWERS.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RECORD = "answers.json"
ARCHIVE = "custom_generate.zip"
"""Holds ``custom_generate/`` of the folder, as it was exported."""


def answers(model: Any, tokenizer: Any, prompt: str, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tokens and the text behind ``prompt``, by each call."""
    encoded = tokenizer(prompt, return_tensors="pt")
    found: list[dict[str, Any]] = []
    for arguments in calls:
        sequence = model.generate(**encoded, **arguments)[0, encoded.input_ids.shape[1] :].tolist()  # (new,)
        text = tokenizer.decode(sequence, skip_special_tokens=True)
        found.append({"arguments": arguments, "tokens": sequence, "text": text})
    return found


def main() -> None:
    """Load the folder with trust, in a process that has no ``hf_hybrid``."""
    import without_plugin  # noqa: F401 - from here on hf_hybrid cannot be found
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(sys.argv[1])
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=record["dtype"], trust_remote_code=True).eval()
    calls = [answer["arguments"] for answer in record["answers"]]
    found = answers(model, AutoTokenizer.from_pretrained(folder), record["prompt"], calls)
    assert not [name for name in sys.modules if name.partition(".")[0] == "hf_hybrid"]
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()

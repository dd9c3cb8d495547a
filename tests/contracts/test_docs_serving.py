"""The requests of the page on serving say what the server reads.

Catches: a field of the documented request that would mean something else.
"""

from __future__ import annotations

import json
import re

from hf_hybrid.cli.served import check_body
from hf_hybrid.config import settings_for, stored_strategy
from tests.snippets import read

PAGE = read("docs/serving.md")


def test_the_documented_requests_name_modes() -> None:
    (curl,) = re.findall(r"-d '(\{.*?\})'\n```", PAGE, re.S)
    body = json.loads(curl)
    check_body(body)
    assert stored_strategy(json.loads(body["generation_config"])["hf_hybrid"]) == "planned_diffusion"
    fields = [json.loads(text) for text in re.findall(r"\| `(\{\"hf_hybrid.*?\})` ", PAGE)]
    assert len(fields) == 4
    for field in fields:
        hybrid = {name: value for name, value in field["hf_hybrid"].items() if value != "..."}
        settings_for(hybrid.pop("strategy", None) or "block_diffusion", hybrid)

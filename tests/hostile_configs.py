"""Two hundred ``generation_config.json`` files that somebody wrote to harm, from one seed, for tests/test_stored.py."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hf_hybrid.config import SETTINGS

LONG = "x" * 100_000
IMPORTS = (
    "os.system",
    "builtins:eval",
    "__main__",
    "../../../etc/passwd",
    "file:///etc/passwd",
    "pickle.loads",
    "a/b--c.D",
)
ODD = ({}, {"a": {"b": []}}, [], [[]], [None], "", "8", LONG, "\u202e\u0000", math.nan, math.inf, -math.inf, 10**400)
"""Right for no field at all."""

WHOLE = (*ODD, True, False, -1, 2.5, 10**30, -(10**12), "1e3")
NUMBER = (*ODD, True, -1e9, 1e30, "0.5", "nan")
SWITCH = (*ODD, 0, 1, "true", "False", None)
TEXT = (*ODD[:6], *ODD[9:], True, 3, ["suffix"], *IMPORTS)
LISTS = ([], [[]], [None], ["1"], [1.5], [True], {"0": 1}, [-7], [10**9], [[1], [2]], LONG, math.nan)

HOST: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("max_new_tokens", "max_length", "num_beams", "num_return_sequences"), (*WHOLE, 0)),
    **dict.fromkeys(("min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size"), WHOLE),
    **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "max_time"), NUMBER),
    **dict.fromkeys(
        ("do_sample", "use_cache", "output_scores", "return_dict_in_generate", "is_assistant"), SWITCH[:-1]
    ),
    **dict.fromkeys(("eos_token_id", "pad_token_id", "forced_bos_token_id"), (61, 10**9, -7, *WHOLE)),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), (*LISTS[1:], "1,2", 61)),
    "bad_words_ids": (*LISTS[1:], [1, 2], [["a"]], 3),
    "stop_strings": ({}, [""], [1], 3, True, [None], [["a"]]),
    "cache_implementation": ("os.system", 3, [], {}, LONG),
    "watermarking_config": ({"import": "os"}, {"bias": {}, "x": 1}, {"seeding_scheme": "os.system"}),
    "compile_config": ({"backend": "os.system"}, 3, "inductor"),
    "early_stopping": ("maybe", 3.5, {}),
    "exponential_decay_length_penalty": ([1], [1, "x"], 3, "x", [math.nan, 1.0], {"a": 1}),
}
"""Field of the host -> values that it must not get through with."""

HIDING = (
    "validate",
    "to_dict",
    "update",
    "from_dict",
    "__class__",
    "__init__",
    "__dict__",
    "_private",
    "to_json_string",
)
PARTNERS = (
    "custom_generate",
    "logits_processor",
    "stopping_criteria",
    "streamer",
    "assistant_model",
    "trust_remote_code",
)
FILES = (
    *(
        b"",
        b"{",
        b"[1, 2]",
        b'"planned_diffusion"',
        b"3",
        b"null",
        b"NaN",
        b"\xff\xfe{}",
        b'{"max_new_tokens": 1' + b"0" * 9999,
    ),
    *(
        b'{"hf_hybrid": ' * 50_000,
        b"[" * 500_000,
        b'{"x": "' + b"y" * (2 << 20) + b'"}',
        b'{"a": 1} {"b": 2}',
        b"\x80\x04\x95.",
    ),
)
"""Whole files: no JSON, no object, too deep, too large."""


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"planned_diffusion": value}
    return value


def settings(rng: random.Random) -> Iterator[Any]:
    """``hf_hybrid`` with one wrong value of one setting, at its top or under the name of its strategy."""
    while True:
        strategy = rng.choice(sorted(SETTINGS))
        field = rng.choice(fields(SETTINGS[strategy]))
        hint = get_type_hints(SETTINGS[strategy])[field.name]
        options = get_args(hint) or (hint,)
        if get_origin(hint) is Literal:
            value = rng.choice(TEXT)
        elif bool in options:
            value = rng.choice(SWITCH)
        elif float in options:
            value = rng.choice(NUMBER)
        else:
            value = rng.choice(WHOLE)
        if (value == [] and field.name == "seed") or (value is None and type(None) in options):
            continue
        wrong = {field.name: value}
        yield {"strategy": strategy, **(wrong if rng.random() < 0.5 else {strategy: wrong})}


def names(rng: random.Random) -> Iterator[Any]:
    """``hf_hybrid`` with a name that is none, or a dict where none may be."""
    while True:
        strategy = rng.choice(sorted(SETTINGS))
        name = rng.choice([*IMPORTS, "window_lenght", "\u0436", "\u202e", "", LONG, "__class__", "strategy ", "core"])
        wrong = rng.choice(
            [{name: 1}, {strategy: {name: 1}}, {strategy: {strategy: {}}}, {strategy: rng.choice(ODD[3:])}]
        )
        yield {"strategy": strategy, **wrong}


def hostile_configs(number: int = 200, seed: int = 5) -> list[bytes]:
    """The files, each another one."""
    rng = random.Random(seed)
    strategies = [
        {"strategy": wrong} for wrong in (*TEXT, "Planned_Diffusion", "planned_diffusion\n", 1, ["speculative"])
    ]
    whole: list[Any] = [
        *(v for v in ODD if v != {}),
        True,
        3,
        "planned_diffusion",
        *map(nested, (2, 9, 30, 300)),
        *strategies,
    ]
    configs: list[Any] = [{"hf_hybrid": value} for value in whole]
    configs += [
        {"hf_hybrid": {"strategy": "block_diffusion"}, name: rng.choice((1, "x", {}))} for name in HIDING + PARTNERS
    ]
    drawn = settings(rng), names(rng)
    files = list(FILES)
    seen = {json.dumps(config) for config in configs}
    while len(configs) + len(files) < number:
        kind = rng.randrange(4)
        if kind < 2:
            config = {"hf_hybrid": next(drawn[kind])}
        else:
            name = rng.choice(sorted(HOST))
            config = {"hf_hybrid": {"strategy": rng.choice(sorted(SETTINGS))}, name: rng.choice(HOST[name])}
        if (text := json.dumps(config)) not in seen:
            seen.add(text)
            configs.append(config)
    return [*files, *(json.dumps(config).encode() for config in configs)]

"""A release of transformers that moved what we rely on is refused with what to do; one that did not is served.

Releases to come are simulated: another version, and a name, a method or a mask that is not what it was.

Bugs these tests catch: a renamed argument that is lost on the way to the loop (and with it bans, lengths or a seed); a
new duty of a cache layer that shows up as a TypeError; keys that a release counts otherwise, so that the text is
another one; a wrong message, or none, or one for releases that were tested; a check that reaches plain calls of the
host, or that changes the random state.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import hybrid, tiny
from transformers import GenerationMixin, LlamaForCausalLM, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

import hf_hybrid
from hf_hybrid import DecodingError
from hf_hybrid.config import settings_for
from hf_hybrid.decoding import Call, decode, engine
from hf_hybrid.models import release, seams
from hf_hybrid.models.cache import RowCacheLayer
from hf_hybrid.models.host import CACHE, Unsupported
from hf_hybrid.models.release import NEWEST, OLDEST, release_note
from hf_hybrid.models.seams import LOOP, check_seams, moved
from hf_hybrid.portable import write_custom_generate

PROMPT = torch.tensor([[3, 7, 9, 2, 11]])
UP_TO = "tested up to 5.2:"
TESTED = f"tested up to {NEWEST[0]}.{NEWEST[1]}"


@pytest.fixture(autouse=True)
def unasked() -> Iterator[None]:
    """As in a new process."""
    moved.cache_clear()
    yield
    moved.cache_clear()


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "installed", lambda: f"{NEWEST[0]}.{NEWEST[1] + 75}.0.dev0")


def sampled(model: Any, ids: Any, processors: Any = None, **kwargs: Any) -> None:
    """The loop of a host that renamed an argument."""


def other_mask(self: RowCacheLayer, query_length: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
    """A host that counts keys before the pass instead of those behind it would see one fewer."""
    return self.place.used - 1, 0


def fewer_keys(self: RowCacheLayer, *args: Any, **kwargs: Any) -> int:
    return max(self.place.past - 1, 0)


MOVED: dict[str, tuple[Any, str, Any, str]] = {
    "an argument of the loop": (GenerationMixin, "_sample", sampled, "input_ids, logits_processor, stopping_criteria"),
    "custom_generate": (GenerationMixin, "generate", sampled, "takes no custom_generate"),
    "a duty of a cache layer": (RowCacheLayer, "__abstractmethods__", frozenset({"pages"}), "must have pages"),
    "the layers of a cache": (seams.Cache, "__init__", lambda self: None, "not made of layers"),
    "keys of a cache": (seams, "DynamicLayer", type("Layer", (seams.CacheLayerMixin,), {}), "no keys and values"),
}
"""What moved -> where, what is there then, and what the message says of it."""


def test_tested_releases_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in (OLDEST, NEWEST):
        monkeypatch.setattr(release, "installed", lambda version=version: f"{version[0]}.{version[1]}.3")
        assert release_note() == "" and not release.is_newer()
        check_seams()


def test_the_pinned_releases_are_the_tested_ones() -> None:
    for name, (major, minor) in (("constraints-floor.txt", OLDEST), ("constraints.txt", NEWEST)):
        text = (Path(__file__).parents[2] / name).read_text(encoding="utf-8")
        assert f"\ntransformers=={major}.{minor}." in text


def test_a_newer_release_that_moved_nothing_is_served(newer: None) -> None:
    model = hybrid(seed=13)
    before = torch.get_rng_state()
    ours = model.generate(PROMPT, strategy="autoregressive", max_new_tokens=12)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(ours, model.generate(PROMPT, max_new_tokens=12, do_sample=False))


@pytest.mark.parametrize("name", MOVED)
def test_what_moved_is_named(newer: None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hybrid(seed=13)
    where, attribute, there, said = MOVED[name]
    with monkeypatch.context() as patch:
        if name == "keys of a cache":
            there.__abstractmethods__ = frozenset()
            patch.setattr(there, "__init__", lambda self: None)
        patch.setattr(where, attribute, there)
        found = moved()
    assert any(said in fault for fault in found)
    with pytest.raises(Unsupported, match=TESTED):  # once per process
        model.generate(PROMPT, strategy="autoregressive", max_new_tokens=4)
    assert model.generate(PROMPT, max_new_tokens=4).shape == (1, 9)  # the host's own call


def test_fields_of_outputs_are_named(newer: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [
        (f.name, f.type, f) for f in dataclasses.fields(GenerateDecoderOnlyOutput) if f.name not in (CACHE, "scores")
    ]
    bare = dataclasses.make_dataclass("Output", [(name, kind, None) for name, kind, _ in kept])
    monkeypatch.setattr(seams, "GenerateDecoderOnlyOutput", bare)
    assert moved() == ("outputs of generate() have no scores, cache or past_key_values",)


@pytest.mark.parametrize("method", [("get_mask_sizes", other_mask), ("get_seq_length", fewer_keys)])
def test_keys_that_are_counted_otherwise_give_no_text(
    newer: None, method: tuple[str, Callable[..., Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RowCacheLayer, *method)
    with pytest.raises(Unsupported, match=f"a pass over a tiny model .*{TESTED}"):
        hybrid(seed=13).generate(PROMPT, strategy="speculative", max_new_tokens=4)


def test_a_mask_that_is_ignored_gives_no_text(newer: None, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LlamaForCausalLM.forward

    def forward(self: Any, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **rest: Any) -> Any:
        return original(self, input_ids, attention_mask=None, position_ids=position_ids, **rest)

    forward.__signature__ = importlib.import_module("inspect").signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    assert moved() == ("a pass over a tiny model has other logits than without a cache",)


def test_a_renamed_parameter_of_forward_is_named(newer: None) -> None:
    class Renamed(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, kv: Any = None):
            raise AssertionError("no pass may be made")

    model = Renamed(tiny("llama").config).eval()
    with pytest.raises(Unsupported, match=TESTED):
        hf_hybrid.enable(model).generate(PROMPT, strategy="autoregressive", max_new_tokens=4)


@pytest.mark.parametrize("missing", LOOP[1:])
def test_what_the_loop_does_not_get_is_not_left_out(newer: None, missing: str) -> None:
    model = hybrid(seed=13)
    handed = {
        "logits_processor": LogitsProcessorList(),
        "stopping_criteria": StoppingCriteriaList(),
        "generation_config": model.generation_config,
        "use_cache": True,
    }
    handed[f"{missing}_of_another_name"] = handed.pop(missing)
    call = Call("autoregressive", settings_for("autoregressive", {}))
    with pytest.raises(DecodingError, match=TESTED):
        decode(model, PROMPT, call=call, **handed)


def test_an_error_inside_a_newer_release_says_so(newer: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hybrid(seed=13)

    def criteria(*args: Any, **kwargs: Any) -> Any:
        raise TypeError("MaxLengthCriteria has no attribute max_length")

    monkeypatch.setattr(engine, "own_criteria", criteria)
    with pytest.raises(TypeError) as caught:
        model.generate(PROMPT, strategy="autoregressive", max_new_tokens=4)
    assert TESTED in caught.value.__notes__[0]


@pytest.mark.parametrize("name", ["transformers.cache_utils", "numpy"])
def test_a_name_that_is_gone_says_so(newer: None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.import_module

    def import_module(module: str) -> Any:
        if module == "hf_hybrid.many":
            raise ImportError(f"cannot import name 'CacheLayerMixin' from '{name}'", name=name)
        return original(module)

    monkeypatch.setattr(hf_hybrid, "import_module", import_module)
    monkeypatch.delitem(vars(hf_hybrid), "generate_many", raising=False)
    with pytest.raises(ImportError, match="CacheLayerMixin") as caught:
        _ = hf_hybrid.generate_many
    assert (TESTED in str(caught.value)) is (name != "numpy")


GONE = """
import sys
sys.modules["hf_hybrid"] = None
import torch, transformers.cache_utils
from transformers import AutoModelForCausalLM
import transformers
{change}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
try:
    print(model.generate(torch.tensor([[3, 4]]), strategy="autoregressive", max_new_tokens=3).tolist())
except (ImportError, ValueError) as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("del transformers.cache_utils.CacheLayerMixin", ["cannot import name 'CacheLayerMixin'", UP_TO]),
        (
            "transformers.GenerationMixin._sample = lambda self, ids, **kwargs: ids",
            ["logits_processor", UP_TO],
        ),
        ("", ["[[3, 4, "]),
    ],
)
def test_a_folder_without_the_plugin_says_so(tmp_path: Path, change: str, said: list[str]) -> None:
    tiny("llama").float().save_pretrained(tmp_path / "model")
    write_custom_generate(tmp_path / "model")
    tested = tmp_path / "model" / "custom_generate" / "models_release.py"
    text = tested.read_text(encoding="utf-8")
    tested.write_text(text.replace(f"OLDEST, NEWEST = {OLDEST}, {NEWEST}", "OLDEST, NEWEST = (5, 1), (5, 2)"))
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", GONE.format(change=change), str(tmp_path / "model")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in said), json.dumps(done.stdout)

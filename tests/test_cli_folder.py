"""Broken and hostile checkpoints: every command that loads a model says what is wrong in one line.

Catches: tracebacks of libraries below (safetensors, tokenizers, torch); a pickle that is read; tensors that are missing
and drawn at random without a word; an index that names files elsewhere; stop strings of a checkpoint that ask for a
tokenizer which the command line has.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from hf_hybrid import generate_many
from hf_hybrid.checkpoints import bundled
from hf_hybrid.cli.command import guarded, load
from hf_hybrid.cli.folder import LoadingError, check_folder
from tests.cli_for_tests import call

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "model")


def changed(name: str, **fields: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **fields}))

    return change


def written(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def removed(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def truncated(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def far_offsets(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    next(value for name, value in header.items() if name != "__metadata__")["data_offsets"] = [0, 10**12]
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def without_a_tensor(folder: Path, name: str = "model.norm.weight") -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[name]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


class Evil:
    """Unpickling it leaves a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


def pickled(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(pickle.dumps(Evil()))

    return change


def in_torch_format(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def indexed(shard: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        names = list(load_file(folder / WEIGHTS))
        (folder / WEIGHTS).rename(folder.parent / "outside.safetensors")
        shutil.copy(folder / "config.json", folder / "evil.bin")
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}))

    return change


def an_adapter(folder: Path) -> None:
    pickled("adapter_model.bin")(folder)
    (folder / "adapter_config.json").write_text("{}")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncated, "truncated or broken"),
    "empty weights": (written(WEIGHTS, b""), "truncated or broken"),
    "a header of exabytes": (written(WEIGHTS, struct.pack("<Q", 2**62) + b"{}"), "truncated or broken"),
    "a header that is no JSON": (written(WEIGHTS, struct.pack("<Q", 4) + b"{{{{"), "truncated or broken"),
    "offsets behind the end": (far_offsets, "truncated or broken"),
    "a pointer to large files": (written(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), "truncated or bro"),
    "a tensor is missing": (without_a_tensor, "1 tensors of the model are not there, such as model.norm.weight"),
    "a tensor of the attention": (
        lambda f: without_a_tensor(f, "model.layers.0.self_attn.q_proj.weight"),
        "the model: 1 tensors of the model are not there, such as model.layers.0.self_attn.q_proj",
    ),
    "other shapes": (changed("config.json", hidden_size=64), "other shapes than config.json says"),
    "no weights": (removed(WEIGHTS), "there are no weights"),
    "a pickle": (pickled("pytorch_model.bin"), "pytorch_model.bin is a pickle"),
    "a pickle in parts": (pickled("pytorch_model-00001-of-00002.bin"), "is a pickle"),
    "tensors in a pickle": (in_torch_format, "convert it"),
    "an adapter in a pickle": (an_adapter, "adapter_model.bin is a pickle"),
    "an index of pickles": (indexed("evil.bin"), "evil.bin is a pickle"),
    "an index that leads outside": (indexed("../outside.safetensors"), "is not beside it"),
    "an index of nothing": (indexed("model-00001-of-00001.safetensors"), "is not there; download it again"),
    "an index that is empty": (lambda f: (removed(WEIGHTS)(f), written(INDEX, b"{}")(f)), 'no "weight_map"'),
    "an index that is no JSON": (lambda f: (removed(WEIGHTS)(f), written(INDEX, b"[" * 10**5)(f)), "is no JSON file"),
    "an empty tokenizer": (written("tokenizer.json", b"{}"), "the tokenizer"),
    "a tokenizer that is no JSON": (written("tokenizer.json", b"nope"), "the tokenizer"),
    "a tokenizer of another kind": (changed("tokenizer.json", model={"type": "Nope"}), "the tokenizer"),
    "a list for a config of the tokenizer": (written("tokenizer_config.json", b"[]"), "the tokenizer"),
    "flash attention": (changed("config.json", attn_implementation="flash_attention_2"), '"attn_implementation": "sdp'),
    "an unknown attention": (changed("config.json", attn_implementation="nonsense"), '"attn_implementation": "sdpa"'),
    "a quantisation without its package": (
        changed("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "optimum",
    ),
    "a config that is no JSON": (written("config.json", b"nope"), "not a valid JSON file"),
    "a config that is a number": (written("config.json", b"5"), "the model"),
    "a config too deep": (written("config.json", b"[" * 10**5), "recursion"),
    "an unknown type": (changed("config.json", model_type="nope"), "nope"),
    "an unknown activation": (changed("config.json", hidden_act="nope"), "nope"),
    "a text for a size": (changed("config.json", hidden_size="big"), "hidden_size"),
    "no heads": (changed("config.json", num_attention_heads=0), "the model"),
    "a generation config that is no JSON": (written("generation_config.json", b"nope"), "is no JSON file"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_line(
    copy: Path, change: Callable[[Path], object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(copy)
    monkeypatch.chdir(copy.parent)
    result = call("generate", "Area: 1", "--max-new-tokens", 2, "--model", copy, code=1)
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert message in result.stderr and str(copy) in result.stderr
    assert not (copy.parent / "unpickled").exists()


@pytest.mark.parametrize("kind", ["truncated", "a pickle", "an empty tokenizer", "flash attention"])
def test_so_it_is_for_every_command(copy: Path, kind: str, tmp_path: Path) -> None:
    change, message = BROKEN[kind]
    change(copy)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"Area: 1"\n')
    bench = ("bench", "--num-prompts", 1, "--model", copy)
    for line in (
        ("plan", "Area: 1", "--model", copy),
        ("generate", "--input", prompts, "--output", tmp_path / "out.jsonl", "--model", copy),
        ("demo", "--model", copy),
        bench,
        ("export", copy, tmp_path / "exported"),
    ):
        said = call(*line, code=1).stderr
        assert message in said and len(said.splitlines()) == 1, line
    assert not (tmp_path / "exported").exists() and not (tmp_path / "out.jsonl").exists()
    if kind != "an empty tokenizer":  # loads none
        assert message in call("bench", "--loading", "--repeats", 1, "--model", copy, code=1).stderr


def test_a_device_that_is_not_there_is_one_line(folder: Path) -> None:
    said = call("generate", "Area: 1", "--model", folder, "--device", "nonsense:7", code=1).stderr
    assert "--device nonsense:7" in said and len(said.splitlines()) == 1


def test_pickles_beside_weights_do_not_matter(copy: Path) -> None:
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    check_folder(copy)
    assert call("generate", "Area: 1", "--max-new-tokens", 2, "--model", copy).stderr == ""
    with pytest.raises(LoadingError, match="no weights"):
        check_folder(copy.parent)


class PanicException(BaseException):
    """As libraries in Rust raise it."""


@pytest.mark.parametrize("error", [KeyError("x"), PanicException("index out of bounds"), ImportError("no flash")])
def test_what_nobody_expected_is_one_line_and_points_at_debug(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as ended:
        guarded(command)(debug=False)
    said = capsys.readouterr().err
    assert ended.value.exit_code == 1 and len(said.splitlines()) == 1 and str(error) in said
    assert ("--debug shows where" in said) == (not isinstance(error, ImportError))
    with pytest.raises(typer.Exit):
        guarded(command)(debug=True)
    assert "Traceback" in capsys.readouterr().err


# Stop strings that a checkpoint names.

PROMPT = "Capital: Port Amel\nArea: 12,300 sq km"


@pytest.fixture(scope="module")
def stopping(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The bundled checkpoint, which stops at a text that its plain answer holds, and that text."""
    model, tokenizer, _ = load("hybrid-pocket")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    options = {"strategy": "autoregressive", "do_sample": False, "max_new_tokens": 12}
    ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(ids[5:8], skip_special_tokens=True)
    copied = shutil.copytree(bundled("hybrid-pocket"), tmp_path_factory.mktemp("stopping") / "model")
    changed("generation_config.json", stop_strings=[text])(copied)
    return copied, text


@pytest.mark.parametrize("strategy", ["host", "autoregressive", "speculative"])
def test_stop_strings_of_a_checkpoint_stop_an_answer(stopping: tuple[Path, str], strategy: str) -> None:
    copied, text = stopping
    options = (PROMPT, "--strategy", strategy, "--max-new-tokens", 24, "--json")
    stopped = json.loads(call("generate", *options, "--model", copied).stdout)["text"]
    whole = json.loads(call("generate", *options, "--model", "hybrid-pocket").stdout)["text"]
    assert stopped.endswith(text) and whole.startswith(stopped) and len(stopped) < len(whole)


def test_stop_strings_of_a_checkpoint_stop_a_job_and_a_stream(stopping: tuple[Path, str], tmp_path: Path) -> None:
    copied, text = stopping
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text((json.dumps(PROMPT) + "\n") * 3)
    options = ("--strategy", "autoregressive", "--max-new-tokens", 24, "--batch-size", 2)
    call("generate", "--input", prompts, "--output", output, *options, "--model", copied)
    found = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    assert len(found) == 3 and all(answer.endswith(text) for answer in found)
    model, tokenizer, _ = load(str(copied))
    ids = tokenizer(PROMPT)["input_ids"]
    settings: dict[str, Any] = {"strategy": "autoregressive", "max_new_tokens": 24, "do_sample": False}
    for answer in generate_many(model, [ids] * 3, batch_size=2, tokenizer=tokenizer, **settings):
        assert tokenizer.decode(answer.tokens) == found[0]
    with pytest.raises(ValueError, match="stop_strings need the tokenizer"):
        generate_many(model, [ids], **settings)


@pytest.mark.parametrize(
    "line",
    [
        ("plan", PROMPT, "--max-new-tokens", 24),
        ("generate", PROMPT, "--race", "--max-new-tokens", 24),
        ("demo", "--max-new-tokens", 24),
        ("bench", "--num-prompts", 1, "--max-new-tokens", 24),
    ],
    ids=lambda line: " ".join(map(str, line[:1])),
)
def test_no_command_asks_for_the_tokenizer_that_it_has(stopping: tuple[Path, str], line: tuple[object, ...]) -> None:
    assert "tokenizer" not in call(*line, "--model", stopping[0]).stderr


def test_a_prompt_that_is_no_text_is_one_line(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xff")
    for given in (["half a sign: \udcff"], ["--input", path]):
        said = call("generate", *given, "--model", folder, code=1).stderr
        assert "no text in UTF-8" in said and len(said.splitlines()) == 1

"""Links in folders that are exported, saved into or described: nothing comes from, or goes, elsewhere.

Catches: a secret beside a checkpoint that lands in its export, as a card, as a licence, as a chat template, through a
linked folder; a Hub cache that cannot be exported any more, or whose blobs are overwritten; files of somebody else
that are written through a link, also one that leads nowhere yet; a device that is replaced by a file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_for_tests import write_checkpoint
from models_for_tests import hybrid
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import hf_hybrid
from hf_hybrid import PortableError
from hf_hybrid.checkpoints import bundled
from hf_hybrid.cli import app
from hf_hybrid.hub import links
from hf_hybrid.hub.card import write_card
from hf_hybrid.hub.exporting import export_model
from hf_hybrid.hub.links import LinkError, check_source, replace_file
from hf_hybrid.portable import custom_generate_files, write_custom_generate

SECRET = "a key of somebody else"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("made"))


@pytest.fixture
def source(made: Path, tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text(SECRET)
    return Path(shutil.copytree(made, tmp_path / "model"))


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    """The snapshot of a Hub cache: every file is a link to a blob."""
    repository = tmp_path / "hub" / "models--me--small"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repository / "blobs" / "card").write_text("the card")
    (snapshot / "README.md").symlink_to("../../blobs/card")
    for path in made.iterdir():
        shutil.copyfile(path, repository / "blobs" / f"b-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/b-{path.name}")
    return snapshot


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    assert code == 0 or len(result.output.splitlines()) == 1
    return result.output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "training.json", "test_set.jsonl", "chat_template.jinja"])
def test_nothing_beside_the_source_is_exported(source: Path, tmp_path: Path, name: str) -> None:
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to("../secret")
    told = call("export", source, tmp_path / "out", code=1)
    assert f"{source / name} is a link that leads out of {source}, to ../secret" in told and "put a copy" in told
    assert not (tmp_path / "out").exists()


def test_nothing_is_exported_through_a_linked_folder(source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "private.jinja").write_text(SECRET)
    (source / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LinkError, match="additional_chat_templates is a link that leads out"):
        export_model(AutoModelForCausalLM.from_pretrained(source), tmp_path / "out", source=source)
    assert not (tmp_path / "out").exists()
    (source / "additional_chat_templates").unlink()
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").symlink_to(tmp_path / "secret")
    assert "tool.jinja is a link that leads out" in call("export", source, tmp_path / "out", code=1)
    (source / "additional_chat_templates" / "tool.jinja").unlink()
    (source / "a").symlink_to("b")  # links in a ring lead nowhere
    (source / "b").symlink_to("a")
    with pytest.raises(LinkError, match="is a link"):
        check_source(source)


def test_links_that_stay_inside_are_files(source: Path, tmp_path: Path) -> None:
    (source / "docs").mkdir()
    (source / "docs" / "card.md").write_text("my card")
    (source / "README.md").symlink_to("docs/card.md")
    (source / "runs").symlink_to(tmp_path)  # a folder that no export reads
    (tmp_path / "latest").symlink_to(source)
    call("export", tmp_path / "latest", tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "my card"
    assert not (tmp_path / "out" / "README.md").is_symlink()


def test_a_hub_cache_is_exported_whole(cache: Path, tmp_path: Path) -> None:
    call("export", cache, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "the card"
    assert (tmp_path / "out" / "test_set.jsonl").read_bytes() == (cache / "test_set.jsonl").read_bytes()
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    check_source(cache / "sub")  # a model in a subfolder of a snapshot, here without files


def test_a_snapshot_holds_its_own_blobs_alone(cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "hub" / "models--me--other" / "blobs"
    other.mkdir(parents=True)
    (other / "x").write_text(SECRET)
    (cache / "LICENSE").symlink_to("../../../models--me--other/blobs/x")
    assert "LICENSE is a link" in call("export", cache, tmp_path / "out", code=1)
    (cache / "LICENSE").unlink()
    (cache.parents[1] / "blobs" / "through").symlink_to(other / "x")
    (cache / "LICENSE").symlink_to("../../blobs/through")
    assert "LICENSE is a link" in call("export", cache, tmp_path / "out", code=1)
    assert not (tmp_path / "out").exists()


def test_a_linked_installation_of_the_bundled_checkpoint_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some installers link every file of a package to a cache of theirs."""
    check_source(bundled("hybrid-pocket"))
    (tmp_path / "package" / "hybrid-pocket").mkdir(parents=True)
    (tmp_path / "package" / "hybrid-pocket" / "README.md").symlink_to("../../card")
    with pytest.raises(LinkError):
        check_source(tmp_path / "package" / "hybrid-pocket")
    monkeypatch.setattr(links.checkpoints, "__file__", str(tmp_path / "package" / "__init__.py"))
    check_source(tmp_path / "package" / "hybrid-pocket")


# Targets.


@pytest.mark.parametrize("there", [True, False])
def test_a_target_that_is_a_link_is_refused(source: Path, tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere")
    for arguments in ((source, tmp_path / "out"), ("--speculative", tmp_path / "out")):
        assert "out is a link to elsewhere; name that folder itself" in call("export", *arguments, code=1)
    assert not there or list((tmp_path / "elsewhere").iterdir()) == []
    assert there or not (tmp_path / "elsewhere").exists()


def test_a_target_below_a_link_is_fine(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "home").symlink_to("disk")
    call("export", "--speculative", tmp_path / "home" / "out")
    assert (tmp_path / "disk" / "out" / "README.md").is_file()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md", "tokenizer.json", "LICENSE"])
@pytest.mark.parametrize("there", [True, False])
def test_files_that_are_links_are_not_written_through(source: Path, tmp_path: Path, name: str, there: bool) -> None:
    (source / "LICENSE").write_text("mine")
    victim = tmp_path / "victim"
    if there:
        victim.write_text(SECRET)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(victim)
    told = call("export", source, tmp_path / "out", code=1)
    assert f"{name} is a link that leads out of" in told and "name another folder" in told
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert victim.read_text() == SECRET if there else not victim.exists()


@pytest.mark.parametrize("write", ["portable", "save", "speculative", "export"])
def test_a_linked_custom_generate_is_not_written_through(source: Path, tmp_path: Path, write: str) -> None:
    elsewhere = write_custom_generate(tmp_path / "elsewhere", "speculative")
    (elsewhere / "old.py").write_text("# Copied from hf_hybrid 0.0.1: hf_hybrid.old\n")
    before = contents(tmp_path / "elsewhere")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "custom_generate").symlink_to(elsewhere)
    doors: dict[str, Callable[[], object]] = {
        "portable": lambda: write_custom_generate(tmp_path / "out"),
        "save": lambda: hf_hybrid.save_pretrained(hybrid(), tmp_path / "out"),
        "speculative": lambda: call("export", "--speculative", tmp_path / "out", code=1),
        "export": lambda: call("export", source, tmp_path / "out", code=1),
    }
    if write in ("portable", "save"):
        with pytest.raises((PortableError, LinkError), match="custom_generate is a link"):
            doors[write]()
    else:
        assert "custom_generate is a link" in str(doors[write]())
    assert contents(tmp_path / "elsewhere") == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["custom_generate"]


def test_an_enabled_model_is_saved_beside_a_linked_custom_generate(tmp_path: Path) -> None:
    """Weights are never lost to it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "custom_generate").symlink_to(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="custom_generate is a link"):
        hybrid().save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file() and list((tmp_path / "elsewhere").iterdir()) == []


def test_saving_into_a_hub_cache_is_refused(cache: Path) -> None:
    before = contents(cache.parents[1] / "blobs")
    with pytest.raises(LinkError, match="would be written over there"):
        hf_hybrid.save_pretrained(hybrid(), cache)
    assert contents(cache.parents[1] / "blobs") == before


def test_the_files_of_custom_generate_replace_links(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text(SECRET)
    (tmp_path / "custom_generate").mkdir()
    name = next(iter(custom_generate_files()))
    (tmp_path / "custom_generate" / name).symlink_to(tmp_path / "victim")
    (tmp_path / "custom_generate" / f".{name}.{os.getpid()}").symlink_to(tmp_path / "victim")
    write_custom_generate(tmp_path)
    assert (tmp_path / "victim").read_text() == SECRET
    assert {path.name for path in (tmp_path / "custom_generate").iterdir()} == set(custom_generate_files())


# Cards.


def test_a_card_replaces_a_link(cache: Path, tmp_path: Path) -> None:
    blob = cache.parents[1] / "blobs" / "card"
    write_card(cache, licence="mit")
    assert blob.read_text() == "the card" and not (cache / "README.md").is_symlink()
    assert "license: mit" in (cache / "README.md").read_text()
    picture, victim = tmp_path / "plots" / "sweep.png", tmp_path / "victim"
    picture.parent.mkdir()
    picture.write_bytes(b"drawn")
    victim.write_text(SECRET)
    (tmp_path / "CARD.md").symlink_to(victim)
    (tmp_path / "sweep.png").symlink_to(victim)
    write_card(cache, out=tmp_path / "CARD.md", licence="mit", picture=picture)
    assert victim.read_text() == SECRET and (tmp_path / "sweep.png").read_bytes() == b"drawn"
    assert "license: mit" in (tmp_path / "CARD.md").read_text()
    write_card(cache, out=tmp_path / "CARD.md", licence="mit", picture=tmp_path / "sweep.png")  # already beside it
    assert (tmp_path / "sweep.png").read_bytes() == b"drawn"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_file_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "card").write_text("old")

    def full(self: Path, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(tmp_path / "card", b"new")
    assert (tmp_path / "card").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["card"]


def test_a_device_is_written_to() -> None:
    reader, writer = os.pipe()
    replace_file(Path(f"/dev/fd/{writer}"), b"card")
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b"card"

"""Push and load over HTTP, with the unmodified client of the hub against a hub on loopback.

Catches: a push that loses ``generation_config.hf_hybrid``, the tokenizer or the record of control tokens; a checkpoint
that writes other text after the way over the hub (by id, commit, tag, branch, subfolder, in shards, private); errors
that do not say what is missing; a load from the cache that needs a network; a token that is sent to where files lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_hybrid.checkpoints import bundled
from tests.checkpoint_for_tests import write_checkpoint
from tests.hub.client_for_tests import PROMPT, STRATEGIES
from tests.hub.hub_for_tests import NOBODY, USERS, run_client
from tests.hub_server import HubServer

NAMES = ("tiny", "sharded", "secret", "deep", "pocket", "one", "carded", "speculative", "my-model")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer(USERS) as server:
        server.storage.page = 3  # listings come in pages
        server.storage.part_size = 60_000  # and the weights in parts
        yield server


@pytest.fixture(scope="module")
def pushed(hub: HubServer, root: Path) -> dict[str, Any]:
    folder = str(write_checkpoint(root / "tiny"))
    return run_client(root, hub.url, "push", {"folder": folder}, home="writer", token="hf_alice")[0]


@pytest.fixture(scope="module")
def read(hub: HubServer, root: Path, pushed: dict[str, Any]) -> dict[str, Any]:
    return run_client(root, hub.url, "read", {"first": pushed["first"]}, home="reader")[0]


@pytest.fixture(scope="module")
def refused(hub: HubServer, root: Path, pushed: dict[str, Any]) -> dict[str, list[str]]:
    return run_client(root, hub.url, "refused", home="stranger")[0]


def test_everything_goes_up(hub: HubServer, pushed: dict[str, Any]) -> None:
    assert set(hub.storage.repositories) == {f"alice/{name}" for name in NAMES}
    main = hub.storage.repositories["alice/tiny"].at("main")
    assert main is not None and main.oid == pushed["first"]
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= main.files.keys()
    assert main.files["model.safetensors"].lfs and not main.files["config.json"].lfs
    assert hub.storage.repositories["alice/secret"].private and not hub.storage.repositories["alice/tiny"].private
    assert pushed["refs"] == ["main", "trial", "v1"] and pushed["commits"][-1] == "initial commit"
    assert sum(name.startswith("model-0") for name in pushed["shards"]) > 1
    assert "models/tiny/model.safetensors" in pushed["tree"]
    # The checkpoint as it is shipped, byte for byte.
    pocket = hub.storage.repositories["alice/pocket"].at("main")
    assert pocket is not None
    files = {
        path.relative_to(bundled("hybrid-pocket")).as_posix(): path for path in bundled("hybrid-pocket").rglob("*")
    }
    assert {name: blob.data for name, blob in pocket.files.items()} == {
        name: path.read_bytes() for name, path in files.items() if path.is_file() and "__pycache__" not in name
    }


@pytest.mark.parametrize("way", ["id", "commit", "tag", "sharded", "subfolder", "private", "enabled", "one", "card"])
def test_the_same_text_comes_down(pushed: dict[str, Any], read: dict[str, Any], way: str) -> None:
    assert read[way] == pushed["before"]


def test_a_branch_has_its_own_weights(pushed: dict[str, Any], read: dict[str, Any]) -> None:
    assert read["branch"] == pushed["branch"]
    assert read["branch"] != pushed["before"]


def test_the_stored_strategy_survives(pushed: dict[str, Any], read: dict[str, Any]) -> None:
    before = pushed["before"]
    assert read["config"] == {"strategy": "planned_diffusion", "planned_diffusion": {"window_length": 6}}
    assert before["stored"] == before["planned_diffusion"] != before["autoregressive"]
    assert read["plain"] == before["autoregressive"]  # the host's own classes know nothing of it
    assert read["pipeline"] == before["stored"]  # after install(), a pipeline by id does
    assert "## " in read["pocket"] and "Port Amel" in read["pocket"]


def test_one_commit_brings_it_all(hub: HubServer, pushed: dict[str, Any]) -> None:
    oid, titles = pushed["one"]
    commit = hub.storage.repositories["alice/one"].at("main")
    assert commit is not None and commit.oid == oid and titles == ["All of it", "initial commit"]
    assert {"README.md", "tokenizer.json", "custom_generate/generate.py"} <= commit.files.keys()
    readme = hub.storage.repositories["alice/my-model"].at("main")  # pushed by the line of docs/hub.md
    assert readme is not None and readme.files.keys() == commit.files.keys()
    assert (
        "custom_generate/generate.py"
        in hub.storage.repositories["alice/speculative"]
        .commits[hub.storage.repositories["alice/speculative"].branches["main"]]
        .files
    )


def test_the_hub_reads_the_card(pushed: dict[str, Any]) -> None:
    assert pushed["tags"][:2] == ["hf_hybrid", "custom_generate"] and pushed["pipeline"] == "text-generation"
    assert pushed["bad card"][0] == "ValueError" and "base_model_relation" in pushed["bad card"][1]


def test_without_the_plugin_the_same_text_is_written(hub: HubServer, root: Path, pushed: dict[str, Any]) -> None:
    job = {"prompt": PROMPT, "name": "alice/one", "strategies": STRATEGIES, "revision": pushed["one"][0]}
    (found,) = run_client(root, hub.url, "trusting", job, home="elsewhere", program="client_without_plugin.py")
    before = pushed["before"]
    assert found["modules"] == []
    assert found["written"] == before
    assert found["pipeline"] == found["card"] == before["stored"]
    assert found["untrusted"] == found["drafted"] == before["autoregressive"] != before["stored"]


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("private without token", "OSError", "alice/secret is not a local folder and is not a valid model identifier"),
        ("private of another", "OSError", "alice/secret is not a local folder and is not a valid model identifier"),
        ("wrong token", "OSError", "Invalid credentials in Authorization header"),
        ("wrong token, private", "OSError", "Invalid credentials in Authorization header"),
        ("missing repository", "OSError", "alice/nothing is not a local folder and is not a valid model identifier"),
        ("missing revision", "OSError", "nowhere is not a valid git identifier"),
        ("missing subfolder", "ValueError", "Unrecognized model in alice/deep"),
        ("push without token", "HfHubHTTPError", "Invalid username or password"),
        ("push to another", "HfHubHTTPError", "bob must not write to alice/tiny"),
    ],
)
def test_errors_name_what_is_wrong(refused: dict[str, list[str]], case: str, error: str, message: str) -> None:
    kind, text = refused[case]
    assert kind == error and message in text


def test_offline_it_loads_from_the_cache(root: Path, pushed: dict[str, Any], read: dict[str, Any]) -> None:
    (found,) = run_client(root, NOBODY, "offline", home="reader", HF_HUB_OFFLINE="1")
    assert [found[way] for way in ("id", "sharded", "subfolder")] == [pushed["before"]] * 3
    assert found["missing"][0] == "OSError" and "couldn't find them in the cached files" in found["missing"][1]


def test_the_server_was_all_that_the_client_needs(
    hub: HubServer, read: dict[str, Any], refused: dict[str, list[str]]
) -> None:
    assert read and refused
    assert hub.unknown_requests() == []
    assert hub.storage.tokens_at_cdn == []
    assert any(path.startswith("/cdn/") for _, path, _ in hub.storage.asked)


def test_what_is_deleted_is_gone(hub: HubServer, root: Path, read: dict[str, Any], refused: dict[str, Any]) -> None:
    assert read and refused  # they need what is deleted here
    (found,) = run_client(root, hub.url, "remove", home="writer", token="hf_alice")
    assert "README.md" not in found["files"] and "config.json" in found["files"]
    assert found["branches"] == ["main"] and found["exists"] is False
    assert "alice/secret" not in hub.storage.repositories

"""``push_to_hub``: uploads model, tokenizer, ``custom_generate/`` and a card in one commit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, ModelCard, ModelCardData

from hf_hybrid.config import SETTINGS, stored_strategy
from hf_hybrid.hub.saving import save_pretrained
from hf_hybrid.mixin import causal_model
from hf_hybrid.models.vocabulary import control_tokens

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedTokenizerBase

CARD = "README.md"
TAGS = ("hf_hybrid", "custom_generate")


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    create_pr: bool = False,
    **kwargs: Any,
) -> CommitInfo:
    """Push the files of ``hf_hybrid.save_pretrained`` in one commit.

    Args:
        model: as of ``save_pretrained``.
        repo_id: ``owner/name``; made when it is not there.
        tokenizer: goes with it.
        private: True makes a new repository private; unset: as the owner's default says.
        token: of the Hub; unset: of ``hf auth login``.
        revision: branch; made when it is not there. Unset: the main branch.
        commit_message: title of the commit.
        create_pr: open a pull request instead of committing.
        **kwargs: for the host's ``save_pretrained``, such as ``max_shard_size="2GB"``.

    Returns:
        The commit; ``oid`` is its hash, for ``from_pretrained(revision=...)``.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: no such owner, or no right to write there.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, tokenizer=tokenizer, **kwargs)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if not api.file_exists(repo_id, CARD, revision=None if create_pr else revision):
            write_repository_card(model, Path(folder), repo_id)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )


def write_repository_card(model: Any, folder: Path, name: str) -> None:
    """Write a first card for a repository that has none: how to run it with this package, without, by the host alone.

    ``hf-hybrid card`` writes one with measured numbers.
    """
    host = causal_model(model)
    control = control_tokens(host)
    hybrid = control is not None and control.tags is not None
    strategies = [name for name in SETTINGS if hybrid or "diffusion" not in name]
    default = stored_strategy(getattr(host.generation_config, "hf_hybrid", None))
    card = ModelCard.from_template(
        ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=list(TAGS)),
        template_path=str(Path(__file__).with_name("repository_card.md")),
        name=name,
        title=name.rpartition("/")[2],
        strategy=default or ("planned_diffusion" if hybrid else "speculative"),
        strategies=", ".join(f"`{s}`" for s in strategies),
        default=f"by `{default}`" if default else "token by token, as the host does",
    )
    (folder / CARD).write_text(f"{card}\n", encoding="utf-8")

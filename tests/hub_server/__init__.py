"""A model hub on loopback, for tests alone: what the unmodified ``huggingface_hub`` client needs to push and to load.

It keeps everything in memory, speaks the documented HTTP API (repositories, branches, tags, commits, LFS, private
repositories with tokens) and never offers Xet; run the client with ``HF_ENDPOINT=server.url`` and
``HF_HUB_DISABLE_XET=1``. Nothing here is ever shipped.
"""

from tests.hub_server.server import HubServer
from tests.hub_server.storage import Blob, Repository

__all__ = ["Blob", "HubServer", "Repository"]

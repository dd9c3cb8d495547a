"""A hub on loopback and a client of it, in a process of its own: it reads its endpoint when it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
USERS = {"hf_alice": "alice", "hf_bob": "bob", "hf_eve": "eve"}
NOBODY = "http://127.0.0.1:9"
"""An endpoint where nobody listens."""


def run_client(
    root: Path,
    endpoint: str,
    step: str,
    *calls: Mapping[str, Any],
    home: str = "home",
    token: str | None = None,
    program: str = "client_for_tests.py",
    **environment: str,
) -> list[dict[str, Any]]:
    """What the ``calls`` of a step of ``client_for_tests`` found.

    Args:
        root: folder for everything that is written. home: name of the user's home in it, for cache and modules.
        endpoint: of the hub. token: of the user. program: in this folder. environment: more variables.
    """
    arguments, answer = root / "arguments.json", root / "answer.json"
    arguments.write_text(json.dumps(calls or [{}]), encoding="utf-8")
    answer.unlink(missing_ok=True)
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    variables |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(root / home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1,localhost",
        "PYTHONPATH": str(ROOT),
        **({} if token is None else {"HF_TOKEN": token}),
        **environment,
    }
    # The client sends parts of large files in a way that its own HTTP library deprecates.
    warn = ("-W", "error", "-W", "ignore::DeprecationWarning")
    command = [sys.executable, *warn, str(Path(__file__).with_name(program)), step, str(arguments), str(answer)]
    done = subprocess.run(command, env=variables, cwd=root, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise AssertionError(f"{step}: {done.stderr[-4000:]}")
    return json.loads(answer.read_text(encoding="utf-8"))

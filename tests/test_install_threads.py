"""``install()`` and ``uninstall()`` from many threads, on a host whose methods are slow to read and to replace.

Catches: a host that is wrapped twice and cannot be unwrapped; an ``uninstall()`` that sees half of an ``install()`` and
calls it a change by somebody else; one method patched without the other.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import hf_hybrid
from hf_hybrid import mixin

THREADS = 6


class Slow(type):
    """A class whose methods take a while to read, the later the longer, and to replace: threads meet in the middle."""

    reads = itertools.count(1)

    def __getattribute__(cls, name: str) -> Any:
        if name == "generate":
            time.sleep(0.03 * next(Slow.reads))
        return super().__getattribute__(name)

    def __setattr__(cls, name: str, value: Any) -> None:
        time.sleep(0.005)
        super().__setattr__(name, value)
        time.sleep(0.005)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """(class with ``generate``, class with ``from_pretrained``), instead of the host's for this test."""

    class Host(metaclass=Slow):
        def generate(self, inputs: Any = None) -> Any: ...

    class Tokenizer(metaclass=Slow):
        @classmethod
        def from_pretrained(cls) -> Any: ...

    monkeypatch.setattr(Slow, "reads", itertools.count(1))
    monkeypatch.setattr(mixin, "_Host", Host)
    monkeypatch.setattr(mixin, "_Tokenizer", Tokenizer)
    monkeypatch.setattr(mixin, "_installed", None)
    return Host, Tokenizer


def at_once(*calls: Callable[[], None]) -> list[BaseException]:
    """Carry out all calls, each in a thread, begun together; what they raised."""
    barrier, raised = threading.Barrier(len(calls)), []

    def run(call: Callable[[], None]) -> None:
        barrier.wait()
        try:
            call()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def methods(host: tuple[Any, Any]) -> tuple[Any, Any]:
    return vars(host[0])["generate"], vars(host[1])["from_pretrained"]


def depth(host: tuple[Any, Any]) -> tuple[int, int]:
    """How often each method is wrapped."""
    counts = []
    for method in methods(host):
        count, function = 0, getattr(method, "__func__", method)
        while hasattr(function, "__wrapped__"):
            count, function = count + 1, function.__wrapped__
        counts.append(count)
    return counts[0], counts[1]


def test_many_installs_are_one(host: tuple[Any, Any]) -> None:
    original = methods(host)
    assert at_once(*[hf_hybrid.install] * THREADS) == []
    assert depth(host) == (1, 1)
    assert at_once(*[hf_hybrid.uninstall] * THREADS) == []
    assert methods(host) == original and mixin._installed is None


def test_uninstall_never_sees_half_an_install(host: tuple[Any, Any]) -> None:
    original = methods(host)
    for _ in range(5):
        assert at_once(*[hf_hybrid.install, hf_hybrid.uninstall] * (THREADS // 2)) == []
        assert depth(host) == ((1, 1) if mixin._installed is not None else (0, 0))
    hf_hybrid.uninstall()
    assert methods(host) == original


def test_a_reader_sees_whole_methods_alone(host: tuple[Any, Any]) -> None:
    """Beside changes, whoever calls finds the host's method or ours around it, never ours around ours."""
    depths: set[int] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            depths.update(depth(host))

    def change() -> None:
        for _ in range(3):
            hf_hybrid.install()
            hf_hybrid.uninstall()

    watcher = threading.Thread(target=watch)
    watcher.start()
    raised = at_once(*[change] * 3)
    done.set()
    watcher.join()
    assert raised == [] and depths == {0, 1}

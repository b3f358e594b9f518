"""The contract with the inside of Flower's engine that `femfed.engine.dispatch` leans on."""

import inspect
import threading
import time
from dataclasses import dataclass, field
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.server.superlink.fleet.vce import vce_api
from flwr.server.superlink.linkstate import InMemoryLinkState

from femfed.engine import dispatch
from femfed.engine.dispatch import hand_out, prompt_dispatch


def test_flowers_loop_is_the_one_that_is_known() -> None:
    loop = getattr(vce_api, dispatch.LOOP)
    assert tuple(inspect.signature(loop).parameters) == dispatch.PARAMETERS
    assert dispatch.LOOP in vce_api.run_api.__code__.co_names  # looked up when the engine runs
    assert {"store_message_ins", "get_message_ins"} <= set(loop.__code__.co_names) | set(
        vars(InMemoryLinkState)
    )
    parameters = inspect.signature(InMemoryLinkState.get_message_ins).parameters
    assert {"node_id", "limit"} <= set(parameters)
    assert list(inspect.signature(InMemoryLinkState.store_message_ins).parameters)[1:] == [
        "message"
    ]


def test_flowers_loop_is_replaced_inside_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = getattr(vce_api, dispatch.LOOP)
    with pytest.raises(RuntimeError), prompt_dispatch():
        assert getattr(vce_api, dispatch.LOOP) is hand_out
        raise RuntimeError
    assert getattr(vce_api, dispatch.LOOP) is stock


def test_another_flower_keeps_its_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(state: object, somewhere: object) -> None: ...

    monkeypatch.setattr(vce_api, dispatch.LOOP, other)
    with prompt_dispatch():
        assert getattr(vce_api, dispatch.LOOP) is other
    monkeypatch.delattr(vce_api, dispatch.LOOP)
    with prompt_dispatch():
        assert not hasattr(vce_api, dispatch.LOOP)


@dataclass
class Store:
    """Holds messages as Flower's does: each is given out once."""

    waiting: dict[int, list[Any]] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.Lock)

    def store_message_ins(self, message: Any) -> str:
        with self.lock:
            self.waiting.setdefault(message.metadata.dst_node_id, []).append(message)
        return str(message.text)

    def get_message_ins(self, node_id: int, limit: int | None) -> list[Any]:
        with self.lock:
            messages = self.waiting.pop(node_id, [])
            self.waiting[node_id] = [] if limit is None else messages[limit:]
            return messages[:limit]


def message(node: int, text: str) -> Any:
    return SimpleNamespace(metadata=SimpleNamespace(dst_node_id=node), text=text)


def test_every_message_is_handed_out_once_in_order() -> None:
    store, queue, stop = Store(), Queue[Any](), threading.Event()
    store.store_message_ins(message(7, "before"))
    thread = threading.Thread(target=hand_out, args=(store, queue, {7: 0, 8: 1}, stop))
    thread.start()
    try:
        assert queue.get(timeout=60).text == "before"
        store.store_message_ins(message(7, "first"))
        assert queue.get(timeout=60).text == "first"
        names = [store.store_message_ins(message(7 + i % 2, str(i))) for i in range(100)]
        assert [queue.get(timeout=60).text for _ in names] == names
    finally:
        stop.set()
        thread.join(timeout=60)
    assert not thread.is_alive()
    assert queue.empty()


def test_a_message_that_came_past_the_replaced_method_is_found() -> None:
    store, queue, stop = Store(), Queue[Any](), threading.Event()
    stock = store.store_message_ins  # as a thread may have it when the loop begins
    thread = threading.Thread(target=hand_out, args=(store, queue, {7: 0, 8: 1}, stop))
    thread.start()
    try:
        while store.store_message_ins == stock:
            time.sleep(0.001)
        stock(message(8, "untold"))
        store.store_message_ins(message(7, "told"))
        assert {queue.get(timeout=60).text for _ in range(2)} == {"untold", "told"}
    finally:
        stop.set()
        thread.join(timeout=60)
    assert not thread.is_alive()

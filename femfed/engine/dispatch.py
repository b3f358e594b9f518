"""Messages are handed out as they come, instead of ten times a second.

Flower's simulation engine scans all nodes for new messages, sleeps for 0.1 s, and scans again: each
training and each evaluation would begin up to 0.1 s late, and a scan takes nodes x messages steps.
Here the loop that does so, `add_messages_to_queue`, is replaced while the engine runs by one that a
new message wakes. The name is not of Flower's public API. `tests/test_dispatch.py` holds the
contract; where another Flower does not have it, its own loop stays, with the same results later.
"""

import contextlib
import inspect
import threading
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from typing import Any

from flwr.server.superlink.fleet.vce import vce_api

LOOP = "add_messages_to_queue"
PARAMETERS = ("state", "queue", "nodes_mapping", "f_stop")
PATIENCE = 0.1  # seconds until the next look whether the engine stops


@contextlib.contextmanager
def prompt_dispatch() -> Iterator[None]:
    """Hand out messages as they come, wherever Flower's engine runs inside the block."""
    stock = getattr(vce_api, LOOP, None)
    if stock is None or tuple(inspect.signature(stock).parameters) != PARAMETERS:
        yield
        return
    setattr(vce_api, LOOP, hand_out)
    try:
        yield
    finally:
        setattr(vce_api, LOOP, stock)


def hand_out(
    state: Any, queue: Any, nodes_mapping: dict[int, int], f_stop: threading.Event
) -> None:
    """Put every message that `state` stores into `queue`, until `f_stop` is set.

    Args:
        state: Flower's store of messages.
        queue: from which its workers take them.
        nodes_mapping: node id -> partition.
        f_stop: set when the engine stops.
    """
    stored: SimpleQueue[int] = SimpleQueue()
    store = state.store_message_ins

    def store_and_tell(message: Any) -> Any:
        name = store(message)
        stored.put(message.metadata.dst_node_id)
        return name

    state.store_message_ins = store_and_tell
    # Until one is told of, all nodes are looked at: messages may have been stored before, or by the
    # stock method, which the one thread that sends them had in hand.
    told = False
    while not f_stop.is_set():
        new: list[int] = []
        with contextlib.suppress(Empty):
            new.append(stored.get(timeout=PATIENCE))
        nodes, limit = (new, 1) if told else (nodes_mapping, None)
        for node in nodes:
            for message in state.get_message_ins(node_id=node, limit=limit):
                queue.put(message)
        told = told or bool(new)

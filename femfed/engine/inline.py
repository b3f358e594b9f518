"""The same Flower apps in this process: for tests, debuggers and tiny runs."""

import threading
from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run as FlowerRun
from flwr.supercore.task_identity import TaskIdentity

from femfed.engine.apps import Run, client_app, server_app, travelling
from femfed.engine.footprint import check_address_space

ADDRESS_BYTES = 3 * 2**29  # TensorFlow's libraries


class InlineGrid(Grid):
    """A Flower grid whose nodes are this process: a message is answered when it is pulled.

    Args:
        nodes: how many nodes to show.
    """

    def __init__(self, nodes: int) -> None:
        self._contexts = {
            node: Context(
                run_id=1,
                node_id=node,
                node_config={"partition-id": node - 1, "num-partitions": nodes},
                state=RecordDict(),
                run_config={},
            )
            for node in range(1, nodes + 1)
        }
        self._messages: dict[str, Message] = {}

    def set_run(self, run: FlowerRun) -> None:
        """Refuse: there is no run that Flower would know of."""
        raise NotImplementedError

    @property
    def run(self) -> FlowerRun:
        """Refuse: there is no run that Flower would know of."""
        raise NotImplementedError

    def create_message(self, *_: object, **__: object) -> Message:
        """Refuse: Flower deprecates this call in favour of `Message(...)`."""
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids, 1 to n."""
        return list(self._contexts)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return no details: a node here has none."""
        return []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep the messages until their replies are pulled."""
        names = []
        for message in messages:
            name = str(uuid4())
            message.metadata.__dict__["_message_id"] = name  # as Flower's own in-memory grid does
            self._messages[name] = message
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Answer one of the messages asked for, so that progress shows after each."""
        for name in message_ids:
            if name in self._messages:
                message = self._messages.pop(name)
                context = self._contexts[message.metadata.dst_node_id]
                return [client_app(message=message, context=context)]
        return []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Answer all messages."""
        return [
            reply for name in self.push_messages(messages) for reply in self.pull_messages([name])
        ]


class InlineEngine:
    """Runs everything in this process; a context manager like the engines that have workers.

    Raises:
        UserError: this process may not have enough addresses.
    """

    workers = 1

    def __init__(self) -> None:
        check_address_space(ADDRESS_BYTES)

    def __enter__(self) -> "InlineEngine":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, run: Run, folder: Path) -> None:
        """Take `run` to its end.

        Args:
            run: what to run.
            folder: the run's folder, used where there is too little shared memory.
        """
        with travelling(run, folder) as shared:
            ends: list[BaseException | None] = []
            app = server_app([(run, shared)], threading.Event(), ends.append)
            nothing = RecordDict()
            context = Context(run_id=1, node_id=0, node_config={}, state=nothing, run_config={})
            # Flower's own engines name the task before they call the ServerApp; messages ask for it
            TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0
            app(grid=InlineGrid(run.job.nodes), context=context)
            if ends[0] is not None:
                raise ends[0]

"""What pfl-research's two contestants share: processes, the algorithm, the rounds."""

import os
import socket
import subprocess
import sys
from typing import Any

import protocol


def one_process_per_core() -> None:
    """Start this script again for every further core, and tell pfl's workers of each other."""
    cores = protocol.arguments()[2]
    if "PFL_WORKER_RANK" in os.environ or cores == 1:
        return
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(cores)]
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    os.environ["PFL_WORKER_ADDRESSES"] = ",".join(addresses)
    for rank in range(1, cores):
        environment = {**os.environ, "PFL_WORKER_RANK": str(rank)}
        streams = {"stdin": subprocess.DEVNULL, "stdout": sys.stderr}
        subprocess.Popen([sys.executable, *sys.argv], env=environment, **streams)
    os.environ["PFL_WORKER_RANK"] = "0"


def run(model: Any, data: dict[str, Any], package: str) -> None:
    """Run federated averaging of `model` over all of `data` for as many rounds as are asked for."""
    import numpy as np
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.internal.ops.selector import get_default_framework_module
    from pfl.metrics import Metrics

    context = get_default_framework_module().distributed
    asked = protocol.rounds("pfl", package) if context.global_rank == 0 else iter(range(1, 1 << 30))
    np.random.seed(0)  # the same draws everywhere, as pfl asks for
    users = {user: Dataset(tuple(arrays), user_id=user) for user, arrays in data.items()}
    dataset = FederatedDataset(users.__getitem__, get_user_sampler("minimize_reuse", list(users)))

    class Gate(TrainingProcessCallback):
        """Ends a round, and lets the next one begin when it is asked for."""

        def wait(self) -> bool:
            done = next(asked, None) is None
            return bool(context.all_reduce([to_tensor(float(done))])[0])  # the others wait here

        def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Metrics]:
            return self.wait(), Metrics()

    def to_tensor(value: float) -> Any:
        return get_default_framework_module().to_tensor(np.full(1, value, np.float32))

    gate = Gate()
    gate.wait()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=1 << 30,
            evaluation_frequency=1 << 30,
            train_cohort_size=len(users),
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(dataset, dataset, postprocessors=[WeightByDatapoints()]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=protocol.LEARNING_RATE,
            local_batch_size=protocol.BATCH,
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[gate],
    )

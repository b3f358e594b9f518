"""femfed as a contestant; SETTING is its precision.

python -m benchmarks.peers.ours MODEL CLIENTS CORES float32
"""

from dataclasses import replace
from pathlib import Path

from benchmarks.bench import EXAMPLES, LOCAL, MODELS, equal_writers, job, run, temporary_cache
from benchmarks.peers import protocol
from femfed.engine.ray import RayEngine
from femfed.engine.rounds import Round


class NoMoreError(Exception):
    """No further round is asked for."""


def main() -> None:
    """Train as many rounds as are asked for."""
    name, clients, cores, precision = protocol.arguments()
    model = MODELS[name]
    protocol.check(name, model.parameters)
    ours = (EXAMPLES, LOCAL.batch_size, LOCAL.learning_rate, LOCAL.epochs)
    assert ours == (protocol.EXAMPLES, protocol.BATCH, protocol.LEARNING_RATE, 1)
    asked = protocol.rounds("femfed", "flwr", "tensorflow")
    next(asked)

    def on_round(finished: Round) -> None:
        if next(asked, None) is None:
            raise NoMoreError

    with temporary_cache() as folder, RayEngine(cores, False, model.parameters) as engine:
        store = equal_writers(Path(folder), clients)
        work = job(store, model, clients, rounds=1 << 30, workers=cores)
        if precision != "float32":
            work = replace(work, precision=precision)
        try:
            engine.run(run(work, on_round), Path(folder))
        except NoMoreError:
            return


if __name__ == "__main__":
    main()

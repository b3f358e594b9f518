"""A plain PyTorch loop: no federated framework, one single-threaded process per core.

Each process trains its share of the cohort with the optimisation loop of
https://docs.pytorch.org/tutorials/beginner/basics/optimization_tutorial.html and adds up the
weighted deltas; the sums meet in one `all_reduce` of `torch.distributed` a round.
"""

import multiprocessing
import tempfile

import protocol
import torch
import torch.distributed as dist
import torch_models
from torch.nn.utils import parameters_to_vector, vector_to_parameters


def work(rank: int, name: str, clients: int, cores: int, meeting: str) -> None:
    """Train the clients of one process, round after round."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=cores)
    torch.manual_seed(0)  # the same first weights everywhere
    model = torch_models.build(name)
    weights = parameters_to_vector(model.parameters()).detach().clone()
    mine = protocol.writers(clients)[rank::cores]
    writers = [(torch.tensor(x[:, None]), torch.tensor(y)) for x, y in mine]
    loss_of = torch.nn.CrossEntropyLoss()
    asked = protocol.rounds("torch") if rank == 0 else iter(())
    more = torch.zeros(1)
    while True:
        if rank == 0:
            more[0] = next(asked, 0)
        dist.broadcast(more, 0)  # the others wait here between rounds
        if not more:
            return
        total = torch.zeros_like(weights)
        for images, labels in writers:
            vector_to_parameters(weights.clone(), model.parameters())
            optimizer = torch.optim.SGD(model.parameters(), lr=protocol.LEARNING_RATE)
            batches = torch.randperm(len(labels)).split(protocol.BATCH)
            for batch in batches:
                loss = loss_of(model(images[batch]), labels[batch])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                total.add_(parameters_to_vector(model.parameters()) - weights, alpha=len(labels))
        dist.all_reduce(total)
        weights += total / (clients * protocol.EXAMPLES)


if __name__ == "__main__":
    name, clients, cores, _ = protocol.arguments()
    with tempfile.TemporaryDirectory() as folder:
        shared = (name, clients, cores, f"{folder}/meeting")
        context = multiprocessing.get_context("spawn")
        others = [context.Process(target=work, args=(i, *shared)) for i in range(1, cores)]
        for other in others:
            other.start()
        work(0, *shared)
        for other in others:
            other.join()

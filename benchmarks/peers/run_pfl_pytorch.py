"""pfl-research with PyTorch: `FederatedAveraging` on its `SimulatedBackend`, a process per core.

https://apple.github.io/pfl-research/tutorials/index.html; several processes as its
`GenericPlatform` documents, by PFL_WORKER_RANK and PFL_WORKER_ADDRESSES, which is what `torchrun`
would come to. One thread each, which is faster on few cores than threads.
"""

import protocol
import run_pfl

run_pfl.one_process_per_core()  # before pfl is imported

import torch  # noqa: E402
import torch_models  # noqa: E402
from pfl.metrics import Weighted  # noqa: E402
from pfl.model.pytorch import PyTorchModel  # noqa: E402


class WithLoss(torch.nn.Module):
    """What pfl asks of a module."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layers = torch_models.build(name)
        self.loss_of = torch.nn.CrossEntropyLoss()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return self.layers(x)

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a batch."""
        self.train()
        return self.loss_of(self(x), y)

    @torch.no_grad()
    def metrics(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, Weighted]:
        """Return the evaluation that is never asked for here."""
        self.eval()
        return {"loss": Weighted(self.loss_of(self(x), y).item() * len(y), len(y))}


if __name__ == "__main__":
    name, clients, _, _ = protocol.arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = WithLoss(name)
    model = PyTorchModel(
        module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
    )
    data = {
        str(i): [torch.tensor(x[:, None]), torch.tensor(y)]
        for i, (x, y) in enumerate(protocol.writers(clients))
    }
    run_pfl.run(model, data, "torch")

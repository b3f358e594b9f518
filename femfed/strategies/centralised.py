"""Centralised training: what could be reached if all images lay in one place."""

from dataclasses import dataclass

from femfed.strategies.base import Strategy


@dataclass(frozen=True)
class Centralised(Strategy):
    """SGD on the training images of all clients together, as many steps a round as a cohort takes.

    ```
    server:  w <- w - learning_rate * g(w)     on batches drawn from all clients' images
    ```

    The baseline that federated learning is measured against. A round draws its images without
    replacement, and takes the sum over the cohort of each client's steps, one after the other, so
    on one worker. Nothing is exchanged.

    Source: the SGD baseline of B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Aguera y Arcas,
    "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
    https://arxiv.org/abs/1602.05629
    """

    exchanges = False
    pools = True

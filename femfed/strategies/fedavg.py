"""Federated averaging, which is what a strategy is before it overrides anything."""

from dataclasses import dataclass

from femfed.strategies.base import Strategy


@dataclass(frozen=True)
class FedAvg(Strategy):
    """Federated averaging: `w <- w + sum_i n_i (w_i - w) / sum_i n_i`.

    Source: B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Aguera y Arcas,
    "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
    https://arxiv.org/abs/1602.05629
    """

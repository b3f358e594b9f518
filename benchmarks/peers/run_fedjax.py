"""FedJAX: `fedjax.algorithms.fed_avg` with its `jit` backend, one process with XLA's own threads.

https://github.com/google/fedjax/blob/main/examples/emnist_fed_avg.py
"""

import fedjax
import haiku as hk
import jax
import protocol


def build(name: str) -> fedjax.Model:
    """Return FedJAX's own EMNIST model, or LEAF's in Haiku."""
    if name == "cnn":
        return fedjax.models.emnist.create_conv_model(only_digits=False)

    def forward(batch: fedjax.BatchExample) -> jax.Array:
        pool = {"window_shape": (1, 2, 2, 1), "strides": (1, 2, 2, 1), "padding": "VALID"}
        return hk.Sequential(
            [
                hk.Conv2D(32, 5, padding="SAME"),
                jax.nn.relu,
                hk.MaxPool(**pool),
                hk.Conv2D(64, 5, padding="SAME"),
                jax.nn.relu,
                hk.MaxPool(**pool),
                hk.Flatten(),
                hk.Linear(2048),
                jax.nn.relu,
                hk.Linear(protocol.CLASSES),
            ]
        )(batch["x"])

    ((images, labels),) = protocol.writers(1)
    return fedjax.create_model_from_haiku(
        transformed_forward_pass=hk.transform(forward),
        sample_batch={"x": images[:1, ..., None], "y": labels[:1]},
        train_loss=lambda b, p: fedjax.metrics.unreduced_cross_entropy_loss(b["y"], p),
    )


if __name__ == "__main__":
    name, clients, _, _ = protocol.arguments()
    model = build(name)
    data = fedjax.InMemoryFederatedData(
        {
            str(i): {"x": images[..., None], "y": labels}
            for i, (images, labels) in enumerate(protocol.writers(clients))
        }
    )

    def loss_of(params: fedjax.Params, batch: fedjax.BatchExample, rng: jax.Array) -> jax.Array:
        """Return the mean loss of a batch."""
        predictions = model.apply_for_train(params, batch, rng)
        return model.train_loss(batch, predictions).mean()

    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        jax.jit(jax.grad(loss_of)),
        fedjax.optimizers.sgd(protocol.LEARNING_RATE),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=protocol.BATCH, num_epochs=1),
    )
    sampler = fedjax.client_samplers.UniformGetClientSampler(data, clients, seed=0)
    state = algorithm.init(model.init(jax.random.PRNGKey(0)))
    protocol.check(name, sum(leaf.size for leaf in jax.tree_util.tree_leaves(state.params)))
    for number in protocol.rounds("fedjax", "jax"):
        sampler.set_round_num(number)
        state, _ = algorithm.apply(state, sampler.sample())
        jax.block_until_ready(state.params)

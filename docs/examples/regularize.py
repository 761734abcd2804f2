"""A penalty on the weights, right under any strategy."""

from ftcore import hookimpl, plugin


@plugin(api=1)
class Lasso:
    """Add the sum of absolute weights to the loss; vectors (biases, norms) are left out."""

    weight: float = 1e-5

    @hookimpl
    def regularize(self, shards):
        matrices = [shard for shard in shards if len(shard.shape) > 1]
        return {"lasso": self.weight * sum(shard.value.abs().sum() for shard in matrices)}

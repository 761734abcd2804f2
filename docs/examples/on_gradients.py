"""Change the gradient, or the weights, once a step."""

from ftcore import hookimpl, plugin


@plugin(api=1)
class ClampGradients:
    """No element of the gradient beyond a limit."""

    limit: float = 1.0

    @hookimpl
    def on_gradients(self, shards):
        for shard in shards:
            if shard.grad is not None:
                shard.grad.clamp_(-self.limit, self.limit)

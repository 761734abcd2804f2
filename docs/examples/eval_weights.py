"""Evaluate and export other weights than those that are trained."""

from ftcore import hookimpl, plugin


@plugin(api=1, needs=("pretrained",))
class HalfWay:
    """Weights between pretrained and fine-tuned ones (WiSE-FT, Wortsman et al., 2022)."""

    alpha: float = 0.5

    @hookimpl
    def eval_weights(self, shards):
        return {
            shard.name: shard.pretrained + self.alpha * (shard.value - shard.pretrained)
            for shard in shards
            if shard.pretrained is not None
        }

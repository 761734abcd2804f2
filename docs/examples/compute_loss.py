"""A term beside whatever loss the task has."""

from ftcore import LossTerm, hookimpl, plugin


@plugin(api=1)
class ZLoss:
    """Keep the normaliser of the softmax near 1 (the z-loss of PaLM, Chowdhery et al., 2022)."""

    weight: float = 1e-4

    @hookimpl(wrapper=True)
    def compute_loss(self, outputs):
        terms = yield
        log_z = outputs.logits.float().logsumexp(dim=-1)  # [rows]
        terms["z_loss"] = LossTerm(sum=log_z.square().sum(), unit="examples", weight=self.weight)
        return terms

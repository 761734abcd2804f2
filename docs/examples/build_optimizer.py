"""Another optimiser."""

from ftcore import hookimpl, plugin


@plugin(api=1)
class Momentum:
    """SGD with momentum, in place of AdamW."""

    momentum: float = 0.9

    @hookimpl
    def build_optimizer(self, params, cfg):
        import torch

        return torch.optim.SGD(params, lr=cfg.optim.lr, momentum=self.momentum)

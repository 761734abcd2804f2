"""A strategy of your own: YAML `trainer/NAME.yaml` lets users write `trainer=NAME`."""

from ftcore import hookimpl, plugin


@plugin(api=1)
class Cautious:
    """One process, each step at half the rate."""

    @hookimpl
    def build_strategy(self, cfg):
        from ftcore.strategies import Single

        class Half(Single):
            def step(self, lr):
                return super().step(lr / 2)

        return Half(cfg)

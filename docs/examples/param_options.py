"""A rate of their own for some weights."""

from ftcore import hookimpl, plugin


@plugin(api=1)
class FastHead:
    """Train the classification head at a higher rate than the body, and do not decay it."""

    scale: float = 10.0

    @hookimpl
    def param_options(self, name):
        return {"lr_scale": self.scale, "weight_decay": 0.0} if name.startswith("classifier") else None

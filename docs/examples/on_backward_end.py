"""See this rank's gradients before they are summed over ranks."""

from ftcore import hookimpl, plugin


@plugin(api=1)
class LocalGradient:
    """Log the norm of the first rank's own gradient."""

    @hookimpl
    def on_backward_end(self, model, step):
        import torch

        grads = [param.grad for param in model.parameters() if param.grad is not None]
        step.log("local_grad_norm", torch.nn.utils.get_total_norm(grads))

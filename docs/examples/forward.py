"""Noise while the model runs, the same for a row however the step is split."""

from ftcore import hookimpl, plugin


@plugin(api=1)
class NoisyEmbeddings:
    """Shift each row's embeddings by a little noise while training."""

    scale: float = 0.01

    @hookimpl(wrapper=True)
    def forward(self, model, batch, step):
        import torch

        def shift(module, inputs, output):  # output: [rows, tokens, width]
            generators = [step.row_generator("noisy", row) for row in batch.rows]
            noise = torch.stack([torch.randn(output.shape[-1], generator=g) for g in generators])
            return output + self.scale * noise[:, None].to(output)

        handle = model.get_input_embeddings().register_forward_hook(shift)
        try:
            return (yield)
        finally:
            handle.remove()

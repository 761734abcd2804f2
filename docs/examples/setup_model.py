"""Leave some weights as they are."""

from ftcore import hookimpl, plugin


@plugin(api=1)
class FrozenEmbeddings:
    """Do not train the input embeddings."""

    @hookimpl
    def setup_model(self, model):
        model.get_input_embeddings().requires_grad_(False)

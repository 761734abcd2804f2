"""Pad on the left."""

from ftcore import hookimpl, plugin


@plugin(api=1)
class PadLeft:
    """Pad on the left, where the model reads the last token."""

    @hookimpl(wrapper=True)
    def load_tokenizer(self):
        tokenizer = yield
        tokenizer.padding_side = "left"
        return tokenizer

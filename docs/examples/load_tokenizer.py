"""Keep the end of a text that is too long."""

from ftcore import hookimpl, plugin


@plugin(api=1)
class KeepEnd:
    """Cut a text that is longer than `data.max_length` at its beginning."""

    @hookimpl(wrapper=True)
    def load_tokenizer(self):
        tokenizer = yield
        tokenizer.truncation_side = "left"
        return tokenizer

"""The model as it is written to `model/`."""

from ftcore import hookimpl, plugin


@plugin(api=1)
class Labelled:
    """Write a line about its making into the exported config."""

    text: str = "fine-tuned by ftcore"

    @hookimpl
    def on_export(self, model):
        model.config.made_by = self.text

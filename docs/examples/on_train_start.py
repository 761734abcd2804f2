"""Write down what is about to be trained."""

from ftcore import hookimpl, plugin


@plugin(api=1)
class Inventory:
    """List the trained parameters in the run's directory."""

    @hookimpl
    def on_train_start(self, state):
        names = [name for name, param in state.model.named_parameters() if param.requires_grad]
        (state.run_dir / "parameters.txt").write_text("\n".join(names))

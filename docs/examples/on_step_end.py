"""Follow a run, and what has to outlive a restart."""

from ftcore import hookimpl, plugin


@plugin(api=1)
class Heartbeat:
    """Touch a file after each step, and count the steps of all parts of a resumed run."""

    def __post_init__(self):
        self.count = 0

    @hookimpl
    def on_step_end(self, state):
        self.count += 1
        (state.run_dir / "alive").touch()

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]

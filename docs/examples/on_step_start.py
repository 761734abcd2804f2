"""See all micro-batches of a step before its first forward."""

from ftcore import hookimpl, plugin


@plugin(api=1)
class Longest:
    """Log the longest row of this rank's part of each step."""

    @hookimpl
    def on_step_start(self, batches, step):
        step.log("longest", max(batch["input_ids"].shape[1] for batch in batches))

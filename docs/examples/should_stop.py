"""End a run that can't become good: below a floor when it should be above."""

from ftcore import hookimpl, plugin


@plugin(api=1)
class GiveUp:
    """End a run whose metric is below `floor` at an evaluation after step `after`."""

    floor: float = 0.5
    after: int = 100

    @hookimpl
    def should_stop(self, record, metric):
        value = record[f"eval/{metric}"]
        if record["step"] > self.after and value < self.floor:
            return f"{metric} {value:.3f} is below {self.floor} after step {self.after}"

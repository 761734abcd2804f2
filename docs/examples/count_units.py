"""A unit of your own, for a term that is no sum over rows or tokens."""

from ftcore import LossTerm, hookimpl, plugin


@plugin(api=1)
class LongRows:
    """Push down the logits of rows of more than `length` tokens, averaged over those rows."""

    length: int = 12

    @hookimpl
    def count_units(self, batch):
        return {"long_rows": float(self._long(batch).sum())}

    @hookimpl(wrapper=True)
    def compute_loss(self, batch, outputs):
        terms = yield
        squares = outputs.logits.float().square().sum(dim=-1)
        total = (squares * self._long(batch)).sum()
        terms["long_rows"] = LossTerm(sum=total, unit="long_rows", weight=0.01)
        return terms

    def _long(self, batch):
        return batch["attention_mask"].sum(dim=1) > self.length

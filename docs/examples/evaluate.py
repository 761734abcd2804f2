"""A metric."""

import math

from ftcore import hookimpl, plugin


@plugin(api=1)
class Confidence:
    """The mean probability of the predicted class."""

    @hookimpl
    def evaluate(self, predictions):
        if "scores" not in predictions:  # log-probabilities, of a classification
            return None
        top = [math.exp(max(scores)) for scores in predictions["scores"]]
        return {"confidence": sum(top) / len(top)}

"""What every plugin has to hold."""

from typing import ClassVar

from ftcore.testing import Conformance


class TestContrastive(Conformance):
    """Contrastive under the suite; at weight=0 it is off. Pairs are tried in the other plugins' suites."""

    name = "contrastive"
    off: ClassVar = {"weight": 0.0}
    bad: ClassVar = [{"weight": 1.1}, {"temperature": 0.0}, {"temperature": float("inf")}, {"batch": "all"}]
    # Ranks are in test_training, and in ftcore-deepspeed's tests.
    test_one_gradient_on_two_ranks = None
    test_composes = None

"""What every plugin has to hold."""

from typing import ClassVar

from ftcore.testing import Conformance


class TestNEFTune(Conformance):
    """NEFTune under the suite; at alpha=0 it is off."""

    name = "neftune"
    off: ClassVar = {"alpha": 0.0}
    bad: ClassVar = [{"alpha": -1.0}, {"alpha": float("inf")}]

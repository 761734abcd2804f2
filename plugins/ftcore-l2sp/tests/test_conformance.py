"""What every plugin has to hold."""

from typing import ClassVar

from ftcore.testing import Conformance


class TestL2SP(Conformance):
    """L2-SP under the suite; with both factors at 0 it is off."""

    name = "l2sp"
    off: ClassVar = {"alpha": 0.0, "beta": 0.0}
    bad: ClassVar = [{"alpha": -1.0}, {"beta": -0.1}, {"schedule": "sometimes"}]

"""What every plugin has to hold."""

from typing import ClassVar

from ftcore.testing import Conformance


class TestMixout(Conformance):
    """Mixout under the suite; at p=0 it is off."""

    name = "mixout"
    off: ClassVar = {"p": 0.0}
    bad: ClassVar = [{"p": 1.0}, {"decay": -1.0}, {"target": "zero", "decay": 0.1}]

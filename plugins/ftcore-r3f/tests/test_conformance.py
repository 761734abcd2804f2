"""What every plugin has to hold."""

from typing import ClassVar

from ftcore.testing import Conformance


class TestR3F(Conformance):
    """R3F under the suite, with noise that is well above rounding; at weight=0 it is off."""

    name = "r3f"
    options: ClassVar = {"eps": 0.1}
    off: ClassVar = {"weight": 0.0}
    bad: ClassVar = [{"weight": -1.0}, {"eps": 0.0}, {"noise": "pink"}]

"""What every plugin has to hold."""

from typing import ClassVar

from ftcore.testing import Conformance


class TestLoRA(Conformance):
    """LoRA under the suite."""

    name = "lora"
    bad: ClassVar = [{"r": 0}, {"alpha": 0}, {"dropout": 1.0}]

"""What the tests of core and of every plugin share; `tests/cli.py` runs ftcore for them."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's caches, or asks the network; one thread, as the models are tiny."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    root = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FTCORE_CACHE", str(root / "ftcore"))
        patch.setenv("HF_HOME", str(root / "huggingface"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield

"""The conformance suite: what every plugin has to hold, by two lines in its own tests.

    from ftcore.testing import Conformance

    class TestMine(Conformance):
        name = "mine"

It trains a tiny model on the CPU, offline, with the plugin as it is installed. Each failure says what is
wrong with the plugin; `ftcore.proofs` has the proofs, which `ftcore check` runs on a config of the user's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ftcore.errors import UserError

__all__ = ["Conformance"]

FIRST_PARTY = ("mixout", "contrastive", "instruct", "l2sp", "r3f", "neftune", "lora")
HEAVY = ("transformers", "datasets", "deepspeed", "peft", "bitsandbytes", "sklearn")
FAST = ("data.limit.train=64", "data.limit.validation=16", "data.limit.test=16", "model=tiny_bert")

IMPORT = """
import os, sys, torch
before, state = dict(os.environ), torch.get_rng_state()
from importlib.metadata import entry_points
(point,) = entry_points(group="ftcore.plugins", name=sys.argv[1])
point.load()
print(*[m for m in sys.argv[2:] if m in sys.modules])
assert dict(os.environ) == before, "it changes the environment"
assert torch.equal(torch.get_rng_state(), state), "it draws random numbers"
"""


class Conformance:
    """Subclass as `TestX` and set `name`; the rest where the defaults do not fit.

    Attributes:
        name: the plugin's, as in `+plugin=NAME`; for a strategy, as in `trainer=NAME`.
        options: options to test with, where the defaults would do nothing.
        off: options that switch the technique off, if there are any.
        bad: sets of options that must be refused.
        overrides: the run's other arguments; by default the demo's data and `model=tiny_bert`.
    """

    name: str
    options: Mapping[str, Any] = {}
    off: Mapping[str, Any] | None = None
    bad: Sequence[Mapping[str, Any]] = ()
    overrides: Sequence[str] = FAST

    def __init_subclass__(cls) -> None:
        if cls.off is None:  # nothing to test; None is no test
            setattr(cls, Conformance.test_off_is_the_run_without_it.__name__, None)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """The other plugins of `test_composes`: those of ours that are installed."""
        if "other" in metafunc.fixturenames:
            from ftcore.plugins import installed

            there = installed()
            metafunc.parametrize("other", [n for n in FIRST_PARTY if n in there and n != self.name])

    @pytest.fixture(autouse=True)
    def _surroundings(
        self, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[None]:
        """A cache of the session's own, no network, one thread."""
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        monkeypatch.setenv("FTCORE_CACHE", str(tmp_path_factory.getbasetemp() / "ftcore-cache"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        yield
        torch.set_num_threads(threads)

    @pytest.fixture
    def cfg(self) -> Any:
        """The config of a run with the plugin."""
        return self.config()

    def config(self, *others: str, options: Mapping[str, Any] | None = None) -> Any:
        """The config of a run with the plugin; of `others`, in call order, '' stands for the plugin."""
        from ftcore.compose import compose

        strategy = self._is_strategy()
        names = [name or self.name for name in others or ("",) if name or not strategy]
        chosen = [f"+plugin=[{','.join(names)}]"] if names else []
        cfg = compose([*self.overrides, *chosen, *([f"trainer={self.name}"] if strategy else [])])
        node = cfg.trainer if strategy else cfg.plugin[self.name]
        node |= {**self.options, **(options or {})}
        return cfg

    def _is_strategy(self) -> bool:
        from ftcore.plugins import conf_dirs

        conf = conf_dirs().get(self.name)  # None for a plugin in a single file
        return conf is not None and not (conf / "plugin" / f"{self.name}.yaml").is_file()

    def _conf(self) -> Path:
        from ftcore.plugins import conf_dirs

        found = conf_dirs()
        assert self.name in found, (
            f"no conf/ directory is in the package of '{self.name}'; it needs plugin/{self.name}.yaml"
        )
        return found[self.name]

    def _class(self) -> Any:
        from ftcore.plugins import installed

        (point,) = installed()[self.name]
        return point.load()

    # What is installed.

    def test_installed_and_light(self) -> None:
        """One package has the name, and importing it loads nothing heavy and changes nothing."""
        from ftcore.plugins import installed

        points = installed().get(self.name, [])
        assert points, f"no entry point '{self.name}' in the group ftcore.plugins; pip install -e ."
        assert len(points) == 1, f"several packages have a plugin '{self.name}'"
        command = [sys.executable, "-c", IMPORT, self.name, *HEAVY]
        ended = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert ended.returncode == 0, ended.stderr.strip().splitlines()[-1]
        loaded = ended.stdout.split()
        assert not loaded, (
            f"importing the plugin imports {', '.join(loaded)}: import them in the hook that needs them"
        )

    def test_yaml_is_the_defaults(self) -> None:
        """Its YAML names every option with the class's default, under its own package."""
        from omegaconf import OmegaConf

        from ftcore.plugins import check_options

        group = "trainer" if self._is_strategy() else "plugin"
        path = self._conf() / group / f"{self.name}.yaml"
        text = path.read_text()
        line = f"# @package plugin.{self.name}"
        assert group == "trainer" or text.startswith(line), f"{path.name} must start with '{line}'"
        given: Any = OmegaConf.to_container(OmegaConf.load(path))
        for key in ("strategy", "defaults"):
            given.pop(key, None)
        defaults = check_options(self._class(), f"plugin.{self.name}", {})
        assert given == defaults, f"{path.name} gives {given}, the class's defaults are {defaults}"

    def test_bad_options_are_refused(self) -> None:
        """An unknown option, a wrong type, and what `bad` lists are errors that say so."""
        from ftcore.plugins import check_options

        cls = self._class()
        with pytest.raises(UserError, match="has no option"):
            check_options(cls, f"plugin.{self.name}", {"no_such_option": 1})
        numbers = [
            f.name for f in dataclasses.fields(cls) if f.init and type(f.default) in (int, float, bool)
        ]
        for key in numbers:
            with pytest.raises(UserError, match=key):
                check_options(cls, f"plugin.{self.name}", {key: "a word"})
        for options in self.bad:
            with pytest.raises((UserError, ValueError, TypeError)):
                cls(**check_options(cls, f"plugin.{self.name}", options))

    def test_hooks_match(self, cfg: Any) -> None:
        """Every hook is one that core has, and takes arguments that core gives."""
        from ftcore.hookspecs import names
        from ftcore.job import build_hooks

        hooks = build_hooks(cfg)
        answered = [name for name in names() if self.name in hooks.implemented(name)]
        assert answered, "the plugin implements no hook: is @hookimpl above its methods?"

    # What it does to a run.

    def test_off_is_the_run_without_it(self, tmp_path: Path) -> None:
        """Switched off, the run is bit for bit the one without the plugin."""
        from ftcore import proofs
        from ftcore.compose import compose

        assert self.off is not None
        _hold(proofs.off_proof(self.config(options=self.off), compose(list(self.overrides)), tmp_path))

    def test_one_gradient_however_it_is_split(self, cfg: Any, tmp_path: Path) -> None:
        """A step's gradient is the same in one micro-batch and in several."""
        from ftcore import proofs

        _hold(proofs.split_proof(cfg, tmp_path))

    def test_one_gradient_on_two_ranks(self, cfg: Any, tmp_path: Path) -> None:
        """It is the same on two ranks, which own half of each parameter each.

        By ddp, and by DeepSpeed's ZeRO, stages 1 to 3, where it is installed and not declared not to combine.
        """
        from ftcore import proofs

        if self._is_strategy() and "devices" not in cfg.trainer:
            pytest.skip("a strategy for one process: it has no option `devices`")
        trainers = [cfg.trainer] if self._is_strategy() else [None, *self._stages(cfg)]
        _hold(proofs.rank_proof(cfg, tmp_path, trainers))

    def _stages(self, cfg: Any) -> Iterator[dict[str, Any]]:
        """The stages of ZeRO that the run may combine with, as `trainer` nodes."""
        from ftcore.compose import compose
        from ftcore.job import build_hooks
        from ftcore.plugins import installed

        for stage in (1, 2, 3) if "deepspeed" in installed() else ():
            node = dict(compose(["trainer=deepspeed"]).trainer) | {"stage": stage}
            with contextlib.suppress(UserError):
                build_hooks(dataclasses.replace(cfg, trainer=node))
                yield node

    def test_resume_is_as_never_stopped(self, cfg: Any, tmp_path: Path) -> None:
        """Stopped and resumed, the run ends as one that was not, bit for bit."""
        from ftcore import proofs

        _hold(proofs.resume_proof(cfg, tmp_path))

    def test_state_round_trips(self, cfg: Any, tmp_path: Path) -> None:
        """What `state_dict` gives, `load_state_dict` takes, in a fresh instance."""
        from ftcore import proofs

        _hold(proofs.state_proof(cfg, tmp_path, self.name))

    def test_deterministic_under_a_seed(self, cfg: Any, tmp_path: Path) -> None:
        """Two runs in one process are the same, bit for bit."""
        from ftcore import proofs

        _hold(proofs.repeat_proof(cfg, tmp_path))

    def test_finite_in_bf16(self, cfg: Any, tmp_path: Path) -> None:
        """Nothing overflows in bf16."""
        from ftcore import proofs

        _hold(proofs.precision_proof(cfg, tmp_path))

    def test_export_loads_without_ftcore(self, cfg: Any, tmp_path: Path) -> None:
        """`model/` answers in plain transformers as the run did."""
        from ftcore import proofs

        _hold(proofs.export_proof(cfg, tmp_path))

    def test_composes(self, other: str, tmp_path: Path) -> None:
        """Beside each first-party plugin, in either order, it trains and scales, or the pair is refused."""
        from ftcore import proofs

        for order in (("", other), (other, "")):
            with contextlib.suppress(UserError):  # declared not to combine, or the other is for other tasks
                _hold(proofs.split_proof(self.config(*order), tmp_path))


def _hold(proof: Any) -> None:
    assert proof.ok, (
        f"{proof.name}: {proof.reason} (compared: {proof.compared}; differs by {proof.difference:.1e})"
    )

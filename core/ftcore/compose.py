"""From the command line to `Config`: the only module that knows Hydra.

Registers the schemas and the search path, says which plugins were chosen, names run directories,
and turns Hydra's errors into one line that says what to write instead.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from ftcore import config, data, sweep
from ftcore.errors import Interrupted, SweepFailed, TrainingError, UserError, nearest, note
from ftcore.hints import HINTS
from ftcore.launch import rank_environment
from ftcore.plugins import FILES, check_options, conf_dirs, file_plugins, installed, load
from ftcore.shortforms import expand

__all__ = [
    "CONF",
    "UNNAMED",
    "command",
    "compose",
    "compose_sweep",
    "compose_with_directory",
    "entered",
    "explain",
    "run_hydra",
    "selected",
    "slug",
]

HERE = Path(__file__).resolve().parent
CONF = next(p for p in (HERE / "conf", HERE.parents[1] / "conf") if p.is_dir())

RUN_ONLY = ("hydra.run.",)
SWEEP_ONLY = ("hydra.sweep.", "hydra.sweeper", "hydra.launcher", "hydra/sweeper", "hydra/launcher")
"""Starts of keys that do nothing in a multirun, and without one."""

SEARCH = "hydra/sweeper=optuna (plugin ftcore-optuna)"

UNNAMED = ("name", "force", "offline", "data.workers", *(f"train.{key}" for key in config.UNESSENTIAL))
"""Keys that do not change the run, and so not its directory."""


def slug(overrides: Sequence[str]) -> str:
    """A directory name for a list of overrides, in `[A-Za-z0-9._-]`: `model-tiny_bert__seed-1`.

    The same overrides give the same name in any order. Where characters are lost, or the name is
    cut, a digest is added, so that different overrides never share a name.
    """
    kept = sorted(
        (o for o in overrides if o.partition("=")[0] not in UNNAMED), key=lambda o: (o.startswith("data"), o)
    )
    if not kept:
        return "default"
    plain = all(re.fullmatch(r"\+?[A-Za-z0-9_.]+=[A-Za-z0-9.-]+(_[A-Za-z0-9.-]+)*", o) for o in kept)
    name = "__".join(o.removeprefix("+").replace("=", "-", 1) for o in kept)
    if plain and len(name) <= 100:
        return name
    last = [re.sub(r"[^=,\[\]]*/(?=[^,\[\]/])", "", o) for o in kept]  # of a path, its last part
    readable = "__".join(o.removeprefix("+").replace("=", "-", 1) for o in last)
    readable = re.sub(r"[^A-Za-z0-9._]+", "-", readable)[:80].strip("-._") or "run"
    return f"{readable}-{hashlib.sha256('|'.join(kept).encode()).hexdigest()[:8]}"


@functools.cache  # one class in a process: Hydra would keep each, and look through all of them
def _search_path() -> type[Any]:
    """What adds the `conf/` of every installed plugin to Hydra's search path."""
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class FtcoreSearchPath(SearchPathPlugin):  # type: ignore[misc]
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            for name, path in conf_dirs().items():
                search_path.append(provider=f"ftcore-{name}", path=f"file://{path}")

    return FtcoreSearchPath


def _register() -> None:
    """Tell Hydra our schemas, resolver and the `conf/` of every installed plugin. Idempotent."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins
    from omegaconf import OmegaConf

    Plugins.instance().register(_search_path())
    store = ConfigStore.instance()
    top = config.Config(model=None, data=None, task=None, optim=None, trainer=None)
    store.store(group="schema", name="config", node=OmegaConf.structured(top))
    for schemas in config.SCHEMAS.values():
        for name, schema in schemas.items():
            store.store(group="schema", name=name, node=schema)
    for point in file_plugins():  # has no YAML: its class's defaults are its options
        node = check_options(load(point), f"plugin.{point.name}", {})
        store.store(group="plugin", name=point.name, node=node, package=f"plugin.{point.name}")
    OmegaConf.register_new_resolver("ftcore.slug", lambda o: slug(list(o)), replace=True)


def run_hydra(job: Callable[[config.Config, Path], float], arguments: Sequence[str]) -> None:
    """Run `job(config, run directory)` for this command line: once, or once a job under `-m`.

    Raises:
        SweepFailed: some jobs of a multirun failed; the others were run all the same, but by ranks that
            torchrun or srun started.
    """
    import hydra
    from hydra.errors import HydraException

    _register()
    arguments = _expand(arguments)
    _check_options(arguments)
    task = Task(job)
    version = {"version_base": "1.3"} if _wants_version_base() else {}
    sys.argv = [sys.argv[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors arrive as exceptions, for `explain`
    with sweep.sweep() if _is_sweep(arguments) else contextlib.nullcontext():
        try:
            hydra.main(config_path=str(CONF), config_name="config", **version)(task)()
        except KeyboardInterrupt:
            raise task.error or KeyboardInterrupt from None
        except HydraException:  # some are an OSError too
            raise
        except OSError as error:  # what a job raises does not get here
            key = "hydra.sweep.dir" if _is_sweep(arguments) else "hydra.run.dir"
            raise UserError(f"{error.strerror or error}: {error.filename}; set {key} (or name=)") from error
        except RuntimeError as error:  # a launcher's: no Slurm here, a process that was killed
            raise TrainingError(str(error).strip().partition("\n")[0]) from error
        except (AssertionError, ValueError) as error:
            settings = [a for a in arguments if a.lstrip("+").startswith(SWEEP_ONLY)]
            if not settings:
                raise
            why = str(error) or "no reason is given"
            raise UserError(f"the multirun can't be run by {' '.join(settings)}: {why}") from error
        if task.error is not None:
            raise task.error


class Task:
    """What Hydra calls for each job; launchers take it to other processes."""

    def __init__(self, job: Callable[[config.Config, Path], float]) -> None:
        self.job = job
        self.error: BaseException | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _register()  # in a launcher's process

    def __call__(self, cfg: Any) -> float:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        hydra_cfg = HydraConfig.get()
        run_dir = Path(hydra_cfg.runtime.output_dir)
        if hydra_cfg.mode != RunMode.MULTIRUN:
            try:
                return self.job(_convert(cfg), run_dir)
            except BaseException as error:
                self.error = error  # past Hydra, which would print a line of its own
                return math.nan
        # One rank may have failed where another waits for it; a launcher's process has one job only.
        others = rank_environment()[1] == 1 or not hydra_cfg.launcher._target_.endswith("BasicLauncher")
        try:
            return sweep.job(run_dir, lambda: self.job(_convert(cfg), run_dir), others=others)
        except (Interrupted, SweepFailed) as error:
            self.error = error
            raise KeyboardInterrupt from error  # which Hydra does not take for one job's failure


def _is_sweep(arguments: Sequence[str]) -> bool:
    return bool({"-m", "--multirun"} & set(arguments))


def _expand(arguments: Sequence[str]) -> list[str]:
    """The arguments without short forms; says what each of those stands for."""
    roots = [CONF, *conf_dirs().values()]
    choices = {g: {f.stem for root in roots for f in (root / g).glob("*.yaml")} for g in ("data", "model")}
    full, notes = expand(arguments, choices, sweep=_is_sweep(arguments))
    for one in notes:
        note(one)
    return [_open(argument) for argument in full]


def _open(argument: str) -> str:
    """The argument with `++` where it sets a plugin's option that takes any keys: Hydra refuses new ones."""
    found = re.match(r"plugin\.(\w+)\.(\w+)[.=]", argument)
    path = conf_dirs().get(found[1], Path()) / "plugin" / f"{found[1]}.yaml" if found else Path()
    if not (found and path.is_file()):
        return argument
    return f"++{argument}" if re.search(rf"^{found[2]}: *\{{\}}", path.read_text(), re.M) else argument


def _check_options(arguments: Sequence[str]) -> None:
    """Refuse options that Hydra does not have, by one line instead of its usage."""
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> None:
        raise UserError(f"{message} (`ftcore --help` lists what there is)")

    parser = get_args_parser()
    parser.error = refuse
    options = parser.parse_args(arguments)
    if options.cfg or options.info:
        if options.multirun:
            raise UserError("--cfg and --info show one run; leave -m and the lists of values away")
        return
    dead = RUN_ONLY if options.multirun else SWEEP_ONLY
    for key in (a.lstrip("+").partition("=")[0] for a in options.overrides):
        if key.startswith(dead):
            cure = "set hydra.sweep.dir" if options.multirun else "add -m"
            raise UserError(f"{key} has no effect {'with' if options.multirun else 'without'} -m; {cure}")


def compose(overrides: Sequence[str]) -> config.Config:
    """The `Config` of a command line, without running anything (`ftcore check`, tests)."""
    return compose_with_directory(overrides)[0]


def compose_with_directory(overrides: Sequence[str]) -> tuple[config.Config, Path]:
    """The `Config` of a command line, and the directory that it would run in."""
    with _hydra() as hydra:
        cfg = hydra.compose("config", overrides=_expand(overrides), return_hydra_config=True)
        return entered(cfg), Path(cfg.hydra.run.dir).absolute()


def compose_sweep(overrides: Sequence[str]) -> list[tuple[config.Config, Path, list[str]]]:
    """Each job of a multirun with Hydra's basic sweeper: its `Config`, directory and overrides."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    jobs = []
    with _hydra() as hydra:
        given = _expand([*overrides, "-m"])[:-1]
        parser = OverridesParser.create()
        fixed = [o.input_line for o in parser.parse_overrides(given) if not o.is_sweep_override()]
        base = hydra.compose("config", overrides=fixed, return_hydra_config=True)
        params = (base.hydra.sweeper.get("params") or {}).items()
        parsed = parser.parse_overrides([*(f"{key}={value}" for key, value in params), *given])
        for batch in BasicSweeper.split_arguments(parsed, None):
            for job in batch:
                cfg = hydra.compose("config", overrides=job, return_hydra_config=True)
                directory = Path(cfg.hydra.sweep.dir, cfg.hydra.sweep.subdir).absolute()
                jobs.append((entered(cfg), directory, job))
    return jobs


@contextlib.contextmanager
def _hydra() -> Iterator[Any]:
    """The `hydra` module, initialised on our config directory."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    _register()
    GlobalHydra.instance().clear()
    version = {"version_base": "1.3"} if _wants_version_base() else {}
    with hydra.initialize_config_dir(config_dir=str(CONF), **version):
        yield hydra


def entered(cfg: Any) -> config.Config:
    """The `Config` of what Hydra composed, which becomes the current one."""
    from hydra.core.hydra_config import HydraConfig

    HydraConfig.instance().set_config(cfg)
    return _convert(cfg)


def _wants_version_base() -> bool:
    """Hydra 1.3 warns without it, 1.4 warns with it."""
    import hydra

    return bool(hydra.__version__.startswith("1.3"))


def _convert(cfg: Any) -> config.Config:
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    selected = _selected()
    plain = cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=True))
    plain.pop("hydra", None)
    given = plain.get("plugin") or {}
    for name in selected:
        if name not in given:
            raise UserError(
                f"plugin/{name}.yaml must start with '# @package plugin.{name}' and give each option"
            )
    for name in given:
        if name not in selected:
            raise UserError(
                f"plugin.{name} has options, but '{name}' is not chosen; add +plugin={name}"
                f" (or take plugin.{name}.* away)"
            )
    plain["plugin"] = {name: given[name] for name in selected}
    found = _absolute(config.from_plain(plain))
    keys = [o.lstrip("+").partition("=")[0] for o in HydraConfig.get().overrides.task]
    fixed = [key.removeprefix("data.columns.") for key in keys if key.startswith("data.columns.")]
    for one in data.guess_columns(found, fixed):
        note(one)
    return found


def _selected() -> list[str]:
    """Names of the plugins chosen by `+plugin=` or an experiment, read off Hydra's defaults list."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
    from hydra.core.hydra_config import HydraConfig

    cfg = HydraConfig.get()
    path = ConfigSearchPathImpl()
    for source in cfg.runtime.config_sources:
        path.append(source.provider, f"{source.schema}://{source.path}")
    return selected(ConfigLoaderImpl(config_search_path=path), "config", list(cfg.overrides.task))


def selected(loader: Any, config_name: str, overrides: Sequence[str]) -> list[str]:
    """Names of the plugins that `overrides` choose, in the order of choice, by a config loader of Hydra's."""
    from hydra.types import RunMode

    chosen = loader.compute_defaults_list(
        config_name=config_name, overrides=list(overrides), run_mode=RunMode.RUN
    )
    paths = [d.config_path or "" for d in chosen.defaults]
    return list(dict.fromkeys(p.removeprefix("plugin/") for p in paths if p.startswith("plugin/")))


def _absolute(cfg: config.Config) -> config.Config:
    """Local paths made absolute, so that a saved config means the same from anywhere."""

    def absolute(path: str | None) -> str | None:
        if not path or path.startswith("ftcore:"):
            return path
        return str(Path(path).expanduser().absolute())

    if isinstance(cfg.data, config.FilesData):
        for split in ("train", "validation", "test"):
            setattr(cfg.data, split, absolute(getattr(cfg.data, split)))
    for node in (cfg.model, cfg.data) if isinstance(cfg.data, config.HubData) else (cfg.model,):
        if node.path and (Path(node.path).exists() or node.path.startswith((".", "/", "~"))):
            node.path = str(Path(node.path).expanduser().resolve())  # runs/latest moves with the next run
    if isinstance(cfg.trainer, dict) and cfg.trainer.get("config"):
        cfg.trainer["config"] = absolute(cfg.trainer["config"])  # a plugin's strategy's own file
    cfg.model.add_tokens = absolute(cfg.model.add_tokens)
    cfg.plugin = _with_absolute_files(cfg.plugin)
    return cfg


def _with_absolute_files(options: Any) -> Any:
    """Plugins' options, in which what names a file that is there (`tasks.yaml`, `data/chats`) is absolute."""
    if isinstance(options, dict):
        return {key: _with_absolute_files(value) for key, value in options.items()}
    if isinstance(options, list):
        return [_with_absolute_files(value) for value in options]
    if not isinstance(options, str) or not re.search(r"[./]\w|\w[./]", options):
        return options  # `query` may be a layer, `.` a separator
    with contextlib.suppress(OSError, RuntimeError):  # a text that can't be a path, or has no such home
        if (path := Path(options).expanduser()).exists():
            return str(path.absolute())
    return options


def command(overrides: Sequence[str]) -> str:
    """The shell command of one run, with the directory of configs and the plugin files of this process."""
    from hydra._internal.utils import get_args_parser

    given = get_args_parser().parse_args(sys.argv[1:])
    options = [f"--config-dir={given.config_dir}"] if given.config_dir else []
    options += [f"--plugin-file={f}" for f in os.environ.get(FILES, "").split(os.pathsep) if f]
    return shlex.join(["ftcore", *overrides, *options])


def known_keys() -> list[str]:
    """Every dotted key of the schema."""
    return sorted(set(_keys(config.Config, "")))


def _keys(schema: type[Any], prefix: str) -> list[str]:
    keys = []
    for f in dataclasses.fields(schema):
        name = prefix + f.name
        nested = list(config.SCHEMAS.get(name, {}).values())
        if isinstance(f.default_factory, type) and dataclasses.is_dataclass(f.default_factory):
            nested.append(f.default_factory)
        keys += [k for s in nested for k in _keys(s, name + ".")] if nested else [name]
    return keys


def explain(error: Exception) -> str:
    """One line for an error of Hydra's: what is wrong, and what to write instead."""
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    text = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"no {group} '{name}'; {nearest(name, error.options or ())}"
    if isinstance(error, OverrideParseException):
        return f"can't read '{error.override}': write key=value (`ftcore --help` shows how)"
    if text.startswith(("Multiple values for plugin", "plugin appears more than once")):
        return "choose several plugins by one list: '+plugin=[a,b]'"
    if found := re.match(r"Multiple values for .+? To override a value use 'override (.+): (.+)'", text):
        return f"'{found[1]}' has a value already: write {found[1]}={found[2]} once, without the +"
    if found := re.match(r"Could not override '([^']+)'", text):
        return _explain_key(found[1], text)
    if text.startswith("Could not append to config. An item is already at 'plugin'"):
        return "no plugin is installed; plugins are pip packages (see `ftcore plugins`)"
    if found := re.match(r"Could not append to config\. An item is already at '([^']+)'", text):
        return f"'{found[1]}' is there already: write it without the +"
    if found := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.+)'", text):
        return _explain_values(found[1])
    if text.startswith("BasicSweeper does not support sweep type : INTERVAL"):
        return f"an interval can't be run value by value: write a,b or range(1,3), or add {SEARCH}"
    cause = error.__cause__
    if text.startswith("Error merging override plugin="):  # no plugin is installed: no such group
        return _explain_key("plugin", text.replace("override plugin=", "+plugin="))
    if text.startswith("Error merging override") and isinstance(cause, OmegaConfBaseException):
        return f"{cause.full_key}: wrong type: {str(cause).partition(chr(10))[0]}"
    return text.partition("\n")[0] or type(error).__name__


def _explain_values(override: str) -> str:
    """What to write for a sweep without `-m`."""
    key, _, value = override.partition("=")
    quoted = shlex.quote(override)
    if re.search(r"\binterval\(", value):
        return f"{quoted} is an interval to search: add -m {SEARCH}"
    said = f"{quoted} has several values; a run of each: ftcore -m {quoted}"
    if re.match(r"\w+\(", value):  # choice(a,b), range(3)
        return said
    if key == "+plugin":
        return f"{said}; one run of all: {shlex.quote(f'{key}=[{value}]')}"
    if key not in known_keys() and not key.startswith("plugin."):  # a group, of which a run has one
        return said
    text = f"{key}={json.dumps(value, ensure_ascii=False)}"
    return f"{said}; one list: {shlex.quote(f'{key}=[{value}]')}; one text: {shlex.quote(text)}"


def _explain_key(key: str, text: str) -> str:
    group, _, rest = key.partition(".")
    if group == "hydra":
        return (
            f"Hydra has no key '{key}' here; `ftcore --cfg hydra` with the same hydra/... prints those it has"
        )
    if key == "plugin":
        value = (re.search(r"\+plugin=(\S+)", text) or ["", "NAME"])[1]
        return f"a plugin is added with a plus: +plugin={value}"
    if group == "plugin":
        name = rest.partition(".")[0]
        plugins = installed()
        if name in plugins:
            options = _options(name)
            option = rest.partition(".")[2]
            if option in options:
                return f"'{key}' has no effect: '{name}' is not chosen; add +plugin={name}"
            return f"plugin {name} has no option '{option}'; {nearest(option, options)}"
        return f"no plugin '{name}' is installed; {nearest(name, plugins) or 'none is'}"
    keys = known_keys()
    if group == "trainer":  # those of plugins' trainers are in their YAML alone
        files = [f for root in conf_dirs().values() for f in (root / "trainer").glob("*.yaml")]
        options = re.findall(r"^([a-z_]\w*):", "\n".join(f.read_text() for f in files), re.M)
        keys += [f"trainer.{o}" for o in options if o not in ("defaults", "strategy")]
    last = key.rpartition(".")[2]
    if last in HINTS:
        hint = HINTS[last]
        return (
            f"no config key '{key}'; {hint.removeprefix('no key: ') if 'no key' in hint else f'use {hint}'}"
        )
    same = [k for k in keys if k.rpartition(".")[2] == last]
    return f"no config key '{key}'; " + (f"did you mean {' or '.join(same)}?" if same else nearest(key, keys))


def _options(name: str) -> list[str]:
    """Names of a plugin's options, from its YAML; it is not imported."""
    for point in file_plugins():
        if point.name == name:
            return list(check_options(load(point), f"plugin.{name}", {}))
    path = conf_dirs().get(name, Path()) / "plugin" / f"{name}.yaml"
    return re.findall(r"^([A-Za-z_]\w*):", path.read_text(), re.M) if path.is_file() else []

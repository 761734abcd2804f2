"""Plugins: the decorator that makes one, how they are found, checked, ordered and enabled.

Installed is not enabled: a plugin is imported only when the config chooses it. Nothing is kept at
module level; each run has its own instances and its own `pluggy.PluginManager`.
"""

import ast
import dataclasses
import hashlib
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, entry_points
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Literal, TypeVar, dataclass_transform

import pluggy

from ftcore.errors import UserError, nearest

__all__ = [
    "API",
    "Enabled",
    "FilePlugin",
    "Meta",
    "conf_dirs",
    "enable",
    "file_plugins",
    "hookimpl",
    "installed",
    "load",
    "plugin",
    "source_hash",
]

API = 1
"""Number of the hook interface. Adding a hook or an argument does not change it."""

OLDEST_API = 1
"""The oldest interface that plugins are still called by."""

GROUP = "ftcore.plugins"
FILES = "FTCORE_PLUGIN_FILES"
"""The environment variable by which `--plugin-file` reaches ranks: paths, parted as in PATH."""

hookimpl = pluggy.HookimplMarker("ftcore")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What a plugin class declares about itself by `@plugin(...)`."""

    after: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    removes: tuple[str, ...] = ()
    api: int = 1


@dataclass_transform(kw_only_default=True, eq_default=False)
def plugin(
    *,
    after: Sequence[str] = (),
    conflicts: Sequence[str] = (),
    needs: Sequence[str] = (),
    removes: Sequence[str] = (),
    api: int = 1,
) -> Callable[[type[T]], type[T]]:
    """Make a class a plugin: a keyword-only dataclass whose fields are its options.

    Args:
        after: plugins that must be registered before this one, if they are enabled.
            A wrapper registered later is the outer one.
        conflicts: plugins that can't be enabled beside this one.
        needs: what it relies on (`logits`, `hidden_states`, `full_rank_weights`, `whole_weights` on
            each rank, ...).
        removes: what it takes away from others, in the same words as `needs`. Where that depends on
            options, `__post_init__` sets `self.__ftcore__ = Meta(...)`.
        api: the hook interface it was written for; say it, so that a later core knows.

    Check options in `__post_init__` and raise ValueError: the message reaches the user in one line.
    """
    meta = Meta(
        after=tuple(after),
        conflicts=tuple(conflicts),
        needs=tuple(needs),
        removes=tuple(removes),
        api=api,
    )

    def decorate(cls: type[T]) -> type[T]:
        made = dataclass(eq=False, kw_only=True)(cls)
        made.__ftcore__ = meta  # type: ignore[attr-defined]
        return made

    return decorate


@dataclass(frozen=True, kw_only=True)
class Enabled:
    """An enabled plugin: its instance and where it came from."""

    name: str
    instance: Any
    distribution: str
    version: str
    options: dict[str, Any]

    @property
    def meta(self) -> Meta:
        return typing.cast(Meta, self.instance.__ftcore__)

    @property
    def source(self) -> str:
        """Hash of its source: another one is another technique."""
        return source_hash(type(self.instance))

    @property
    def summary(self) -> str:
        """First line of the class's docstring."""
        return (type(self.instance).__doc__ or "").strip().partition("\n")[0]


def source_hash(made: Any) -> str:
    """Hash of the source that a class or function may call: its package, or its single file."""
    file = Path(inspect.getsourcefile(inspect.unwrap(made)) or "")
    files = sorted(file.parent.rglob("*.py")) if (file.parent / "__init__.py").is_file() else [file]
    digest = hashlib.sha256()
    for one in files:
        digest.update(one.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class FilePlugin:
    """A plugin class in a single file that the command line names; it stands for an entry point."""

    name: str
    path: Path
    cls: str
    digest: str
    dist: None = None

    @property
    def value(self) -> str:
        return f"{self.path}:{self.cls}"

    @property
    def module(self) -> str:
        return f"ftcore_file_{self.digest}"

    def load(self) -> Any:
        """The class; the file is run once in a process, and again when it has changed."""
        if self.module not in sys.modules:
            spec = spec_from_file_location(self.module, self.path)
            assert spec is not None
            assert spec.loader is not None
            sys.modules[self.module] = module = module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[self.module]
                raise
        return getattr(sys.modules[self.module], self.cls)


def file_plugins() -> list[FilePlugin]:
    """The plugins in the files that `--plugin-file` names, found without running them.

    A class `LabelNoise` under `@plugin()` is the plugin `label_noise`.

    Raises:
        UserError: a file that is not there, is no Python, or has no such class.
    """
    found = []
    for path in map(Path, filter(None, os.environ.get(FILES, "").split(os.pathsep))):
        if path.suffix != ".py":
            raise UserError(f"--plugin-file {path} is no Python file (*.py)")
        try:
            source = path.read_bytes()
            tree = ast.parse(source)
        except OSError as error:
            raise UserError(f"--plugin-file {path}: {error.strerror}") from error
        except (SyntaxError, ValueError) as error:
            raise UserError(f"--plugin-file {path} is no Python: {error}") from error
        names = [n.name for n in tree.body if isinstance(n, ast.ClassDef) and _is_decorated(n)]
        if not names:
            raise UserError(f"--plugin-file {path} has no class under @ftcore.plugin()")
        digest = hashlib.sha256(source).hexdigest()[:16]
        for cls in names:
            name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls).lower()
            found.append(FilePlugin(name=name, path=path, cls=cls, digest=digest))
    return found


def _is_decorated(node: ast.ClassDef) -> bool:
    calls = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    return any(ast.unparse(c) in ("plugin", "ftcore.plugin") for c in calls)


def installed() -> dict[str, list[EntryPoint | FilePlugin]]:
    """Every installed plugin by name. More than one entry point under a name is an error if chosen."""
    found: dict[str, list[EntryPoint | FilePlugin]] = {}
    for point in (*entry_points(group=GROUP), *file_plugins()):
        found.setdefault(point.name, []).append(point)
    return dict(sorted(found.items()))


def conf_dirs() -> dict[str, Path]:
    """The `conf/` directory of every installed plugin that has one, found without importing it."""
    dirs = {}
    for name, points in installed().items():
        for point in points:
            spec = find_spec(point.module.partition(".")[0])
            for root in (spec and spec.submodule_search_locations) or ():
                if (conf := Path(root) / "conf").is_dir():
                    dirs[name] = conf
    return dirs


def enable(chosen: Mapping[str, Mapping[str, Any]], trainer: str | None = None) -> list[Enabled]:
    """Import, check and instantiate the chosen plugins, in call order.

    Args:
        chosen: plugin name to its options, in the order of selection.
        trainer: which of them has the config's `trainer` node for its options.

    Raises:
        UserError: unknown or ambiguous name, failing import, wrong version or option,
            conflict, unmet need, circular order.
    """
    available = installed()
    plugins = [
        _instantiate(name, available, options, "trainer" if name == trainer else f"plugin.{name}")
        for name, options in chosen.items()
    ]
    _check_company(plugins)
    return _sort(plugins)


def _instantiate(
    name: str, available: Mapping[str, list[EntryPoint | FilePlugin]], options: Mapping[str, Any], key: str
) -> Enabled:
    if name not in available:
        raise UserError(
            f"no plugin '{name}' is installed; {nearest(name, available) or 'none is'} (see `ftcore plugins`;"
            " for one in a file of yours: --plugin-file FILE)"
        )
    points = available[name]
    if len(points) > 1:
        owners = " and ".join(str(p.dist.name if p.dist else p.value) for p in points)
        raise UserError(f"plugin '{name}' is defined by both {owners}; uninstall one of them")
    (point,) = points
    cls = load(point)
    values = check_options(cls, key, options)
    try:
        instance = cls(**values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{key}: {error}") from error
    return Enabled(name=name, instance=instance, options=values, **_origin(point))


def _origin(point: EntryPoint | FilePlugin) -> dict[str, str]:
    if isinstance(point, FilePlugin):
        return {"distribution": str(point.path), "version": f"sha256:{point.digest}"}
    return {
        "distribution": str(point.dist.name) if point.dist else "",
        "version": str(point.dist.version) if point.dist else "",
    }


def load(point: EntryPoint | FilePlugin) -> type[Any]:
    """Import a plugin's class and check what it declares.

    Raises:
        UserError: another ftcore or hook interface, a failing import, no plugin class.
    """
    name = point.name
    if point.dist is not None:
        _check_version(name, point.dist)
    try:
        cls = point.load()
    except Exception as error:
        raise UserError(
            f"plugin '{name}' ({point.value}) does not import: {type(error).__name__}: {error}"
        ) from error
    meta = getattr(cls, "__ftcore__", None)
    if not isinstance(cls, type) or not isinstance(meta, Meta):
        raise UserError(f"plugin '{name}': {point.value} is no class decorated with @ftcore.plugin")
    if not OLDEST_API <= meta.api <= API:
        raise UserError(
            f"plugin '{name}' is written for hook API {meta.api}, this ftcore has {OLDEST_API} to {API};"
            f" upgrade {'ftcore' if meta.api > API else 'the plugin'}"
        )
    return cls


def _check_version(name: str, dist: Distribution) -> None:
    from packaging.requirements import Requirement

    from ftcore import __version__

    for text in dist.requires or ():
        requirement = Requirement(text)
        if requirement.name != "ftcore" or (requirement.marker and not requirement.marker.evaluate()):
            continue
        if not requirement.specifier.contains(__version__, prereleases=True):
            raise UserError(
                f"plugin '{name}' ({dist.name} {dist.version}) needs ftcore"
                f"{requirement.specifier}, this is {__version__}; upgrade one of them"
            )


def check_options(cls: type[Any], prefix: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options checked and converted by the class's own field types; defaults filled in.

    `prefix` is where they stand in the config: `plugin.NAME`, or `trainer`.

    Raises:
        UserError: an unknown option (with the nearest names) or a value of a wrong type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in options:
        if key not in fields:
            raise UserError(f"{prefix} has no option '{key}'; {nearest(key, fields)}")
    choices = {n: typing.get_args(hints[n]) for n in fields if typing.get_origin(hints[n]) is Literal}
    # A choice may be called "true", which YAML and Hydra read as a bool.
    named = [k for k, v in options.items() if isinstance(v, bool) and "true" in choices.get(k, ())]
    called: dict[str, Any] = {k: str(options[k]).lower() for k in named}
    schema = dataclasses.make_dataclass(
        f"{cls.__name__}Options",
        [
            (
                f.name,
                type(choices[f.name][0]) if f.name in choices else hints[f.name],
                dataclasses.field(default=f.default, default_factory=f.default_factory),
            )
            for f in fields.values()
        ],
        kw_only=True,
    )
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), dict(options) | called)
        values = typing.cast("dict[str, Any]", OmegaConf.to_container(merged, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(f"{prefix}.{error.full_key}: {str(error).partition(chr(10))[0]}") from error
    for key, allowed in choices.items():
        if values[key] not in allowed:
            raise UserError(
                f"{prefix}.{key} must be one of {', '.join(map(str, allowed))}, got '{values[key]}'"
            )
    return values


def _check_company(plugins: Sequence[Enabled]) -> None:
    names = {p.name for p in plugins}
    for one in plugins:
        for other in one.meta.conflicts:
            if other in names:
                raise UserError(f"plugins '{one.name}' and '{other}' can't be combined; choose one")
        for other_plugin in plugins:
            lost = set(one.meta.needs) & set(other_plugin.meta.removes)
            if lost and other_plugin is not one:
                raise UserError(
                    f"plugin '{one.name}' needs {', '.join(sorted(lost))},"
                    f" which '{other_plugin.name}' takes away; choose one, or other options"
                )


def _sort(plugins: Sequence[Enabled]) -> list[Enabled]:
    """Selection order, changed only where `after` asks for it."""
    waiting, placed = list(plugins), list[Enabled]()
    while waiting:
        names = {p.name for p in waiting}
        ready = next((p for p in waiting if not names & set(p.meta.after) - {p.name}), None)
        if ready is None:
            raise UserError(f"plugins {', '.join(sorted(names))} each want to come after another")
        waiting.remove(ready)
        placed.append(ready)
    return placed

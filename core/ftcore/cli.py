"""The command line: help, subcommands, and how errors end. Imports nothing heavy until it must."""

import gc
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from ftcore.errors import Interrupted, TrainingError, UserError, nearest
from ftcore.plugins import FILES
from ftcore.signals import OUTPUT_LOST

__all__ = ["main"]

HELP = """\
ftcore: fine-tune language models with techniques that combine.

usage: ftcore [key=value ...]            train; with no argument, the built-in demo
       ftcore -m key=a,b [key=value ...] train once for each combination
       ftcore COMMAND [ARGUMENTS]

examples:
  ftcore
  ftcore data=reviews.csv                       a file, or a directory: cut in three parts where it is not yet
  ftcore data=files data.train=train.jsonl data.validation=dev.jsonl train.epochs=8
  ftcore model=FacebookAI/roberta-base optim.lr=2e-5 seed=1
  ftcore trainer=ddp trainer.devices=2 train.precision=bf16
  ftcore predict runs/latest new.csv

commands:
{commands}

choices (write GROUP=NAME; plugins with a plus, '+plugin=[a,b]' for several):
{groups}

settings (every key and its value: ftcore --cfg job):
  train.batch_size          rows per optimiser step over all ranks
  train.micro_batch_size    rows per forward; accumulation follows, the result stays the same
  train.epochs, train.steps, train.precision (fp32, bf16, fp16), train.eval_every, ...
  optim.lr, optim.weight_decay, optim.schedule (constant, linear, cosine), optim.warmup
  data.columns.text, data.columns.label, data.max_length, data.limit.train, data.split, ...
  seed, name (of the directory runs/NAME), force (run again), offline

options:
  --help        this text             --version    ftcore's version
  --cfg job     print the config      -m           multirun
  --config-dir DIR   a directory of your own configs (experiment/*.yaml, ...)
  --plugin-file FILE a plugin in a single file: class LabelNoise is +plugin=label_noise
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0, 1 (the run failed), 2 (the user can mend it)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Threads that wait asleep: with spinning ones, two runs on one machine's cores are some 20 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    named = os.environ.get(FILES)
    try:
        code = _dispatch(_take_plugin_files(arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `ftcore ... | head`: whoever read it has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OUTPUT_LOST
    except UserError as error:
        print(f"ftcore: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"ftcore: {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("ftcore: stopped at once", file=sys.stderr)
        return 130
    except TrainingError as error:
        print(f"ftcore: failed: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if (message := _mendable(error)) is not None:
            print(f"ftcore: error: {message}", file=sys.stderr)
            return 2
        traceback.print_exc()
        print(f"ftcore: failed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    finally:
        if named is None:
            os.environ.pop(FILES, None)
        else:
            os.environ[FILES] = named


def _take_plugin_files(arguments: list[str]) -> list[str]:
    """The arguments without `--plugin-file FILE`; the files go into the environment, for ranks too."""
    rest: list[str] = []
    files = list(filter(None, os.environ.get(FILES, "").split(os.pathsep)))
    waiting = iter(arguments)
    for argument in waiting:
        option, equals, value = argument.partition("=")
        if option != "--plugin-file":
            rest.append(argument)
            continue
        path = Path(value if equals else next(waiting, ""))
        if not path.is_file():
            raise UserError(f"--plugin-file: no such file: {path}")
        files.append(str(path.resolve()))
    if files:
        os.environ[FILES] = os.pathsep.join(dict.fromkeys(files))
    return rest


def _dispatch(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("--help", "-h"):
        print(_help(), end="")
        return 0
    if arguments == ["--version"]:
        from ftcore import __version__

        print(f"ftcore {__version__}")
        return 0
    if arguments and "=" not in arguments[0] and not arguments[0].startswith("-"):
        return _command(arguments[0], arguments[1:])
    from ftcore.compose import run_hydra

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Settings may stand among options; Hydra's parser wants them together.
    settings = [a for a in arguments if "=" in a and not a.startswith("-")]
    run_hydra(_train, [*settings, *(a for a in arguments if a not in settings)])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from ftcore.ranks import leave_ranks

        # A rank of an outside launcher: torch 2.13's gloo threads now and then abort an orderly exit.
        leave_ranks()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return 0


def _train(cfg, run_dir):  # type: ignore[no-untyped-def]
    if "ftcore.run" not in sys.modules:
        _import_uncollected()
    from ftcore.run import run

    return run(cfg, run_dir)


def _import_uncollected() -> None:
    """Import what a run needs without the garbage collector, which finds nothing in a fifth of a start."""
    gc.disable()
    try:
        import ftcore.job
        import ftcore.loop
        import ftcore.run  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


def _command(name: str, arguments: list[str]) -> int:
    points = {p.name: p for p in entry_points(group="ftcore.commands")}
    if name not in points and Path(name).exists():
        raise UserError(f"no command '{name}'; to train on that file or directory: data={shlex.quote(name)}")
    if name not in points:
        raise UserError(f"no command '{name}'; {nearest(name, points)}")
    code = points[name].load()(arguments)
    return int(code or 0)


def _mendable(error: Exception) -> str | None:
    """The message of an error that Hydra or OmegaConf raised about the command line."""
    hydra_errors = sys.modules.get("hydra.errors")
    if hydra_errors is None or not isinstance(error, hydra_errors.HydraException):
        return None
    from ftcore.compose import explain

    return explain(error)


def _help() -> str:
    from ftcore.compose import CONF
    from ftcore.plugins import conf_dirs

    roots = [CONF, *conf_dirs().values()]
    lines = []
    for group in ("model", "data", "task", "optim", "trainer", "experiment", "arm", "plugin"):
        names = sorted({f.stem for root in roots for f in (root / group).glob("*.yaml")})
        lines.append(f"  {group:<12}{', '.join(names) or '(none installed)'}")
    commands = sorted(p.name for p in entry_points(group="ftcore.commands"))
    return HELP.format(groups="\n".join(lines), commands=f"  {', '.join(commands)}")

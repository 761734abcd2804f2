"""Write docs/hooks.md from core's hook specifications and docs/examples/: `python docs/_hooks.py`."""

import inspect
import re
from pathlib import Path

from ftcore import hookspecs
from ftcore.plugins import API

HERE = Path(__file__).resolve().parent
HEAD = f"""\
<!-- Made by docs/_hooks.py from core/ftcore/hookspecs.py and docs/examples/. Do not edit. -->
# Hooks

Every hook of ftcore, in the order in which a run calls them. This is hook API {API}: a plugin says
`@plugin(api={API})` and runs on every later ftcore that still speaks it. New hooks and new arguments do not
change the number, as a plugin names only the hooks and arguments that it wants.

How answers combine:

- *First result*: one plugin answers; core's own answer stands where none does. Two that both answer are
  an error. A wrapper (`@hookimpl(wrapper=True)`: one `yield`, which gives the answer of what is inside) may
  surround it.
- *All*: every plugin's answer counts, in registration order.
- *Notify*: nothing is returned.

Each example is a whole plugin in one file. To try it:

```console
$ ftcore --plugin-file docs/examples/compute_loss.py +plugin=zloss model=tiny_bert train.steps=20
```
"""


def signature(spec: object) -> str:
    """`name(argument: type, ...) -> type`, a line each where it is long."""
    name, found = spec.__name__, inspect.signature(spec)  # type: ignore[attr-defined,arg-type]
    parts = [str(p).replace("'", "") for p in found.parameters.values()]
    answer = str(found.return_annotation).replace("'", "")
    line = f"{name}({', '.join(parts)}) -> {answer}"
    return line if len(line) <= 90 else f"{name}(\n    " + ",\n    ".join(parts) + f",\n) -> {answer}"


def combination(spec: object) -> str:
    """`First result`, `All` or `Notify`, as the docstring has it."""
    return re.search(r"First result|All\b|Notify", inspect.getdoc(spec) or "")[0]  # type: ignore[index]


def page() -> str:
    """The whole page.

    Raises:
        FileNotFoundError: a hook has no example.
    """
    names = list(hookspecs.names())
    rows = [f"| [`{n}`](#{n}) | {combination(getattr(hookspecs, n)).lower()} |" for n in names]
    parts = [HEAD, "\n".join(["| hook | answers |", "|---|---|", *rows]) + "\n"]
    for name in names:
        spec = getattr(hookspecs, name)
        text = re.sub(r"::\n\n((?:    .*\n?|\n)+)", r":\n\n```python\n\1```\n", inspect.getdoc(spec) or "")
        text = re.sub(
            r"```python\n(.*?)```",
            lambda m: "```python\n" + inspect.cleandoc(m[1]) + "\n```",
            text,
            flags=re.S,
        )
        example = (HERE / "examples" / f"{name}.py").read_text().strip()
        parts.append(
            f"## {name}\n\n```python\n{signature(spec)}\n```\n\n{text.strip()}\n\n"
            f'```python title="docs/examples/{name}.py"\n{example}\n```\n'
        )
    return "\n".join(parts)


if __name__ == "__main__":
    (HERE / "hooks.md").write_text(page(), encoding="utf-8")

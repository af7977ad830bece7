"""docs/config.md, made from the config's dataclasses: `python -m launch.config_docs > docs/config.md`."""

from __future__ import annotations

import json
import re
from dataclasses import MISSING

from sapo_ray.config import RunConfig
from sapo_ray.config_loader import Key, describe, section_docs

_INTRODUCTION = """\
# Config keys

Made from the code by `python -m launch.config_docs > docs/config.md`; do not edit.

A config is a YAML file. Every key has a default, so a file names only what it changes:

```yaml
extends: local.yaml     # start from another file, relative to this one
rounds: 3
task: {pool: 12000}     # sections are mappings …
sampling.questions: 3000  # … and dotted keys mean the same
```

Later sources win: the file that `extends` names, the file itself, then `key=value` arguments in their order:

```
sapo run configs/local.yaml rounds=3 task.pool=12000 sampling.stop='["##"]'
sapo run configs/gsm8k/gemma-2-2b.yaml extends=configs/gpu/node.yaml
```

`extends` may be a list, of which later files win. As an argument it names files, relative to the working directory,
that win over CONFIG.

Mappings are merged key by key, lists are replaced, and `${section.key}` stands for another key's value. The run
directory's `config.yaml` holds every key as the run used it.

A mistake ends the command with exit status 2 and one line, before anything is written or started. It names the file (or
the command line), the key, and what is allowed. Where keys do not go together, or not with the task or the machine, it
names them without their files:

```
error: my.yaml: sampling.temprature is not a key; did you mean sampling.temperature?
error: command line: sft.epochs is 'many'; it must be int
error: my.yaml: pairs.eta is 2.0; scores lie in 0 … 1, so it must lie between -1 and 1
```

The keys of `task` depend on `task.kind`. A file that names another kind than the one it extends begins `task` anew.

Keys below stand without the name of their section: `samples` under *sampling* is `sampling.samples`.

A run that goes on must have the config it was begun with. Keys marked * may differ: they say how fast and where it
works, not what comes of it. Samples of an engine that depend on what shares a batch depend on some of them, too."""


def config_docs() -> str:
    """The text of docs/config.md. A section that repeats the keys of an earlier one lists only those it adds."""
    meanings = section_docs(RunConfig)
    parts, tables = [_INTRODUCTION], dict[str, list[str]]()
    for (section, kind), keys in _grouped().items():
        rows = [_row(key) for key in keys]
        bases = [name for name, earlier in tables.items() if set(earlier) <= set(rows)]
        base = max(bases, key=lambda name: len(tables[name]), default=None)
        heading = f"{section}, kind {kind}" if kind else section
        tables[heading] = rows
        parts += [f"## {heading}", meanings[section, kind]] if section else ["## The run"]
        if base is not None:
            rows = [row for row in rows if row not in tables[base]]
            anchor = re.sub(r"[^\w -]", "", base).replace(" ", "-")
            parts.append(f"The keys of [{base}](#{anchor}){', and:' if rows else '.'}")
        if rows:
            parts.append("\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def _grouped() -> dict[tuple[str, str], list[Key]]:
    """The keys of every section and kind, a section before those in it."""
    groups: dict[tuple[str, str], list[Key]] = {}
    for key in describe(RunConfig):
        section = key.name.rpartition(".")[0]
        if "." in section:
            groups.setdefault((section.rpartition(".")[0], key.kind), [])
        groups.setdefault((section, key.kind), []).append(key)
    return groups


def _row(key: Key) -> str:
    if key.default is MISSING:
        default = "none"
    else:
        default = f"`{key.default if isinstance(key.default, str) else json.dumps(key.default)}`"
    name = f"`{key.name.rpartition('.')[2]}`" + (" *" if key.changeable else "")
    cells = (name, key.type, default, " ".join(key.doc.split()))
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(config_docs(), end="")

"""Fill a tree of keyword-only dataclasses from YAML files and dotted overrides, by OmegaConf.

A dataclass's fields are the keys; a field that is itself a dataclass is a section. A YAML file may name others to
start from (`extends: base.yaml` or a list of such, relative to itself), and so may an override, relative to the working
directory. Later sources win: base files, file, overrides in order; a file that is reached in several ways counts where
it comes first. Mappings are merged, lists replaced. `${…}` interpolates, as in OmegaConf.

A section of the schema itself may be one of several dataclasses, `task: ChainConfig | MathConfig`, each with a field
`kind: Literal["chain"] = "chain"` by which a source chooses. A source that chooses another kind than those before it
begins the section anew.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import io
import itertools
import math
import re
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from sapo_ray.errors import SapoError
from sapo_ray.files import Folder, is_uri, joined, split

T = TypeVar("T")


class ConfigError(SapoError):
    """A config that cannot be used. The message names the file (or the command line) and the dotted key."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a schema. `default` is `dataclasses.MISSING` where a value must be given; `doc` may be empty.

    `kind` names the one among a section's dataclasses that the key belongs to; it is empty where there is no choice.
    """

    name: str
    type: str
    default: object
    doc: str
    changeable: bool = False
    kind: str = ""


def changeable(default: T) -> T:
    """A field whose value may differ when a run goes on: it says how fast and where it works, not what comes of it."""
    return field(default=default, metadata={"changeable": True})


def changeable_keys(schema: type) -> set[str]:
    """The dotted names of a schema's keys that were declared `changeable`."""
    hints, names = get_type_hints(schema), set[str]()
    for entry in fields(schema):
        sections = _sections(hints[entry.name]).values()
        names |= {f"{entry.name}.{name}" for section in sections for name in changeable_keys(section)}
        if not sections and entry.metadata.get("changeable"):
            names.add(entry.name)
    return names


def load_config(schema: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """The config in the file `path`, which may be a URI, with overrides such as `train.lr=1e-3`, as a `schema`.

    Raises ConfigError for a file that cannot be read, an unknown key, a value of the wrong type or outside its
    choices, a number that is not finite, a key without a value, and a value that a dataclass's `__post_init__` refuses
    with a ValueError.
    """
    merge = _Merge(schema, str(path))
    given = [_parse_override(override) for override in overrides]
    bases = [base for values in given for base in _bases("command line", values)]
    for source, values in _layers([str(path), *bases]).items():
        merge.add(source, values)
    # A kind first: what is given before it on the same command line is meant for it, too.
    for values in sorted(filter(None, given), key=lambda values: not next(iter(values)).endswith(".kind")):
        merge.add("command line", values)
    merge.check()
    config = OmegaConf.to_object(merge.config)
    return schema(**vars(config))


def config_files(path: str | Path) -> list[str]:
    """The file `path` and those that it extends, outermost first. Raises ConfigError where one cannot be read."""
    return list(_layers([str(path)]))


def to_yaml(config: object) -> str:
    """The dataclass instance `config` as YAML, from which `load_config` makes an equal one."""
    assert is_dataclass(config)
    assert not isinstance(config, type)
    return OmegaConf.to_yaml(OmegaConf.create(_escape(asdict(config))))


def describe(schema: type) -> Iterator[Key]:
    """Every key of a schema but the sections, depth first and in the order of the source; of all kinds of a section."""
    hints, docs = get_type_hints(schema), field_docs(schema)
    for entry in fields(schema):
        sections = _sections(hints[entry.name])
        for kind, section in sections.items():
            yield from (replace(key, name=f"{entry.name}.{key.name}", kind=kind) for key in describe(section))
        if sections:
            continue
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        changes = entry.metadata.get("changeable", False)
        yield Key(entry.name, _type_name(hints[entry.name]), default, docs.get(entry.name, ""), changes)


def section_docs(schema: type) -> dict[tuple[str, str], str]:
    """What stands under each section's field, by the section's dotted name and its kind; and each kind's docstring."""
    docs: dict[tuple[str, str], str] = {}
    for name, hint in get_type_hints(schema).items():
        for kind, section in _sections(hint).items():
            docs[name, kind] = inspect.cleandoc(section.__doc__ or "") if kind else field_docs(schema)[name]
            docs |= {(f"{name}.{inner}", kind): doc for (inner, _), doc in section_docs(section).items()}
    return docs


def field_docs(schema: type) -> dict[str, str]:
    """The string literal under each field, read from the source of the class and of its bases."""
    docs: dict[str, str] = {}
    for cls in (c for c in reversed(schema.__mro__) if is_dataclass(c)):
        definition = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(definition, ast.ClassDef)
        for entry, below in itertools.pairwise(definition.body):
            match entry, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                    docs[name] = inspect.cleandoc(doc)
    return docs


class _Merge:
    """A config on its way: the values merged so far, and which source set each key last."""

    def __init__(self, schema: type, path: str) -> None:
        hints = get_type_hints(schema)
        self.unions = {name: kinds for name, hint in hints.items() if (kinds := _kinds(hint))}
        self.path = path
        self.config: DictConfig = OmegaConf.structured(_opened(schema, self.unions))
        self.hints = hints | {name: OmegaConf.get_type(self.config[name]) for name in self.unions}
        self.sources: dict[str, str] = {}

    def add(self, source: str, values: Mapping[str, Any]) -> None:
        """Set every value of `values`, whose keys may be nested or dotted."""
        for name in self.unions:
            self._choose(source, name, values)
        self._add_section(source, values, self.hints, "")

    def _choose(self, source: str, name: str, values: Mapping[str, Any]) -> None:
        """Begin a section anew where `values` name another kind than it has."""
        section, key = values.get(name), f"{name}.kind"
        kind = values.get(key, section.get("kind") if isinstance(section, Mapping) else None)
        if kind is None or kind == self.config[name].kind:
            return
        if kind not in list(self.unions[name]):  # any value, also one that has no hash
            raise ConfigError(f"{source}: {key} is {kind!r}; it must be one of {', '.join(self.unions[name])}")
        self.hints[name] = self.unions[name][kind]
        OmegaConf.update(self.config, name, OmegaConf.structured(self.hints[name]), merge=False)
        self.sources = {k: s for k, s in self.sources.items() if not k.startswith(f"{name}.")}

    def _add_section(self, source: str, values: Mapping[str, Any], hints: Mapping[str, Any], prefix: str) -> None:
        for name, value in values.items():
            first, dot, rest = str(name).partition(".")
            key, given = prefix + first, {rest: value} if dot else value
            if first not in hints:
                raise ConfigError(f"{source}: {key} is not a key; {self._suggest(first, prefix, hints)}")
            section = _section(hints[first])
            if section is None or (given is None and type(None) in get_args(hints[first])):
                self._set(source, key, given, hints[first])
            elif isinstance(given, Mapping):
                if OmegaConf.select(self.config, key) is None:
                    OmegaConf.update(self.config, key, OmegaConf.structured(section))
                self._add_section(source, given, get_type_hints(section), f"{key}.")
            else:
                keys = ", ".join(get_type_hints(section))
                raise ConfigError(f"{source}: {key} is {given!r}; it must be a section with keys among {keys}")

    def _set(self, source: str, key: str, value: object, hint: object) -> None:
        try:
            OmegaConf.update(self.config, key, value)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{source}: {key} is {value!r}; it must be {_type_name(hint)}") from error
        self.sources.pop(key, None)
        self.sources[key] = source

    def _suggest(self, name: str, prefix: str, siblings: Iterable[str]) -> str:
        """The kind that has the key, the nearest key of the same section or of any section, or this section's keys."""
        section = prefix.removesuffix(".")
        others = [kind for kind, other in self.unions.get(section, {}).items() if name in get_type_hints(other)]
        if others:
            return f"{section}.kind is {self.config[section].kind}, and {name} belongs to {' and '.join(others)}"
        near = [prefix + sibling for sibling in difflib.get_close_matches(name, siblings, n=1)]
        if not near:
            keys = list(_keys(self.hints))
            close = difflib.get_close_matches(name, [_last(key) for key in keys], n=1, cutoff=0.8)
            near = [key for key in keys if _last(key) in close]
        return f"did you mean {near[0]}?" if near else f"the keys here are {', '.join(siblings)}"

    def check(self) -> None:
        """Make every section, the innermost first, so that the error of a section is laid at its door."""
        for section in (*reversed([key for key, inner in _keys(self.hints).items() if inner]), ""):
            node = OmegaConf.select(self.config, section) if section else self.config
            try:
                if node is not None:
                    OmegaConf.to_object(node)
            except MissingMandatoryValue as error:
                raise ConfigError(f"{self.path}: {error.full_key} has no value; give it one") from error
            except OmegaConfBaseException as error:
                key = error.full_key or section
                raise ConfigError(f"{self._source(key)}: {key} has no meaning: {_first_line(error)}") from error
            except ValueError as error:
                raise ConfigError(self._refusal(section, str(error))) from error
        for key in _keys(self.hints):
            value = OmegaConf.select(self.config, key)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{self._source(key)}: {key} is {value}; it must be a finite number")

    def _refusal(self, section: str, message: str) -> str:
        """A ValueError's message with its source and, if it begins with the name of a key, that key's dotted name."""
        name, _, rest = message.partition(" ")
        for key in (f"{section}.{name}".lstrip("."), name):
            if key in _keys(self.hints):
                return f"{self._source(key)}: {key} {rest}"
        return ": ".join(filter(None, (self._source(section), section, message)))

    def _source(self, key: str) -> str:
        """Who set `key` or a part of it; else who last set anything in the sections around it; else the config file."""
        parts = key.split(".")
        around = [".".join(parts[:depth]) for depth in range(len(parts) - 1, 0, -1)]
        for scope in (key, *(around or [""])):
            setters = [s for k, s in self.sources.items() if not scope or k == scope or k.startswith(f"{scope}.")]
            if setters:
                return setters[-1]
        return self.path


def _layers(paths: Iterable[str], children: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """The values of every file of `paths`, each after the files that it extends."""
    layers: dict[str, dict[str, Any]] = {}
    for path in paths:
        if path in children:
            raise ConfigError(f"{children[-1]}: extends goes round in a circle, back to {path}")
        try:
            values = _read(path)
        except FileNotFoundError as error:
            raise ConfigError(f"{path}: no such file" + (f"; {children[-1]} extends it" if children else "")) from error
        home, _ = split(path)
        bases = [base if is_uri(base) else joined(home, base) for base in _bases(path, values)]
        for source, layer in [*_layers(bases, (*children, path)).items(), (path, values)]:
            layers.setdefault(source, layer)
    return layers


def _bases(source: str, values: dict[str, Any]) -> list[str]:
    """The files that `values` extend, which is taken out of them."""
    extends = values.pop("extends", None)
    bases = [extends] if isinstance(extends, str) else [] if extends is None else extends
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        raise ConfigError(f"{source}: extends is {extends!r}; it must be the path of a YAML file, or a list of such")
    return bases


def _read(path: str) -> dict[str, Any]:
    folder, name = split(path)
    try:
        values = OmegaConf.to_container(OmegaConf.load(io.BytesIO(Folder(folder).read(name))))
    except FileNotFoundError:
        raise
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}: not YAML: {error.problem}{line}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: cannot be read: {_first_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a list; it must hold keys with values")
    return {str(key): value for key, value in values.items()}


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise ConfigError(f"command line: {override!r} is not of the form key=value, such as train.lr=1e-3")
    try:
        return {key: OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"]}  # type: ignore[index, call-overload]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"command line: the value of {key} is not YAML: {value!r}") from error


def _section(hint: object) -> type | None:
    """The dataclass that a field of this type holds, or may hold."""
    return next((t for t in (hint, *_alternatives(hint)) if isinstance(t, type) and is_dataclass(t)), None)


def _alternatives(hint: object) -> tuple[object, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ()


def _sections(hint: object) -> dict[str, type]:
    """The dataclasses that a field of this type may hold, by their kinds; one without a choice by the empty name."""
    section = _section(hint)
    return _kinds(hint) or ({} if section is None else {"": section})


def _kinds(hint: object) -> dict[str, type]:
    """The dataclasses of a union of them by their kinds; empty for any other type."""
    sections = [t for t in _alternatives(hint) if isinstance(t, type) and is_dataclass(t)]
    return {get_args(get_type_hints(t)["kind"])[0]: t for t in sections} if len(sections) > 1 else {}


def _opened(schema: type, unions: Mapping[str, Any]) -> type:
    """`schema` with fields of type Any in place of unions of dataclasses, which OmegaConf does not know."""
    chosen = [entry for entry in fields(schema) if entry.name in unions]
    opened: dict[str, Any] = {e.name: field(default_factory=e.default_factory) for e in chosen}
    opened["__annotations__"] = dict.fromkeys(opened, Any)
    return dataclass(kw_only=True)(type(schema.__name__, (schema,), opened))


def _keys(hints: Mapping[str, Any]) -> dict[str, type | None]:
    """The dotted name of every key and section, a section before its keys; and the dataclass of a section."""
    keys: dict[str, type | None] = {}
    for name, hint in hints.items():
        keys[name] = section = _section(hint)
        if section is not None:
            keys |= {f"{name}.{inner}": t for inner, t in _keys(get_type_hints(section)).items()}
    return keys


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _type_name(hint: object) -> str:
    if get_origin(hint) is Literal:
        values = [str(value) for value in get_args(hint)]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if alternatives := _alternatives(hint):
        return " or ".join(_type_name(t) for t in alternatives)
    if hint is type(None):
        return "null"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


def _escape(value: Any) -> Any:
    """`value` with every `${` in its strings escaped, so that it is read back as text."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    return [_escape(item) for item in value] if isinstance(value, (list, tuple)) else value


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]

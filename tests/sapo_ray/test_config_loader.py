from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sapo_ray.config_loader import ConfigError, Key, describe, load_config, section_docs, to_yaml
from sapo_ray.files import Folder


@dataclass(kw_only=True)
class Optimizer:
    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """What follows the warm-up."""
    betas: tuple[float, ...] = (0.9, 0.95)
    """Decay of Adam's
    two moments."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr}; it must be above 0")


@dataclass(kw_only=True)
class LongOptimizer(Optimizer):
    warmup: int | None = None
    """Updates until the peak."""


@dataclass(kw_only=True)
class Schema:
    name: str
    """What the run is called."""
    train: LongOptimizer = field(default_factory=LongOptimizer)
    other: Optimizer | None = None
    start: Literal["auto"] | float = "auto"
    """Score before the first step."""
    tags: list[str] = field(default_factory=list)
    """Labels of the run."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of each data set."""
    merge: bool = False
    """Whether to merge."""

    def __post_init__(self) -> None:
        if self.merge and self.other is None:
            raise ValueError("other.lr must be given where merge is true")
        if len(self.tags) > 2:
            raise ValueError("too many things at once")


def _write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_later_sources_win(tmp_path: Path) -> None:
    _write(tmp_path, "name: base\ntags: [a]\nweights: {x: 1, y: 1}\ntrain: {lr: 0.5, warmup: 7}\n", "base.yaml")
    (tmp_path / "sub").mkdir()
    child = _write(tmp_path / "sub", "extends: ../base.yaml\ntags: [b, c]\nweights: {y: 2}\ntrain.lr: 0.25\n")
    config = load_config(Schema, child, ["train.lr=1e-4", "train.schedule=constant", "train.lr=2e-4"])
    assert config == Schema(
        name="base",
        train=LongOptimizer(lr=2e-4, schedule="constant", warmup=7),
        tags=["b", "c"],
        weights={"x": 1.0, "y": 2.0},
    )


def test_a_file_may_extend_several_and_so_may_the_command_line(tmp_path: Path) -> None:
    """Later ones win, but one that is reached twice does not undo what came between."""
    _write(tmp_path, "name: base\ntags: [a]\nweights: {x: 1, y: 1, z: 1}\n", "base.yaml")
    _write(tmp_path, "extends: base.yaml\ntags: [b]\nweights.x: 2\n", "left.yaml")
    _write(tmp_path, "extends: base.yaml\nname: right\nweights: {x: 3, y: 3}\n", "right.yaml")
    child = _write(tmp_path, "extends: [left.yaml, right.yaml]\nweights.z: 4\n")
    assert load_config(Schema, child) == Schema(name="right", tags=["b"], weights={"x": 3.0, "y": 3.0, "z": 4.0})
    given = [f"extends={tmp_path / 'right.yaml'}", "weights.y=5"]
    config = load_config(Schema, tmp_path / "left.yaml", given)
    assert config == Schema(name="right", tags=["b"], weights={"x": 3.0, "y": 5.0, "z": 1.0})


def test_an_optional_section_is_filled_and_emptied(tmp_path: Path) -> None:
    path = _write(tmp_path, "name: a\nother: {schedule: constant}\n")
    assert load_config(Schema, path).other == Optimizer(schedule="constant")
    assert load_config(Schema, path, ["other.lr=2"]).other == Optimizer(schedule="constant", lr=2.0)
    assert load_config(Schema, path, ["other=null"]).other is None


def test_a_value_may_refer_to_another(tmp_path: Path) -> None:
    path = _write(tmp_path, "name: run-${train.warmup}\ntrain: {warmup: 3}\n")
    assert load_config(Schema, path, ["train.warmup=4"]).name == "run-4"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("train: {lrr: 1}", [], "{path}: train.lrr is not a key; did you mean train.lr?"),
        ("schedul: cosine", [], "{path}: schedul is not a key; did you mean train.schedule?"),
        ("zzz: 1", [], "{path}: zzz is not a key; the keys here are name, train, other, start, tags, weights, merge"),
        ("train: {lr: fast}", [], "{path}: train.lr is 'fast'; it must be float"),
        ("train: {warmup: 1.5}", [], "{path}: train.warmup is 1.5; it must be int or null"),
        ("name: a\ntrain: {lr: .inf}", [], "{path}: train.lr is inf; it must be a finite number"),
        ("name: a", ["start=.nan"], "command line: start is nan; it must be a finite number"),
        ("name: a", ["train.lr=inf"], "command line: train.lr is inf; it must be a finite number"),
        ("train: {lr: null}", [], "{path}: train.lr is None; it must be float"),
        ("train: {schedule: step}", [], "{path}: train.schedule is 'step'; it must be one of constant, cosine"),
        ("start: late", [], "{path}: start is 'late'; it must be auto or float"),
        ("train: {betas: [a]}", [], "{path}: train.betas is ['a']; it must be tuple[float, ...]"),
        ("tags: a", [], "{path}: tags is 'a'; it must be list[str]"),
        ("weights: {x: heavy}", [], "{path}: weights is {{'x': 'heavy'}}; it must be dict[str, float]"),
        (
            "train: 5",
            [],
            "{path}: train is 5; it must be a section with keys among lr, schedule, betas, warmup",
        ),
        (
            "train: null",
            [],
            "{path}: train is None; it must be a section with keys among lr, schedule, betas, warmup",
        ),
        ("merge: false", [], "{path}: name has no value; give it one"),
        ("name: a\ntrain: {lr: -1}", [], "{path}: train.lr is -1.0; it must be above 0"),
        ("name: a\nother: {lr: 0}", [], "{path}: other.lr is 0.0; it must be above 0"),
        ("name: a", ["train.lr=-1"], "command line: train.lr is -1.0; it must be above 0"),
        ("name: a\nmerge: true", [], "{path}: other.lr must be given where merge is true"),
        ("name: a\ntags: [a, b, c]", [], "{path}: too many things at once"),
        ("name: ${nobody}", [], "{path}: name has no meaning: Interpolation key 'nobody' not found"),
        ("name: a\nextends: 5", [], "{path}: extends is 5; it must be the path of a YAML file, or a list of such"),
        (
            "name: a\nextends: [a.yaml, 5]",
            [],
            "{path}: extends is ['a.yaml', 5]; it must be the path of a YAML file, or a list of such",
        ),
        ("name: a", ["extends=5"], "command line: extends is 5; it must be the path of a YAML file, or a list of such"),
        ("extends: no.yaml", [], "{folder}/no.yaml: no such file; {path} extends it"),
        ("extends: run.yaml", [], "{path}: extends goes round in a circle, back to {path}"),
        ("- 1", [], "{path}: holds a list; it must hold keys with values"),
        ("name: a\nname: b", [], "{path}: not YAML: found duplicate key name in line 2"),
        ("name: a\ntags: [", [], "{path}: not YAML: did not find expected node content in line 3"),
        ("name: a", ["train.lr"], "command line: 'train.lr' is not of the form key=value, such as train.lr=1e-3"),
        ("name: a", ["a..b=1"], "command line: 'a..b=1' is not of the form key=value, such as train.lr=1e-3"),
        ("name: a", ["tags=[1"], "command line: the value of tags is not YAML: '[1'"),
        ("name: a", ["trian.lr=1"], "command line: trian is not a key; did you mean train?"),
    ],
)
def test_an_error_is_one_line_that_names_source_and_key(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    path = _write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(Schema, path, overrides)
    assert str(caught.value) == message.format(path=path, folder=tmp_path)


def test_a_config_may_lie_in_an_object_store_and_extend_another_there(s3: str) -> None:
    folder = Folder(s3.format("configs"))
    folder.write("base.yaml", "name: base\ntags: [a]\n")
    folder.write("sub/run.yaml", "extends: ../base.yaml\ntags: [b]\n")
    config = load_config(Schema, folder.locate("sub/run.yaml"), ["train.lr=0.5"])
    assert (config.name, config.tags, config.train.lr) == ("base", ["b"], 0.5)
    with pytest.raises(ConfigError, match=r"configs/none\.yaml\?.*: no such file"):
        load_config(Schema, folder.locate("none.yaml"))


def test_an_error_names_the_file_that_set_the_key(tmp_path: Path) -> None:
    base = _write(tmp_path, "train: {lr: -1}\n", "base.yaml")
    child = _write(tmp_path, "extends: base.yaml\nname: a\ntrain: {schedule: constant}\n")
    with pytest.raises(ConfigError, match="above 0") as caught:
        load_config(Schema, child)
    assert str(caught.value).startswith(f"{base}: train.lr is")


@pytest.mark.parametrize(("data", "problem"), [(None, "no such file"), (b"name: \xff", "cannot be read: ")])
def test_an_unreadable_file(tmp_path: Path, data: bytes | None, problem: str) -> None:
    path = tmp_path / "run.yaml"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ConfigError, match=problem):
        load_config(Schema, path)


_text = st.text(st.characters(codec="utf-8")) | st.text("\\${}ab:'\"# \n-1e.")
_present = _text.filter(lambda text: text != "???")
_number = st.floats(allow_nan=False, allow_infinity=False)


def _optimizers() -> st.SearchStrategy[LongOptimizer]:
    return st.builds(
        LongOptimizer,
        lr=st.floats(min_value=1e-300, allow_infinity=False),
        schedule=st.sampled_from(["constant", "cosine"]),
        betas=st.lists(_number).map(tuple),
        warmup=st.none() | st.integers(),
    )


_schemas = st.builds(
    Schema,
    name=_present,
    train=_optimizers(),
    start=st.just("auto") | _number,
    tags=st.lists(_present, max_size=2),
    weights=st.dictionaries(st.text("abc", min_size=1), _number),
    merge=st.just(False),
)


@given(_schemas)
@example(Schema(name=r"\${a} \\${b} ${", tags=["1e3", "on"], start=1e300))
def test_yaml_round_trip(tmp_path_factory: pytest.TempPathFactory, config: Schema) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(Schema, path) == config


def test_describe_reads_types_defaults_and_docs() -> None:
    keys = {key.name: key for key in describe(Schema)}
    assert list(keys)[:5] == ["name", "train.lr", "train.schedule", "train.betas", "train.warmup"]
    assert keys["name"] == Key("name", "str", MISSING, "What the run is called.")
    assert keys["train.schedule"] == Key(
        "train.schedule", "one of constant, cosine", "cosine", "What follows the warm-up."
    )
    assert keys["train.betas"].doc == "Decay of Adam's\ntwo moments."
    assert keys["train.warmup"] == Key("train.warmup", "int or null", None, "Updates until the peak.")
    assert keys["tags"].default == []
    assert keys["start"].type == "auto or float"
    assert keys["other.lr"].doc == "Peak learning rate."


@dataclass(kw_only=True)
class Step:
    """A fixed rate."""

    kind: Literal["step"] = "step"
    """A fixed rate."""
    size: float = 1.0
    """How far."""
    count: int = 1
    """How often."""


@dataclass(kw_only=True)
class Search:
    """A search."""

    kind: Literal["search"] = "search"
    """A search."""
    inner: Optimizer = field(default_factory=Optimizer)
    """What searches."""
    count: int = 2
    """How often."""
    label: str
    """What it is called."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count is {self.count}; it must be at least 1")


@dataclass(kw_only=True)
class Chosen:
    how: Step | Search = field(default_factory=Step)
    """How it goes on."""
    size: int = 0
    """How large."""

    def __post_init__(self) -> None:
        if isinstance(self.how, Step) and self.how.size > self.size + 10:
            raise ValueError(f"how.size is {self.how.size}; it must be at most size + 10")


def test_a_section_is_of_the_kind_that_is_chosen(tmp_path: Path) -> None:
    assert load_config(Chosen, _write(tmp_path, "how: {size: 2}\n")) == Chosen(how=Step(size=2.0))
    path = _write(tmp_path, "how: {inner.lr: 0.5, label: a, kind: search}\n")
    expected = Chosen(how=Search(label="a", inner=Optimizer(lr=0.5)))
    assert load_config(Chosen, path) == expected
    path.write_text(to_yaml(expected))
    loaded = load_config(Chosen, path)
    assert loaded == expected
    assert type(loaded) is Chosen


def test_another_kind_begins_the_section_anew(tmp_path: Path) -> None:
    base = _write(tmp_path, "how: {size: 2, count: 5}\nsize: 4\n", "base.yaml")
    child = _write(tmp_path, "extends: base.yaml\nhow.label: a\nhow.kind: search\n")
    assert load_config(Chosen, child) == Chosen(how=Search(label="a"), size=4)
    assert load_config(Chosen, child, ["how.size=3", "how.kind=step"]) == Chosen(how=Step(size=3.0), size=4)
    assert load_config(Chosen, base, ["how.kind=step"]) == Chosen(how=Step(size=2.0, count=5), size=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("how: {kind: other}", "{path}: how.kind is 'other'; it must be one of step, search"),
        ("how: {kind: [step]}", "{path}: how.kind is ['step']; it must be one of step, search"),
        ("how: {label: a}", "{path}: how.label is not a key; how.kind is step, and label belongs to search"),
        ("how: {sise: 1}", "{path}: how.sise is not a key; did you mean how.size?"),
        ("how: {kind: search, inner: {lrr: 1}}", "{path}: how.inner.lrr is not a key; did you mean how.inner.lr?"),
        ("how: {kind: search}", "{path}: how.label has no value; give it one"),
        ("how: {kind: search, label: a, count: 0}", "{path}: how.count is 0; it must be at least 1"),
        ("how: {kind: search, label: a, inner.lr: 0}", "{path}: how.inner.lr is 0.0; it must be above 0"),
        ("how: {size: a}", "{path}: how.size is 'a'; it must be float"),
        ("how: {size: 11}", "{path}: how.size is 11.0; it must be at most size + 10"),
        ("how: 5", "{path}: how is 5; it must be a section with keys among kind, size, count"),
    ],
)
def test_an_error_in_a_section_of_kinds(tmp_path: Path, text: str, message: str) -> None:
    path = _write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(Chosen, path)
    assert str(caught.value) == message.format(path=path)


def test_describe_has_the_keys_of_every_kind() -> None:
    keys = [(key.name, key.kind, key.default) for key in describe(Chosen)]
    assert ("how.count", "step", 1) in keys
    assert ("how.count", "search", 2) in keys
    assert ("how.inner.lr", "search", 1e-3) in keys
    assert ("size", "", 0) in keys
    assert section_docs(Chosen) == {
        ("how", "step"): "A fixed rate.",
        ("how", "search"): "A search.",
        ("how.inner", "search"): "What searches.",
    }

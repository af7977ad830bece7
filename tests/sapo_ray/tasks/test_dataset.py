"""Tasks from data sets: where records come from, which split a question goes to, and what the reasoner is shown."""

from __future__ import annotations

import gzip
import json
import pickle
import socket
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from datasets.arrow_writer import ArrowWriter
from pyarrow import parquet

from sapo_ray.encoding import Chat
from sapo_ray.errors import SapoError
from sapo_ray.files import Folder
from sapo_ray.tasks import SPLITS, Math, MathConfig, make_task
from sapo_ray.tasks.dataset import field_of
from sapo_ray.tasks.prompts import PromptConfig
from sapo_ray.tasks.sources import SourceConfig

ROWS = [{"question": f"{i}+{i}?", "answer": i + i, "why": f"{i}+{i}={i + i}"} for i in range(40)]


def lines(path: Path, rows: list[dict[str, Any]]) -> SourceConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(path=str(path), solution="why")


def config(tmp_path: Path, **keys: Any) -> MathConfig:
    """20 questions to train on, 20 for the test."""
    train, test = lines(tmp_path / "train.jsonl", ROWS[:20]), lines(tmp_path / "test.jsonl", ROWS[20:])
    return MathConfig(**{"train_data": train, "test_data": test, "worked": 4, "validation": 3, **keys})


def test_gsm8k_is_read_and_divided(data: Path) -> None:
    train = SourceConfig(path=str(data / "gsm8k/train.jsonl"), solution="answer", strip="<<[^<>]*>>")
    task = Math(MathConfig(train_data=train, test_data=SourceConfig(path=str(data / "gsm8k/test.jsonl"))))
    assert [len(task.questions(split)) for split in SPLITS] == [500, 6773, 200, 1319, 0]
    assert not task.remarks()
    texts = [q.text for split in SPLITS for q in task.questions(split)]
    assert len(set(texts)) == len(texts)
    for question in task.questions("worked"):
        assert question.solution
        assert question.solution[-1] == f"#### {question.answer}"
        assert "<<" not in "".join(question.solution)
        assert task.split("".join(question.solution)) == question.solution
        assert task.is_correct(task.answer(question.solution), question.answer)
    assert all(q.solution is None for split in SPLITS[1:] for q in task.questions(split))


def test_svamp_in_one_file_has_equations_for_solutions(data: Path) -> None:
    source = SourceConfig(
        path=str(data / "svamp/SVAMP.json"),
        question="{{ Body }} {{ Question }}",
        answer="Answer",
        solution="{{ Equation | replace('.0 ', ' ') }} = {{ Answer }}",
    )
    task = Math(MathConfig(train_data=source, worked=600, validation=100, test=300, pool=0))
    assert [len(task.questions(split)) for split in SPLITS] == [600, 0, 100, 300, 0]
    known = {q.id: q for split in SPLITS for q in task.questions(split)}
    first = next(q for q in known.values() if q.id == "train-1")
    assert first.text.startswith(
        "Each pack of dvds costs 76 dollars. If there is a discount of 25 dollars on each pack How"
    )
    assert first.answer == "51"
    assert all(task.is_correct(task.answer(q.solution or ()), q.answer) for q in task.questions("worked"))


def test_math_takes_the_boxed_answer_out_of_a_solution(data: Path) -> None:
    source = SourceConfig(
        path=str(data / "math500/test500.jsonl"), question="problem", answer="solution", solution="solution"
    )
    task = Math(MathConfig(train_data=source, worked=100, validation=50, test=50, convention="boxed", steps="sentence"))
    golds = {
        r["problem"].strip(): r["answer"] for r in map(json.loads, Path(source.path or "").read_text().splitlines())
    }
    for split in SPLITS:
        for question in task.questions(split):
            assert question.answer == golds[question.text]
    assert all(task.answer(q.solution or ()) == q.answer for q in task.questions("worked"))


@pytest.mark.parametrize("form", ["a.jsonl", "a.json", "a.parquet", "a.jsonl.gz", "directory"])
def test_every_form_gives_the_same_questions(tmp_path: Path, form: str) -> None:
    text, rows = "".join(json.dumps(row) + "\n" for row in ROWS), tmp_path / form
    match form:
        case "a.jsonl":
            rows.write_text(text)
        case "a.json":
            rows.write_text(json.dumps(ROWS))
        case "a.parquet":
            parquet.write_table(pa.Table.from_pylist(ROWS), rows)
        case "a.jsonl.gz":
            rows.write_bytes(gzip.compress(text.encode()))
        case "directory":
            (rows / "deep").mkdir(parents=True)
            (rows / "README.md").write_text("no data")
            (rows / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:7]))
            parquet.write_table(pa.Table.from_pylist(ROWS[7:]), rows / "deep" / "b.parquet")
    task = Math(MathConfig(train_data=SourceConfig(path=str(rows)), worked=0, validation=0, test=40))
    found = sorted(task.questions("test"), key=lambda q: int(q.id.partition("-")[2]))
    assert [(q.id, q.text, q.answer) for q in found] == [
        (f"train-{i + 1}", row["question"], str(row["answer"])) for i, row in enumerate(ROWS)
    ]


def test_data_may_lie_in_an_object_store(s3: str) -> None:
    folder = Folder(s3.format("questions"))
    folder.write("part/a.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    for location in (folder.locate("part/a.jsonl"), folder.locate("part")):
        task = Math(MathConfig(train_data=SourceConfig(path=location), worked=0, validation=0, test=1))
        assert len(task.questions("pool")) == 39


def test_splits_do_not_depend_on_each_others_sizes(tmp_path: Path) -> None:
    small, large = Math(config(tmp_path, worked=4, pool=3, test=5)), Math(config(tmp_path, worked=6, pool=4))
    for split in SPLITS:
        assert list(large.questions(split))[: len(small.questions(split))] == list(small.questions(split))
    assert Math(config(tmp_path, seed=1)).questions("worked") != Math(config(tmp_path)).questions("worked")


def test_records_may_be_chosen_by_a_condition(data: Path) -> None:
    easy = "{{ answer.count('\\n') in (2, 3) }}"
    source = SourceConfig(path=str(data / "gsm8k/test.jsonl"), solution="answer", strip="<<[^<>]*>>", where=easy)
    task = Math(MathConfig(train_data=source, worked=300, validation=0, test=0))
    assert {len(q.solution or ()) for q in task.questions("worked")} == {3, 4}  # the answer's own line is one, too
    records = [json.loads(line) for line in Path(source.path or "").read_text().splitlines()]
    wanted = {f"train-{n}" for n, record in enumerate(records, 1) if record["answer"].count("\n") in (2, 3)}
    assert {q.id for split in SPLITS for q in task.questions(split)} == wanted


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("{{ answer }}", "line 1: where comes to '0'; it must come to True or False"),
        ("{{ level > 3 }}", "line 1: where: 'level' is undefined"),
        ("{{ answer > 99 }}", "task.train_data has no questions for which task.train_data.where holds"),
    ],
)
def test_a_condition_that_says_neither_or_leaves_nothing_is_refused(tmp_path: Path, where: str, message: str) -> None:
    settings = config(tmp_path)
    settings.train_data.where = where
    with pytest.raises(SapoError) as caught:
        Math(settings).questions("pool")
    assert message in str(caught.value)


def test_a_question_is_in_one_split_the_test_first(tmp_path: Path) -> None:
    test = lines(tmp_path / "t.jsonl", [{**ROWS[3], "question": " 3+3?\n"}, *ROWS[30:]])
    ood = lines(tmp_path / "o.jsonl", [ROWS[30], ROWS[4], ROWS[4]])
    task = Math(config(tmp_path, test_data=test, ood_data=ood))
    assert [q.text for q in task.questions("ood")] == ["4+4?"]
    assert len([q for split in ("worked", "pool", "validation") for q in task.questions(split)]) == 18
    assert task.remarks() == [
        "2 questions of task.ood_data repeat another or one that tests; left out",
        "2 questions of task.train_data repeat another or one that tests; left out",
    ]


BAD = [
    ("{", "no JSON"),
    ("[1]", "it is list, no object"),
    ('{"question": "1?", "why": "1"}', "there is no 'answer'; answer must name one of question, why"),
    ('{"question": " ", "answer": 1, "why": "1"}', "question is empty"),
    ('{"question": "1?", "answer": null, "why": "1"}', "'answer' is NoneType, no text or number"),
    ('{"question": "1?", "answer": 1, "why": "#### 2"}', "the solution comes to '2' and not to the answer '1'"),
]


@pytest.mark.parametrize(("line", "problem"), BAD)
def test_a_record_that_does_not_fit_is_named_or_left_out(tmp_path: Path, line: str, problem: str) -> None:
    settings = config(tmp_path)
    path = Path(settings.train_data.path or "")
    path.write_text(f"{line}\n" + path.read_text())
    with pytest.raises(SapoError) as caught:
        Math(settings).questions("pool")
    assert str(caught.value).startswith(f"1 of 21 records of task.train_data do not fit: {path}, line 1: {problem}")
    settings.on_bad = "skip"
    assert len(Math(settings).questions("pool")) == 13
    assert Math(settings).remarks()[0].endswith("; left out")
    assert "\n" not in Math(settings).remarks()[0]


def test_of_many_records_that_do_not_fit_the_first_are_named_and_a_traceback_lists_all(tmp_path: Path) -> None:
    settings = config(tmp_path)
    path = Path(settings.train_data.path or "")
    path.write_text("{\n" * 7 + path.read_text())
    with pytest.raises(SapoError) as caught:
        Math(settings).questions("pool")
    assert "line 5: " in str(caught.value)
    assert "line 6: " not in str(caught.value)
    assert "; and 2 more (`sapo --debug … task.on_bad=fail` lists all)" in str(caught.value)
    (listed,) = caught.value.__notes__
    assert [line.partition(": ")[0] for line in listed.splitlines()] == [f"{path}, line {n}" for n in range(1, 8)]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"worked": 21}, "task.worked is 21, but task.train_data has only 17 more questions with a worked solution"),
        ({"pool": 14}, "task.pool is 14, but task.train_data has only 13 more questions"),
        ({"test": 21}, "task.test is 21, but task.test_data has only 20 questions"),
        ({"train_data": SourceConfig(path="/nowhere/a.jsonl")}, "/nowhere/a.jsonl: no such file"),
        ({"train_data": SourceConfig(path="/nowhere")}, "/nowhere: no such file or directory, or none in it"),
        (
            {"prompt": PromptConfig(template="none")},
            "task.prompt.template none is no file that can be read, nor one of",
        ),
    ],
)
def test_what_cannot_be_had_is_said(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(SapoError) as caught:
        Math(config(tmp_path, **keys)).questions("pool")
    assert str(caught.value).startswith(message)


def test_offline_the_network_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    task = Math(MathConfig(train_data=SourceConfig(hub="nobody/nothing-at-all"), test=1))
    with pytest.raises(SapoError, match=r"nobody/nothing-at-all cannot be loaded.*`path`") as caught:
        task.questions("test")
    assert "a connection was tried" not in str(caught.value)


def test_offline_a_hub_data_set_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache as the library leaves it behind: a file of Arrow data and a description."""
    place = tmp_path / "somebody___sums" / "main" / "0.0.0" / "abc123"
    place.mkdir(parents=True)
    rows = [{"question": row["question"], "answer": str(row["answer"])} for row in ROWS]
    features = datasets.Dataset.from_list(rows).features
    writer = ArrowWriter(path=str(place / "sums-train.arrow"), features=features)
    for row in rows:
        writer.write(row)
    count, size = writer.finalize()
    split = {"name": "train", "num_bytes": size, "num_examples": count, "dataset_name": "sums"}
    datasets.DatasetInfo(
        features=features, dataset_name="sums", config_name="main", version="0.0.0", splits={"train": split}
    ).write_to_directory(str(place))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    source = SourceConfig(hub="somebody/sums", subset="main")
    assert len(Math(MathConfig(train_data=source, worked=0, validation=0, test=5)).questions("pool")) == 35


def test_prompts_are_filled_templates(tmp_path: Path) -> None:
    plain = Math(config(tmp_path))
    assert plain.prompt("1+1?") == "Question: 1+1?\nAnswer:\n"
    shots = Math(config(tmp_path, prompt=PromptConfig(shots=2)))
    text = shots.prompt("What?")
    assert isinstance(text, str)
    assert text.count("Question: ") == 3
    assert text.count("#### ") == 2
    assert len(shots.questions("pool")) == len(plain.questions("pool")) - 2
    assert not [q for split in SPLITS for q in shots.questions(split) if f"Question: {q.text}\n" in text]
    chat = Math(config(tmp_path, prompt=PromptConfig(template="instruct", chat=True), convention="boxed")).prompt(
        "1+1?"
    )
    assert isinstance(chat, Chat)
    assert chat.text.startswith("1+1?\n")
    assert r"\boxed{}" in chat.text
    own = tmp_path / "own.jinja"
    own.write_text("{{ question | upper }} ({{ convention }}): ")
    assert Math(config(tmp_path, prompt=PromptConfig(template=str(own)))).prompt("a?") == "A? (hashes): "


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ question", "line 1: unexpected end of template"),
        ("a\n{% nonsense %}", "line 2: Encountered unknown tag 'nonsense'"),
        ("{{ answer }}", "'answer' is undefined"),
        ("{{ question.__class__.__mro__ }}", "unsafe"),
        ("{{ examples.append(1) }}", "unsafe"),
    ],
)
def test_a_template_is_checked_and_stays_in_its_sandbox(tmp_path: Path, template: str, message: str) -> None:
    (tmp_path / "own.jinja").write_text(template)
    with pytest.raises(SapoError, match=r"task.prompt.template .*own.jinja") as caught:
        Math(config(tmp_path, prompt=PromptConfig(template=str(tmp_path / "own.jinja")))).prompt("1+1?")
    assert message in str(caught.value)


def test_a_training_takes_along_prompts_and_no_questions(tmp_path: Path) -> None:
    task = Math(config(tmp_path, prompt=PromptConfig(shots=2)))
    assert task.questions("pool")
    pickled = pickle.dumps(task)
    for path in tmp_path.iterdir():
        path.unlink()
    assert pickle.loads(pickled).prompt("1+1?") == task.prompt("1+1?")
    assert sum(f"{i}+{i}?".encode() in pickled for i in range(20)) == 2


def test_a_data_task_has_no_alphabet_and_no_oracle(tmp_path: Path) -> None:
    task = make_task(config(tmp_path))
    assert task.alphabet is None
    assert task.oracle(task.questions("worked")[0], ["1"]) is None


def test_a_number_is_read_as_people_write_it() -> None:
    source = SourceConfig(path="data.jsonl", answer="cost")
    costs = [51.0, 0.1 + 0.2, -2.5, 7]
    assert [field_of(source, "answer", {"cost": cost}) for cost in costs] == ["51", "0.3", "-2.5", "7"]

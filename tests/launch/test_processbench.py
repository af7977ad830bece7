"""`sapo processbench` from files to figures, for a checkpoint of every format. No Ray is started."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForTokenClassification, AutoTokenizer

from launch.cli import cli
from tests.prms import SAVE

LONG = "9" * 3000


def case(name: str, label: int, *steps: str) -> dict[str, Any]:
    return {"id": name, "problem": f"What is {name}?", "steps": steps, "label": label}


TUNE = [case("a", 1, "one", "2 + 2 = 5", "5"), case("b", -1, "2 + 2 = 4", "4"), case("c", 0, "3 - 1 = 1", "1", "1")]
TEST = [
    case("d", 0, "5 - 3 = 3", "3"),
    case("long", 1, "one", LONG),
    case("e", -1, "7 x 7", "so 49"),
    case("f", -1, "1"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processbench")
    for name, save in SAVE.items():
        save(folder / name)
    (folder / "tune.json").write_text(json.dumps(TUNE))
    (folder / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in TEST))
    (folder / "one.yaml").write_text("task: {kind: math, train_data: {path: nowhere.jsonl}, test: 1}\n")
    return folder


def run(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(
        cli, ["processbench", str(folder / "one.yaml"), *(a.replace("IN", str(folder)) for a in arguments)]
    )


@pytest.mark.parametrize("name", SAVE)
def test_a_threshold_is_chosen_on_one_file_and_applied_to_another(folder: Path, name: str) -> None:
    arguments = ["--verifier", f"IN/{name}", "--test", "IN/test.jsonl"]
    result = run(folder, *arguments, "--tune", "IN/tune.json", "--json", "verifier.batch_tokens=200")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    tuned, tested = figures["splits"]
    assert (figures["format"], figures["tuned_on"]) == (name, str(folder / "tune.json"))
    assert (tuned["split"], tuned["tuned_on"], tuned["wrong"], tuned["right"]) == (figures["tuned_on"], True, 2, 1)
    assert (tested["split"], tested["tuned_on"]) == (str(folder / "test.jsonl"), False)
    assert (tested["wrong"], tested["right"], tested["left_out"]) == (1, 2, ["long"])
    warning = "warning: 1 of 4 records of IN/test.jsonl exceed the 2,048 positions of the model and are left out: long"
    assert warning.replace("IN", str(folder)) in result.stderr
    # The same threshold, given, brings the same figures, and nothing is said to be chosen on anything.
    given = run(folder, *arguments, "--threshold", str(figures["threshold"]), "--json")
    again = json.loads(given.stdout)
    assert again["splits"] == [tested]
    assert (again["threshold"], again["tuned_on"]) == (figures["threshold"], None)


def test_the_table_says_what_the_threshold_was_chosen_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)  # longer paths would be wrapped
    arguments = ["--verifier", "sapo", "--test", "test.jsonl", "--tune", "tune.json"]
    figures = json.loads(run(folder, *arguments, "--json").stdout)
    first, *lines = run(folder, *arguments).stdout.splitlines()
    assert first == f"sapo (sapo), threshold {figures['threshold']:.4g}, chosen on tune.json"
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert [row[0] for row in rows] == ["tune.json (threshold chosen on it)", "test.jsonl"]
    for row, split in zip(rows, figures["splits"], strict=True):
        assert row[1:3] == [f"{100 * split['f1']:.1f}", f"{100 * split['wrong_accuracy']:.1f}"]
        assert (row[4], row[7], row[8]) == (str(split["wrong"]), str(split["right"]), str(len(split["left_out"])))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--test", "IN/test.jsonl"], "name --tune or --threshold, one of the two"),
        (
            ["--test", "IN/test.jsonl", "--tune", "IN/tune.json", "--threshold", "0.5"],
            "name --tune or --threshold, one",
        ),
        (
            ["--test", "IN/tune.json", "--tune", "IN/tune.json"],
            "3 of 3 records of --test IN/tune.json are in --tune IN/tune.json, too; test on others ",
        ),
        (["--test", "IN/one.json", "--tune", "IN/tune.json"], "1 of 1 records of --test IN/one.json are in --tune "),
        (
            ["--test", "IN/tune.json", "--tune", "IN/right.json"],
            "--tune IN/right.json: a threshold is chosen on right ",
        ),
        (["--test", "IN/one.yaml", "--threshold", "0.5"], "IN/one.yaml: no such file or directory, or none in it "),
        (["--test", "IN/bad.jsonl", "--threshold", "0.5"], "IN/bad.jsonl, line 2: `label` is 1; it must be "),
        (
            ["--test", "IN/tag.json", "--threshold", "0.5", "--verifier", "IN/math-shepherd"],
            "IN/tag.json, g: the step tag ки is read 2 times after 1 steps: ",
        ),
        (
            ["--test", "IN/tune.json", "--threshold", "0.5", "--verifier", "IN"],
            "Invalid value for '--verifier': IN is no",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be(folder: Path, arguments: list[str], message: str) -> None:
    (folder / "one.json").write_text(json.dumps([TUNE[0] | {"id": "another"}]))
    (folder / "right.json").write_text(json.dumps([case("r", -1, "1"), case("s", -1, "2")]))
    (folder / "bad.jsonl").write_text(f"{json.dumps(TUNE[0])}\n{json.dumps(case('h', 1, 'one'))}\n")
    (folder / "tag.json").write_text(json.dumps([case("g", -1, "a ки b")]))
    result = run(folder, "--verifier", "IN/sapo", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].replace(str(folder), "IN").startswith(f"error: {message}")


def test_published_records_end_to_end(folder: Path, data: Path, tmp_path: Path) -> None:
    """Twenty of each of ProcessBench's files, by a verifier of this project with random weights.

    The figures are those of scores that transformers gives for one text at a time.
    """
    for name in ("gsm8k", "math"):
        file = data / "processbench" / f"{name}.json"
        if not file.is_file():
            pytest.skip(f"no {file}")
        rows = json.loads(file.read_text())
        (tmp_path / f"{name}.json").write_text(json.dumps(rows[:: len(rows) // 20]))
    files = ["--tune", f"{tmp_path}/gsm8k.json", "--test", f"{tmp_path}/math.json"]
    result = run(folder, "--verifier", "IN/sapo", *files, "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    tuned, tested = figures["splits"]
    for name, split in (("gsm8k", tuned), ("math", tested)):
        rows = json.loads((tmp_path / f"{name}.json").read_text())
        answers = _answers(folder / "sapo", rows, figures["threshold"])
        assert split["left_out"] == [row["id"] for row in rows if row["id"] not in answers]
        kept = [(answers[row["id"]], row["label"]) for row in rows if row["id"] in answers]
        wrong = fmean(answer == label for answer, label in kept if label >= 0)
        right = fmean(answer == label for answer, label in kept if label == -1)
        assert (split["wrong_accuracy"], split["right_accuracy"]) == (wrong, right)
        assert split["f1"] == pytest.approx(2 * wrong * right / (wrong + right) if wrong + right else 0)
    assert tuned["f1"] > 0
    assert 0 < len(tested["left_out"]) < 10


@torch.no_grad()
def _answers(checkpoint: Path, rows: list[dict[str, Any]], threshold: float) -> dict[str, int]:
    """What the verifier says of every record that it has positions for: one token a character."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForTokenClassification.from_pretrained(checkpoint).eval()
    answers = {}
    for row in rows:
        *steps, last = row["steps"]
        texts = [f"Question: {row['problem']}\nAnswer:\n", *(step + "\n" for step in steps), last]
        lengths = list(accumulate(len(tokenizer.encode(text)) for text in texts))
        if lengths[-1] > 2048:
            continue
        logits = model(torch.tensor([tokenizer.encode("".join(texts))])).logits[0, :, 0]
        below = [j for j, length in enumerate(lengths[1:]) if torch.sigmoid(logits[length - 1]) < threshold]
        answers[row["id"]] = below[0] if below else -1
    return answers

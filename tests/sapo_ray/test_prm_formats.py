"""Every format's scores are those of a plain forward pass over its text, one unpadded trajectory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Qwen2Config,
    Qwen2Model,
)

from sapo_ray.errors import SapoError
from sapo_ray.models import ModelConfig, save_random_reasoner
from sapo_ray.prm_formats import prm_format
from sapo_ray.scoring import score
from sapo_ray.steps import StepUnit
from sapo_ray.tasks import Chain, ChainConfig, Math, MathConfig
from sapo_ray.tasks.chain import VOCABULARY
from sapo_ray.tasks.prompts import PromptConfig
from sapo_ray.tasks.sources import SourceConfig
from tests.prms import SAVE

PROBLEM = "Tom has 3 apples and buys 4 - 1 more. How many?"
SOLUTIONS = [
    ["He buys 3.", "3 + 3 = 6", "The answer is \\boxed{6}."],
    ["7"],
    ["First,\nlook:\n", "4 - 1 = 3", "so 3 + 3 = 7", "that is + or - one", "7"],
]


def math_task(steps: StepUnit = "line", template: str = "plain") -> Math:
    """The task whose prompts a verifier of this project knows. Its data is not read."""
    source, prompt = SourceConfig(path="nowhere.jsonl"), PromptConfig(template=template)
    return Math(MathConfig(train_data=source, test=1, steps=steps, prompt=prompt))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("prms")
    for name, save in SAVE.items():
        save(folder / name)
    return {name: folder / name for name in SAVE}


@torch.no_grad()
def plain_sapo(checkpoint: Path, problem: str, steps: list[str]) -> list[float]:
    """Of a text without its last step's newline, the positions are counted in characters: one token each."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    lines = [step.removesuffix("\n") for step in steps]
    prompt = math_task().prompt(problem)
    assert isinstance(prompt, str)
    ids = tokenizer.encode(prompt + "\n".join(lines))
    ends, at = [], len(prompt) - 1
    for line in lines[:-1]:
        at += len(line) + 1
        ends.append(at)
    model = AutoModelForTokenClassification.from_pretrained(checkpoint).eval()
    return torch.sigmoid(model(torch.tensor([ids])).logits[0, [*ends, len(ids) - 1], 0]).tolist()


@torch.no_grad()
def plain_math_shepherd(checkpoint: Path, problem: str, steps: list[str]) -> list[float]:
    """As the model's card computes it."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    candidates = tokenizer.encode("+ -")[1:]
    tag = tokenizer.encode("ки")[-1]
    ids = torch.tensor([tokenizer.encode(problem + " " + "\n".join(step + " ки" for step in steps))])
    logits = AutoModelForCausalLM.from_pretrained(checkpoint).eval()(ids).logits[:, :, candidates]
    return logits.softmax(dim=-1)[:, :, 0][ids == tag].tolist()


@torch.no_grad()
def plain_qwen_math(checkpoint: Path, problem: str, steps: list[str]) -> list[float]:
    """The backbone and the head's two layers, from the weights' names."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    system = "Please reason step by step, and put your final answer within \\boxed{}."
    text = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"
    text += "<extra_0>".join(steps) + "<extra_0><|im_end|>\n"
    ids = torch.tensor([tokenizer.encode(text)])
    weights = load_file(checkpoint / "model.safetensors")
    backbone = Qwen2Model(Qwen2Config.from_pretrained(checkpoint)).eval()
    backbone.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")})
    hidden = backbone(ids).last_hidden_state
    hidden = torch.relu(hidden @ weights["score.0.weight"].T + weights["score.0.bias"])
    logits = hidden @ weights["score.2.weight"].T + weights["score.2.bias"]
    return logits.softmax(dim=-1)[ids == tokenizer.convert_tokens_to_ids("<extra_0>")][:, 1].tolist()


PLAIN: dict[str, Callable[[Path, str, list[str]], list[float]]] = {
    "sapo": plain_sapo,
    "math-shepherd": plain_math_shepherd,
    "qwen2.5-math-prm": plain_qwen_math,
}


@pytest.mark.parametrize("name", SAVE)
def test_scores_are_those_of_a_plain_forward_pass(checkpoints: dict[str, Path], name: str) -> None:
    checkpoint = checkpoints[name]
    form, longest = prm_format(str(checkpoint), math_task())
    assert (form.name, longest) == (name, 2048)
    encoded = [form.encode(PROBLEM, steps) for steps in SOLUTIONS]
    model = form.load(str(checkpoint), torch.float32).eval()
    found = score(model, encoded, batch_tokens=4096)
    for steps, scores in zip(SOLUTIONS, found, strict=True):
        assert scores == pytest.approx(PLAIN[name](checkpoint, PROBLEM, steps), abs=1e-5)
    assert max(map(max, found)) - min(map(min, found)) > 0.1
    for scores, alone in zip(found, score(model, encoded, batch_tokens=1), strict=True):
        assert scores == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize(
    ("unit", "steps"),
    [
        ("line", ["a\n", "b\n", "c"]),
        ("sentence", ["a\n", "b\n", "c"]),
        ("statement", ["a\n", "b\n", "c"]),
        ("paragraph", ["a\n\n", "b\n", "c"]),
    ],
)
def test_a_step_ends_as_the_tasks_steps_do(checkpoints: dict[str, Path], unit: StepUnit, steps: list[str]) -> None:
    """One that ends in a newline is left alone, and so is the last: a solution ends with it."""
    path = str(checkpoints["sapo"])
    task = math_task(unit, "instruct")
    encoded = prm_format(path, task)[0].encode("Why?", ["a", "b\n", "c"])
    prompt = task.prompt("Why?")
    assert AutoTokenizer.from_pretrained(path).decode(encoded.ids) == f"{prompt}{''.join(steps)}"
    assert [end - encoded.prompt_length + 1 for end in encoded.step_ends] == [
        sum(map(len, steps[: j + 1])) for j in range(3)
    ]


@pytest.mark.parametrize(("name", "tag"), [("math-shepherd", "ки"), ("qwen2.5-math-prm", "<extra_0>")])
def test_a_step_that_holds_the_tag_is_refused(checkpoints: dict[str, Path], name: str, tag: str) -> None:
    form, _ = prm_format(str(checkpoints[name]), math_task())
    with pytest.raises(SapoError, match=f"the step tag {tag} is read 3 times after 2 steps"):
        form.encode(PROBLEM, [f"one {tag} more", "two"])


def test_a_task_with_an_alphabet_reads_nothing_else(tmp_path: Path) -> None:
    save_random_reasoner(ModelConfig(hidden_size=32, layers=1, heads=1), VOCABULARY, 0, tmp_path)
    model = AutoModelForTokenClassification.from_pretrained(tmp_path, num_labels=1)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path)
    task = Chain(ChainConfig(worked=1))
    form, _ = prm_format(str(tmp_path), task)
    question = task.questions("worked")[0]
    assert question.solution is not None
    assert len(form.encode(question.text, question.solution).step_ends) == len(question.solution)
    with pytest.raises(SapoError, match="cannot read '\\$'"):
        form.encode(question.text, ["$1"])


def test_a_reasoner_is_no_math_shepherd_prm(tmp_path: Path) -> None:
    save_random_reasoner(ModelConfig(hidden_size=32, layers=1, heads=1), VOCABULARY, 0, tmp_path)
    with pytest.raises(SapoError, match=f"{tmp_path} holds Qwen2ForCausalLM, but its tokenizer has no token for "):
        prm_format(str(tmp_path), math_task())


def test_a_checkpoint_of_another_kind_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["sapo"], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["Qwen2Model"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SapoError, match=f"{tmp_path} holds Qwen2Model; a PRM is a …ForTokenClassification"):
        prm_format(str(tmp_path), math_task())


def test_a_head_without_weights_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["qwen2.5-math-prm"], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["score.2.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    form, _ = prm_format(str(tmp_path), math_task())
    with pytest.raises(SapoError, match=f"{tmp_path} holds no weights for score.2.weight"):
        form.load(str(tmp_path), torch.float32)

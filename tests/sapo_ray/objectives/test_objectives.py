"""Losses against outside oracles: transformers' masked causal-LM loss, TRL's ORPO, and torch's mse_loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2ForCausalLM, Qwen2ForTokenClassification
from trl.experimental.orpo import ORPOTrainer

from sapo_ray.encoding import encode
from sapo_ray.models import ModelConfig, character_tokenizer, save_random_reasoner
from sapo_ray.objectives import make_objective
from sapo_ray.objectives.base import IGNORE, Batch, Example, Objective, Row, collate, response_nll
from sapo_ray.objectives.orpo import ORPO, mean_log_probs, odds_ratio_loss
from sapo_ray.objectives.prm import PRM
from sapo_ray.objectives.sft import SFT
from sapo_ray.tasks.chain import VOCABULARY, Chain, ChainConfig

BETA = 0.25
CHAIN = Chain(ChainConfig(worked=8, pool=1, validation=1, test=1, ood=1))
SOLVED = [(q.text, list(q.solution)) for q in CHAIN.questions("worked") if q.solution]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return character_tokenizer(VOCABULARY, 512)


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    path = tmp_path_factory.mktemp("reasoner")
    save_random_reasoner(ModelConfig(hidden_size=32, layers=2, heads=1, intermediate_size=64), VOCABULARY, 0, path)
    return Qwen2ForCausalLM.from_pretrained(path)


@pytest.fixture(scope="module")
def verifier(reasoner: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    path = tmp_path_factory.mktemp("verifier")
    reasoner.save_pretrained(path)
    torch.manual_seed(0)
    return Qwen2ForTokenClassification.from_pretrained(path, num_labels=1).eval()


def trajectory(index: int) -> dict[str, Any]:
    question, steps = SOLVED[index]
    return {"trajectory_id": f"t{index}", "question": question, "steps": steps, "truncated": False}


def pair(index: int, *, rejected: bool = True) -> dict[str, Any]:
    """Every second rejected solution is shorter than the chosen one."""
    question, steps = SOLVED[index]
    wrong = [*steps[: -1 - index % 2], "1+1=9\n"] if rejected else None
    return {"question": question, "chosen_id": "c", "chosen": steps, "rejected_id": None, "rejected": wrong}


def examples(objective: Objective, tokenizer: PreTrainedTokenizerBase, records: list[dict[str, Any]]) -> list[Example]:
    return [objective.example(record, CHAIN.prompt, tokenizer) for record in records]


def masked_lm_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, solved: list[tuple[str, list[str]]]
) -> Any:
    """transformers' own loss of the responses, on a batch made here from text."""
    rows = []
    for question, steps in solved:
        prompt = tokenizer.encode(question + "\n")
        response = [*tokenizer.encode("".join(steps)), tokenizer.eos_token_id]
        rows.append((prompt + response, [-100] * len(prompt) + response))
    width = max(len(ids) for ids, _ in rows)
    return model(
        input_ids=torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows]),
        attention_mask=torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        labels=torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
    ).loss


def trl_trainer() -> Any:
    """As much of an ORPOTrainer as its loss methods read."""
    trainer = object.__new__(ORPOTrainer)
    vars(trainer).update(beta=BETA, is_encoder_decoder=False, aux_loss_enabled=False, padding_value=0)
    trainer.accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value)
    return trainer


def trl_batch(pairs: list[Example]) -> dict[str, torch.Tensor]:
    batch = {}
    for side, index in (("chosen", 0), ("rejected", 1)):
        rows = collate([Example("", (pair.rows[index],), {}) for pair in pairs], 0)
        lengths = torch.tensor([len(pair.rows[index].ids) for pair in pairs])
        batch[f"{side}_input_ids"], batch[f"{side}_labels"] = rows.ids, rows.labels
        batch[f"{side}_attention_mask"] = (torch.arange(rows.ids.shape[1]) < lengths[:, None]).long()
    return batch


def test_sft_is_the_masked_causal_lm_loss(reasoner: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    made = examples(SFT(), tokenizer, [trajectory(i) for i in range(8)])
    loss = SFT().terms(reasoner, collate(made, 0))["nll"] / sum(e.counts["nll"] for e in made)
    assert loss.item() == pytest.approx(masked_lm_loss(reasoner, tokenizer, SOLVED).item(), abs=1e-5)


def test_the_head_gets_what_torch_multiplies_without_copies_of_its_weights(
    reasoner: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    batch, given = collate(examples(SFT(), tokenizer, [trajectory(i) for i in range(8)]), 0), list[torch.Tensor]()
    hook = reasoner.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    SFT().terms(reasoner, batch)
    hook.remove()
    assert [x.shape[:2] for x in given] == [(8, batch.ids.shape[1] - batch.first)]
    assert all(x.is_contiguous() for x in given)


def test_sft_learns_no_end_from_a_solution_that_was_cut_off(tokenizer: PreTrainedTokenizerBase) -> None:
    whole, cut = examples(SFT(), tokenizer, [trajectory(0), {**trajectory(0), "truncated": True}])
    assert whole.rows[0].ids == [*cut.rows[0].ids, tokenizer.eos_token_id]


def test_orpo_is_trl_s(reasoner: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The odds-ratio term and the mean log-probabilities; the likelihood term is transformers'."""
    made = examples(ORPO(BETA), tokenizer, [pair(i) for i in range(8)])
    batch = collate(made, 0)
    terms = ORPO(BETA).terms(reasoner, batch)
    trainer = trl_trainer()
    chosen, rejected, *_ = trainer.concatenated_forward(reasoner, trl_batch(made))
    log_probs = mean_log_probs(*response_nll(reasoner, batch), rows=16)
    torch.testing.assert_close(log_probs[0::2], chosen, atol=1e-5, rtol=0)
    torch.testing.assert_close(log_probs[1::2], rejected, atol=1e-5, rtol=0)
    oracle = trainer.odds_ratio_loss(chosen, rejected)[0]
    assert terms["odds_ratio"].item() * BETA == pytest.approx(-oracle.sum().item(), abs=1e-5)
    torch.testing.assert_close(odds_ratio_loss(chosen, rejected) * BETA, -oracle, atol=1e-6, rtol=0)
    nll = terms["nll"].item() / sum(e.counts["nll"] for e in made)
    assert nll == pytest.approx(masked_lm_loss(reasoner, tokenizer, SOLVED).item(), abs=1e-5)


def test_orpo_s_total_is_trl_s_without_the_prompt_mask(
    reasoner: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """TRL's likelihood term includes the prompt, and so do its mean log-probabilities where no label is masked."""
    masked = examples(ORPO(BETA), tokenizer, [pair(i) for i in range(8)])
    made = [Example(e.id, tuple(Row(r.ids, [IGNORE, *r.ids[1:]]) for r in e.rows), {}) for e in masked]
    terms = ORPO(BETA).terms(reasoner, collate(made, 0))
    total = terms["nll"] / sum(len(e.rows[0].ids) - 1 for e in made) + BETA * terms["odds_ratio"] / len(made)
    oracle, _ = trl_trainer().get_batch_loss_metrics(reasoner, trl_batch(made))
    assert total.item() == pytest.approx(oracle.item(), abs=1e-5)


def test_a_solution_without_a_rejected_one_has_the_likelihood_term_alone(
    reasoner: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with_pair, alone = examples(ORPO(BETA), tokenizer, [pair(0), pair(1, rejected=False)])
    assert (with_pair.counts["odds_ratio"], alone.counts["odds_ratio"]) == (1, 0)
    apart = [ORPO(BETA).terms(reasoner, collate([example], 0)) for example in (with_pair, alone)]
    both = ORPO(BETA).terms(reasoner, collate([alone, with_pair], 0))
    assert both["odds_ratio"].item() == pytest.approx(apart[0]["odds_ratio"].item(), abs=1e-5)
    assert apart[1]["odds_ratio"].item() == 0
    assert both["nll"].item() == pytest.approx(apart[0]["nll"].item() + apart[1]["nll"].item(), abs=1e-4)


def test_the_odds_ratio_of_a_certain_solution_is_finite_and_so_is_its_gradient() -> None:
    chosen = torch.tensor([0.0, -1e-9, -50.0], requires_grad=True)
    loss = odds_ratio_loss(chosen, torch.tensor([-1.0, 0.0, -60.0]))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert chosen.grad is not None
    assert chosen.grad.isfinite().all()


def test_prm_is_the_mean_squared_error_one_trajectory_at_a_time(
    verifier: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    records, errors = [], []
    for i in range(8):
        record = trajectory(i)
        labels = [int(j < i % 4) for j in range(len(record["steps"]))]
        records.append({**record, "step_labels": labels})
        encoded = encode(tokenizer, CHAIN.prompt(record["question"]), record["steps"])
        logits = verifier(torch.tensor([encoded.ids])).logits[0, :, 0]
        scores = torch.sigmoid(logits[encoded.step_ends])
        errors.append(F.mse_loss(scores, torch.tensor(labels, dtype=torch.float), reduction="none"))
    made = examples(PRM(), tokenizer, records)
    loss = PRM().terms(verifier, collate(made, 0))["mse"] / sum(e.counts["mse"] for e in made)
    assert loss.item() == pytest.approx(torch.cat(errors).mean().item(), abs=1e-5)


def test_a_masked_step_is_left_out(verifier: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    steps = trajectory(0)["steps"]
    labels = [1] + [0] * (len(steps) - 1)
    (whole,) = examples(PRM(), tokenizer, [{**trajectory(0), "step_labels": labels}])
    (masked,) = examples(PRM(), tokenizer, [{**trajectory(0), "step_labels": [1, -1, *labels[2:]]}])
    assert masked.counts["mse"] == whole.counts["mse"] - 1
    encoded = encode(tokenizer, CHAIN.prompt(SOLVED[0][0]), steps)
    score = torch.sigmoid(verifier(torch.tensor([encoded.ids])).logits[0, encoded.step_ends[1], 0])
    losses = [PRM().terms(verifier, collate([example], 0))["mse"].item() for example in (whole, masked)]
    assert losses[0] - losses[1] == pytest.approx(score.item() ** 2, abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "message"), [([1], "step_labels has 1 entries for"), ([2] * 8, "step_labels holds 2")]
)
def test_labels_that_fit_no_steps_are_refused(
    tokenizer: PreTrainedTokenizerBase, labels: list[int], message: str
) -> None:
    record = trajectory(0)
    record["steps"] = (record["steps"] * 2)[:8]
    with pytest.raises(ValueError, match=message):
        examples(PRM(), tokenizer, [{**record, "step_labels": labels}])


def test_padding_does_not_change_a_loss(reasoner: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    (example,) = examples(SFT(), tokenizer, [trajectory(0)])
    batch = collate([example], 0)
    padded = Batch(F.pad(batch.ids, (0, 9)), F.pad(batch.labels, (0, 9), value=IGNORE), batch.number, batch.first)
    losses = [SFT().terms(reasoner, b)["nll"].item() for b in (batch, padded)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_an_unknown_objective_or_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match="objective is 'dpo'; it must be one of sft, prm, orpo"):
        make_objective("dpo", {})
    with pytest.raises(ValueError, match="'sft' does not take the parameters"):
        make_objective("sft", {"beta": 0.1})

"""Algorithm 1: self-adaptive process optimization (SAPO, arXiv 2601.20312), as one reads it."""

from __future__ import annotations

from actors.run import Run


def sapo(run: Run) -> None:
    """Self-evolve a reasoner M and its verifier V for `rounds` rounds. Leaves reasoner-i, verifier-i and summary.json.

    Without `verify` (the paper's "w/o RM") there is no V: nothing is labelled, and pairs go by result alone.
    """
    verify = run.config.verify
    run.originals()
    run.finetune()  # M_0 = SFT(M, D_org)
    run.sample_validation()
    run.sample_and_label(0)  # S_0 = Sample(M_0), L_0 = Omega(M_0, subset of S_0)
    if verify:
        run.train_verifier(0)  # V_0 = PRM(init M_0, L_0)
    run.evaluate(0)

    for i in range(1, run.config.rounds + 1):
        run.sample_and_label(i)  # S_i = Sample(M_{i-1}), L_i = SAPS(V_{i-1}, M_{i-1}, subset of S_i)
        if verify:
            run.train_verifier(i)  # V_i = PRM(init M_{i-1}, L_i)
        run.make_pairs(i)  # P_i = pairs from Score(V_i, D_i), D_i = S_i ∪ D_{i-1}
        run.align(i)  # M_i = ORPO(init, P_i)
        run.evaluate(i)

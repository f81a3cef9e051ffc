"""Hybrid LLM: labels, heads, curves, thresholds, the command, and the rules that go by its scores."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

import jaxroute
from jaxroute.banks.bank import BankConfig, NoWorse, build_bank
from jaxroute.banks.tables import Table, split_of_rows, write_table
from jaxroute.commands import predict as command_line
from jaxroute.env.environment import _request
from jaxroute.errors import UserError
from jaxroute.predictors.hybrid import (
    GAP,
    SCORES,
    by_text,
    choose_threshold,
    curve,
    fit_head,
    graded,
    judge_pairs,
    labels_of,
    mean_quality,
    predict_no_worse,
    relaxation,
    share_no_worse,
)

LLMS = ["small-2b", "medium-7b", "large-27b"]
NAN = np.nan


def planted(rows=360, answers=1, seed=0):
    """Prompts of which half are hard: the large LLM is good at both, the small one at those that are not."""
    rng = np.random.default_rng(seed)
    hard = rng.integers(0, 2, rows)
    words = ["apple", "river", "stone", "cloud", "green", "seven"]
    prompts = [f"{'prove' if hard[row] else 'name'} {' '.join(rng.choice(words, 6))} {row}" for row in range(rows)]
    right = np.stack([0.9 - 0.7 * hard, 0.9 - 0.4 * hard, np.full(rows, 0.9)], axis=1)
    return prompts, (rng.random((rows, answers, 3)) < right[:, None]).astype(float), hard


# --- labels ------------------------------------------------------------------------------------------------------


def test_labels_of_several_answers():
    small, large = np.array([[0.2, 0.8], [0.5, NAN], [NAN, NAN]]), np.array([[0.5, 0.6], [0.9, 0.5], [1.0, 1.0]])
    labels = labels_of(small, large, 0.3)
    # First answers: 0.2 against 0.5, 0.5 against 0.9.
    np.testing.assert_array_equal(labels["det"], [0, 0, NAN])
    # 0.8 is no worse than either, 0.2 than neither; 0.5 than one of two.
    np.testing.assert_array_equal(labels["prob"], [0.5, 0.5, NAN])
    # With 0.3 forgiven, 0.2 reaches 0.5, and not 0.6.
    np.testing.assert_array_equal(labels["trans"], [0.75, 0.5, NAN])
    np.testing.assert_array_equal(mean_quality(small), [0.5, 0.5, NAN])


def test_relaxation_maximises_the_mean_difference_of_labels():
    # The small LLM is always worse, by 0.1 for half of the prompts and by 0.4 for the others: 0.1 to 0.39 tell them
    # apart, and the least of them is taken.
    large = np.full((8, 1), 0.9)
    small = large - np.repeat([0.1, 0.4], 4)[:, None]
    assert relaxation(small, large) == pytest.approx(0.1)
    rng = np.random.default_rng(0)
    small, large = rng.random((30, 4)), 0.3 + rng.random((30, 4))

    def spread(t):
        labels = share_no_worse(small, large, t)
        return np.abs(labels[:, None] - labels).mean()

    best = relaxation(small, large)
    assert spread(best) > spread(0)
    assert spread(best) == pytest.approx(max(spread(t) for t in np.linspace(0, 1, 101)))


def test_right_or_wrong_makes_trans_equal_prob_and_one_answer_det_too():
    rng = np.random.default_rng(0)
    for answers in (1, 5):
        small, large = (rng.random((2, 200, answers)) < np.array([0.3, 0.7])[:, None, None]).astype(float)
        t = relaxation(small, large)
        labels = labels_of(small, large, t)
        assert t == 0
        np.testing.assert_array_equal(labels["trans"], labels["prob"])
        for forgiven in (0.01, 0.5, 0.99):
            np.testing.assert_array_equal(share_no_worse(small, large, forgiven), labels["prob"])
        assert np.array_equal(labels["det"], labels["prob"]) == (answers == 1)


def test_rows_of_one_text_are_answers_to_one_prompt():
    quality = np.array([[1.0], [0.0], [0.5], [0.25]])
    texts, answers, prompt = by_text(["b", "a", "b", "b"], quality)
    assert texts == ["b", "a"]
    np.testing.assert_array_equal(answers[:, :, 0], [[1, 0.5, 0.25], [0, NAN, NAN]])
    assert prompt.tolist() == [0, 1, 0, 0]


def test_brevity_grades_right_and_wrong_answers():
    found = graded(np.array([[1.0, 1.0, 0.0, NAN]]), np.array([[500.0, 2000.0, 250.0, 10.0]]), 0.2)
    np.testing.assert_allclose(found, [[0.8 + 0.1, 0.8, 0.15, NAN]])


# --- heads and curves ----------------------------------------------------------------------------------------------


def test_a_head_is_at_the_optimum_of_the_penalised_cross_entropy():
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((80, 5))
    labels = rng.random(80)
    labels[:5] = NAN
    head = fit_head(csr_matrix(inputs), labels)
    error = (head(csr_matrix(inputs)) - labels)[5:]
    np.testing.assert_allclose(error @ inputs[5:] + 3.0 * head.weights, 0, atol=1e-2)
    assert error.sum() == pytest.approx(0, abs=1e-2)


def test_curves_by_hand():
    small, large = np.array([0.5, 1.0, 0.0, 0.5]), np.array([1.0, 1.0, 1.0, 1.0])
    found = curve(np.array([0.7, 0.9, 0.1, 0.3]), small, large)
    np.testing.assert_allclose(found.cost_advantage, [0, 25, 50, 75, 100])
    np.testing.assert_allclose(found.quality_drop, [0, 0, 12.5, 25, 50])
    assert found.drop_at(60) == pytest.approx(17.5)
    # A score that says nothing costs in proportion, as chance does.
    same = curve(np.zeros(4), small, large)
    assert same.drop_at(30) == pytest.approx(15)
    assert same.mean_drop == pytest.approx(25)


def test_the_threshold_saves_most_within_the_drop():
    score = np.array([0.9, 0.8, 0.7, 0.2])
    quality = np.stack([[1.0, 0.96, 0.9, 1.0], np.ones(4)], axis=1)
    cost = np.array([0.0, 1.0])
    both = np.stack([score, np.ones(4)], axis=1)
    assert 0.7 < choose_threshold(both, quality, cost, 1) < 0.8
    # With 4 % to lose, all go to the small one; with nothing, only the first.
    assert choose_threshold(both, quality, cost, 1, 4.0) < 0.2
    assert 0.8 < choose_threshold(both, quality, cost, 1, 0.0) < 0.9
    quality[:, 0] = 0
    assert choose_threshold(both, quality, cost, 1) == np.inf


def test_of_many_the_cheapest_good_enough_counts():
    no_worse = np.array([[0.9, 0.9, 1.0], [0.4, 0.9, 1.0], [0.4, 0.4, 1.0]])
    quality = np.array([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    assert 0.4 < choose_threshold(no_worse, quality, np.array([1.0, 2.0, 3.0]), 2) < 0.9


def test_heads_beat_chance_and_the_oracle_is_best():
    prompts, answers, _ = planted()
    ((judged, second),) = judge_pairs(prompts, answers, [(0, 2)], splits=2)
    random = judged.curves["prob"].drop_at(100) / 2
    assert judged.curves["oracle"].mean_drop < judged.curves["prob"].mean_drop < random - 5
    assert judged.curves[GAP].mean_drop < random - 5
    assert set(judged.chosen) == {*SCORES, GAP}
    # One answer, right or wrong: one score.
    for name in ("det", "trans"):
        np.testing.assert_array_equal(judged.curves[name].quality_drop, judged.curves["prob"].quality_drop)
    assert judged.t == 0
    assert not np.array_equal(second.curves["prob"].quality_drop, judged.curves["prob"].quality_drop)


def test_several_answers_make_better_labels():
    prompts, answers, hard = planted(answers=8, seed=2)
    scores, t = predict_no_worse(prompts, answers, np.arange(len(prompts)) % 2 == 0, 2)
    assert t.tolist() == [0, 0, 0]
    # Nothing but being hard matters: what else a score varies with is noise of its labels.
    order = {name: -np.corrcoef(scores[name][:, 0], hard)[0, 1] for name in SCORES}
    assert order["prob"] > order["det"] + 0.05
    np.testing.assert_array_equal(scores["trans"], scores["prob"])
    np.testing.assert_array_equal(scores["prob"][:, 2], 1)


def test_no_score_depends_on_the_answers_to_its_own_prompt():
    prompts, answers, _ = planted(rows=200)
    in_train = np.arange(200) < 100
    answers[7, :, 2] = 1  # so that the small LLM's answer decides
    before, _ = predict_no_worse(prompts, answers, in_train, 2)
    changed = answers.copy()
    changed[7, :, 0] = 1 - changed[7, :, 0]
    after, _ = predict_no_worse(prompts, changed, in_train, 2)
    np.testing.assert_array_equal(after["prob"][7], before["prob"][7])
    assert (after["prob"][100:] != before["prob"][100:]).any()
    changed = answers.copy()
    changed[100:] = 1 - changed[100:]
    np.testing.assert_array_equal(predict_no_worse(prompts, changed, in_train, 2)[0]["prob"], before["prob"])


# --- the command ---------------------------------------------------------------------------------------------------


def run(capsys, *argv):
    """Exit code of the command line and what it printed on both streams."""
    code = command_line.main(["hybrid", *(str(argument) for argument in argv)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def folder(tmp_path):
    prompts, answers, _ = planted(rows=440)
    queries = pd.DataFrame({"prompt": prompts, "prompt_tokens": 20})
    tokens = np.random.default_rng(1).integers(50, 900, (440, 3)).astype(float)
    write_table(Table(queries, answers[:, 0], tokens, LLMS), tmp_path / "bank")
    return tmp_path / "bank"


def test_a_pair_from_the_command_line(folder, tmp_path, capsys):
    out_folder = tmp_path / "out"
    code, out, _ = run(
        capsys, folder, "--small", LLMS[0], "--large", LLMS[2], "--out", out_folder, "--splits", 2
    )  # fmt: skip
    assert code == 0
    assert "trans equals prob. With one answer to each prompt, det is the same score too." in out
    assert f"bank.hybrid={out_folder}" in out
    written = {path.name for path in out_folder.iterdir()}
    assert written == {"hybrid.json", "hybrid.png", *(f"no_worse_{name}.parquet" for name in SCORES)}
    figures = json.loads((out_folder / "hybrid.json").read_text())["pairs"]["small-2b | large-27b"]
    drops = {name: figures["scores"][name]["mean_drop"]["mean"] for name in figures["scores"]}
    assert drops["oracle"] < drops["prob"] < drops["random"]
    assert drops["prob"] == drops["trans"] == drops["det"]
    assert figures["all_small_drop"]["mean"] == pytest.approx(2 * drops["random"])
    no_worse = pd.read_parquet(out_folder / "no_worse_prob.parquet")
    assert list(no_worse.columns) == [LLMS[0], LLMS[2]]
    assert len(no_worse) == 440


def test_every_pair_of_a_graded_bank(folder, tmp_path, capsys):
    code, out, _ = run(capsys, folder, "--out", tmp_path / "out", "--splits", 1, "--brevity", 0.2)
    assert code == 0
    assert "trans equals prob" not in out
    assert "One answer to each prompt: det equals prob." in out
    figures = json.loads((tmp_path / "out" / "hybrid.json").read_text())["pairs"]
    assert list(figures) == ["small-2b | medium-7b", "small-2b | large-27b", "medium-7b | large-27b"]
    # No single large LLM: no scores for rules.
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"hybrid.json", "hybrid.png"}
    for measured in figures.values():
        assert measured["scores"]["prob"]["mean_drop"]["ci95"] is None  # of one split


def test_a_bank_with_scores(folder, tmp_path, capsys):
    scores = tmp_path / "scores"
    assert run(capsys, folder, "--large", LLMS[2], "--out", scores, "--splits", 1)[0] == 0
    predictions = tmp_path / "predictions"
    predictions.mkdir()
    for name, value in (("quality", 0.5), ("output_tokens", 200.0)):
        pd.DataFrame({llm: [value] * 440 for llm in LLMS}).to_parquet(predictions / f"predicted_{name}.parquet")
    pd.DataFrame({llm: [0.3] for llm in LLMS}).to_parquet(predictions / "log_length_error.parquet")
    where = {"folder": str(folder), "predictions": str(predictions), "hybrid": str(scores)}
    config = BankConfig(kind="table", num_prompts=None, split="test", **where)
    seen = build_bank(config, [LLMS[2], LLMS[0]])
    assert NoWorse._fields == SCORES
    for name in SCORES:
        table = pd.read_parquet(scores / f"no_worse_{name}.parquet")[[LLMS[2], LLMS[0]]].to_numpy()
        np.testing.assert_allclose(getattr(seen.no_worse, name), table[~split_of_rows(440)], rtol=1e-6)
    assert build_bank(replace(config, hybrid=None), LLMS[:1]).no_worse is None

    pd.DataFrame({name: [0.5] for name in LLMS}).to_parquet(scores / "no_worse_prob.parquet")
    with pytest.raises(UserError, match="has 1 rows where the bank has 440: run python -m jaxroute predict hybrid"):
        build_bank(config, LLMS)
    (scores / "no_worse_det.parquet").unlink()
    with pytest.raises(UserError, match=r"no_worse_det\.parquet does not exist: set bank\.hybrid to a folder"):
        build_bank(config, LLMS)
    with pytest.raises(UserError, match=r"bank\.hybrid does not fit bank\.kind='embedded'"):
        BankConfig(hybrid=str(scores))


def test_a_router_sees_the_scores_of_the_arriving_prompt():
    env, params = jaxroute.make("edge-poisson", site="edge3", overrides=("bank.num_prompts=200",))
    rng = np.random.default_rng(0)
    no_worse = NoWorse(*(np.float32(rng.random((200, 3))) for _ in SCORES))
    params = params._replace(bank=params.bank._replace(no_worse=no_worse))
    request = _request(0, jnp.int32(7), params.limits, jnp.float32(0), jnp.float32(0), params, None)
    for seen, scores in zip(request.described().no_worse, no_worse, strict=True):
        np.testing.assert_array_equal(seen, scores[7])
    obs, _ = jax.eval_shape(env.reset, jax.random.key(0), params)
    assert [score.shape for score in obs.candidates.no_worse] == [(3,)] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--small", "small-3b"], "has no LLM 'small-3b' (did you mean small-2b?)"),
        (["--small", "small-2b", "--large", "small-2b"], "--small and --large are both small-2b: name two LLMs"),
        (["--brevity", "1.5"], "--brevity=1.5 must be at least 0 and below 1"),
        (["--splits", "0"], "--splits=0 is too few"),
        (["--seed", "-1"], "--seed=-1 is negative"),
        (["--models", "small-2b"], "has no other LLM than small-2b; a pair needs two"),
    ],
)
def test_mistakes(folder, tmp_path, capsys, arguments, message):
    code, _, err = run(capsys, folder, "--out", tmp_path / "out", *arguments)
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()


def test_too_few_answers(folder, tmp_path, capsys):
    quality = pd.read_parquet(folder / "quality.parquet")
    quality.loc[100:, "medium-7b"] = np.nan
    quality.to_parquet(folder / "quality.parquet")
    code, _, err = run(capsys, folder, "--out", tmp_path / "out")
    assert code == 2
    assert "LLM 'medium-7b' has answers to 100 prompts, and at least 200 are needed" in err

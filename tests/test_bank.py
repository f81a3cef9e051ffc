"""Request banks: what they hold, how good and how honest their predictions are, and what bad input says."""

import functools
import logging
import sys
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from jaxroute.banks.bank import BankConfig, build_bank
from jaxroute.banks.generated import DomainFigures, LLMFigures
from jaxroute.banks.noise import NoiseConfig
from jaxroute.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
SITES = ("edge3", "edge6", "edge16")
BANKS = ("embedded", "zeroeval", "mmlu_pro")

# ZeroEval: accuracy and mean tokens of each LLM.
ZEROEVAL = {
    "gemma-2-2b-it": (0.321, 328),
    "Qwen2-7B-Instruct": (0.545, 221),
    "Yi-1.5-9B-Chat": (0.535, 312),
    "Meta-Llama-3.1-8B-Instruct": (0.558, 459),
    "gemma-2-9b-it": (0.585, 211),
    "gemma-2-27b-it": (0.648, 197),
}
POOL = list(ZEROEVAL)


@functools.cache
def load(name):
    return OmegaConf.merge(OmegaConf.structured(BankConfig), OmegaConf.load(CONFIGS / "bank" / f"{name}.yaml"))


def configured(name, **overrides):
    """A configuration file of the bank group with some values replaced, as Hydra would build it."""
    return OmegaConf.to_object(OmegaConf.merge(load(name), overrides))


def site_models(name):
    return [expert.model for expert in OmegaConf.load(CONFIGS / "site" / f"{name}.yaml").experts]


@pytest.fixture(scope="module")
def embedded():
    return build_bank(configured("embedded"), POOL)


@pytest.fixture(scope="module")
def embedded_test():
    return build_bank(configured("embedded", split="test"), POOL)


def auc(right, score):
    """Share of (right, wrong) pairs that the score orders correctly, ties counted half."""
    right = np.asarray(right).ravel() > 0.5
    _, rank, count = np.unique(np.asarray(score).ravel(), return_inverse=True, return_counts=True)
    middle = np.cumsum(count) - (count - 1) / 2
    positives = right.sum()
    above = middle[rank][right].sum() - positives * (positives + 1) / 2
    return above / positives / (~right).sum()


def r2(truth, prediction):
    return 1 - ((truth - prediction) ** 2).mean() / truth.var()


def log_lengths(bank):
    return np.log(np.asarray(bank.output_tokens)), np.log(np.asarray(bank.predicted_output_tokens))


def routing_gain(bank):
    """Accuracy of always taking the LLM with the best predicted quality, less that of the best single LLM."""
    quality = np.asarray(bank.quality)
    chosen = np.asarray(bank.predicted_quality).argmax(axis=1)
    return quality[np.arange(len(quality)), chosen].mean() - quality.mean(axis=0).max()


def check_contract(bank, experts):
    prompts = bank.prompt_tokens.shape[0]
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(bank))
    assert bank.no_worse is None
    bank = jax.tree.map(np.asarray, bank)  # each operation on a new shape would be compiled
    for name in ("quality", "output_tokens", "predicted_quality", "predicted_output_tokens"):
        assert getattr(bank, name).shape == (prompts, experts)
        assert np.isfinite(getattr(bank, name)).all()
    assert bank.log_length_error.shape == (experts,)
    assert set(np.unique(bank.quality)) <= {0.0, 1.0}
    assert bank.prompt_tokens.min() >= 1
    assert bank.output_tokens.min() >= 1
    assert bank.predicted_quality.min() > 0
    assert bank.predicted_quality.max() < 1
    assert bank.predicted_output_tokens.min() > 0
    assert bank.log_length_error.min() > 0.1
    assert bank.log_length_error.max() < 2


# --- the generated bank ---------------------------------------------------------------------------------------


def test_contract(embedded):
    check_contract(embedded, len(POOL))
    assert embedded.output_tokens.max() <= 4096


def test_same_configuration_same_bank():
    first, again = (build_bank(configured("embedded", num_prompts=200), POOL) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_splits_are_different_draws_under_one_predictor(embedded, embedded_test):
    assert not np.array_equal(embedded.prompt_tokens, embedded_test.prompt_tokens)
    assert not np.array_equal(embedded.quality, embedded_test.quality)
    np.testing.assert_array_equal(embedded.log_length_error, embedded_test.log_length_error)


def test_seeds_differ():
    first, second = (build_bank(configured("embedded", seed=s, num_prompts=200), POOL) for s in (0, 1))
    assert not np.array_equal(first.quality, second.quality)


@pytest.mark.parametrize("split", ["embedded", "embedded_test"])
def test_accuracy_and_length_of_each_llm(split, request):
    bank = request.getfixturevalue(split)
    quality, output_tokens = np.asarray(bank.quality), np.asarray(bank.output_tokens)
    for column, (accuracy, tokens) in enumerate(ZEROEVAL.values()):
        assert quality[:, column].mean() == pytest.approx(accuracy, abs=0.03)
        assert output_tokens[:, column].mean() == pytest.approx(tokens, rel=0.12)


def test_pool_agrees_like_the_data(embedded, embedded_test):
    # ZeroEval, these six LLMs: oracle .773, mean pairwise correlation .534 (correctness) and .669 (log length),
    # correlation of the prompts' means of correctness and log length -.564. The latent model has one difficulty
    # per prompt; what LLMs of one family share beyond it is left out.
    quality = np.concatenate([embedded.quality, embedded_test.quality])
    log_length = np.log(np.concatenate([embedded.output_tokens, embedded_test.output_tokens]))
    pairs = np.triu_indices(len(POOL), 1)
    assert quality.max(axis=1).mean() == pytest.approx(0.773, abs=0.03)
    assert np.corrcoef(quality.T)[pairs].mean() == pytest.approx(0.534, abs=0.04)
    assert np.corrcoef(log_length.T)[pairs].mean() == pytest.approx(0.669, abs=0.05)
    means = np.corrcoef(quality.mean(axis=1), log_length.mean(axis=1))[0, 1]
    assert means == pytest.approx(-0.564, abs=0.04)


def test_an_llm_answers_the_same_in_every_pool():
    config = configured("embedded", num_prompts=300)
    pool, pair = build_bank(config, POOL), build_bank(config, [POOL[4], POOL[1]])
    np.testing.assert_array_equal(pair.prompt_tokens, pool.prompt_tokens)
    np.testing.assert_array_equal(pair.quality, np.asarray(pool.quality)[:, [4, 1]])
    np.testing.assert_array_equal(pair.output_tokens, np.asarray(pool.output_tokens)[:, [4, 1]])


def test_two_experts_with_one_llm_share_its_answers():
    config = configured("embedded", num_prompts=300, models={"tuned": "gemma-2-9b-it"})
    bank = build_bank(config, ["gemma-2-9b-it", "gemma-2-2b-it", "tuned"])
    for name in ("quality", "output_tokens", "predicted_quality", "predicted_output_tokens", "log_length_error"):
        values = np.asarray(getattr(bank, name))
        np.testing.assert_array_equal(values[..., 0], values[..., 2])


def test_one_llm_is_enough():
    bank = build_bank(configured("embedded", num_prompts=1000), ["gemma-2-9b-it"])
    check_contract(bank, 1)
    assert auc(bank.quality, bank.predicted_quality) == pytest.approx(0.826, abs=0.02)


# --- predictions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "tolerance"), [("embedded", 0.01), ("embedded_test", 0.02)])
def test_predictions_are_as_good_as_configured(split, tolerance, request):
    bank = request.getfixturevalue(split)
    assert auc(bank.quality, bank.predicted_quality) == pytest.approx(0.826, abs=tolerance)
    assert r2(*log_lengths(bank)) == pytest.approx(0.561, abs=tolerance)


@pytest.mark.parametrize("split", ["embedded", "embedded_test"])
def test_predicted_quality_is_calibrated(split, request):
    bank = request.getfixturevalue(split)
    predicted, quality = np.asarray(bank.predicted_quality), np.asarray(bank.quality)
    for decile in np.array_split(np.argsort(predicted, axis=None), 10):
        assert predicted.ravel()[decile].mean() == pytest.approx(quality.ravel()[decile].mean(), abs=0.04)
    np.testing.assert_allclose(predicted.mean(axis=0), quality.mean(axis=0), atol=0.025)


def test_predicted_length_is_unbiased_and_knows_its_error(embedded):
    truth, predicted = log_lengths(embedded)
    np.testing.assert_allclose((truth - predicted).mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose((truth - predicted).std(axis=0), embedded.log_length_error, rtol=1e-3)


def test_predictions_hardly_tell_which_llm_is_right(embedded, embedded_test):
    # A TF-IDF ridge router gains nothing on these prompts over the best single LLM; the oracle gains .125.
    for bank in (embedded, embedded_test):
        assert -0.01 < routing_gain(bank) < 0.015


def test_predicted_length_adds_nothing_to_predicted_quality(embedded):
    """The router may see both; together they must not beat the configured AUC."""
    quality, predicted = np.asarray(embedded.quality), np.asarray(embedded.predicted_quality)
    log_length = log_lengths(embedded)[1]
    combined = np.empty_like(predicted)
    for column in range(len(POOL)):
        logit = np.log(predicted[:, column] / (1 - predicted[:, column]))
        features = np.column_stack([np.ones_like(logit), logit, predicted[:, column], log_length])
        weights = np.linalg.lstsq(features, quality[:, column], rcond=None)[0]
        combined[:, column] = features @ weights
    assert auc(quality, combined) < auc(quality, predicted) + 0.01


def test_predictor_figures_are_obeyed():
    strong = NoiseConfig(quality_auc=0.9, quality_own_r2=0.2, length_r2=0.6, length_own_r2=0.2)
    config = configured("embedded", num_prompts=2000)
    config.noise = strong
    bank = build_bank(config, POOL)
    assert auc(bank.quality, bank.predicted_quality) == pytest.approx(0.9, abs=0.01)
    assert r2(*log_lengths(bank)) == pytest.approx(0.6, abs=0.01)
    assert routing_gain(bank) > 0.02


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"quality_auc": 0.51}, r"quality_auc=0.51 is out of reach.*between 0\.7.* and 0\.9"),
        ({"quality_auc": 0.995}, r"quality_auc=0.995 is out of reach.*change bank.noise.quality_own_r2"),
        ({"length_r2": 0.99}, r"length_r2=0.99 is out of reach.*choose a value between"),
    ],
)
def test_figures_out_of_reach(figures, message):
    with pytest.raises(UserError, match=message):
        build_bank(configured("embedded", num_prompts=300, noise=figures), POOL)


# --- published tables -----------------------------------------------------------------------------------------


def write_tables(folder, rows=400, missing=0):
    """Tables in the published format: three LLMs of different ability on prompts of different difficulty."""
    rng = np.random.default_rng(0)
    difficulty = rng.standard_normal((rows, 1))
    correct = (rng.standard_normal((rows, 3)) + np.array([-0.5, 0.2, 0.5]) > difficulty).astype(np.uint8)
    tokens = np.rint(np.exp(5 + 0.5 * difficulty + 0.3 * rng.standard_normal((rows, 3)))).astype(np.uint16)
    correct[5, 0], tokens[7, 0], correct[9, 1] = 2, 0, 2
    correct[rows - missing :, 2], tokens[rows - missing :, 2] = 255, 65535
    names = ["small-2b", "medium-7b", "large-27b"]
    folder.mkdir(parents=True)
    ids = pd.Series(np.arange(rows), name="id")
    prompts = pd.DataFrame({"prompt_tokens": np.arange(rows) + 20})
    pd.concat([ids, prompts], axis=1).to_parquet(folder / "queries.parquet")
    pd.concat([ids, pd.DataFrame(correct, columns=names)], axis=1).to_parquet(folder / "correct.parquet")
    pd.concat([ids, pd.DataFrame(tokens, columns=names)], axis=1).to_parquet(folder / "out_tokens.parquet")
    return prompts["prompt_tokens"].to_numpy(), correct, tokens


def table_config(**overrides):
    return BankConfig(
        **{
            "kind": "zeroeval",
            "num_prompts": None,
            "split": "all",
            "models": {"a": "small-2b", "b": "medium-7b", "c": "large-27b"},
            **overrides,
        }
    )


def test_tables_are_read_as_they_are(tmp_path):
    prompts, correct, tokens = write_tables(tmp_path / "zeroeval")
    bank = build_bank(table_config(), ["c", "a"], tmp_path)
    check_contract(bank, 2)
    np.testing.assert_array_equal(bank.prompt_tokens, prompts)
    np.testing.assert_array_equal(bank.quality, (correct == 1)[:, [2, 0]])  # 2, no answer, counts as wrong
    np.testing.assert_array_equal(bank.output_tokens, np.maximum(tokens[:, [2, 0]], 1))


def test_table_halves_are_disjoint_and_do_not_depend_on_the_seed(tmp_path):
    prompts, _, _ = write_tables(tmp_path / "zeroeval")

    def rows(**overrides):
        return set(np.asarray(build_bank(table_config(**overrides), ["a", "b"], tmp_path).prompt_tokens))

    train, test = rows(split="train"), rows(split="test", seed=3)
    assert train | test == set(prompts)
    assert not train & test
    some = rows(split="test", seed=4, num_prompts=100)
    assert len(some) == 100
    assert some < test


def test_rows_with_missing_cells_are_dropped_and_counted(tmp_path, caplog):
    prompts, _, _ = write_tables(tmp_path / "zeroeval", missing=150)
    with caplog.at_level(logging.WARNING):
        bank = build_bank(table_config(), ["a", "c"], tmp_path)
    np.testing.assert_array_equal(bank.prompt_tokens, prompts[:250])
    assert "dropped 150 of 400 rows" in caplog.text
    caplog.clear()
    assert len(build_bank(table_config(), ["a", "b"], tmp_path).quality) == 400
    assert "dropped" not in caplog.text


def test_too_few_complete_rows(tmp_path):
    write_tables(tmp_path / "zeroeval", missing=320)
    with pytest.raises(UserError, match=r"80 rows complete for small-2b, large-27b; at least 100.*bank\.models"):
        build_bank(table_config(), ["a", "c"], tmp_path)


def test_more_prompts_than_rows(tmp_path):
    write_tables(tmp_path / "zeroeval")
    with pytest.raises(UserError, match=r"num_prompts=300 is more than the 200 complete rows of .*'train'"):
        build_bank(table_config(num_prompts=300, split="train"), ["a", "b"], tmp_path)


def test_unknown_column_names_the_close_ones(tmp_path):
    write_tables(tmp_path / "zeroeval")
    with pytest.raises(UserError, match=r"no column 'Large-27B-it' \(did you mean large-27b.*bank\.models"):
        build_bank(table_config(), ["a", "Large-27B-it"], tmp_path)


def test_no_data_folder():
    with pytest.raises(UserError, match="set JAXROUTE_DATA or data_dir"):
        build_bank(table_config(), ["a"], None)


def test_missing_tables(tmp_path):
    with pytest.raises(UserError, match=r"queries\.parquet does not exist: set JAXROUTE_DATA or data_dir"):
        build_bank(table_config(), ["a"], tmp_path)


def test_unreadable_table(tmp_path):
    write_tables(tmp_path / "zeroeval")
    (tmp_path / "zeroeval" / "correct.parquet").write_text("version https://git-lfs.example/spec/v1")
    with pytest.raises(UserError, match=r"correct\.parquet is not a readable Parquet file.*fetch it again"):
        build_bank(table_config(), ["a"], tmp_path)


def test_tables_that_do_not_belong_together(tmp_path):
    write_tables(tmp_path / "zeroeval")
    path = tmp_path / "zeroeval" / "out_tokens.parquet"
    pd.read_parquet(path).iloc[:-1].to_parquet(path)
    with pytest.raises(UserError, match=r"out_tokens\.parquet has 399 rows where queries\.parquet has 400"):
        build_bank(table_config(), ["a"], tmp_path)


def test_unknown_codes(tmp_path):
    write_tables(tmp_path / "zeroeval")
    path = tmp_path / "zeroeval" / "correct.parquet"
    table = pd.read_parquet(path)
    table.loc[3, "small-2b"] = 7
    table.to_parquet(path)
    with pytest.raises(UserError, match="codes other than 0 wrong, 1 right"):
        build_bank(table_config(), ["a"], tmp_path)


def test_prompt_tokens_missing(tmp_path):
    write_tables(tmp_path / "zeroeval")
    path = tmp_path / "zeroeval" / "queries.parquet"
    pd.read_parquet(path).drop(columns="prompt_tokens").to_parquet(path)
    with pytest.raises(UserError, match=r"queries\.parquet has no column 'prompt_tokens'"):
        build_bank(table_config(), ["a"], tmp_path)


def test_outcomes_that_never_vary(tmp_path):
    write_tables(tmp_path / "zeroeval")
    path = tmp_path / "zeroeval" / "correct.parquet"
    table = pd.read_parquet(path)
    table["small-2b"] = np.uint8(1)
    table.to_parquet(path)
    with pytest.raises(UserError, match="always right or always wrong"):
        build_bank(table_config(), ["a"], tmp_path)


@pytest.mark.parametrize("package", ["pandas", "pyarrow"])
def test_missing_package_names_the_extra(tmp_path, monkeypatch, package):
    write_tables(tmp_path / "zeroeval")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install 'jaxroute\[data\]'"):
        build_bank(table_config(), ["a"], tmp_path)


def test_zeroeval(data_dir):
    config = configured("zeroeval", split="all")
    bank = build_bank(config, POOL, data_dir)
    check_contract(bank, len(POOL))
    assert len(bank.quality) == 2840
    quality, output_tokens = np.asarray(bank.quality), np.asarray(bank.output_tokens)
    for column, (accuracy, tokens) in enumerate(ZEROEVAL.values()):
        assert quality[:, column].mean() == pytest.approx(accuracy, abs=1e-3)
        assert output_tokens[:, column].mean() == pytest.approx(tokens, abs=1)
    assert auc(bank.quality, bank.predicted_quality) == pytest.approx(0.826, abs=0.02)
    assert r2(*log_lengths(bank)) == pytest.approx(0.561, abs=0.02)
    assert -0.01 < routing_gain(bank) < 0.015


def test_mmlu_pro(data_dir):
    bank = build_bank(configured("mmlu_pro"), site_models("edge6"), data_dir)
    check_contract(bank, 6)
    assert len(bank.quality) == pytest.approx(12032 / 2, abs=1)
    assert auc(bank.quality, bank.predicted_quality) == pytest.approx(0.696, abs=0.02)
    assert r2(*log_lengths(bank)) == pytest.approx(0.483, abs=0.02)
    # A TF-IDF ridge router gains .010 over the best single of these six, the oracle .283.
    assert 0 < routing_gain(bank) < 0.03


# --- configuration --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
def test_every_site_has_its_llms_in_the_embedded_bank(site):
    models = site_models(site)
    bank = build_bank(configured("embedded", num_prompts=300), models)
    check_contract(bank, len(models))


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("site", SITES)
def test_every_site_finds_its_columns(bank, site, data_dir):
    config = configured(bank)
    known = config.llms
    if bank != "embedded":
        table = pd.read_parquet(data_dir / bank / "correct.parquet")
        known = [name for name in table if not (table[name] == 255).any()]
    assert {config.models.get(model, model) for model in site_models(site)} <= set(known)


def test_unknown_llm_names_the_close_ones():
    with pytest.raises(UserError, match=r"no LLM 'gemma-2-9b' \(did you mean gemma-2-9b-it\?\).*bank\.models"):
        build_bank(configured("embedded"), ["gemma-2-9b"])


def test_no_experts():
    with pytest.raises(UserError, match="list at least one expert"):
        build_bank(configured("embedded"), [])


def test_embedded_without_figures():
    with pytest.raises(UserError, match=r"start from configs/bank/embedded\.yaml"):
        build_bank(BankConfig(), POOL)


DOMAIN = {
    "name": "d",
    "share": 1.0,
    "log_prompt_mean": 5.0,
    "log_prompt_sd": 0.2,
    "difficulty_length_correlation": 0.5,
    "difficulty_prompt_correlation": 0.3,
    "length_prompt_correlation": 0.5,
}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BankConfig(kind="mmlu"), r"bank\.kind='mmlu' is unknown: use one of embedded, zeroeval"),
        (lambda: BankConfig(split="dev"), r"bank\.split='dev' is unknown: use one of train, test, all"),
        (lambda: BankConfig(split="all"), r"bank\.split='all' does not fit .*use train or test"),
        (lambda: BankConfig(num_prompts=None), r"num_prompts=null does not fit .*give a number"),
        (lambda: BankConfig(num_prompts=10), r"num_prompts=10 is too few .*at least 100"),
        (lambda: BankConfig(seed=-1), r"seed=-1 is negative"),
        (lambda: NoiseConfig(quality_auc=1.0), r"quality_auc=1.0 is not between 0.5 and 1"),
        (lambda: NoiseConfig(length_r2=-0.1), r"length_r2=-0.1 is not in \[0, 1\)"),
        (lambda: DomainFigures(**{**DOMAIN, "share": 0.0}), r"domain 'd': share=0.0 .*above 0"),
        (
            lambda: DomainFigures(**{**DOMAIN, "difficulty_prompt_correlation": -0.9}),
            r"domain 'd': its three correlations contradict each other",
        ),
        (
            lambda: BankConfig(
                domains=[DomainFigures(**DOMAIN)],
                llms={"x": LLMFigures([0.0, 1.0], [1.0], [5.0], [0.3], [0.3], [0.0])},
            ),
            r"bank\.llms\.x\.ability has 2 values for 1 domains: give one value per domain",
        ),
    ],
)
def test_bad_configuration(build, message):
    with pytest.raises(UserError, match=message):
        build()

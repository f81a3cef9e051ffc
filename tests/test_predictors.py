"""Predictors from prompt text: features, exact cross-validation, no leak, calibration, storage, the command line."""

import json

import numpy as np
import pandas as pd
import pytest

from jaxroute.banks.bank import BankConfig, build_bank
from jaxroute.banks.tables import Table, choose_llms, read_table, split_of_rows, write_table
from jaxroute.commands import predict as command_line
from jaxroute.errors import UserError
from jaxroute.predictors import Predictor
from jaxroute.predictors.features import BUCKETS, count, fit_features, inner_products
from jaxroute.predictors.metrics import auc, measure, reliability
from jaxroute.predictors.model import MIN_ERROR, Regression, _inverse, _leave_out, _whole_blocks, cross_validate
from jaxroute.predictors.predictor import Answers

LLMS = ["small-2b", "medium-7b", "large-27b"]
ROWS = 400
IN_TRAIN = split_of_rows(ROWS)
TEST = ~IN_TRAIN
WORDS = ("apple", "river", "stone", "cloud", "green", "seven", "music", "paper", "winter", "garden", "window", "silver")


def texts(rng, rows=ROWS):
    """Random words that mean nothing, numbered so that no two are the same."""
    return [" ".join(rng.choice(WORDS, 12)) + f" {row}" for row in range(rows)]


def planted(seed=0):
    """Prompts whose words say how hard they are, how long the answers get and which LLM is good at them."""
    rng = np.random.default_rng(seed)
    hard, long, code = rng.integers(0, 2, (3, ROWS))
    prompts = [
        f"{'prove' if hard[row] else 'name'} {text} {'in detail' if long[row] else ''} {'python' if code[row] else ''}"
        for row, text in enumerate(texts(rng))
    ]
    margin = np.array([0.2, 0.4, 0.6]) - 1.5 * hard[:, None] + 0.75
    margin[:, 0] += 2.0 * code  # the small one is good at code
    quality = (margin + 0.3 * rng.standard_normal(margin.shape) > 0).astype(float)
    log_length = 4 + 1.5 * long[:, None] + np.array([0.0, 0.3, 0.6]) + 0.2 * rng.standard_normal((ROWS, 3))
    return prompts, Answers(quality, np.log(np.rint(np.exp(log_length)))), np.where(code, "code", "text")


def fitted(prompts, answers, **options):
    return cross_validate(prompts, answers, IN_TRAIN, LLMS, **options)


@pytest.fixture(scope="module")
def bank():
    return planted()


@pytest.fixture(scope="module")
def result(bank):
    prompts, answers, category = bank
    return fitted(prompts, answers, category=category)


def changed(answers, rows):
    """The opposite answers in some rows."""
    quality, log_length = (part.copy() for part in answers)
    quality[rows] = 1 - quality[rows]
    log_length[rows] += 3
    return Answers(quality, log_length)


def same(first, second):
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(first, second, strict=True))


# --- features --------------------------------------------------------------------------------------------------


def test_hashing_stays_as_it_was():
    # A stored predictor depends on it: another hash must come with another version.
    grams, plain = count(["Ab ab, 12?"])
    words = [56311, 62044, 19438, 9834, 39440, 22388, 65470, 33848]
    characters = [110821, 127871, 97291, 109178, 102725, 75373, 123919]
    assert grams.indices.tolist() == words + characters
    signs = [1, 1, 1, 1, 1, 1, -1, -1, 1, 1, 1, 1, -1, -1, -1]
    np.testing.assert_allclose(grams.data, [1 + np.log(2), *signs[1:]], rtol=1e-6)
    assert plain.shape == (1, 15)


def test_features_of_odd_prompts():
    prompts = ["", " ", "\ud800 half a character", "名前は何ですか", "a" * 100_000, "x\x00y"]
    counts = count(prompts)
    encoded = fit_features(counts, 0).encode(counts)
    assert np.isfinite(encoded.grams.data).all()
    assert np.isfinite(encoded.dense).all()
    assert count([]).grams.shape == (0, 2 * BUCKETS)


def test_features_of_a_prompt_do_not_depend_on_the_others():
    prompts = texts(np.random.default_rng(0), 50)
    features = fit_features(count(prompts), 0)
    together = features.encode(count(prompts))
    alone = features.encode(count(prompts[7:8]))
    assert (together.grams[7] != alone.grams[0]).nnz == 0
    np.testing.assert_allclose(together.dense[7], alone.dense[0], atol=1e-6)


def test_words_and_characters_are_normalised_and_what_occurs_once_is_dropped():
    counts = count(["one two three", "one two four", "two one five"])
    encoded = fit_features(counts, 0).encode(counts)
    words, characters = encoded.grams[:, :BUCKETS], encoded.grams[:, BUCKETS:]
    np.testing.assert_allclose(words.multiply(words).sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(characters.multiply(characters).sum(axis=1), 0.5, rtol=1e-5)
    # "one", "two" and "one two": more often in the first two prompts than in all three, and so heavier.
    assert (np.diff(words[:2].tocsr().indptr) == 5).all()
    assert (words[0].toarray() != 0).sum() == 3
    assert (words[2].toarray() != 0).sum() == 2


def test_inner_products():
    counts = count(texts(np.random.default_rng(0), 40))
    encoded = fit_features(counts, 0).encode(counts)
    whole = np.concatenate([encoded.grams.toarray(), encoded.dense], axis=1)
    np.testing.assert_allclose(inner_products(encoded), whole @ whole.T, rtol=1e-4, atol=1e-5)


# --- exact leaving out -----------------------------------------------------------------------------------------


def test_leaving_out_equals_fitting_without():
    rng = np.random.default_rng(0)
    rows, left_out, penalty = 60, np.array([3, 4, 17, 40]), 2.0
    inputs = rng.standard_normal((rows, 30)).astype(np.float32)
    kernel, targets = inputs @ inputs.T, rng.standard_normal((rows, 2)).astype(np.float32)
    duals, unseen = _leave_out(_inverse(kernel, penalty), targets, _whole_blocks(left_out, rows))

    def fit(kept):
        return np.linalg.solve(kernel[np.ix_(kept, kept)] + penalty * np.eye(len(kept)), targets[kept])

    kept = np.setdiff1d(np.arange(rows), left_out)
    np.testing.assert_allclose(duals[kept], fit(kept), atol=1e-4)
    np.testing.assert_array_equal(duals[left_out], 0)
    np.testing.assert_allclose(unseen[left_out], kernel[np.ix_(left_out, kept)] @ fit(kept), atol=1e-3)
    for row in (0, 30, 59):
        others = np.setdiff1d(kept, row)
        np.testing.assert_allclose(unseen[row], kernel[row, others] @ fit(others), atol=1e-3)


def test_rows_left_out_and_answers_missing_are_as_if_they_were_not_there(bank):
    prompts, answers, _ = bank
    counts = count(prompts[:120])
    encoded = fit_features(counts, 0).encode(counts)
    left_out = np.arange(120) % 5 == 0
    answers = answers.rows(np.arange(120))
    missing = Answers(*(np.where(left_out[:, None], np.nan, part) for part in answers))
    alone = Regression(encoded.rows(np.flatnonzero(~left_out)), answers.rows(~left_out)).fit(np.zeros(96, bool))
    for weights in (Regression(encoded, answers).fit(left_out), Regression(encoded, missing).fit(np.zeros(120, bool))):
        for part, expected in zip(weights, alone, strict=True):
            np.testing.assert_allclose(part, expected, atol=2e-3)


def test_an_llm_with_answers_missing_takes_nothing_from_the_others_rows(bank):
    prompts, answers, _ = bank
    quality, log_length = (part.copy() for part in answers)
    quality[::4, 1] = np.nan
    log_length[::3, 2] = np.nan
    partial = fitted(prompts, Answers(quality, log_length))
    assert np.isfinite(partial.predicted.quality).all()
    assert np.isfinite(partial.predicted.log_length).all()
    figures = measure(answers.rows(TEST), partial.predicted.rows(TEST))
    assert figures["quality_auc"] > 0.9
    assert figures["length_r2"] > 0.8


# --- what is learned, and what must not be -----------------------------------------------------------------------


def test_words_that_decide_are_found(bank, result):
    _, answers, _ = bank
    for rows in (TEST, result.fitted):
        figures = measure(answers.rows(rows), result.predicted.rows(rows))
        assert figures["quality_auc"] > 0.9
        assert figures["length_r2"] > 0.85
        assert figures["quality_own_r2"] > 0.15
        assert figures["routed"] > figures["best_single"] + 0.03
        assert figures["calibration_error"] < 0.08
    # Length's own noise has a standard deviation of 0.2.
    np.testing.assert_allclose(result.predictor.log_length_error, 0.25, atol=0.06)


def test_noise_is_not_predicted():
    rng = np.random.default_rng(3)
    answers = Answers((rng.random((ROWS, 3)) < 0.5).astype(float), 5 + rng.standard_normal((ROWS, 3)))
    noise = fitted(texts(rng), answers)
    for rows in (TEST, IN_TRAIN):
        figures = measure(answers.rows(rows), noise.predicted.rows(rows))
        assert abs(figures["quality_auc"] - 0.5) < 0.06
        assert -0.1 < figures["length_r2"] < 0.03
    np.testing.assert_allclose(noise.predictor.log_length_error, 1, atol=0.12)
    # It says so: hardly more than the means is predicted.
    assert noise.predicted.quality.std(axis=0).max() < 0.12


def test_no_prediction_depends_on_the_answers_to_its_own_prompt(bank, result):
    prompts, answers, category = bank
    row = int(np.flatnonzero(IN_TRAIN)[5])
    other = fitted(prompts, changed(answers, row), category=category)
    for part, before in zip(other.predicted, result.predicted, strict=True):
        np.testing.assert_array_equal(part[row], before[row])
        assert (part != before)[IN_TRAIN].any()  # those of other folds
        assert (part != before)[TEST].any()
    assert not same(other.apart, result.apart)


def test_the_test_half_has_no_influence(bank, result):
    prompts, answers, category = bank
    other = fitted(prompts, changed(answers, TEST), category=category)
    assert same(other.predicted, result.predicted)
    np.testing.assert_array_equal(other.predictor.log_length_error, result.predictor.log_length_error)
    last = np.flatnonzero(TEST)[-1]
    rewritten = [*prompts[:last], "quite another text", *prompts[last + 1 :]]
    other = fitted(rewritten, answers, category=category)
    assert same(
        (np.delete(part, last, 0) for part in other.predicted), (np.delete(p, last, 0) for p in result.predicted)
    )


def test_a_category_left_out_has_no_influence_on_its_predictions(bank, result):
    prompts, answers, category = bank
    other = fitted(prompts, changed(answers, category == "code"), category=category)
    code = result.fitted & (category == "code")
    for part, before in zip(other.apart, result.apart, strict=True):
        np.testing.assert_array_equal(part[code], before[code])
        assert np.isfinite(before[code]).all()
        assert np.isnan(before[~result.fitted]).all()
    assert not same(other.predicted, result.predicted)


def test_a_repeated_text_is_never_predicted_by_a_fit_to_its_copy(bank):
    prompts, answers, _ = bank
    prompts = list(prompts)
    train, test = np.flatnonzero(IN_TRAIN), np.flatnonzero(TEST)
    prompts[test[0]] = prompts[train[0]]  # in both halves: not fitted to
    prompts[train[9]] = prompts[train[4]]  # twice in the train half: the first is fitted to
    before = fitted(prompts, answers)
    assert not before.fitted[train[[0, 9]]].any()
    assert before.fitted.sum() == len(train) - 2
    assert same(fitted(prompts, changed(answers, train[0])).predicted, before.predicted)
    after = fitted(prompts, changed(answers, train[4]))
    for part, old in zip(after.predicted, before.predicted, strict=True):
        np.testing.assert_array_equal(part[train[[4, 9]]], old[train[[4, 9]]])


def test_the_same_seed_gives_the_same_predictor(bank, result):
    prompts, answers, category = bank
    assert same(fitted(prompts, answers, category=category).predicted, result.predicted)
    assert not same(fitted(prompts, answers, seed=1).predicted, result.predicted)


def test_an_llm_that_is_always_right_and_always_as_long(bank):
    prompts, answers, _ = bank
    quality, log_length = (part.copy() for part in answers)
    quality[:, 1], log_length[:, 1] = 1, np.log(100)
    sure = fitted(prompts, Answers(quality, log_length))
    assert sure.predicted.quality[:, 1].min() > 0.95
    np.testing.assert_allclose(np.exp(sure.predicted.log_length[:, 1]), 100, rtol=0.05)
    assert sure.predictor.log_length_error[1] == pytest.approx(MIN_ERROR, abs=0.01)
    assert np.isnan(auc(quality[:, 1], sure.predicted.quality[:, 1]))


# --- figures ---------------------------------------------------------------------------------------------------


def test_ties_count_half():
    assert auc(np.array([1.0, 1, 0, 0]), np.zeros(4)) == 0.5
    assert auc(np.array([0.0, 1, np.nan, 0]), np.array([0.1, 0.2, 0.0, 0.2])) == 0.75


def test_reliability_and_figures_without_answers():
    rng = np.random.default_rng(0)
    predicted = rng.random((1000, 1))
    bins = reliability((rng.random((1000, 1)) < predicted).astype(float), predicted)
    np.testing.assert_allclose(bins.observed, bins.predicted, atol=0.15)
    assert bins.share.sum() == pytest.approx(1)
    figures = measure(Answers(predicted, predicted), Answers(predicted, predicted))
    assert figures["calibration_error"] < 1e-9
    assert np.isnan(figures["quality_own_r2"])  # a lone LLM
    nothing = Answers(np.full((5, 2), np.nan), np.full((5, 2), np.nan))
    assert np.isnan(list(measure(nothing, nothing).values())).all()


# --- storage ---------------------------------------------------------------------------------------------------


def test_a_stored_predictor_predicts_exactly_the_same(bank, result, tmp_path):
    prompts, _, _ = bank
    result.predictor.save(tmp_path / "mine")
    again = Predictor.load(tmp_path / "mine")
    assert again.models == tuple(LLMS)
    np.testing.assert_array_equal(again.log_length_error, result.predictor.log_length_error)
    assert same(again(prompts[:20]), result.predictor(prompts[:20]))
    quality, tokens = again(prompts)
    np.testing.assert_allclose(quality[TEST], result.predicted.quality[TEST], rtol=1e-5)
    np.testing.assert_allclose(np.log(tokens[TEST]), result.predicted.log_length[TEST], rtol=1e-5)
    assert quality.min() >= 0
    assert quality.max() <= 1
    assert tokens.min() >= 1
    odd_quality, odd_tokens = again(["", "\ud800", "a" * 100_000])
    assert np.isfinite(odd_quality).all()
    assert np.isfinite(odd_tokens).all()
    assert again([])[0].shape == (0, 3)
    with pytest.raises(UserError, match=r"give \[prompt\] for one prompt"):
        again("one prompt")
    with pytest.raises(UserError, match="exists already"):
        again.save(tmp_path / "mine")


def test_a_predictor_that_cannot_be_loaded(result, tmp_path):
    folder = tmp_path / "mine"
    result.predictor.save(folder)
    with pytest.raises(UserError, match=r"holds no predictor\.json: name the folder predictor/"):
        Predictor.load(tmp_path)
    settings = json.loads((folder / "predictor.json").read_text())
    for change, message in [
        ({"models": LLMS[:2]}, "is damaged .*has shape"),
        ({"hashing": {**settings["hashing"], "version": 0}}, "a version with other features"),
        ({"models": None}, "is damaged"),
    ]:
        (folder / "predictor.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(UserError, match=message):
            Predictor.load(folder)
    (folder / "predictor.json").write_text(json.dumps(settings))
    whole = (folder / "predictor.npz").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no zip"):
        (folder / "predictor.npz").write_bytes(content)
        with pytest.raises(UserError, match="is damaged"):
            Predictor.load(folder)
    (folder / "predictor.npz").unlink()
    with pytest.raises(UserError, match="is damaged"):
        Predictor.load(folder)


# --- the command line ------------------------------------------------------------------------------------------


def run(capsys, *argv):
    """Exit code of the command line and what it printed on both streams."""
    code = command_line.main([str(argument) for argument in argv])
    out, err = capsys.readouterr()
    return code, out, err


def write_bank(folder, bank, **columns):
    prompts, answers, category = bank
    queries = pd.DataFrame({"prompt": prompts, "category": category, "prompt_tokens": np.arange(ROWS) + 10})
    write_table(Table(queries.assign(**columns), answers.quality, np.exp(answers.log_length), LLMS), folder)
    return folder


def test_from_a_bank_to_what_a_router_sees(bank, result, tmp_path, capsys):
    folder = write_bank(tmp_path / "bank", bank)
    code, out, _ = run(capsys, folder, "--out", tmp_path / "predictions")
    assert code == 0
    assert f"bank=table bank.folder={folder} bank.predictions={tmp_path / 'predictions'}" in out
    assert "Fitted to 200 of the 200 prompts in the train half." in out
    written = {path.name for path in (tmp_path / "predictions").iterdir()}
    tables = {"predicted_quality.parquet", "predicted_output_tokens.parquet", "log_length_error.parquet"}
    assert written == {*tables, "metrics.json", "reliability.png", "predictor"}

    config = BankConfig(
        kind="table", folder=str(folder), predictions=str(tmp_path / "predictions"), num_prompts=None, split="test"
    )
    seen = build_bank(config, [LLMS[2], LLMS[0]])
    predictor = Predictor.load(tmp_path / "predictions" / "predictor")
    quality, tokens = predictor([bank[0][row] for row in np.flatnonzero(TEST)])
    np.testing.assert_allclose(seen.predicted_quality, quality[:, [2, 0]], rtol=1e-4)
    np.testing.assert_allclose(seen.predicted_output_tokens, tokens[:, [2, 0]], rtol=1e-4)
    np.testing.assert_allclose(seen.log_length_error, predictor.log_length_error[[2, 0]], rtol=1e-6)

    metrics = json.loads((tmp_path / "predictions" / "metrics.json").read_text())
    expected = measure(bank[1].rows(TEST), result.predicted.rows(TEST))
    assert metrics["figures"]["test"] == pytest.approx(expected, rel=1e-3)
    assert metrics["figures"]["means"]["quality_auc"] < expected["quality_auc"]
    assert set(metrics["categories"]) == {"code", "text"}
    assert list(metrics["llms"]) == LLMS


def test_some_llms_without_categories(bank, tmp_path, capsys):
    folder = write_bank(tmp_path / "bank", bank)
    path = folder / "queries.parquet"
    pd.read_parquet(path).drop(columns="category").to_parquet(path)
    assert run(capsys, folder, "--out", tmp_path / "one", "--models", "large-27b")[0] == 0
    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert metrics["figures"]["test"]["quality_own_r2"] is None  # a lone LLM has nothing of its own
    assert "categories" not in metrics["figures"]
    assert Predictor.load(tmp_path / "one" / "predictor").models == ("large-27b",)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, ["--models", "small-3b"], "has no LLM 'small-3b' (did you mean small-2b?)"),
        ({}, ["--seed", "-1"], "--seed=-1 is negative"),
        ({"drop": "prompt"}, [], "queries.parquet has no column 'prompt', and a predictor needs the prompts' text"),
        ({"prompt": None}, [], "queries.parquet, row 3: prompt is "),
        ({"missing": 1.0}, [], "LLM 'medium-7b' has 0 known values of quality among the 200 prompts to fit to, and at"),
        ({"missing": 0.9}, ["--models", "medium-7b,small-2b"], "leave it out with --models, or add prompts"),
        ({"rows": 60}, [], "among the 30 prompts to fit to, and at least 50 are needed"),
    ],
)
def test_mistakes(bank, tmp_path, capsys, change, arguments, message):
    folder = write_bank(tmp_path / "bank", bank)
    path, quality = folder / "queries.parquet", folder / "quality.parquet"
    if "drop" in change:
        pd.read_parquet(path).drop(columns=change["drop"]).to_parquet(path)
    if "prompt" in change:
        table = pd.read_parquet(path)
        table.loc[2, "prompt"] = change["prompt"]
        table.to_parquet(path)
    if "missing" in change:
        table = pd.read_parquet(quality)
        table.loc[: int(change["missing"] * ROWS), "medium-7b"] = np.nan
        table.to_parquet(quality)
    if "rows" in change:
        for part in folder.iterdir():
            pd.read_parquet(part)[: change["rows"]].to_parquet(part)
    code, _, err = run(capsys, folder, "--out", tmp_path / "mine", *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [folder]


def test_places_that_cannot_be_written(bank, tmp_path, capsys, monkeypatch):
    folder = write_bank(tmp_path / "bank", bank)
    assert "exists already: name another folder" in run(capsys, folder, "--out", folder)[2]
    assert "does not exist" in run(capsys, tmp_path / "none", "--out", tmp_path / "mine")[2]
    assert "the following arguments are required: --out" in run(capsys, folder)[2]

    def disk_full(self, where):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Predictor, "save", disk_full)
    code, _, err = run(capsys, folder, "--out", tmp_path / "mine")
    assert code == 2
    assert "cannot be written (No space left on device)" in err
    assert list(tmp_path.iterdir()) == [folder]


# --- published tables ------------------------------------------------------------------------------------------


def test_published_prompts(data_dir):
    table = choose_llms(read_table(data_dir / "zeroeval"), ["gemma-2-2b-it", "gemma-2-27b-it"], data_dir)
    rows = np.arange(0, len(table.queries), 4)
    answers = Answers(table.quality[rows], np.log(table.output_tokens[rows]))
    prompts = table.queries["prompt"].iloc[rows].tolist()
    test = ~split_of_rows(len(rows))
    predicted = cross_validate(prompts, answers, ~test, table.llms).predicted
    figures = measure(answers.rows(test), predicted.rows(test))
    assert figures["quality_auc"] > 0.77
    assert figures["length_r2"] > 0.35
    assert figures["calibration_error"] < 0.09
    # The published questions of MMLU-Pro become text with their options.
    text = read_table(data_dir / "mmlu_pro").queries["prompt"][0]
    assert text.startswith("Typical advertising")
    assert "Safe practices, Fear, Jealousy, Trivial" in text

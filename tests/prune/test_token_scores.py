"""Scores of tokens from stored log-probabilities, against the full distributions."""

import numpy as np
import pytest
import torch

import kdfast
from kdfast.errors import UsageError

VOCABULARY, K = 40, 6


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A cache of 30 texts; the log-probabilities (N, V) and tokens (N,) of all, one after another."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path_factory.mktemp("tokens") / "t"
    every, tokens = [], []
    with kdfast.TokenWriter(folder, VOCABULARY) as writer:
        for length in torch.randint(2, 12, (30,), generator=generator).tolist():
            logp = (2 * torch.randn(length, VOCABULARY, generator=generator)).double().log_softmax(1)
            text = torch.multinomial(logp.exp(), 1, generator=generator).squeeze(1)
            writer.add(*logp.topk(K), labels=text)
            every.append(logp)
            tokens.append(text)
    return kdfast.TokenTeacher.open(folder), torch.cat(every), torch.cat(tokens)


def true_scores(logp, tokens, method):
    if method == "ce":
        return -logp.gather(1, tokens[:, None]).squeeze(1).numpy()
    return (logp.exp() - torch.nn.functional.one_hot(tokens, VOCABULARY)).norm(dim=1).numpy()


@pytest.mark.parametrize("method", ["ce", "el2n"])
def test_scores_are_exact_or_between_their_bounds(stored, method):
    teacher, logp, tokens = stored
    scores, true = kdfast.token_scores(teacher, method), true_scores(logp, tokens, method)
    inside = (logp.topk(K).indices == tokens[:, None]).any(1).numpy()
    assert 0.3 < inside.mean() < 1
    slack = 5e-3  # float16
    assert (scores.low <= true + slack).all()
    assert (true <= scores.high + slack).all()
    assert ((scores.low <= scores.values) & (scores.values <= scores.high)).all()
    if method == "ce":
        np.testing.assert_array_equal(scores.low[inside], scores.high[inside])
    np.testing.assert_allclose(scores.values[inside], true[inside], atol=0.02)
    assert np.corrcoef(scores.values, true)[0, 1] > (0.9 if method == "ce" else 0.99)


def test_bounds_of_el2n_hold_with_all_mass_alike_and_on_few(tmp_path):
    # Two distributions with the same stored entries: the rest even, and on one class.
    p = torch.tensor([0.4, 0.3, 0.2, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    even, one = p.clone(), p.clone()
    even[3:], one[3] = 0.1 / 4, 0.1
    with kdfast.TokenWriter(tmp_path / "t", 7) as writer:
        writer.add(p[:3].log()[None], torch.arange(3)[None], labels=[1])
    scores = kdfast.token_scores(kdfast.TokenTeacher.open(tmp_path / "t"), "el2n")
    onehot = torch.nn.functional.one_hot(torch.tensor(1), 7)
    assert float(scores.low[0]) == pytest.approx(float((even - onehot).norm()), abs=1e-3)
    assert float(scores.high[0]) == pytest.approx(float((one - onehot).norm()), abs=1e-3)


def test_score_of_a_text_is_the_mean_over_its_known_tokens(stored, tmp_path):
    teacher, logp, tokens = stored
    true = true_scores(logp, tokens, "el2n")
    parts = np.split(true, np.cumsum(teacher.lengths)[:-1])
    found = kdfast.token_scores(teacher, "el2n").texts()
    np.testing.assert_allclose(found, [part.mean() for part in parts], atol=0.05)
    with kdfast.TokenWriter(tmp_path / "t", VOCABULARY) as writer:
        writer.add(*logp[:3].topk(K), labels=[int(tokens[0]), -1, int(tokens[2])])
        writer.add(*logp[:2].topk(K), labels=[-1, -1])
        writer.add(np.zeros(0), np.zeros(0, np.int64), offsets=[0, 0], labels=[3])
    scores = kdfast.token_scores(kdfast.TokenTeacher.open(tmp_path / "t"))
    assert np.isnan(scores.values).tolist() == [False, True, False, True, True, True]
    assert scores.texts()[0] == pytest.approx(scores.values[[0, 2]].mean())
    assert np.isnan(scores.texts()[1:]).all()


def test_scores_select_texts_and_tokens(stored):
    teacher, _, _ = stored
    scores = kdfast.token_scores(teacher)
    texts = scores.texts()
    kept = kdfast.prune(np.zeros(len(texts), int), 0.5, scores=texts, rule="hard")
    assert set(kept) == set(np.argsort(-texts)[:15])
    tokens = kdfast.prune(np.zeros(len(scores.values), int), 0.3, scores=scores.values, rule="hard")
    assert scores.values[tokens].min() >= np.quantile(scores.values, 0.68)


def test_refuses_unknown_methods_and_texts_without_tokens(stored, tmp_path):
    teacher, logp, _ = stored
    with pytest.raises(UsageError, match="no score of tokens is named 'grand'"):
        kdfast.token_scores(teacher, "grand")
    with kdfast.TokenWriter(tmp_path / "t", VOCABULARY) as writer:
        writer.add(*logp[:2].topk(K))
    with pytest.raises(UsageError, match="does not hold the tokens of the texts"):
        kdfast.token_scores(kdfast.TokenTeacher.open(tmp_path / "t"))

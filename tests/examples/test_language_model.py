"""The language-model example: what each kind of teacher does to a student, against the written-out loss."""

import numpy as np
import pytest
import torch

import kdfast
from kdfast.examples import language_model
from kdfast.examples._causal_lm import VOCABULARY, load_texts


@pytest.fixture(scope="module")
def work():
    texts = load_texts(length=32, count=28)
    teacher = language_model.train_teacher(texts[:24], steps=15, width=16, layers=1)
    return language_model.Distillation(teacher, texts[:24], texts[24:26], texts[26:], steps=10)


def test_texts_are_consecutive_pieces_of_ascii():
    texts = load_texts()
    assert texts.shape[1] == 65
    assert 19_025 - 64 <= texts.shape[0] * 64 + 1 <= 19_025
    assert int(texts.max()) < VOCABULARY
    assert torch.equal(texts[:-1, -1], texts[1:, 0])
    assert bytes(texts[0].tolist()).startswith(b"From fairest creatures")


def test_students_of_all_kinds_of_teacher_learn_the_same(work, tmp_path):
    cache = language_model.store(work.teacher, work.texts, tmp_path / "t", k=120)
    dense = work.run(work.dense)
    assert len(dense) == 10
    assert dense[-1] < 0.98 * dense[0]
    np.testing.assert_allclose(work.run(work.from_cache(cache)), dense, rtol=1e-3)
    np.testing.assert_allclose(work.run(work.from_hidden), dense, rtol=1e-5)


def test_loss_from_the_cache_is_the_written_out_one(work, tmp_path):
    cache = language_model.store(work.teacher, work.texts, tmp_path / "t", k=12)
    torch.manual_seed(0)
    student = language_model.CausalLM(16, 1, 32)
    numbers = torch.tensor([5, 0, 9])
    loss = float(work.from_cache(cache)(student, numbers).detach())
    total = 0.0
    for text in work.texts[numbers]:
        with torch.no_grad():
            z, t = student(text[None, :-1])[0].double(), work.teacher(text[None, :-1])[0].double()
        q, p = t.softmax(1), z.softmax(1)
        top = q.topk(12).indices
        q, p = (torch.cat([x.gather(1, top), 1 - x.gather(1, top).sum(1, keepdim=True)], 1) for x in (q, p))
        ce = -z.log_softmax(1).gather(1, text[1:, None])
        total += float(0.1 * ce.sum() + 0.9 * (q * (q.log() - p.log())).sum())
    assert loss == pytest.approx(total / (3 * 32), rel=1e-3)


def test_halves_are_those_of_the_scores(work, tmp_path):
    cache = language_model.store(work.teacher, work.texts, tmp_path / "t", k=VOCABULARY)
    halves = language_model.choose_half(work, cache)
    ce = torch.nn.functional.cross_entropy(
        work.logits.flatten(0, 1), work.texts[:, 1:].flatten(), reduction="none"
    ).view(24, 32).mean(1)  # fmt: skip
    order = ce.argsort().tolist()
    assert set(halves["easy_half"]) == set(order[:12])
    assert set(halves["hard_half"]) == set(order[12:])
    assert all(len(kept) == 12 for kept in halves.values())
    assert len(work.run(work.from_cache(cache), halves["influence_half"])) == 10


def test_influence_is_the_drop_of_the_loss_of_others_without_a_text(work, tmp_path):
    """Against leaving a text's tokens out of the head's training, by one Newton step in float64."""
    cache = language_model.store(work.teacher, work.texts, tmp_path / "t", k=VOCABULARY)
    halves = language_model.choose_half(work, cache)
    features, labels = work.hidden.flatten(0, 1).double(), work.texts[:, 1:].flatten()
    weight = work.teacher.head.weight.detach().double()
    with torch.no_grad():
        others = work.teacher.hidden(work.chooser[:, :-1]).flatten(0, 1).double()

    def gradients(h, y):
        r = (h @ weight.T).softmax(1)
        r[torch.arange(len(y)), y] -= 1
        return r, h

    r, h = gradients(others, work.chooser[:, 1:].flatten())
    p = (features @ weight.T).softmax(1)
    n, width = features.shape
    # The Hessian of the mean loss over the head's (V * D) weights.
    by_class = [(p[:, c, None] * features).T @ features / n for c in range(VOCABULARY)]
    outer = (p[:, :, None] * features[:, None, :]).reshape(n, -1)
    hessian = torch.block_diag(*by_class) - outer.T @ outer / n
    hessian += 1e-2 * torch.eye(VOCABULARY * width, dtype=torch.float64)
    solved = torch.linalg.solve(hessian, (r.T @ h / len(h)).reshape(-1)).view(VOCABULARY, width)
    r, _ = gradients(features, labels)
    influence = ((r @ solved) * features).sum(1).view(24, 32).sum(1)
    assert set(halves["influence_half"]) == set(influence.argsort(descending=True)[:12].tolist())


def test_lookup_by_a_loader_in_another_process(work, tmp_path):
    cache = language_model.store(work.teacher, work.texts, tmp_path / "t", k=8)
    loader = torch.utils.data.DataLoader(range(24), batch_size=6, collate_fn=cache.lookup, num_workers=1)
    for first, batch in zip(range(0, 24, 6), loader, strict=True):
        assert isinstance(batch, kdfast.teacher.tokens.read.TokenBatch)
        assert torch.equal(batch.labels, work.texts[first : first + 6, 1:])

"""Advice in error messages works: each case provokes an error, does what its message says, and succeeds."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kdfast
from kdfast.data.subset import class_budgets, read_subset, subset_size
from kdfast.data.views import Normalization
from kdfast.errors import KdfastError
from kdfast.nets import build_net
from kdfast.nets.importing import import_checkpoint
from kdfast.pruning.rules.apply import select_subset
from kdfast.pruning.score_file import ScoreFile, read_scores, write_scores
from kdfast.pruning.scores.base import ScoreInputs
from kdfast.pruning.scores.registry import compute_score
from kdfast.teacher.writing.rows import open_rows

ROOT = Path(kdfast.__file__).parent
# An expression in a message that the reader is to type.
CODE = re.compile(r"np\.[a-z]\w*\((?!path)|\b\w+\.ravel\(|\.(?:long|int|detach|to_dense)\(\)|write_scores\(")
FINGERPRINT = "f" * 64


def message_of(action: Callable[[], Any]) -> str:
    with pytest.raises((KdfastError, TypeError)) as caught:
        action()
    return str(caught.value)


def raise_sites() -> Iterator[str]:
    """Yield the literal text of every message of kdfast that contains code to type."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                parts = [
                    n.value for n in ast.walk(node.exc) if isinstance(n, ast.Constant) and isinstance(n.value, str)
                ]
                if CODE.search("".join(parts)):
                    yield "".join(parts)


def save_subset(path: Path, ids: Any) -> Callable[[], Any]:
    np.save(path / "idx.npy", ids)
    return lambda: read_subset(path / "idx.npy", n=100)


MASK = np.isin(np.arange(100), [3, 5, 8])
FIRST = np.array([3, 5, 8])
SUBSETS = {
    "mask of integers": (MASK.astype(np.int64), {"mask": MASK.astype(np.int64)}),
    "mask of floats": (MASK.astype(float), {"mask": MASK.astype(float)}),
    "a column of floats": (FIRST.astype(float)[:, None], {"ids": FIRST.astype(float)[:, None]}),
    "repeated": (np.array([3, 8, 5, 3]), {"ids": np.array([3, 8, 5, 3])}),
}


@pytest.mark.parametrize("case", SUBSETS)
def test_expressions_in_messages_about_subsets(tmp_path: Path, case: str) -> None:
    ids, names = SUBSETS[case]
    said = message_of(save_subset(tmp_path, ids))
    mended = eval(said.rsplit("use ", 1)[1], {"np": np, **names})
    assert sorted(save_subset(tmp_path, mended)().ids.tolist()) == [3, 5, 8]


def kd(**changes: Any) -> Callable[[], Any]:
    given = {"logits": torch.zeros(4, 3), "labels": torch.arange(4) % 3, "teacher": torch.zeros(4, 3)} | changes
    return lambda: kdfast.kd_loss(given["logits"], given["labels"], given["teacher"])


LOSSES = {
    "labels of another dtype": {"labels": (torch.arange(4) % 3).int()},
    "teacher with a gradient": {"teacher": torch.zeros(4, 3, requires_grad=True)},
    "sparse teacher": {"teacher": torch.zeros(4, 3).to_sparse()},
}


@pytest.mark.parametrize("case", LOSSES)
def test_methods_in_messages_about_the_loss(case: str) -> None:
    ((name, value),) = LOSSES[case].items()
    method = re.search(r"\.(\w+)\(\)", message_of(kd(**{name: value})))
    assert method is not None
    assert kd(**{name: getattr(value, method[1])()})().isfinite()


def test_fraction_and_balance_of_a_long_tail() -> None:
    labels = np.repeat(np.arange(100), 2)
    scores = np.random.default_rng(0).random(200)
    said = message_of(lambda: select_subset(scores, labels, 0.3))
    found = re.search(r"`fraction` of ([\d.]+); or pass `balance` (\w+)", said)
    assert found is not None
    assert len(set(labels[select_subset(scores, labels, float(found[1])).ids])) == 100
    assert len(select_subset(scores, labels, 0.3, balance=found[2]).ids) == 60
    for n, classes in ((1000, 3), (999, 37), (10847, 100), (7, 6)):
        tail = np.r_[np.arange(classes), np.zeros(n - classes, np.int64)]
        said = message_of(lambda tail=tail: class_budgets(tail, 1))
        fraction = float(said.rsplit(" ", 1)[1])
        assert (class_budgets(tail, subset_size(len(tail), min(1.0, fraction))) > 0).all()


def test_influence_of_classes_too_small_to_hold_out() -> None:
    labels = np.arange(3)
    rng = np.random.default_rng(0)
    arrays = {"logits": rng.normal(size=(len(labels), 3)), "features": rng.normal(size=(len(labels), 4))}
    said = message_of(lambda: compute_score("influence", ScoreInputs(labels, 0, **arrays)))
    name, value = re.search(r"option (\w+)=(\w+)", said).groups()
    assert len(compute_score("influence", ScoreInputs(labels, 0, **arrays, options={name: value})).values) == len(
        labels
    )


@pytest.mark.parametrize("sizes", [[60, 15, 4, 1], [2, 2, 2], [2, 1, 1]])
def test_influence_holds_out_what_a_long_tail_can_spare(sizes: list[int]) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    rng = np.random.default_rng(0)
    arrays = {"logits": rng.normal(size=(len(labels), len(sizes))), "features": rng.normal(size=(len(labels), 5))}
    assert np.isfinite(compute_score("influence", ScoreInputs(labels, 0, **arrays)).values).all()


@pytest.mark.parametrize("kind", ["npy", "text"])
@pytest.mark.parametrize("name", ["scores.npz", "scores.json"])
def test_own_scores(tmp_path: Path, monkeypatch, kind: str, name: str) -> None:
    """The message about a file that cannot be read has the call that writes the scores as kdfast reads them."""
    scores = np.arange(20.0)
    path = tmp_path / name
    with path.open("wb") as file:
        if kind == "npy":
            np.save(file, scores)
        else:
            file.write(b"0.1\n0.2\n")
    said = message_of(lambda: read_scores(path, n=20, fingerprint=FINGERPRINT))
    call = re.search(r"write_scores\('.*?\)\)", said)
    assert call is not None
    monkeypatch.chdir(tmp_path)
    eval(call[0], {"write_scores": write_scores, "ScoreFile": ScoreFile, "scores": scores})
    np.testing.assert_array_equal(read_scores("own.npz", n=20, fingerprint=FINGERPRINT).scores, scores)


def test_own_logits_stored_by_columns(tmp_path: Path) -> None:
    logits = np.asfortranarray(np.random.default_rng(0).random((20, 3), dtype=np.float32))
    np.savez(tmp_path / "own.npz", logits=logits)
    said = message_of(lambda: open_rows(tmp_path / "own.npz", what="logits"))
    written = eval(re.search(r"np\.\w+\(logits\)", said)[0], {"np": np, "logits": logits})
    np.savez(tmp_path / "own.npz", logits=written)
    np.testing.assert_array_equal(open_rows(tmp_path / "own.npz", what="logits").read(0, 20), logits)


def test_own_scores_of_other_data_are_written_again(tmp_path: Path) -> None:
    write_scores(tmp_path / "own.npz", ScoreFile(np.arange(20.0), "own", FINGERPRINT))
    for n, fingerprint in ((20, "e" * 64), (19, FINGERPRINT)):
        said = message_of(lambda n=n, f=fingerprint: read_scores(tmp_path / "own.npz", n=n, fingerprint=f))
        assert "or write your own scores again" in said
        write_scores(tmp_path / "own.npz", ScoreFile(np.arange(float(n)), "own", fingerprint))
        assert len(read_scores(tmp_path / "own.npz", n=n, fingerprint=fingerprint).scores) == n


def test_key_of_one_of_several_sets_of_weights(tmp_path: Path) -> None:
    nets = [build_net("resnet8", 3) for _ in range(2)]
    torch.save({"first": nets[0].state_dict(), "second": nets[1].state_dict()}, tmp_path / "t.pt")
    options = {"net": "resnet8", "classes": 3, "normalization": Normalization((0.5,) * 3, (0.5,) * 3)}
    found = re.search(r"for example `key` (\S+)", message_of(lambda: import_checkpoint(tmp_path / "t.pt", **options)))
    assert found is not None
    model, _ = import_checkpoint(tmp_path / "t.pt", **options, key=found[1])
    assert torch.equal(next(model.net.parameters()), next(nets[["first", "second"].index(found[1])].parameters()))


def test_options_of_softmax_heads() -> None:
    rng = np.random.default_rng(0)
    x, z, y = rng.normal(size=(40, 3)), rng.normal(size=(40, 3)), np.arange(40) % 3
    said = message_of(lambda: kdfast.head_self_influence(x, z, y, l2=0))
    assert kdfast.head_self_influence(x, z, y, l2=float(said.rsplit(" ", 1)[1])).isfinite().all()
    said = message_of(lambda: kdfast.head_self_influence(x, z, y, l2=0.1, corrected=True, method="cg"))
    for text in re.findall(r"(?:pass|or) (\w+=[\w']+)", said):
        options = {"corrected": True, "method": "cg"} | eval(f"dict({text})")
        assert kdfast.head_self_influence(x, z, y, l2=0.1, **options).isfinite().all()


def test_mode_of_gradient_norms() -> None:
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3))
    said = message_of(lambda: kdfast.grad_norms(net, x, y))
    assert "call model.eval() first" in said
    assert kdfast.grad_norms(net.eval(), x, y).isfinite().all()


def test_order_of_imported_logits(tmp_path: Path) -> None:
    logits = np.asfortranarray(np.random.default_rng(0).normal(size=(6, 3)))
    np.savez(tmp_path / "z.npz", logits)
    said = message_of(lambda: open_rows(tmp_path / "z.npz", what="logits"))
    code = re.search(r"np\.\w+\(logits\)", said)
    assert code is not None
    np.savez(tmp_path / "z.npz", eval(code[0], {"np": np, "logits": logits}))
    np.testing.assert_array_equal(open_rows(tmp_path / "z.npz", what="logits").read(0, 6), logits)


def test_every_message_with_code_is_tried() -> None:
    """A message that tells the reader to type code is known here, so that a test above tries it."""
    known = (
        "use np.flatnonzero(mask)",
        "use ids.ravel().astype(np.int64)",
        "use np.unique(ids)",
        "convert it with .long()",
        "convert it with .to_dense()",
        ".detach()",
        "call write_scores(",
        "convert it with .int()",
        "write np.ascontiguousarray(logits)",
        "write np.ascontiguousarray(logits)",
    )
    unknown = [text for text in raise_sites() if not any(code in text for code in known)]
    assert not unknown, unknown
    assert len(list(raise_sites())) >= 8

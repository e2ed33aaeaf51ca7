"""The trainers with linear_kd_loss against the loss computed in float64, text by text and token by token."""

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers and accelerate (pip install 'kdfast[examples]')")
pytest.importorskip("accelerate", reason="needs transformers and accelerate (pip install 'kdfast[examples]')")

import transformers
from transformers import TrainingArguments

import kdfast
from kdfast.examples._texts import VOCABULARY, language_model, make_corpus
from kdfast.examples.text import trainer as example

ALPHA, T, RATE, K = 0.7, 2.0, 0.5, 6


def llama(width, layers, seed, **settings):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.3,
        tie_word_embeddings=False, **settings,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2(width, layers, seed):
    torch.manual_seed(seed)
    return language_model(width, layers, std=0.3)


@pytest.fixture(scope="module")
def texts():
    found = [sample.tokens for sample in make_corpus(4, seed=1)]
    assert len({len(text) for text in found}) == 4, "the tests need texts of different lengths"
    return found


@pytest.fixture
def make_trainer(texts, tmp_path):
    def make(teacher, model=gpt2, dtype=torch.float32, **settings):
        student = model(16, 1, seed=2).to(dtype)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, max_steps=1, max_grad_norm=0, save_strategy="no", report_to="none",
            disable_tqdm=True, dataloader_pin_memory=False, **settings,
        )  # fmt: skip
        optimizer = torch.optim.SGD(student.parameters(), lr=RATE)
        return example.DistillTrainer(
            model=student, args=arguments, data_collator=example.pad, teacher=teacher,
            train_dataset=[{"input_ids": text, "number": i} for i, text in enumerate(texts)],
            loss={"alpha": ALPHA, "temperature": T},
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
        )  # fmt: skip

    return make


def expected_loss(model, teacher, texts, first=1, k=None):
    """Return the sum over the tokens from the ``first`` on and their number, of whole distributions or top k ones."""
    total, count = 0, 0
    for tokens in texts:
        student = model(input_ids=tokens[None]).logits[0].double()
        with torch.no_grad():
            target = teacher(input_ids=tokens[None]).logits[0].double()
        for s in range(first - 1, len(tokens) - 1):
            ce = -student[s].log_softmax(0)[tokens[s + 1]]
            p, q = (student[s] / T).softmax(0), (target[s] / T).softmax(0)
            if k is not None:
                top = target[s].topk(k).indices
                p, q = (torch.cat([x[top], 1 - x[top].sum()[None]]) for x in (p, q))
            total = total + (1 - ALPHA) * ce + ALPHA * T**2 * (q * (q.log() - p.log())).sum()
            count += 1
    return total, count


@pytest.mark.parametrize("model", [gpt2, llama])
@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (1, 4)])
def test_update_with_hidden_states_does_not_depend_on_accumulation(make_trainer, texts, model, batch, accumulation):
    teacher = model(32, 2, seed=1).eval()
    trainer = make_trainer(teacher, model, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    loss, count = expected_loss(trainer.model.train(), teacher, texts)
    gradients = torch.autograd.grad(loss / count, list(trainer.model.parameters()))
    assert trainer.train().training_loss == pytest.approx(loss.item() / count, rel=1e-5)
    assert max(float(g.abs().max()) for g in gradients) > 0.05
    for (name, after), gradient in zip(trainer.model.named_parameters(), gradients, strict=True):
        moved = (before[name] - after.detach()) / RATE
        torch.testing.assert_close(moved, gradient, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture
def stored(texts, tmp_path):
    """Return a teacher and its cache at T, which holds the tokens of each text from a given one on."""
    teacher = gpt2(32, 2, seed=1).eval()

    def store(first, name):
        with kdfast.TokenWriter(tmp_path / name, vocabulary=VOCABULARY, temperature=T) as writer, torch.no_grad():
            for text in texts:
                logp = (teacher(input_ids=text[None]).logits[0] / T).log_softmax(-1)[max(first - 1, 0) : -1]
                values, ids = logp.topk(K)
                labels = text[first:]
                if first == 0:  # as an inference server's log of prompts
                    values = torch.cat([torch.full((1, K), -torch.inf), values])
                    ids = torch.cat([ids[:1], ids])
                writer.add(values, ids, labels=labels)
        return kdfast.TokenTeacher.open(tmp_path / name)

    return teacher, store


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2)])
def test_update_with_cache_is_that_of_its_tokens(make_trainer, stored, texts, first, batch, accumulation):
    teacher, store = stored
    cache = store(first, f"cache{first}")
    trainer = make_trainer(cache, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    loss, count = expected_loss(trainer.model.train(), teacher, texts, max(first, 1), K)
    gradients = torch.autograd.grad(loss / count, list(trainer.model.parameters()))
    trainer.train()
    for (name, after), gradient in zip(trainer.model.named_parameters(), gradients, strict=True):
        moved = (before[name] - after.detach()) / RATE  # the cache is float16
        torch.testing.assert_close(moved, gradient, rtol=5e-3, atol=5e-3, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("left", [False, True])
def test_collator_finds_texts_padded_on_either_side(stored, texts, left):
    _, store = stored
    collate = example.pad
    if left:

        def collate(samples):
            flipped = [{"input_ids": sample["input_ids"].flip(0)} for sample in samples]
            return {key: x.flip(1) for key, x in example.pad(flipped).items()}

    cache = store(3, "answers")
    batch = example.TeacherCollator(collate, cache, T)([{"input_ids": texts[i], "number": i} for i in (2, 0)])
    for b, i in enumerate((2, 0)):
        columns = batch["attention_mask"][b].nonzero().squeeze(1)
        assert (batch["labels"][b, columns[:3]] == -100).all()
        assert torch.equal(batch["labels"][b, columns[3:]], texts[i][3:])
        alone = cache.lookup([i], T)
        rows = batch["rows"][b, columns[3:]]
        assert torch.equal(batch["teacher"][1][rows], alone.teacher.classes[alone.rows[0]])
    assert int((batch["labels"] != -100).sum()) == len(texts[0]) + len(texts[2]) - 6


def test_collator_names_texts_that_are_not_those_of_the_cache(stored, texts):
    _, store = stored
    collate = example.TeacherCollator(example.pad, store(1, "all"), T)
    with pytest.raises(ValueError, match='a sample has no "number"'):
        collate([{"input_ids": texts[1]}])
    with pytest.raises(ValueError, match="text 1 has 3 tokens, and"):
        collate([{"input_ids": texts[1][:3], "number": 1}])
    with pytest.raises(ValueError, match="text 1 has other tokens in the cache"):
        collate([{"input_ids": (texts[1] + 1) % VOCABULARY, "number": 1}])


def test_no_logits_of_all_tokens(make_trainer, texts):
    teacher = llama(32, 2, seed=1).eval()
    trainer = make_trainer(teacher, llama, per_device_train_batch_size=4)
    heads = [trainer.model.lm_head, teacher.lm_head]
    for head in heads:
        head.register_forward_hook(lambda *_: pytest.fail("a last layer was called"))
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] > 0


def small(config, **settings):
    return config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, pad_token_id=0, bos_token_id=0, eos_token_id=0, **settings,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "settings", "key", "value"),
    [
        ("Gemma2", {"final_logit_softcapping": 0.5, "head_dim": 8}, "softcap", 0.5),
        ("Cohere", {"logit_scale": 0.25}, "logit_scale", 0.25),
        ("Granite", {"logits_scaling": 8.0}, "logit_scale", 0.125),
    ],
)
def test_last_layer_scales_as_the_architecture(name, settings, key, value):
    torch.manual_seed(0)
    config = small(getattr(transformers, f"{name}Config"), **settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    assert example.last_layer(model)[key] == value
    example.add_loss(model)
    tokens = torch.randint(VOCABULARY, (2, 8))
    labels = torch.randint(VOCABULARY, (16,))
    teacher = torch.randn(16, VOCABULARY)
    arguments = {"labels": labels, "teacher": teacher, "alpha": 0.5, "temperature": 1.0}
    expected = kdfast.kd_loss(model(input_ids=tokens).logits.flatten(0, 1), labels, teacher, alpha=0.5, temperature=1.0)
    torch.testing.assert_close(model(input_ids=tokens, linear_loss=arguments), expected)


def test_refuses_logits_it_does_not_know():
    model = llama(16, 1, seed=0)
    plain = model.forward

    def forward(*args, **inputs):
        outputs = plain(*args, **inputs)
        outputs.logits = outputs.logits * 3
        return outputs

    model.forward = forward
    with pytest.raises(ValueError, match="LlamaForCausalLM changes the logits of its last layer"):
        example.add_loss(model)

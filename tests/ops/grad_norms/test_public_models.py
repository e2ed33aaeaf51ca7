"""Classes of transformers, timm, torchvision and peft, where they are installed, against autograd in float64."""

import pytest
import torch
import torch.nn.functional as F

import kdfast

N, LENGTH, CLASSES, SIDE = 3, 6, 4, 32
TEXT = {
    "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "num_labels": CLASSES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
TEXTS = {
    "Llama": {"num_key_value_heads": 2},
    "Qwen2": {"num_key_value_heads": 2},
    "Mistral": GROUPED,
    "Gemma": GROUPED,
    "OPT": {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 20},
    "GPTNeoX": {},
    "ModernBert": {"cls_token_id": 1, "sep_token_id": 2},
    "T5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
}
VISION = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": SIDE,
    "patch_size": 8, "num_labels": CLASSES,
}  # fmt: skip
VISIONS = {"ViT": {}, "DeiT": {}, "Dinov2": {}, "Beit": {}, "ConvNext": {"depths": [1, 1], "hidden_sizes": [8, 16]}}


def expected(model, batch, y):
    model = model.double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    out = []
    for i in range(len(y)):
        one = {key: x[i : i + 1].double() if x.is_floating_point() else x[i : i + 1] for key, x in batch.items()}
        outputs = model(**one)
        loss = F.cross_entropy(getattr(outputs, "logits", outputs), y[i : i + 1])
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        out.append(sum(g.square().sum() for g in grads if g is not None).sqrt())
    return torch.stack(out)


def check(model, batch, y, rtol=1e-5, **options):
    model = model.eval()
    found = kdfast.grad_norms(model, batch, y, **options)
    torch.testing.assert_close(found.double(), expected(model, batch, y), rtol=rtol, atol=0)


def text(n=N):
    ids, mask = torch.randint(3, 30, (n, LENGTH)), torch.ones(n, LENGTH, dtype=torch.int64)
    mask[1:, 4:], ids[:, 3] = 0, 2
    return {"input_ids": ids, "attention_mask": mask}, torch.randint(0, CLASSES, (n,))


def make_text(name):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**{**TEXT, **TEXTS[name]})
    return getattr(transformers, f"{name}ForSequenceClassification")(config)


@pytest.mark.parametrize("n", [2, N, LENGTH])
@pytest.mark.parametrize("name", TEXTS)
def test_language_models(name, n):
    model = make_text(name)
    batch, y = text(n)
    if name == "T5":
        batch = {"input_ids": batch["input_ids"]}
    check(model, batch, y)


@pytest.mark.parametrize("name", ["Mamba", "Olmo"])
def test_language_models_without_a_classifier(name):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**{key: v for key, v in TEXT.items() if key != "num_labels"})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    ids, y = torch.randint(3, 30, (N, LENGTH)), torch.randint(0, 30, (N, LENGTH))

    def loss(outputs, labels):
        return F.cross_entropy(outputs.logits.transpose(1, 2), labels, reduction="none").mean(1)

    found = kdfast.grad_norms(model, {"input_ids": ids}, y, loss=loss)
    model = model.double()
    for i in range(N):
        value = loss(model(input_ids=ids[i : i + 1]), y[i : i + 1]).sum()
        grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
        exact = sum(g.square().sum() for g in grads if g is not None).sqrt()
        torch.testing.assert_close(found[i].double(), exact, rtol=1e-5, atol=0)


def test_vmap_with_an_attention_mask():
    from kdfast.ops.grad_norms.fallback import evaluate_by_vmap
    from kdfast.ops.grad_norms.functionals import SquaredNorms
    from kdfast.ops.grad_norms.objective import Objective
    from kdfast.ops.grad_norms.recording.batch_axis import Batch

    model = make_text("Llama").eval()
    batch, y = text()

    def loss(outputs, labels):
        return F.cross_entropy(outputs.logits, labels, reduction="none")

    losses = loss(model(**batch), y).detach()
    parameters = dict(model.named_parameters())
    objective = Objective(loss, y)
    squares = evaluate_by_vmap(Batch(model, batch, objective, N, 0), parameters, losses, SquaredNorms("auto", "auto"))
    found = sum(squares.values()).sqrt().double()
    torch.testing.assert_close(found, expected(model, batch, y), rtol=1e-5, atol=0)


@pytest.mark.parametrize("n", [N, 5])  # 5 x 5 patches and 16 features are as many as other batches
@pytest.mark.parametrize("name", VISIONS)
def test_vision_models_of_transformers(name, n):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**{**VISION, **VISIONS[name]})
    model = getattr(transformers, f"{name}ForImageClassification")(config)
    check(model, {"pixel_values": torch.randn(n, 3, SIDE, SIDE)}, torch.randint(0, CLASSES, (n,)))


def test_vision_transformer_of_torchvision():
    models = pytest.importorskip("torchvision.models")
    model = models.VisionTransformer(SIDE, 8, 2, 2, 16, 24, num_classes=CLASSES)
    torch.nn.init.normal_(model.heads[0].weight)
    check(model, {"x": torch.randn(N, 3, SIDE, SIDE)}, torch.randint(0, CLASSES, (N,)))


SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2}
TIMM = {
    "vit_tiny_patch16_224": {"img_size": SIDE, **SMALL, "init_values": 0.1, "reg_tokens": 2, "qk_norm": True},
    "swin_tiny_patch4_window7_224": {
        "img_size": SIDE, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2),
    },
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},
    "resnet18": {},
    "cait_xxs24_224": {"img_size": SIDE, **SMALL},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_vision_models_of_timm(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=CLASSES, **TIMM[name])
    side = TIMM[name].get("img_size", SIDE)
    check(model, {"x": torch.randn(N, 3, side, side)}, torch.randint(0, CLASSES, (N,)), rtol=3e-5)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "IA3"])
def test_adapters_of_peft(kind):
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj", "down_proj"]
    if kind == "IA3":
        config = peft.IA3Config(task_type="SEQ_CLS", target_modules=targets, feedforward_modules=["down_proj"])
    else:
        config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=targets, use_dora=kind == "DoRA")
    model = peft.get_peft_model(make_text("Llama"), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    batch, y = text()
    check(model, batch, y)

"""What the recording of operations must and must not do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import kdfast
from kdfast.errors import UsageError

N, WIDTH, CLASSES = 5, 4, 3


def data():
    return torch.randn(N, WIDTH, dtype=torch.float64), torch.randint(0, CLASSES, (N,))


def expected(model, x, y):
    losses = F.cross_entropy(model(x), y, reduction="none")
    parameters = list(model.parameters())
    grads = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    return torch.stack([sum(g.square().sum() for g in each if g is not None).sqrt() for each in grads])


class Net(nn.Module):
    """A scale, used as the ``use`` says, and a head."""

    def __init__(self, use):
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.rand(WIDTH)), nn.Linear(WIDTH, CLASSES)
        self.use = use
        self.double()

    def forward(self, x):
        return self.head(self.use(self, x))


def written(net, x):
    """Writes the scale into a tensor of samples."""
    x = x * 1
    x[:, :] = net.scale + x[:, :]
    return x


def on_a_view(net, x):
    x = x * 1
    x.view(-1, 2, 2).mul_(net.scale.view(2, 2))
    return x


def conditional(net, x):
    return torch.where(x > 0, x * net.scale, net.scale)


def derived_in_place(net, x):
    weight = net.scale.clone()
    weight *= 2
    weight[0] = 1.0
    return x * weight


def checkpointed(net, x):
    return checkpoint(lambda v: (v * net.scale).tanh() * net.scale, x, use_reentrant=False)


def nested(net, x):
    return torch.stack([x, net.scale.expand_as(x)]).unbind(0)[1] * torch.cat([x, x * net.scale], 1)[:, WIDTH:]


def detached(net, x):
    with torch.no_grad():
        ratio = net.scale / net.scale.sum()
    return x * ratio + x * net.scale.detach() + net.scale


def normalized(net, x):
    return F.batch_norm(x, x.new_zeros(WIDTH), x.new_ones(WIDTH), net.scale, net.scale + 1, training=False)


def many(net, x):
    for _ in range(4):
        x = (x * net.scale).tanh() + net.scale
    return x


USES = [written, on_a_view, conditional, derived_in_place, checkpointed, nested, detached, normalized, many]


@pytest.mark.parametrize("use", USES)
def test_uses_of_a_parameter_are_scored_correctly_or_rejected(use):
    model, (x, y) = Net(use), data()
    try:
        found = kdfast.grad_norms(model, x, y)
    except UsageError:
        assert use is on_a_view
        found = kdfast.grad_norms(model, x, y, fallback="loop")
    torch.testing.assert_close(found, expected(model, x, y), rtol=1e-10, atol=0)


def batch_statistics(net, x):
    return F.batch_norm(x, None, None, net.scale, training=True)


def test_operations_with_other_results_on_single_samples_are_rejected():
    """Statistics of a batch of one sample exist here, and differ."""

    def use(net, x):
        return F.batch_norm(x[..., None] * x.new_tensor([1.0, 2.0]), None, None, net.scale, training=True).sum(2)

    model, (x, y) = Net(use), data()
    with pytest.raises(UsageError, match="batch_norm gives other results on a single sample than on the batch"):
        kdfast.grad_norms(model, x, y)


def test_operations_that_mix_samples_are_rejected():
    model, (x, y) = Net(batch_statistics), data()
    with pytest.raises(UsageError, match=r"parameter 'scale' (is not covered|is used by an operation that mixes)"):
        kdfast.grad_norms(model, x, y)


def test_arguments_changed_in_place_after_the_operation():
    def added(net, x):
        x = x * 1.0
        y = x + net.scale
        x.add_(1)
        return y

    def multiplied(net, x):
        x = x * 1.0
        y = x.detach() * net.scale
        x.mul_(2)
        return y

    x, y = data()
    model = Net(added)
    torch.testing.assert_close(kdfast.grad_norms(model, x, y), expected(model, x, y), rtol=1e-10, atol=0)
    with pytest.raises(UsageError, match="parameter 'scale' is not covered: an argument of mul was changed in place"):
        kdfast.grad_norms(Net(multiplied), x, y)


class Changing(nn.Module):
    """Layers in training mode that change their buffers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.utils.parametrizations.spectral_norm(nn.Conv1d(2, 3, 1))
        self.norm = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
        self.head = nn.Linear(6, CLASSES)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("average", torch.zeros(3, 2, dtype=torch.float64))

    def forward(self, x):
        x = self.norm(self.conv(x))
        self.calls += 1
        self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
        return self.head(x.flatten(1))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_running_statistics_may_be_updated_by_several_runs(n):
    """Two calls in a forward pass, and a run on a few samples, as 3 channels and 2 positions are as many."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
            self.head = nn.Linear(6, CLASSES)

        def forward(self, x):
            return self.head(self.norm(self.norm(x) ** 2).flatten(1))

    model = Net().double().train()
    x, y = torch.randn(n, 3, 2, dtype=torch.float64), torch.randint(0, CLASSES, (n,))
    mean = model.norm.running_mean.clone()
    found = kdfast.grad_norms(model, x, y)
    assert torch.equal(model.norm.running_mean, mean)
    for i in range(n):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        torch.testing.assert_close(found[i], torch.cat([g.flatten() for g in grads]).norm())


@pytest.mark.parametrize("fallback", ["error", "loop"])
@pytest.mark.parametrize("function", ["grad_norms", "network_hvp"])
def test_buffers_are_unchanged(function, fallback):
    model = Changing().double().train()
    x, y = torch.randn(N, 2, 2, dtype=torch.float64), torch.randint(0, CLASSES, (N,))
    before = copy.deepcopy(model.state_dict())
    hooks = [len(m._forward_hooks) for m in model.modules()]
    if function == "grad_norms":
        found = kdfast.grad_norms(model, x, y, fallback=fallback)
        assert bool((found > 0).all())
    else:
        size = sum(p.numel() for p in model.parameters())
        with pytest.raises(UsageError, match=r"torch\.func"):
            kdfast.network_hvp(model, x, y, torch.zeros(size, dtype=torch.float64))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_rejects_layers_in_eval_mode_that_change_buffers():
    model = Changing().double().eval()
    x, y = torch.randn(N, 2, 2, dtype=torch.float64), torch.randint(0, CLASSES, (N,))
    with pytest.raises(UsageError, match="buffer 'calls' is changed by a layer in eval mode"):
        kdfast.grad_norms(model, x, y)


def test_second_forward_pass_repeats_the_random_numbers():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.drop, self.head = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, CLASSES)

        def forward(self, x):
            return self.head(self.drop(self.mix(x)) @ self.mix.weight)  # a use outside the layer

    model, (x, y) = Dropped().double().train(), data()
    torch.manual_seed(0)
    found = kdfast.grad_norms(model, x, y)
    after = torch.rand(1)
    torch.manual_seed(0)
    exact = expected(model, x, y)
    assert torch.rand(1) == after
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=0)


def test_data_parallel_wrappers_are_looked_through():
    model, (x, y) = Net(many), data()
    wrapped = nn.DataParallel(model)
    assert torch.equal(kdfast.grad_norms(wrapped, x, y), kdfast.grad_norms(model, x, y))


@pytest.mark.parametrize("n", [3, 4, 8])
def test_rows_of_several_samples_that_are_not_their_outer_part(n):
    """Flattened as (time, samples): no block of rows is one sample."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

        def forward(self, x):
            steps = x.shape[1]
            rows = self.mix(x.transpose(0, 1).reshape(-1, WIDTH)).view(steps, -1, WIDTH)
            return self.head(rows.tanh().mean(0))

    class Outer(Inner):
        def forward(self, x):
            return self.head(self.mix(x.reshape(-1, WIDTH)).view(*x.shape).tanh().mean(1))

    x, y = torch.randn(n, 6, WIDTH, dtype=torch.float64), torch.randint(0, CLASSES, (n,))
    model = Outer().double()
    torch.testing.assert_close(kdfast.grad_norms(model, x, y), expected(model, x, y), rtol=1e-10, atol=0)
    model = Inner().double()
    with pytest.raises(UsageError, match=r"'mix\.weight' is used on a dimension that holds samples and something else"):
        kdfast.grad_norms(model, x, y)
    for fallback in ("vmap", "loop"):
        found = kdfast.grad_norms(model, x, y, fallback=fallback)
        torch.testing.assert_close(found, expected(model, x, y), rtol=1e-10, atol=0)

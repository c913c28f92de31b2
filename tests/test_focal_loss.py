"""focal_loss against its float64 reference, in torch and Triton; what must not pass."""

import doctest
import importlib

import pytest
import torch
import torchvision

from kernels.focal_loss import focal_loss, focal_loss_reference

module = importlib.import_module("kernels.focal_loss")  # `kernels.focal_loss` is the function
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Two roundings: of the slope kept and of the result. The interpreter cuts bfloat16 off, not rounds.
EPS = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # log2(0), in numpy
IMPLS = ("torch", "triton")


def case(M, K, dtype=torch.float32, scale=3.0):
    """Logits, labels from -1 to K, and what the losses are multiplied by."""
    g = torch.Generator().manual_seed(M * 1000 + K)
    logits = (scale * torch.randn((M, K), generator=g)).to(DEVICE, dtype)
    labels = torch.randint(-1, K + 1, (M,), generator=g).to(DEVICE)
    return logits, labels, torch.rand(M, generator=g).to(DEVICE)


def run(function, logits, labels, scale, *args, **options):
    logits = logits.detach().requires_grad_()
    loss = function(logits, labels, *args, **options)
    (grad,) = torch.autograd.grad((loss * scale).sum(), logits)
    return loss.detach(), grad


def check(found, logits, labels, scale, *args):
    """Each error at most twice that of torch at this dtype, plus eps of the value."""
    exact = run(focal_loss_reference, logits.double(), labels, scale.double(), *args)
    rival = run(focal_loss_reference, logits, labels, scale, *args)
    for out, truth, other, dtype in zip(found, exact, rival, (torch.float32, logits.dtype)):
        assert out.shape == truth.shape and out.dtype == dtype == other.dtype
        allowed = 2 * (other.double() - truth).abs() + EPS[dtype] * truth.abs()
        tiny = 6e-8 if dtype == torch.float16 else 1e-37  # below it numbers are not normal
        assert ((out.double() - truth).abs() <= allowed + tiny).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("M, K", [(1, 1), (70, 80), (130, 3), (5, 17), (1100, 1), (0, 4)])
def test_against_float64(M, K, dtype, impl):
    tensors = case(M, K, dtype)
    check(run(focal_loss, *tensors, impl=impl), *tensors)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("alpha, gamma", [(0.5, 0.0), (0.25, 1.0), (0.4, 1.5), (0.9, 3.0)])
def test_alpha_and_gamma(alpha, gamma, impl):
    tensors = case(60, 9)
    check(run(focal_loss, *tensors, alpha, gamma, impl=impl), *tensors, alpha, gamma)


@pytest.mark.parametrize("impl", IMPLS)
def test_extreme_logits_and_ignored_rows(impl):
    logits = torch.tensor([[100.0, -100.0], [88.0, -88.0], [20.5, -20.5], [0.0, -0.0]])
    logits = logits.repeat_interleave(4, 0).to(DEVICE)
    labels = torch.tensor([-1, 0, 1, 2]).repeat(4).to(DEVICE)
    scale = torch.ones(16, device=DEVICE)
    loss, grad = found = run(focal_loss, logits, labels, scale, impl=impl)
    check(found, logits, labels, scale)
    assert loss.isfinite().all() and grad.isfinite().all()
    assert not loss[::4].any() and not grad[::4].any()
    ignored = run(focal_loss, logits, torch.full_like(labels, -1), scale, impl=impl)
    assert not any(t.any() for t in ignored)


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides_and_label_dtype(impl):
    logits, labels, scale = case(33, 20)
    wanted = run(focal_loss, logits, labels, scale, impl=impl)
    for other in (logits.T.contiguous().T, torch.stack([logits, logits], 2)[..., 1]):
        for a, b in zip(run(focal_loss, other, labels.int(), scale, impl=impl), wanted):
            torch.testing.assert_close(a, b)
    wide = torch.where(labels == 20, 10**6, labels)  # background is K or more
    assert torch.equal(focal_loss(logits, wide, impl=impl), wanted[0])


def test_worked_by_hand_and_torchvision():
    # p = 1/2: 1/4 * 1/4 * ln 2 for the true class, 3/4 * 1/4 * ln 2 for another.
    found = focal_loss(torch.zeros(3, 1), torch.tensor([0, 1, -1])) / torch.tensor(2.0).log()
    torch.testing.assert_close(found, torch.tensor([0.0625, 0.1875, 0]))
    logits, labels, scale = case(50, 7)
    target = (labels[:, None] == torch.arange(7, device=DEVICE)).float()
    wanted = torchvision.ops.sigmoid_focal_loss(logits, target, 0.3, 1.7).sum(1) * (labels >= 0)
    torch.testing.assert_close(focal_loss(logits, labels, 0.3, 1.7), wanted)


def test_doctest():
    assert doctest.testmod(module).failed == 0 < doctest.testmod(module).attempted


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 2.5])
def test_gradcheck(gamma):
    logits, labels, _ = case(6, 4)
    logits = logits.double().requires_grad_()
    for function in (focal_loss, focal_loss_reference):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, labels, 0.3, gamma), logits)


def test_scaled_float16_loss_keeps_small_slopes():
    """Slopes below float16's smallest number must survive until the loss scale lifts them."""
    logits = torch.full((1, 8), -8.0, dtype=torch.float16, device=DEVICE)
    labels, scale = torch.tensor([8], device=DEVICE), torch.tensor([2.0**16], device=DEVICE)
    for impl in IMPLS:
        _, grad = run(focal_loss, logits, labels, scale, impl=impl)
        assert (grad > 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_double_backward_raises(impl):
    logits, labels, _ = case(4, 3)
    logits.requires_grad_()
    loss = focal_loss(logits, labels, impl=impl).sum()
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="focal_loss_reference"):
        grad.square().sum().backward()


def test_negative_controls():
    logits, labels, scale = tensors = case(40, 6)
    loss, grad = run(focal_loss, *tensors)
    check((loss, grad), *tensors)
    shifted = torch.where(labels >= 0, (labels + 1) % 7, -1)
    for wrong in (
        (torch.zeros_like(loss), torch.zeros_like(grad)),
        (loss, 0 * grad),
        (loss, -grad),
        run(focal_loss, logits, shifted, scale),  # off by one class
        run(focal_loss, logits, labels, scale, alpha=0.75),  # alpha and 1 - alpha swapped
        run(focal_loss, logits, labels, scale, gamma=1.9),
        run(focal_loss, logits, labels.clamp(min=0), scale),  # an ignored row counts
        (loss.flip(0), grad),
        (loss * float("nan"), grad),
    ):
        with pytest.raises(AssertionError):
            check(wrong, *tensors)


def test_arguments():
    logits, labels, _ = case(5, 4)
    for bad in (
        lambda: focal_loss(logits[0], labels),
        lambda: focal_loss(logits[:, :0], labels),
        lambda: focal_loss(logits.long(), labels),
        lambda: focal_loss(logits, labels[1:]),
        lambda: focal_loss(logits, labels.float()),
        lambda: focal_loss(logits, labels.to("meta")),
        lambda: focal_loss(logits, labels, gamma=-1.0),
        lambda: focal_loss(logits, labels, impl="cuda"),
        lambda: focal_loss(logits.double(), labels, impl="triton"),
    ):
        with pytest.raises(ValueError):
            bad()


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_without_a_graph_break(impl):
    def scaled(logits, labels, scale):
        return focal_loss(logits * 1.5, labels, impl=impl) * scale

    compiled = torch.compile(scaled, fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (7, 20):
        logits, labels, scale = case(M, 5)
        for a, b in zip(*(run(f, logits, labels, 1, scale) for f in (compiled, scaled))):
            torch.testing.assert_close(a, b)


def test_nothing_is_kept_without_gradients():
    logits, labels, _ = case(9, 5)
    assert module._focal(logits, labels, 0.25, 2.0, False, "torch")[1].numel() == 0
    assert not focal_loss(logits, labels).requires_grad

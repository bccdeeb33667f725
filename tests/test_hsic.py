"""The loss: official values, naive forms, identities, collapse. Distributed exactness is in test_ranks.py."""

import math

import numpy
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT  # noqa: F401

import hsic

# (seed, images, views, features, HSIC(Z, Y), HSIC(Z, Z)) computed with the official code,
# google-deepmind/ssl_hsic
OFFICIAL = [
    (200, 8, 2, 16, 13.127539222241557, 14.932149040622877),
    (201, 32, 4, 64, 21.76239961344157, 32.088952574044),
    (202, 100, 2, 33, 32.23390178913987, 5.4536352691832235),
]


def draw(seed, b, k, f):
    r = numpy.random.RandomState(seed)
    return (torch.tensor(numpy.stack([r.randn(b, f) for _ in range(k)])) for _ in range(2))


def imq(z, c=1.0):
    """Gram matrix of the exact kernel for rows z (n, d)."""
    return c / (c**2 + torch.cdist(z, z) ** 2).sqrt()


def exact_loss(zs, gamma=3.0, c=1.0):
    """L with the exact kernel, from the definition: (dependence form of HSIC(Z, Y), HSIC(Z, Z) from
    Tr(KHKH))."""
    M, B, d = zs.shape
    K = imq(F.normalize(zs, dim=2).reshape(M * B, d), c)
    same = torch.eye(B).repeat(M, M).double()
    zy = (K * same).sum() / (B * M * (M - 1)) - K.mean()
    H = torch.eye(M * B).double() - 1 / (M * B)
    return -zy + gamma * (torch.trace(K @ H @ K @ H) / (M * B) ** 2).sqrt()


@pytest.mark.parametrize("seed, b, k, f, zy, zz", OFFICIAL)
def test_official_values_hold(seed, b, k, f, zy, zz):
    phi, psi = draw(seed, b, k, f)
    assert hsic.hsic_zy(phi).item() == pytest.approx(zy, rel=1e-12)
    assert hsic.hsic_zz(phi, psi).item() == pytest.approx(zz, rel=1e-12)


def test_estimators_equal_the_double_loop_over_gram_matrices():
    phi, psi = draw(0, 5, 3, 7)
    M, B, _ = phi.shape
    zy = sum(phi[p, i] @ phi[q, i] for i in range(B) for p in range(M) for q in range(M)) / (B * M * (M - 1))
    zy = (
        zy
        - sum(phi[p, i] @ phi[q, j] for i in range(B) for j in range(B) for p in range(M) for q in range(M))
        / (B * M) ** 2
    )
    K, L = (t.reshape(M * B, -1) @ t.reshape(M * B, -1).mT for t in (phi, psi))
    H = torch.eye(M * B).double() - 1 / (M * B)
    assert hsic.hsic_zy(phi).item() == pytest.approx(zy.item(), rel=1e-12)
    assert hsic.hsic_zz(phi, psi).item() == pytest.approx(
        (torch.trace(K @ H @ L @ H) / (M * B) ** 2).item(), rel=1e-12
    )


@pytest.mark.parametrize("kernel", ["imq", "gaussian"])
def test_features_converge_to_the_exact_kernel_at_rate_one_over_root_f(kernel):
    torch.manual_seed(0)
    z, c = F.normalize(torch.randn(40, 32), dim=1), 0.7
    K = imq(z, c) if kernel == "imq" else torch.exp(-(torch.cdist(z, z) ** 2) / (2 * c**2))
    errors = []
    for f in (256, 4096, 65536):
        phi = hsic.random_features(z, *hsic.sample_features(32, f, kernel, 0, 0, "cpu"), c)
        errors.append((phi @ phi.mT - K).square().mean().sqrt().item())
    assert errors[2] < 0.006
    assert all(2.5 < a / b < 6.5 for a, b in zip(errors, errors[1:], strict=False)), (
        errors
    )  # 4 in expectation


def test_loss_with_many_features_is_the_loss_of_the_exact_kernel():
    torch.manual_seed(1)
    z = torch.randn(24, 16).double()
    zs = torch.stack([z + 0.3 * torch.randn(24, 16), z + 0.3 * torch.randn(24, 16)])
    for c in (1.0, 0.5):
        values = [hsic.hsic_loss(zs, c, f=2048, step=step)[0].item() for step in range(8)]
        assert numpy.mean(values) == pytest.approx(exact_loss(zs, c=c).item(), abs=0.03)


def test_exact_kernel_is_the_definition_in_value_and_gradient():
    torch.manual_seed(1)
    zs = torch.randn(3, 12, 5).double().requires_grad_()
    mine, want = hsic.hsic_loss(zs, 0.6, f=0)[0], exact_loss(zs, c=0.6)
    assert mine.item() == pytest.approx(want.item(), rel=1e-9)
    assert torch.allclose(*(torch.autograd.grad(loss, zs)[0] for loss in (mine, want)), atol=1e-9)


def test_draws_are_a_function_of_seed_and_step():
    a, b = hsic.sample_features(8, 16, "imq", 0, 5, "cpu"), hsic.sample_features(8, 16, "imq", 0, 5, "cpu")
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for seed, step in ((1, 5), (0, 6)):
        assert not torch.equal(a[0], hsic.sample_features(8, 16, "imq", seed, step, "cpu")[0])
    omega, _ = hsic.sample_features(256, 20000, "imq", 0, 0, "cpu")
    amplitude = omega.norm(dim=0)  # the official table: mean 12.75, deviation 9.65 at d = 256
    assert amplitude.mean() == pytest.approx(12.75, abs=0.25) and amplitude.std() == pytest.approx(
        9.65, abs=0.25
    )


def test_dependence_is_near_0_when_z_ignores_identity_and_largest_when_views_coincide():
    torch.manual_seed(2)
    a, b = torch.randn(2, 512, 64).double()
    views = [torch.stack([a, s * a + (1 - s * s) ** 0.5 * b]) for s in (0, 0.5, 0.9, 1)]
    dependence = [hsic.hsic_loss(zs, f=2048)[1]["dependence"].item() for zs in views]
    assert abs(dependence[0]) < 0.005
    assert dependence[0] < dependence[1] < dependence[2] < dependence[3]
    assert dependence[3] == pytest.approx(
        1 - 3**-0.5, abs=0.02
    )  # k of one point, 1, less that of orthogonal ones


@pytest.mark.parametrize("kernel, f", [("imq", 32), ("gaussian", 32), ("imq", 0), ("linear", 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_at_collapse_and_in_odd_shapes_are_finite(kernel, f, dtype):
    torch.manual_seed(0)
    point = torch.randn(4, dtype=dtype)
    cases = [point.expand(2, 8, 4), torch.zeros(2, 8, 4, dtype=dtype), torch.randn(2, 1, 4, dtype=dtype),
             torch.randn(3, 8, 1, dtype=dtype), torch.randn(2, 8, 4, dtype=dtype) * 1e4,
             torch.randn(2, 8, 4, dtype=dtype) * 1e-4]  # fmt: skip
    for zs in cases:
        zs = zs.clone().requires_grad_()
        loss, terms = hsic.hsic_loss(zs, kernel=kernel, f=f)
        loss.backward()
        assert loss.isfinite() and zs.grad.isfinite().all() and all(t.isfinite() for t in terms.values())


def test_nan_goes_through_to_the_loss():
    zs = torch.randn(2, 8, 4)
    zs[0, 0, 0] = math.nan
    assert hsic.hsic_loss(zs)[0].isnan()


def test_aligned_spread_embeddings_are_better_than_collapse():
    torch.manual_seed(0)
    spread = F.normalize(torch.randn(256, 256).double(), dim=1).expand(2, 256, 256)
    collapsed = torch.ones(2, 256, 256).double()
    assert hsic.hsic_loss(spread, f=0)[0].item() == pytest.approx(exact_loss(spread).item(), rel=1e-9)
    assert exact_loss(spread).item() == pytest.approx(-1.33, abs=0.02)
    assert exact_loss(collapsed).item() == pytest.approx(-1, abs=1e-6)
    assert hsic.hsic_loss(collapsed, f=4096)[0].item() == pytest.approx(-1, abs=0.03)
    assert hsic.hsic_loss(spread, f=4096)[0].item() == pytest.approx(-1.33, abs=0.03)


def test_small_temperature_hsic_is_infonce_to_second_order():
    """-InfoNCE = E_pos[tau k] - E_all[tau k] - 1/2 E_i Var_j[tau k] + O(tau^3): halving tau divides the rest
    by 8."""
    torch.manual_seed(0)
    a = torch.randn(64, 16).double()
    a, b = F.normalize(a, dim=1), F.normalize(a + 0.5 * torch.randn(64, 16), dim=1)
    rest = []
    for tau in (0.2, 0.1):
        k = tau / (1 + torch.cdist(a, b) ** 2).sqrt()
        infonce = -(k.diagonal() - k.exp().mean(1).log()).mean()
        rest.append(
            (-infonce - (k.diagonal().mean() - k.mean() - k.var(1, correction=0).mean() / 2)).abs().item()
        )
    assert 6 < rest[0] / rest[1] < 10


def test_adaptive_scale_is_the_maximiser_and_adam_goes_there():
    torch.manual_seed(0)
    zs = torch.randn(2, 200, 8).double()
    zs[..., 0] += 2
    for kernel in ("imq", "gaussian"):
        scale = hsic.KernelScale(kernel, "adaptive").double()
        c = scale(zs, 0, 0)
        r2 = scale.squared_distances(zs, 0, 0)

        def log_slope(c, r2=r2, kernel=kernel):
            if kernel == "imq":
                return (c.log() - 1.5 * (c * c + r2).log()).mean()
            return (-2 * c.log() - r2 / (2 * c * c)).mean()

        assert all(log_slope(c) > log_slope(c * s) for s in (0.98, 1.02))
        if kernel == "imq":
            assert (3 * c**2 * (1 / (c**2 + r2)).mean()).item() == pytest.approx(1, abs=1e-4)
        adam = hsic.KernelScale(kernel, "adam").double()
        adam.optimizer.param_groups[0]["lr"] = 0.02
        for step in range(200):
            moved = adam(zs, 0, step)
            adam.optimizer.step()
        assert abs(moved - c) < 0.02


def test_pairs_for_the_scale_are_of_all_views_and_images():
    zs = torch.arange(3 * 50, dtype=torch.double).view(3, 50, 1).expand(3, 50, 2).clone()
    zs[..., 0] = zs[..., 1].cos()
    zs[..., 1] = zs[..., 1].sin()
    r2 = hsic.KernelScale("imq", "adam").squared_distances(zs, 0, 0)
    assert len(r2) == 1024 and r2.mean() == pytest.approx(2, abs=0.15)  # independent points of a circle


def test_loss_is_linear_in_the_number_of_rows():
    import time

    def seconds(n):
        zs = torch.randn(4, n, 64, requires_grad=True)
        times = []
        for step in range(4):
            begun = time.perf_counter()
            hsic.hsic_loss(zs, f=128, step=step)[0].backward()
            times.append(time.perf_counter() - begun)
        return min(times)

    assert seconds(8192) < 4 * 2.2 * seconds(2048)

"""CorInfoMax, MUSIC and SFRIK: official values, naive forms, identities. Ranks are in test_ranks.py."""

import itertools
import math

import numpy
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

import corinfomax
import mmd_sphere
import music


def pair(seed, n, d, scale=1.0, corr=0.7):
    r = numpy.random.RandomState(seed)
    a = r.randn(n, d)
    b = corr * a + math.sqrt(1 - corr**2) * r.randn(n, d)
    return [torch.tensor(x * scale).requires_grad_() for x in (a, b)]


def summary(grad):
    return [grad.abs().sum().item(), grad.flatten()[0].item(), grad.flatten()[-1].item()]


# ---------------------------------------------------------------------------------------- official

# (seed, n, segments, segment size, scale), loss, diagonal, off-diagonal, invariance, gradients: from the
# official code
MUSIC = [
    ((100, 16, 4, 8, 1.0), -3.0948400145248245, -0.6963841399057462, -4.070074718129043, 1.6716188433099655,
     [0.7404474983595547, 0.00032653832969086784, 0.00039407693203575455],
     [0.7322390534674754, 0.0007473360732136809, 0.0005164193291822162]),
    ((101, 64, 6, 10, 3.0), -4.1618457775506394, -1.1378465670159994, -4.395996517638142, 1.371997307103502,
     [0.9265959772204209, -5.895037367515313e-05, 1.073606251684012e-05],
     [0.9849830741350676, -0.0006713610862455019, 1.4366750367824738e-05]),
    ((102, 33, 2, 5, 0.5), -2.3992469531367178, -0.6921039966062101, -3.214258651009189, 1.5071156944786814,
     [0.4511482985036587, -0.00032234959478742893, 0.0009468034339502366],
     [0.41975118145402474, -0.0018074280263112585, 0.0007082868822001014]),
]  # fmt: skip

# (seed, n, d), b, alpha, loss, gradients
SPHERE = [
    ((110, 16, 8), [1, 40, 40], 4000, 272.93648234274724,
     [613.5235661324239, -2.999127344048239, -5.133391495931177],
     [585.5920366491057, 1.4761766082101082, 6.4501660544884505]),
    ((111, 64, 128), [1, 40, 40], 40000, 181.38678185164466,
     [351.9237706249223, -0.14371305329618742, 0.06050427754934118],
     [348.7760968059822, 0.13688473791786426, -0.027346451928095726]),
    ((112, 50, 3), [1, 0, 0], 1, 0.31547818401654126,
     [0.632626158484316, 0.003734985469274568, 0.00024205781505365765],
     [0.5801282457735566, -0.009581611313372825, -0.017459191393476407]),
    ((113, 40, 16), [0, 1, 0], 10, 0.4366033212496496,
     [0.8089465970358594, 0.0029542051742405613, -0.0006491534688353974],
     [0.7339083651335803, -0.0011546098857142392, -0.00013344336128797454]),
]  # fmt: skip

# (n, d, forget, eps, alpha), then per step: seed, invariance, big bang, loss, gradients
CORINFOMAX = [
    ((32, 8, 0.01, 1e-8, 250), [
        (120, 0.07654064088903899, 4.312473995473575, 23.44763421773332,
         [106.57331302017658, -0.44087466656851537, -0.36425801817879677],
         [106.44784204541048, 0.41612641872062794, 0.32861968236382444]),
        (121, 0.07866852733347762, 4.370984621732109, 24.038116455101516,
         [106.27292928862484, 0.994778257212367, 0.29451209453196997],
         [106.40716360168247, -0.9357261071174992, -0.30041797189826536]),
        (122, 0.07908289494367157, 4.609374099590985, 24.380097835508877,
         [106.18961288456919, -0.3229792110680871, 0.19871777880643135],
         [105.98928515875352, 0.3185280094775499, -0.20617514210430088])]),
    ((64, 16, 0.1, 1e-8, 2000), [
        (130, 0.03778230248080613, 3.760622274975674, 79.32522723658793,
         [617.7911605248341, 0.3652228352923323, 0.13319030054616657],
         [617.8060244035927, -0.3625974159325159, -0.13354999028518388]),
        (131, 0.03822909972726686, 5.436806595325344, 81.89500604985908,
         [617.575634385836, 0.6087263383724514, 0.6234738195711137],
         [617.8316011977242, -0.6099743728481763, -0.6303204467368057]),
        (132, 0.03870472095263641, 5.738296134070642, 83.14773803934347,
         [623.532660997216, 0.804860175073265, 0.2585800394738694],
         [623.5940324694003, -0.7903344250756859, -0.2837706421551828])]),
    ((16, 16, 0.5, 1e-3, 1), [
        (140, 0.037002876476018326, 1.2702168884971692, 1.3072197649731876,
         [0.37231283967919604, 0.0022709664931170968, -0.0018467536072677407],
         [0.3779393932150459, 0.0013011954295610868, 0.00050021730775872]),
        (141, 0.03664813176129694, 2.445780402686051, 2.482428534447348,
         [0.5816463913505624, 0.0026909915981447857, -0.0013261596175391474],
         [0.5671591728102492, 0.0014074750944179258, -0.001208724873523588]),
        (142, 0.037926210750749555, 3.4810043259142285, 3.518930536664978,
         [0.8985919763001066, -0.0016730327642581488, 0.0017483245076643317],
         [0.8927079330505749, -0.003345532923670948, 0.003933239924221413])]),
]  # fmt: skip


@pytest.mark.parametrize("inputs, loss, diagonal, off, invariance, grad1, grad2", MUSIC)
def test_music_has_the_official_values(inputs, loss, diagonal, off, invariance, grad1, grad2):
    seed, n, S, s, scale = inputs
    z = pair(seed, n, S * s, scale)
    value, terms = music.music_loss(*z, s)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-6)
    got = [terms[name].item() for name in ("diagonal", "off_diagonal", "invariance")]
    assert got == pytest.approx([diagonal, off, invariance], abs=1e-6)
    assert [*summary(z[0].grad), *summary(z[1].grad)] == pytest.approx([*grad1, *grad2], abs=1e-6)


@pytest.mark.parametrize("inputs, b, alpha, loss, grad1, grad2", SPHERE)
def test_mmd_sphere_has_the_official_values(inputs, b, alpha, loss, grad1, grad2):
    z = pair(*inputs)
    value, _ = mmd_sphere.mmd_sphere_loss(torch.stack(z), alpha, b)
    value.backward()
    assert value.item() == pytest.approx(loss, rel=1e-10)
    assert [*summary(z[0].grad), *summary(z[1].grad)] == pytest.approx([*grad1, *grad2], rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("inputs, steps", CORINFOMAX)
def test_corinfomax_has_the_official_values_over_three_steps(inputs, steps):
    n, d, forget, eps, alpha = inputs
    criterion = corinfomax.CorInfoMax(d, forget, forget, eps)
    for seed, invariance, big_bang, loss, grad1, grad2 in steps:
        z = [F.normalize(x.detach(), dim=1).requires_grad_() for x in pair(seed, n, d)]
        value, terms = criterion(*z, alpha)
        value.backward()
        assert value.item() == pytest.approx(loss, rel=1e-9)
        got = [terms["invariance"].item(), terms["big_bang"].item()]
        assert got == pytest.approx([invariance, big_bang], rel=1e-9)
        assert [*summary(z[0].grad), *summary(z[1].grad)] == pytest.approx(
            [*grad1, *grad2], rel=1e-8, abs=1e-9
        )


# ------------------------------------------------------------------------------------------- MUSIC


def naive_music(z1, z2, s):
    """The definition, one segment pair at a time."""
    n, d = z1.shape
    S = d // s
    p1, p2 = (torch.softmax(z.view(n, S, s), 2) for z in (z1, z2))
    diagonal = off = 0
    for a in range(S):
        for b in range(S):
            P = p1[:, a].mT @ p2[:, b] / n
            if a == b:
                diagonal += (P.diagonal() * P.diagonal().log()).sum() / S
            else:
                off += (P * P.log()).sum() / (S * (S - 1))
    return diagonal + off - (p1 * p2).sum(2).log().mean(), diagonal, off


def test_music_equals_the_loop_over_blocks_in_value_and_gradient():
    z = pair(1, 7, 24)
    for s in (2, 4, 8):
        loss, terms = music.music_loss(*z, s)
        want, diagonal, off = naive_music(*z, s)
        assert [loss.item(), *(terms[k].item() for k in ("diagonal", "off_diagonal"))] == pytest.approx(
            [want.item(), diagonal.item(), off.item()], rel=1e-12
        )
        for got, grad in zip(torch.autograd.grad(loss, z), torch.autograd.grad(want, z), strict=True):
            assert torch.allclose(got, grad, atol=1e-14)


def one_hot_codes(codes, s):
    """Embeddings (N, S s) so confident that the softmax is the one-hot of codes (N, S)."""
    return 60 * F.one_hot(torch.tensor(codes), s).double().flatten(1)


def test_music_reaches_its_bound_on_a_full_factorial_design_and_collapse_is_worse():
    s, S = 3, 3
    z = one_hot_codes(list(itertools.product(range(s), repeat=S)), s)
    assert music.music_loss(z, z, s)[0].item() == pytest.approx(-3 * math.log(s), abs=1e-9)
    constant = one_hot_codes([[0] * S] * 27, s)
    assert music.music_loss(constant, constant, s)[0].item() == pytest.approx(0, abs=1e-9)
    uniform = torch.zeros(27, S * s).double()
    assert music.music_loss(uniform, uniform, s)[0].item() == pytest.approx(
        -(1 + 2 / s) * math.log(s), abs=1e-9
    )
    for seed in range(5):
        assert music.music_loss(*pair(seed, 20, 9, 5.0), s)[0].item() > -3 * math.log(s)


def test_music_does_not_see_the_order_of_units_and_segments():
    torch.manual_seed(0)
    z1, z2 = (x.detach().view(11, 4, 6) for x in pair(2, 11, 24))
    units, segments = torch.randperm(6), torch.randperm(4)
    want = music.music_loss(z1.flatten(1), z2.flatten(1), 6)[0].item()
    for change in (lambda z: z[:, :, units], lambda z: z[:, segments]):
        assert music.music_loss(change(z1).flatten(1), change(z2).flatten(1), 6)[0].item() == pytest.approx(
            want
        )


def test_music_has_no_off_diagonal_with_one_segment_and_refuses_other_sizes():
    z = pair(3, 5, 6)
    loss, terms = music.music_loss(*z, 6)
    loss.backward()
    assert terms["off_diagonal"] == 0 and loss.isfinite() and z[0].grad.isfinite().all()
    with pytest.raises(ValueError, match="6 is not a multiple of the segment size 4"):
        music.music_loss(*z, 4)


# ------------------------------------------------------------------------------------------- SFRIK


def test_legendre_polynomials_are_the_closed_forms_and_orthogonal_on_the_sphere():
    t = torch.linspace(-1, 1, 41, dtype=torch.double)
    for d in (2, 3, 5, 64):
        P = mmd_sphere.legendre(t, d, 4)
        assert torch.allclose(P[2], (d * t**2 - 1) / (d - 1))
        assert torch.allclose(P[3], ((d + 2) * t**3 - 3 * t) / (d - 1))
        assert torch.allclose(P[4], ((d + 4) * (d + 2) * t**4 - 6 * (d + 2) * t**2 + 3) / (d**2 - 1))
        assert all(p[-1] == pytest.approx(1) for p in P)
    torch.manual_seed(0)
    t = F.normalize(torch.randn(400_000, 5).double(), dim=1)[:, 0]
    products = torch.stack(mmd_sphere.legendre(t, 5, 4))
    gram = products @ products.mT / len(t)
    assert (gram - gram.diagonal().diag()).abs().max() < 0.005 and gram.diagonal().min() > 0.01


def test_mmd_of_degree_two_is_the_frobenius_norm_of_the_covariance():
    z = F.normalize(torch.randn(30, 7).double(), dim=1)
    frobenius = (z.mT @ z / 30).square().sum()
    assert mmd_sphere.mmd2(z, [0, 1]).item() == pytest.approx((7 / 6 * (frobenius - 1 / 7)).item(), rel=1e-12)
    assert mmd_sphere.mmd2(z, [], "quadratic").item() == pytest.approx(frobenius.item(), rel=1e-12)


def test_mmd_of_uniform_collapsed_and_antipodal_points_and_rotations():
    torch.manual_seed(0)
    z, b = F.normalize(torch.randn(800, 16).double(), dim=1), [1.0, 40.0, 40.0]
    assert mmd_sphere.mmd2(z, b).item() == pytest.approx(81 / 800, rel=0.2)
    assert mmd_sphere.mmd2(z[:1].expand(50, 16), b).item() == pytest.approx(81)
    assert mmd_sphere.mmd2(torch.cat([z, -z]), [1, 0, 1]).item() == pytest.approx(0, abs=1e-12)
    rotation = torch.linalg.qr(torch.randn(16, 16).double())[0]
    assert mmd_sphere.mmd2(z @ rotation, b).item() == pytest.approx(mmd_sphere.mmd2(z, b).item(), rel=1e-9)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else [out]
        self.numel = max(self.numel, *(x.numel() for x in made if isinstance(x, torch.Tensor)), 0)
        return out


def test_mmd_sphere_of_dimension_32768_makes_nothing_larger_than_its_input():
    zs = torch.randn(2, 64, 32768, requires_grad=True)
    with Largest() as largest:
        mmd_sphere.mmd_sphere_loss(zs, 40000.0, [1, 40, 40])[0].backward()
    assert largest.numel == zs.numel()  # the gradient; d x d would be 256 times that


def test_rbf_with_log_is_the_uniformity_loss():
    z = F.normalize(torch.randn(40, 8).double(), dim=1)
    want = torch.pdist(z).square().mul(-2).exp().mean().log()
    assert mmd_sphere.mmd2(z, [], "rbf", log=True).item() == pytest.approx(want.item(), rel=1e-12)


@pytest.mark.parametrize(
    "kernel, log", [("legendre", False), ("rbf", False), ("rbf", True), ("quadratic", False)]
)
def test_mmd_gradient_from_half_of_the_gram_matrix_is_the_whole_one(monkeypatch, kernel, log):
    monkeypatch.setattr(mmd_sphere, "BLOCK", 60)  # five rows at a time
    zs, want = torch.randn(2, 12, 5).double().requires_grad_(), 0
    for u in F.normalize(zs, dim=2):
        t = u @ u.mT
        if kernel == "legendre":
            phi = sum(w * p for w, p in zip([1, 40, 40], mmd_sphere.legendre(t, 5, 3)[1:], strict=True))
        else:
            phi = torch.exp(-4 * (1 - t)) if kernel == "rbf" else t**2
        want = want + (((phi.sum() - 12) / (12 * 11)).log() if log else phi.mean()) / 2
    mine = mmd_sphere.mmd_sphere_loss(zs, 0.0, [1, 40, 40], kernel, log)[0]
    assert mine.item() == pytest.approx(want.item())
    assert torch.allclose(
        torch.autograd.grad(3 * mine, zs)[0], 3 * torch.autograd.grad(want, zs)[0], atol=1e-12
    )


def test_more_views_are_pulled_to_the_global_ones_and_not_spread():
    zs = torch.randn(4, 6, 5).double().requires_grad_()
    u = F.normalize(zs, dim=2)
    pairs = [(u[g] - u[o]).square().mean() for g in (0, 1) for o in range(4) if o != g]
    pulled = torch.stack(pairs).mean()
    loss, terms = mmd_sphere.mmd_sphere_loss(zs, 3.0, [0, 0])
    assert torch.allclose(
        torch.autograd.grad(loss, zs)[0], 3 * torch.autograd.grad(pulled, zs, retain_graph=True)[0]
    )
    loss, terms = mmd_sphere.mmd_sphere_loss(zs, 3.0, [1, 2])
    assert terms["invariance"].item() == pytest.approx(pulled.item())
    spread = (mmd_sphere.mmd2(u[0], [1, 2]) + mmd_sphere.mmd2(u[1], [1, 2])) / 2
    assert loss.item() == pytest.approx((3 * terms["invariance"] + spread).item())


# -------------------------------------------------------------------------------------- CorInfoMax


def test_corinfomax_without_memory_is_the_batch_covariance_and_logdet_has_the_gradient_inverse():
    z = [F.normalize(x.detach(), dim=1) for x in pair(5, 40, 6)]
    criterion = corinfomax.CorInfoMax(6, 0.0, 0.0)
    loss, terms = criterion(*z, 1.0)
    covariances = [torch.cov(x.mT, correction=0) for x in z]
    assert all(torch.allclose(got, want) for got, want in zip(criterion.R, covariances, strict=True))
    want = -sum(torch.linalg.slogdet(R)[1] for R in covariances) / 6
    assert terms["big_bang"].item() == pytest.approx(want.item(), rel=1e-6)
    R = covariances[0].clone().requires_grad_()
    gradient = torch.autograd.grad(criterion.logdet(R), R)[0]
    assert torch.allclose(gradient, torch.linalg.inv(criterion.regular(R)).detach(), rtol=1e-6)


def test_corinfomax_prefers_a_round_covariance_of_the_same_trace_and_abhors_collapse():
    criterion = corinfomax.CorInfoMax(5)
    torch.manual_seed(0)
    for _ in range(20):
        A = torch.randn(5, 5).double()
        R = A @ A.mT
        assert criterion.logdet(R) < criterion.logdet(torch.eye(5).double() * R.trace() / 5)
    spread = F.normalize(torch.randn(64, 5).double(), dim=1)
    point, line = spread[:1].expand(64, 5), spread[:1] * torch.randn(64, 1).sign()
    scores = [corinfomax.CorInfoMax(5)(z, z, 1.0)[0].item() for z in (spread, line, point)]
    assert scores[0] + 1 < scores[1] and scores[0] + 1 < scores[2]


def test_ldmi_is_four_times_the_mutual_information_of_gaussian_views():
    torch.manual_seed(0)
    rho, n = torch.tensor([0.9, 0.5, 0.1]).double(), 200_000
    a, e = torch.randn(2, n, 3).double()
    views = a, rho * a + (1 - rho**2).sqrt() * e
    criterion = corinfomax.CorInfoMax(3, 0.0, 0.0, objective="ldmi")
    information = criterion(*views, 0.0)[1]["information"].item()
    assert information * 3 == pytest.approx((-2 * (1 - rho**2).log().sum()).item(), rel=0.01)
    mirrored = corinfomax.CorInfoMax(3, 0.0, 0.0, objective="ldmi")(*views[::-1], 0.0)[1][
        "information"
    ].item()
    assert mirrored == pytest.approx(information, rel=1e-9)


def test_corinfomax_moves_its_state_in_training_alone_and_survives_near_collapse():
    torch.manual_seed(0)
    criterion = corinfomax.CorInfoMax(32, 0.1, 0.1)
    criterion.eval()(*F.normalize(torch.randn(2, 8, 32), dim=2), 1.0)
    assert torch.equal(criterion.R[0], torch.eye(32).double())
    criterion.train()
    for _ in range(1000):
        z = F.normalize(torch.ones(32) + 1e-5 * torch.randn(2, 8, 32), dim=2).requires_grad_()
        loss, _ = criterion(*z, 1.0)
        loss.backward()
        assert loss.isfinite() and z.grad.isfinite().all()


# ----------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("kind", ["same rows", "zero rows", "large", "small", "n = 2", "bf16", "n < d"])
def test_extreme_input_stays_finite(kind):
    torch.manual_seed(0)
    n = {"n = 2": 2, "n < d": 4}.get(kind, 32)
    zs = torch.randn(2, n, 12)
    changes = {
        "same rows": lambda z: z[:, :1].expand_as(z),
        "zero rows": torch.zeros_like,
        "large": lambda z: z * 1e4,
        "small": lambda z: z * 1e-4,
        "bf16": lambda z: z.bfloat16().float(),
    }
    zs = changes.get(kind, lambda z: z)(zs)
    losses = {
        "music": lambda zs: music.music_loss(*zs, 4)[0],
        "mmd_sphere": lambda zs: mmd_sphere.mmd_sphere_loss(zs, 10.0, [1, 40, 40])[0],
        "uniformity": lambda zs: mmd_sphere.mmd_sphere_loss(zs, 1.0, [], "rbf", True)[0],
        "corinfomax": lambda zs: corinfomax.CorInfoMax(12)(*F.normalize(zs, dim=2), 10.0)[0],
    }
    for name, loss_of in losses.items():
        leaf = zs.clone().requires_grad_()
        loss = loss_of(leaf)
        loss.backward()
        assert loss.isfinite() and leaf.grad.isfinite().all(), name

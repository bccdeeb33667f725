"""The four losses: official numbers, definitions, collapse, random features. Ranks are in test_ranks.py."""

import itertools
import math
from functools import partial

import numpy
import pytest
import torch
import torch.nn.functional as F

import common
import corinfomax
import hsic
import mmd_sphere
import music

assert_near = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


def normal(*shape, seed=0):
    return torch.tensor(numpy.random.RandomState(seed).randn(*shape))


LOSSES = {  # of zs (2, n, d), d a multiple of 4
    "hsic": lambda zs: hsic.hsic_loss(zs, f=0)[0],
    "hsic, features": lambda zs: hsic.hsic_loss(zs, f=32)[0],
    "corinfomax": lambda zs: corinfomax.CorInfoMax(zs.shape[2])(*F.normalize(zs, dim=2), 10.0)[0],
    "ldmi": lambda zs: corinfomax.CorInfoMax(zs.shape[2], objective="ldmi")(*F.normalize(zs, dim=2), 10.0)[0],
    "music": lambda zs: music.music_loss(*zs, 4)[0],
    "mmd_sphere": lambda zs: mmd_sphere.mmd_sphere_loss(zs, 10, [1, 40, 40])[0],
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def gradient(loss, zs):
    return torch.autograd.grad(loss, zs, retain_graph=True)[0]


def assert_same(loss, naive, zs):
    assert_near(loss, naive)
    assert_near(gradient(3 * loss, zs), gradient(3 * naive, zs))  # a custom backward may forget the 3


def official_views(seed, n, d):
    a, b = normal(2, n, d, seed=seed)
    return torch.stack([a, 0.7 * a + math.sqrt(0.51) * b])


# fmt: off
OFFICIAL = [  # loss and terms; views; the values, of SFRIK of the loss alone
    (lambda zs: (hsic.hsic_zy(zs[0]), dict(zz=hsic.hsic_zz(*zs))), normal(2, 4, 32, 64, seed=201),
        [21.76239961344157, 32.088952574044]),
    (lambda zs: corinfomax.CorInfoMax(16, 0.5, 0.5, 1e-3)(*F.normalize(zs, dim=2), 1.0),
        official_views(140, 16, 16), [1.3072197649731876, 0.037002876476018326, 1.2702168884971692]),
    (lambda zs: music.music_loss(*zs, 8), official_views(100, 16, 32),
        [-3.0948400145248245, -0.6963841399057462, -4.070074718129043, 1.6716188433099655]),
    (lambda zs: mmd_sphere.mmd_sphere_loss(zs, 4000, [1, 40, 40]), official_views(110, 16, 8), [272.936482]),
]
# fmt: on


@pytest.mark.parametrize("loss_of, zs, official", OFFICIAL)
def test_losses_have_the_official_values(loss_of, zs, official):
    loss, terms = loss_of(zs)
    values = [loss, *terms.values()][: len(official)]
    assert torch.stack(values).tolist() == pytest.approx(official, 1e-7)


KERNELS = {  # of squared distances, at c = 0.6
    "imq": lambda r2: 0.6 / (0.36 + r2).sqrt(),
    "gaussian": lambda r2: torch.exp(-r2 / 0.72),
    "linear": lambda r2: 1 - r2 / 2,
}


def gram_matrix(z, kernel):
    return KERNELS[kernel]((z[:, None] - z).square().sum(2))


def hsic_of_gram_matrices(K, L):
    """Loss at gamma = 2, HSIC(Z, Y), root of HSIC(Z, Z), and dependence of 3 views of 12 images each."""
    same_image = torch.eye(12).repeat(3, 3)
    zy = (K * same_image).sum() / 72 - K.mean()
    root = ((K - K.mean(0)) * (L - L.mean(0)).mT).sum().sqrt() / 36
    return torch.stack([2 * root - zy, zy, root, zy - K.trace() / 72])


@pytest.mark.parametrize("kernel, f", [("imq", 0), ("gaussian", 0), ("linear", 0), ("imq", 8)])
def test_hsic_is_its_definition_or_its_mean_over_draws_of_features(kernel, f, monkeypatch):
    zs = normal(3, 12, 5).requires_grad_()
    z = F.normalize(zs, dim=2).flatten(0, 1)
    naive = 0
    for draw in range(3):
        K = L = gram_matrix(z, kernel)
        if f > 0:
            omega, phase = hsic.sample_features(5, 8, kernel, 6, 7, torch.tensor([draw]))
            phi = hsic.random_features(z, omega[:, 0], phase[0], 0.6)  # (36, 2, 8), of both sets
            K, L = phi[:, 0] @ phi[:, 0].mT, phi[:, 1] @ phi[:, 1].mT
        naive += hsic_of_gram_matrices(K, L) / 3
    for at_once in (1, 2**25):  # one draw in a product, and all
        monkeypatch.setitem(hsic.FEATURES_AT_ONCE, "cpu", at_once)
        loss, terms = hsic.hsic_loss(zs, 0.6, 2.0, kernel, f, seed=6, step=7, draws=3)
        assert_same(loss, naive[0], zs)
        assert_near(list(terms.values()), list(naive[1:]))


@pytest.mark.parametrize("S, s", [(1, 24), (110, 10)])
def test_music_is_its_definition_with_all_of_P_in_memory(S, s):
    zs = normal(2, 7, S * s).requires_grad_()
    p1, p2 = torch.softmax(zs.view(2, 7, S, s) / 0.5, 3)
    P = torch.einsum("nai,nbj->abij", p1, p2) / 7
    negentropy = P * P.log()
    within = torch.einsum("aaii->", negentropy) / S
    between = (negentropy.sum() - torch.einsum("aaij->", negentropy)) / max(1, S * (S - 1))
    naive = 2 * within + 3 * between - 5 * (p1 * p2).sum(2).log().mean()
    assert_same(music.music_loss(*zs, s, (2, 3, 5), 0.5)[0], naive, zs)


def test_music_pulls_views_together_however_surely_they_disagree():
    zs = torch.tensor([[[1e3, 0]], [[0, 1e3]]]).double().requires_grad_()  # -log(2 exp(-1000)) underflows
    loss, _ = music.music_loss(*zs, 2, weights=(0, 0, 1))
    distance = zs[0, 0, 0] - zs[0, 0, 1] + zs[1, 0, 1] - zs[1, 0, 0]
    assert_same(loss, distance / 2 - math.log(2), zs)


def test_music_needs_segments_of_equal_size():
    with pytest.raises(ValueError, match="24 .* 5"):
        music.music_loss(*normal(2, 7, 24), 5)


SPREAD = [  # b, kernel, log; MMD^2 for tau = 2 in dimension 5
    (([3, 0, 4],), lambda z: 7 * (z @ z.mT).pow(3).mean()),
    (([], "quadratic"), lambda z: (z @ z.mT).square().mean()),
    (([], "rbf", True), lambda z: torch.pdist(z).square().mul(-2).exp().mean().log()),  # uniformity
]


@pytest.mark.parametrize("options, mmd2", SPREAD)
def test_mmd_sphere_is_its_closed_form_and_spreads_the_global_views_alone(options, mmd2):
    zs = normal(4, 1100, 5).requires_grad_()
    z = F.normalize(zs, dim=2)
    invariance = (z[:2, None] - z).square().mean((2, 3)).sum() / 6  # pairs of a global view and another
    naive = 7 * invariance + (mmd2(z[0]) + mmd2(z[1])) / 2
    assert_same(mmd_sphere.mmd_sphere_loss(zs, 7.0, *options)[0], naive, zs)


def test_legendre_polynomials_are_orthogonal_on_the_sphere_and_1_at_1():
    angle = torch.linspace(0, math.pi, 20_000)
    P = torch.stack(mmd_sphere.legendre(angle.cos(), 3, 4))
    products = (P * angle.sin()) @ P.mT / 20_000
    assert products.triu(1).abs().max() < 1e-3
    assert (P[:, 0] == 1).all()


@pytest.mark.parametrize("objective", ["corinfomax", "ldmi"])
def test_corinfomax_and_ldmi_match_blocks_of_the_joint_covariance(objective):
    """LDMI is 4 / d times the mutual information of Gaussian views."""
    criterion = corinfomax.CorInfoMax(4, 0.3, 0.2, 0.01, 2.0, objective, log_ldmi=True)
    mu, R = torch.zeros(8), 2 * torch.eye(8).double()
    same_view = torch.kron(torch.eye(2), torch.ones(4, 4))
    for step in range(3):
        zs = normal(2, 9, 4, seed=step).requires_grad_()
        z = torch.hstack([*zs])
        mu = 0.2 * mu + 0.8 * z.mean(0)
        R = 0.3 * R + 0.7 * (z - mu).mT @ (z - mu) / 9
        joint = R + 0.01 * torch.eye(8)
        blocks = (joint * same_view).logdet()
        naive = dict(corinfomax=5 * F.mse_loss(*zs) - blocks / 4, ldmi=(joint.logdet() - blocks) / 2)
        loss, terms = criterion(*zs, 5.0)
        assert_same(loss, naive[objective], zs)
        torch.testing.assert_close(terms["information"], -naive["ldmi"].detach())


def test_neither_rotation_nor_in_music_the_order_of_units_matters():
    zs = normal(2, 16, 12)
    rotated = zs @ torch.linalg.qr(normal(12, 12))[0]
    assert_near(LOSSES["mmd_sphere"](rotated), LOSSES["mmd_sphere"](zs))
    permuted = zs.view(2, 16, 3, 4).roll((1, 2), (2, 3)).flatten(2)
    assert_near(LOSSES["music"](permuted), LOSSES["music"](zs))


@every_loss
def test_collapse_to_a_point_or_line_is_worse_than_spread_embeddings(name):
    spread = (20 * normal(256, 16)).expand(2, 256, 16)
    point = spread[:, :1].expand_as(spread)
    line = point * normal(256, 1).sign()
    assert LOSSES[name](spread) < min(LOSSES[name](point), LOSSES[name](line)) - 0.1


@every_loss
def test_extreme_input_stays_finite_and_nan_stays_nan(name):
    zs = normal(2, 32, 12).float()
    for extreme in (zs[:, :1].expand_as(zs), 0 * zs[:, :2], 1e4 * zs):
        leaf = extreme.clone().requires_grad_()
        loss = LOSSES[name](leaf)
        assert (loss + gradient(loss, leaf)).isfinite().all()
    zs[0, 0, 0] = math.nan
    assert LOSSES[name](zs).isnan()


def test_training_keeps_the_rank_and_without_what_spreads_it_collapses():
    torch.manual_seed(0)
    points = torch.randn(128, 32)
    ranks = []
    for loss_of in [lambda zs: F.mse_loss(*F.normalize(zs, dim=2)), *LOSSES.values()]:
        net = torch.nn.Linear(32, 32)
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        for _ in range(100):
            zs = net(points + 0.3 * torch.randn(2, 128, 32))
            optimizer.zero_grad()
            loss_of(zs).backward()
            optimizer.step()
        ranks.append(common.effective_rank(zs[0].detach()))
    assert ranks[0] < 5 and min(ranks[1:]) > 15


def test_corinfomax_survives_near_collapse_with_few_images():
    criterion = corinfomax.CorInfoMax(32, 0.1, 0.1)
    for step in range(300):
        zs = F.normalize(1 + 1e-5 * normal(2, 8, 32, seed=step).float(), dim=2).requires_grad_()
        loss, _ = criterion(*zs, 1.0)
        loss.backward()  # an error if the state kept the graph of the step before
        assert (loss + zs.grad).isfinite().all()


@pytest.mark.parametrize("kernel", ["imq", "gaussian"])
def test_features_converge_to_the_kernel_at_rate_one_over_root_f(kernel):
    z = F.normalize(normal(40, 32), dim=1)
    errors = []
    for f in (1024, 16384):
        omega, phase = hsic.sample_features(32, f, kernel, 0, 0, torch.tensor([0]))
        phi = hsic.random_features(z, omega[:, 0, 0], phase[0, 0], 0.6)
        errors.append((phi @ phi.mT - gram_matrix(z, kernel)).norm() / 40)
    assert 2.5 < errors[0] / errors[1] < 6.5  # 4 in expectation


def test_features_are_a_function_of_seed_step_and_draw():
    keys = 2 * list(itertools.product((0, 1), repeat=3))
    omegas = []
    for seed, step, draw in keys:
        omega, _ = hsic.sample_features(8, 16, "imq", seed, step, torch.tensor([draw]))
        omegas.append(omega)
    assert len(torch.stack(omegas).unique(dim=0)) == 8


@pytest.mark.parametrize("kernel", ["imq", "gaussian"])
def test_adaptive_scale_is_of_pairs_of_all_rows_and_adam_converges_to_it(kernel):
    zs = 3 * torch.eye(6).view(3, 2, 6)
    adaptive, adam = hsic.KernelScale(kernel, "adaptive"), hsic.KernelScale(kernel, "adam")
    r2 = adaptive.squared_distances(zs, 0, 0)
    assert len(r2) == 1024 and abs(r2.mean() - 5 / 3) < 0.1
    common.set_lr(adam.optimizer, 0.02)
    for _ in range(200):
        c = adam(zs, 0, 0)
        adam.optimizer.step()
    assert abs(c - adaptive(zs, 0, 0)) < 0.001


def test_dependence_is_0_without_identity_and_largest_if_views_coincide():
    zs = normal(2, 256, 64)
    _, ignorant = hsic.hsic_loss(zs, f=0)
    _, coincident = hsic.hsic_loss(zs[:1].expand_as(zs), f=0)
    assert abs(ignorant["dependence"]) < 0.006
    assert abs(coincident["dependence"] - 0.4226) < 0.01  # k at distance 0 less k at root 2


def test_dependence_of_a_small_kernel_is_infonce_to_second_order():
    """-InfoNCE = E_pos[tau k] - E_all[tau k] - 1/2 E_i Var_j[tau k] + O(tau^3), over the same batch."""
    zs = normal(2, 64, 16)
    dependence = hsic.hsic_loss(zs, 0.6, f=0)[1]["dependence"]
    k = 0.1 * gram_matrix(F.normalize(zs, dim=2).flatten(0, 1), "imq")
    minus_infonce = k.diagonal(64).mean() - k.exp().mean(1).log().mean()
    second_order = 0.1 * dependence - k.var(1, correction=0).mean() / 2
    assert abs(minus_infonce - second_order) < 1e-6


def test_corinfomax_prefers_a_round_covariance_of_the_same_trace():
    ellipsoid = normal(40, 5)
    ball = torch.linalg.qr(ellipsoid)[0] * ellipsoid.norm() / 5**0.5
    criterion = corinfomax.CorInfoMax(5, 0.0, 1.0)  # of z^T z / N
    assert criterion(ball, ball, 0.0)[0] < criterion(ellipsoid, ellipsoid, 0.0)[0]


def test_music_reaches_its_bound_on_a_full_factorial_design():
    codes = torch.tensor(list(itertools.product(range(3), repeat=3)))
    design = 60 * F.one_hot(codes, 3).double().flatten(1)  # so confident that the softmax is one-hot
    assert music.music_loss(design, design, 3)[0].item() == pytest.approx(-3 * math.log(3))

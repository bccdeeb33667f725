"""The four losses: official numbers, definitions, collapse, random features. Ranks are in test_ranks.py."""

import itertools
import math

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import corinfomax
import hsic
import mmd_sphere
import music


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def corinfomax_loss(zs, objective):
    return corinfomax.CorInfoMax(zs.shape[2], objective=objective)(*F.normalize(zs, dim=2), 10.0)[0]


LOSSES = {  # of zs (2, n, d), d a multiple of 4
    "hsic": lambda zs: hsic.hsic_loss(zs, f=0)[0],
    "hsic, linear": lambda zs: hsic.hsic_loss(zs, kernel="linear")[0],
    "hsic, features": lambda zs: hsic.hsic_loss(zs, f=32)[0],
    "corinfomax": lambda zs: corinfomax_loss(zs, "corinfomax"),
    "ldmi": lambda zs: corinfomax_loss(zs, "ldmi"),
    "music": lambda zs: music.music_loss(*zs, 4)[0],
    "mmd_sphere": lambda zs: mmd_sphere.mmd_sphere_loss(zs, 10, [1, 40, 40])[0],
    "uniformity": lambda zs: mmd_sphere.mmd_sphere_loss(zs, 10, [], "rbf", True)[0],
}
every_loss = pytest.mark.parametrize("name", LOSSES)

# fmt: off
# loss; seed; n, d, scale; value, MUSIC's diagonal, off-diagonal and invariance, sums of |gradient|
OFFICIAL = [
    (lambda zs: music.music_loss(*zs, 8), 100, (16, 32), [-3.0948400145248245, -0.6963841399057462,
        -4.070074718129043, 1.6716188433099655, 0.7404474983595547, 0.7322390534674754]),
    (lambda zs: music.music_loss(*zs, 10), 101, (64, 60, 3.0), [-4.1618457775506394, -1.1378465670159994,
        -4.395996517638142, 1.371997307103502, 0.9265959772204209, 0.9849830741350676]),
    (lambda zs: mmd_sphere.mmd_sphere_loss(zs, 4000, [1, 40, 40]), 110, (16, 8),
        [272.93648234274724, 613.5235661324239, 585.5920366491057]),
    (lambda zs: mmd_sphere.mmd_sphere_loss(zs, 10, [0, 1, 0]), 113, (40, 16),
        [0.4366033212496496, 0.8089465970358594, 0.7339083651335803]),
]
# of seed + step: loss, invariance, big bang, sums of |gradient|
OFFICIAL_CORINFOMAX = [
    [1.3072197649731876, 0.037002876476018326, 1.2702168884971692, 0.372312839679196, 0.3779393932150459],
    [2.482428534447348, 0.03664813176129694, 2.445780402686051, 0.5816463913505624, 0.5671591728102492],
    [3.518930536664978, 0.037926210750749555, 3.4810043259142285, 0.8985919763001066, 0.8927079330505749],
]
# fmt: on


def assert_near(values, expected, tolerance=1e-9):
    expected = torch.as_tensor(expected, dtype=values.dtype)
    torch.testing.assert_close(values, expected, rtol=tolerance, atol=tolerance)


def gradient(loss, zs):
    return torch.autograd.grad(loss, zs, retain_graph=True)[0]


def assert_same(loss, naive, zs):
    assert_near(loss, naive)
    assert_near(gradient(3 * loss, zs), gradient(3 * naive, zs))  # a custom backward may forget the 3


def official_views(seed, n, d, scale=1.0):
    a, b = torch.tensor(numpy.random.RandomState(seed).randn(2, n, d))
    return (scale * torch.stack([a, 0.7 * a + math.sqrt(0.51) * b])).requires_grad_()


def assert_official(loss, terms, zs, official):
    """The loss, those terms that have official values, and the sum of |.| of each view's gradient."""
    values = [loss, *terms.values()][: len(official) - 2]
    assert_near(torch.stack([*values, *gradient(loss, zs).abs().sum((1, 2))]), official, 1e-7)


def test_hsic_of_features_has_the_official_values():
    phi, psi = torch.tensor(numpy.random.RandomState(201).randn(2, 4, 32, 64))
    values = torch.stack([hsic.hsic_zy(phi), hsic.hsic_zz(phi, psi)])
    assert_near(values, [21.76239961344157, 32.088952574044])


@pytest.mark.parametrize("loss, seed, shape, official", OFFICIAL)
def test_music_and_mmd_sphere_have_the_official_values(loss, seed, shape, official):
    zs = official_views(seed, *shape)
    assert_official(*loss(zs), zs, official)


def test_corinfomax_has_the_official_values_over_three_steps():
    criterion = corinfomax.CorInfoMax(16, 0.5, 0.5, 1e-3)
    for step, official in enumerate(OFFICIAL_CORINFOMAX):
        zs = F.normalize(official_views(140 + step, 16, 16), dim=2)
        assert_official(*criterion(*zs, 1.0), zs, official)


KERNELS = {  # of squared distances, at c = 0.6
    "imq": lambda r2: 0.6 / (0.36 + r2).sqrt(),
    "gaussian": lambda r2: torch.exp(-r2 / 0.72),
    "linear": lambda r2: 1 - r2 / 2,
}


def gram_matrix(zs, kernel):
    z = F.normalize(zs, dim=2).flatten(0, 1)
    return KERNELS[kernel]((z[:, None] - z).square().sum(2))


def gram_forms(K, L):
    """HSIC(Z, Y), root of HSIC(Z, Z), and dependence, from Gram matrices of 3 views of 12 images each."""
    same_image = torch.eye(12).repeat(3, 3)
    H = torch.eye(36).double() - 1 / 36
    zy = (K * same_image).sum() / 72 - K.mean()
    zz = (H @ K @ H * L).sum() / 36**2
    return torch.stack([zy, zz.sqrt(), zy - K.trace() / 72])


def assert_hsic(loss, terms, forms, zs):
    assert_same(loss, 2 * forms[1] - forms[0], zs)
    assert_near(torch.stack([*terms.values()]), forms)


@pytest.mark.parametrize("kernel", KERNELS)
def test_exact_hsic_is_its_definition(kernel):
    zs = normal(3, 12, 5).requires_grad_()
    K = gram_matrix(zs, kernel)
    assert_hsic(*hsic.hsic_loss(zs, 0.6, 2.0, kernel, f=0), gram_forms(K, K), zs)


def test_hsic_of_features_is_the_mean_over_draws_of_its_definition_with_two_halves_of_the_features():
    zs = normal(3, 12, 5).requires_grad_()
    forms = []
    for draw in range(3):
        omega, phase = hsic.sample_features(5, 16, "imq", 6, 7, draw=draw)
        features = hsic.random_features(F.normalize(zs, dim=2).flatten(0, 1), omega, phase, 0.6)
        K, L = [2 * half @ half.mT for half in features.chunk(2, 1)]
        forms.append(gram_forms(K, L))
    loss, terms = hsic.hsic_loss(zs, 0.6, 2.0, "imq", 8, seed=6, step=7, draws=3)
    assert_hsic(loss, terms, torch.stack(forms).mean(0), zs)


@pytest.mark.parametrize("d, s", [(24, 24), (1100, 10)])
def test_music_is_its_definition_with_all_of_P_in_memory(d, s):
    zs = normal(2, 7, d).requires_grad_()
    S = d // s
    p1, p2 = torch.softmax(zs.view(2, 7, S, s) / 0.5, 3)
    P = torch.einsum("nai,nbj->abij", p1, p2) / 7
    negentropy = P * P.log()
    within = torch.einsum("aaii->", negentropy) / S
    between = (negentropy.sum() - torch.einsum("aaij->", negentropy)) / max(1, S * (S - 1))
    naive = 2 * within + 3 * between - 5 * (p1 * p2).sum(2).log().mean()
    assert_same(music.music_loss(*zs, s, (2, 3, 5), 0.5)[0], naive, zs)


def test_music_wants_segments_of_one_size():
    with pytest.raises(ValueError, match="24 .* 5"):
        music.music_loss(*normal(2, 7, 24), 5)


SPREAD = [  # b, kernel, log; MMD^2 for tau = 2 in dimension 5
    ([3, 0, 4], "legendre", False, lambda z: 7 * (z @ z.mT).pow(3).mean()),
    ([], "quadratic", False, lambda z: (z @ z.mT).square().mean()),
    ([], "rbf", True, lambda z: torch.pdist(z).square().mul(-2).exp().mean().log()),  # uniformity
]


@pytest.mark.parametrize("b, kernel, log, mmd2", SPREAD)
def test_mmd_sphere_is_its_closed_form_and_spreads_the_global_views_alone(b, kernel, log, mmd2):
    zs = normal(4, 1100, 5).requires_grad_()
    z = F.normalize(zs, dim=2)
    invariance = (z[:2, None] - z).square().mean((2, 3)).sum() / 6  # pairs of a global view and another
    naive = 7 * invariance + (mmd2(z[0]) + mmd2(z[1])) / 2
    assert_same(mmd_sphere.mmd_sphere_loss(zs, 7.0, b, kernel, log)[0], naive, zs)


@pytest.mark.parametrize("d", [2, 3, 5])
def test_legendre_polynomials_are_orthogonal_on_the_sphere_and_1_at_1(d):
    angle = torch.linspace(0, math.pi, 20_000)
    P = torch.stack(mmd_sphere.legendre(angle.cos(), d, 4))
    products = (P * angle.sin() ** (d - 2)) @ P.mT / 20_000
    assert_near(products, products.diagonal().diag(), 1e-3)
    assert mmd_sphere.legendre(torch.tensor(1.0), d, 4) == [1] * 5


@pytest.mark.parametrize("objective", ["corinfomax", "ldmi"])
def test_corinfomax_and_ldmi_are_their_definitions_in_blocks_of_the_recursive_joint_covariance(objective):
    """LDMI is 4 / d times the mutual information of Gaussian views."""
    criterion = corinfomax.CorInfoMax(4, 0.3, 0.2, 0.01, 2.0, objective)
    mu, R = torch.zeros(8), 2 * torch.eye(8).double()
    for step in range(3):
        zs = normal(2, 9, 4, seed=step).requires_grad_()
        z = torch.cat([*zs], 1)
        mu = 0.2 * mu.detach() + 0.8 * z.mean(0)
        R = 0.3 * R.detach() + 0.7 * (z - mu).mT @ (z - mu) / 9
        joint = R + 0.01 * torch.eye(8)
        blocks = joint[:4, :4].logdet() + joint[4:, 4:].logdet()
        naive = dict(corinfomax=5 * F.mse_loss(*zs) - blocks / 4, ldmi=(joint.logdet() - blocks) / 2)
        assert_same(criterion(*zs, 5.0)[0], naive[objective], zs)


@every_loss
def test_order_rotation_and_for_music_segments_and_units_do_not_matter(name):
    zs = normal(2, 16, 12)
    changed = zs.flip(0)[:, torch.randperm(16)]
    if name == "music":
        changed = changed.view(2, 16, 3, 4)[:, :, [2, 0, 1]][..., [1, 3, 0, 2]].flatten(2)
    elif name != "hsic, features":
        changed = changed @ torch.linalg.qr(normal(12, 12))[0]
    assert_near(LOSSES[name](changed), LOSSES[name](zs), 1e-6)


@every_loss
def test_collapse_to_a_point_or_a_line_is_worse_than_aligned_spread_embeddings(name):
    spread = (20 * normal(256, 16)).expand(2, 256, 16)
    point = spread[:, :1].expand(2, 256, 16)
    line = point * normal(256, 1).sign()
    assert LOSSES[name](spread) < min(LOSSES[name](point), LOSSES[name](line)) - 0.1


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_input_stays_finite_and_nan_stays_nan(name, dtype):
    zs = normal(2, 32, 12).to(dtype)
    for extreme in (zs[:, :1].expand_as(zs), 0 * zs[:, :2], 1e4 * zs, 1e-4 * zs, zs[:, :2]):
        leaf = extreme.clone().requires_grad_()
        loss = LOSSES[name](leaf)
        assert (loss + gradient(loss, leaf)).isfinite().all()
    zs[0, 0, 0] = math.nan
    assert LOSSES[name](zs).isnan()


def rank_after_training(loss_of):
    """The effective rank of embeddings (128, 32) of noisy points after a short training."""
    torch.manual_seed(0)
    points = torch.randn(128, 32)
    net = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(150):
        zs = net((points + 0.3 * torch.randn(2, 128, 32)).flatten(0, 1)).view(2, 128, 32)
        optimizer.zero_grad()
        loss_of(zs).backward()
        optimizer.step()
    return common.effective_rank(zs[0].detach())


@pytest.mark.parametrize("name", ["hsic", "corinfomax", "music", "mmd_sphere"])
def test_training_keeps_the_rank_and_without_what_spreads_it_collapses(name):
    collapsed = rank_after_training(lambda zs: F.mse_loss(*F.normalize(zs, dim=2)))
    assert collapsed < 5 and rank_after_training(LOSSES[name]) > 15


def test_corinfomax_survives_a_long_time_near_collapse_with_fewer_images_than_dimensions():
    criterion = corinfomax.CorInfoMax(32, 0.1, 0.1)
    for step in range(300):
        zs = F.normalize(1 + 1e-5 * normal(2, 8, 32, seed=step).float(), dim=2).requires_grad_()
        loss, _ = criterion(*zs, 1.0)
        loss.backward()  # an error if the state kept the graph of the step before
        assert (loss + zs.grad).isfinite().all()


@pytest.mark.parametrize("kernel", ["imq", "gaussian"])
def test_features_converge_to_the_kernel_at_rate_one_over_root_f(kernel):
    z = F.normalize(normal(1, 40, 32), dim=2)
    errors = []
    for f in (1024, 16384):
        phi = hsic.random_features(z[0], *hsic.sample_features(32, f, kernel, 0, 0), 0.6)
        errors.append((phi @ phi.mT - gram_matrix(z, kernel)).norm() / 40)
    assert errors[1] < 0.01 and 2.5 < errors[0] / errors[1] < 6.5  # 4 in expectation


def test_features_are_a_function_of_seed_step_and_draw_and_over_steps_give_the_loss_of_the_kernel():
    keys = 2 * list(itertools.product((0, 1), repeat=3))
    omegas = [hsic.sample_features(8, 16, "imq", seed, step, draw=draw)[0] for seed, step, draw in keys]
    assert len(torch.stack(omegas).unique(dim=0)) == 8
    zs = normal(64, 16) + 0.3 * normal(2, 64, 16, seed=1)
    losses = [hsic.hsic_loss(zs, 0.7, f=64, step=step)[0] for step in range(400)]
    assert_near(sum(losses) / 400, hsic.hsic_loss(zs, 0.7, f=0)[0], 0.01)


@pytest.mark.parametrize("kernel", ["imq", "gaussian"])
def test_adaptive_scale_is_of_pairs_of_all_views_and_images_and_adam_goes_there(kernel):
    angle = torch.linspace(0, math.pi, 150).view(3, 50)
    half_circle = torch.stack([angle.cos(), angle.sin()], 2)
    adaptive, adam = hsic.KernelScale(kernel, "adaptive"), hsic.KernelScale(kernel, "adam")
    r2 = adaptive.squared_distances(half_circle, 0, 0)
    assert len(r2) == 1024 and abs(r2.mean() - (2 - 8 / math.pi**2)) < 0.1
    adam.optimizer.param_groups[0]["lr"] = 0.02
    for _ in range(200):
        c = adam(half_circle, 0, 0)
        adam.optimizer.step()
    assert_near(c, adaptive(half_circle, 0, 0), 0.001)


@pytest.mark.parametrize("f", [0, 2048])
def test_dependence_is_near_0_when_z_ignores_identity_and_largest_when_views_coincide(f):
    a, b = normal(2, 256, 64)
    dependences = []
    for share in (0, 0.5, 1):
        zs = torch.stack([a, share * a + math.sqrt(1 - share**2) * b])
        dependences.append(hsic.hsic_loss(zs, f=f)[1]["dependence"])
    assert abs(dependences[0]) < 0.006 and dependences == sorted(dependences)
    assert_near(dependences[2], 1 - 3**-0.5, 0.01)  # k at distance 0 less k at root 2


def test_dependence_of_a_small_kernel_is_infonce_to_second_order():
    """-InfoNCE = E_pos[tau k] - E_all[tau k] - 1/2 E_i Var_j[tau k] + O(tau^3), over the same batch."""
    zs = normal(64, 16) + 0.5 * normal(2, 64, 16, seed=1)
    dependence = hsic.hsic_loss(zs, 0.6, f=0)[1]["dependence"]
    rest = []
    for tau in (0.2, 0.1):
        k = tau * gram_matrix(zs, "imq")
        minus_infonce = k.diagonal(64).mean() - k.exp().mean(1).log().mean()
        rest.append(minus_infonce - tau * dependence + k.var(1, correction=0).mean() / 2)
    assert 6 < rest[0] / rest[1] < 10


def test_corinfomax_prefers_a_round_covariance_of_the_same_trace():
    z = normal(40, 5)
    ball = torch.linalg.qr(z - z.mean(0))[0]
    ellipsoids = [F.normalize(ball @ A, dim=(0, 1)) for A in (torch.eye(5).double(), *normal(20, 5, 5))]
    losses = [corinfomax.CorInfoMax(5, 0.0)(z, z, 0.0)[0] for z in ellipsoids]
    assert losses[0] < min(losses[1:])


def test_music_reaches_its_bound_on_a_full_factorial_design():
    codes = torch.tensor(list(itertools.product(range(3), repeat=3)))
    design = 60 * F.one_hot(codes, 3).double().flatten(1)  # so confident that the softmax is one-hot
    assert_near(music.music_loss(design, design, 3)[0], -3 * math.log(3))

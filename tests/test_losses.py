"""The four losses: official numbers, naive and closed forms, collapse. Ranks are in test_ranks.py."""

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


def new_corinfomax(d, forget, eps=1e-8, objective="corinfomax"):
    return corinfomax.CorInfoMax(d, forget, forget, eps, 1.0, objective)


def corinfomax_loss(zs, objective="corinfomax"):
    return new_corinfomax(zs.shape[2], 0.01, 1e-8, objective)(*F.normalize(zs, dim=2), 10.0)[0]


def sphere_loss(z1, z2, *settings):
    return mmd_sphere.mmd_sphere_loss(torch.stack([z1, z2]), *settings)


LOSSES = {  # of zs (2, n, d), d a multiple of 4
    "hsic": lambda zs: hsic.hsic_loss(zs, f=0)[0],
    "hsic, gaussian": lambda zs: hsic.hsic_loss(zs, kernel="gaussian", f=0)[0],
    "hsic, linear": lambda zs: hsic.hsic_loss(zs, kernel="linear", f=0)[0],
    "hsic, features": lambda zs: hsic.hsic_loss(zs, f=32)[0],
    "corinfomax": corinfomax_loss,
    "ldmi": lambda zs: corinfomax_loss(zs, "ldmi"),
    "music": lambda zs: music.music_loss(*zs, 4)[0],
    "mmd_sphere": lambda zs: sphere_loss(*zs, 10.0, [1, 40, 40])[0],
    "uniformity": lambda zs: sphere_loss(*zs, 10.0, [], "rbf", True)[0],
}
every_loss = pytest.mark.parametrize("name", LOSSES)

# fmt: off
# seed; views, images, features; HSIC(Z, Y), HSIC(Z, Z)
OFFICIAL_HSIC = [
    (201, (4, 32, 64), [21.76239961344157, 32.088952574044]),
    (202, (2, 100, 33), [32.23390178913987, 5.4536352691832235]),
]
# loss and settings; seed; n, d, scale; loss, MUSIC's terms, of each view's gradient the sum of |.|
OFFICIAL = [
    (music.music_loss, (10,), 101, (64, 60, 3.0), [-4.1618457775506394, -1.1378465670159994,
        -4.395996517638142, 1.371997307103502, 0.9265959772204209, 0.9849830741350676]),
    (music.music_loss, (5,), 102, (33, 10, 0.5), [-2.3992469531367178, -0.6921039966062101,
        -3.214258651009189, 1.5071156944786814, 0.4511482985036587, 0.41975118145402474]),
    (sphere_loss, (4000, [1, 40, 40]), 110, (16, 8), [272.93648234274724, 613.5235661324239,
        585.5920366491057]),
    (sphere_loss, (10, [0, 1, 0]), 113, (40, 16), [0.4366033212496496, 0.8089465970358594,
        0.7339083651335803]),
]
# seed; n, d; forget, eps; alpha; at each of three steps: loss, invariance, big bang, sums of |gradient|
OFFICIAL_CORINFOMAX = [
    (120, (32, 8), (0.01, 1e-08), 250, [
        [23.44763421773332, 0.07654064088903899, 4.312473995473575, 106.57331302017658, 106.44784204541048],
        [24.038116455101516, 0.07866852733347762, 4.370984621732109, 106.27292928862484, 106.40716360168247],
        [24.380097835508877, 0.07908289494367157, 4.609374099590985, 106.18961288456919, 105.98928515875352],
    ]),
    (140, (16, 16), (0.5, 0.001), 1, [
        [1.3072197649731876, 0.037002876476018326, 1.2702168884971692, 0.372312839679196, 0.3779393932150459],
        [2.482428534447348, 0.03664813176129694, 2.445780402686051, 0.5816463913505624, 0.5671591728102492],
        [3.518930536664978, 0.037926210750749555, 3.4810043259142285, 0.8985919763001066, 0.8927079330505749],
    ]),
]
# fmt: on


def assert_near(values, expected, tolerance=1e-9):
    values = torch.as_tensor(values, dtype=torch.double)
    expected = torch.as_tensor(expected, dtype=torch.double)
    torch.testing.assert_close(values, expected, rtol=tolerance, atol=tolerance)


def gradient(loss, zs):
    return torch.autograd.grad(loss, zs, retain_graph=True)[0]


def assert_same(loss, naive, zs):
    assert_near(loss, naive)
    assert_near(gradient(3 * loss, zs), gradient(3 * naive, zs))  # a custom backward may forget the 3


def official_views(seed, n, d, scale=1.0):
    a, b = torch.tensor(numpy.random.RandomState(seed).randn(2, n, d))
    return (scale * torch.stack([a, 0.7 * a + math.sqrt(1 - 0.7**2) * b])).requires_grad_()


def assert_official(loss, terms, zs, official, tolerance):
    """The loss, its terms, and the sum of |.| of each view's gradient."""
    sums = gradient(loss, zs).abs().sum((1, 2))
    assert_near(torch.stack([loss, *terms.values(), *sums]), official, tolerance)


@pytest.mark.parametrize("seed, shape, official", OFFICIAL_HSIC)
def test_hsic_has_the_official_values_and_is_its_gram_matrix_form(seed, shape, official):
    phi, psi = torch.tensor(numpy.random.RandomState(seed).randn(2, *shape))
    assert_near([hsic.hsic_zy(phi), hsic.hsic_zz(phi, psi)], official, 1e-12)
    rows = torch.stack([phi, psi]).flatten(1, 2)
    assert_near(gram_forms(*(rows @ rows.mT), shape[0]), official, 1e-12)


@pytest.mark.parametrize("loss, settings, seed, shape, official", OFFICIAL)
def test_music_and_mmd_sphere_have_the_official_values(loss, settings, seed, shape, official):
    zs = official_views(seed, *shape)
    value, terms = loss(*zs, *settings)
    assert_official(value, terms if loss is music.music_loss else {}, zs, official, 1e-6)


@pytest.mark.parametrize("seed, shape, options, alpha, official", OFFICIAL_CORINFOMAX)
def test_corinfomax_has_the_official_values_over_three_steps(seed, shape, options, alpha, official):
    criterion = new_corinfomax(shape[1], *options)
    for step in range(3):
        zs = F.normalize(official_views(seed + step, *shape), dim=2)
        loss, terms = criterion(*zs, alpha)
        assert_official(loss, terms, zs, official[step], 1e-8)


def gram_forms(K, L, views):
    """HSIC(Z, Y) and HSIC(Z, Z) from Gram matrices of all embeddings, view after view."""
    N = len(K)
    same_image = torch.eye(N // views).repeat(views, views)
    H = torch.eye(N).double() - 1 / N
    zy = (K * same_image).sum() / (N * (views - 1)) - K.mean()
    return zy, torch.trace(K @ H @ L @ H) / N**2


def kernel_matrix(zs, kernel, c):
    z = F.normalize(zs, dim=2).flatten(0, 1)
    r2 = (z[:, None] - z).square().sum(2)
    kernels = {"imq": c / (c**2 + r2).sqrt(), "gaussian": torch.exp(-r2 / (2 * c**2)), "linear": 1 - r2 / 2}
    return kernels[kernel]


@pytest.mark.parametrize("kernel", ["imq", "gaussian", "linear"])
def test_exact_hsic_is_its_definition(kernel):
    zs = normal(3, 12, 5).requires_grad_()
    K = kernel_matrix(zs, kernel, 0.6)
    zy, zz = gram_forms(K, K, 3)
    assert_same(hsic.hsic_loss(zs, 0.6, 2.0, kernel, f=0)[0], -zy + 2 * zz.sqrt(), zs)


@pytest.mark.parametrize("s", [2, 4, 8, 24])
def test_music_is_its_definition_with_all_of_P_in_memory(s):
    zs = normal(2, 7, 24).requires_grad_()
    S = 24 // s
    p1, p2 = torch.softmax(zs.view(2, 7, S, s) / 0.5, 3)
    P = torch.einsum("nai,nbj->abij", p1, p2) / 7
    negentropy = P * P.log()
    within = torch.einsum("aaii->", negentropy) / S
    between = (negentropy.sum() - torch.einsum("aaij->", negentropy)) / max(1, S * (S - 1))
    naive = 2 * within + 3 * between - 5 * (p1 * p2).sum(2).log().mean()
    assert_same(music.music_loss(*zs, s, (2, 3, 5), 0.5)[0], naive, zs)
    with pytest.raises(ValueError, match="24 .* 5"):
        music.music_loss(*zs, 5)


SPREAD = [  # b, kernel, log; MMD^2 for tau = 2 in dimension 5
    ([0, 1], "legendre", False, lambda z: (5 * (z.mT @ z / len(z)).square().sum() - 1) / 4),
    ([3, 0, 4], "legendre", False, lambda z: 7 * (z @ z.mT).pow(3).mean()),
    ([], "quadratic", False, lambda z: (z.mT @ z / len(z)).square().sum()),
    ([], "rbf", False, lambda z: torch.exp(4 * z @ z.mT - 4).mean()),
    ([], "rbf", True, lambda z: torch.pdist(z).square().mul(-2).exp().mean().log()),  # uniformity
]


@pytest.mark.parametrize("views, n", [(2, 1100), (4, 6)])
@pytest.mark.parametrize("b, kernel, log, mmd2", SPREAD)
def test_mmd_sphere_is_its_closed_form_and_spreads_the_global_views_alone(views, n, b, kernel, log, mmd2):
    zs = normal(views, n, 5).requires_grad_()
    z = F.normalize(zs, dim=2)
    pulled = [(z[g] - z[o]).square().mean() for g in (0, 1) for o in range(views) if o != g]
    naive = 7 * torch.stack(pulled).mean() + (mmd2(z[0]) + mmd2(z[1])) / 2
    assert_same(mmd_sphere.mmd_sphere_loss(zs, 7.0, b, kernel, log)[0], naive, zs)


def test_ldmi_is_four_times_the_mutual_information_of_gaussian_views_with_the_recursive_covariance():
    """In the joint covariance and its blocks, where both views count alike: the paper's brackets agree."""
    criterion = new_corinfomax(4, 0.3, 0.01, "ldmi")
    mu, R = torch.zeros(8), torch.eye(8).double()
    for step in range(3):
        zs = normal(2, 9, 4, seed=step).requires_grad_()
        z = torch.cat([*zs], 1)
        mu = 0.3 * mu.detach() + 0.7 * z.mean(0)
        R = 0.3 * R.detach() + 0.7 * (z - mu).mT @ (z - mu) / 9
        joint = R + 0.01 * torch.eye(8).double()
        information = (joint[:4, :4].logdet() + joint[4:, 4:].logdet() - joint.logdet()) / 2
        assert_same(criterion(*zs, 0.0)[0], -information, zs)  # 4 / d = 1


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
    for extreme in (zs[:, :1].expand_as(zs), 0 * zs, 1e4 * zs, 1e-4 * zs, zs[:, :2], zs[:, :4]):
        leaf = extreme.clone().requires_grad_()
        loss = LOSSES[name](leaf)
        assert loss.isfinite() and gradient(loss, leaf).isfinite().all()
    zs[0, 0, 0] = math.nan
    assert LOSSES[name](zs).isnan()


def rank_after_training(loss_of):
    """The effective rank of embeddings (128, 32) of noisy points after a short training."""
    torch.manual_seed(0)
    points = torch.randn(256, 32)
    net = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(150):
        batch = points[torch.randperm(256)[:128]]
        zs = torch.stack([net(batch + 0.3 * torch.randn(128, 32)) for _ in range(2)])
        optimizer.zero_grad()
        loss_of(zs).backward()
        optimizer.step()
    return common.effective_rank(zs[0].detach())


@pytest.mark.parametrize("name", ["hsic", "corinfomax", "music", "mmd_sphere"])
def test_training_keeps_the_rank_and_without_what_spreads_it_collapses(name):
    def alignment(zs):
        if name == "music":
            return music.music_loss(*zs, 4, (0, 0, 1))[0]
        return F.mse_loss(*F.normalize(zs, dim=2))

    collapsed = rank_after_training(alignment)
    assert collapsed < 5 and rank_after_training(LOSSES[name]) > 3 * collapsed


@pytest.mark.parametrize("kernel", ["imq", "gaussian"])
def test_features_converge_to_the_kernel_at_rate_one_over_root_f(kernel):
    z = F.normalize(normal(1, 40, 32), dim=2)
    errors = []
    for f in (1024, 16384):
        omega, phase = hsic.sample_features(32, f, kernel, 0, 0)
        phi = math.sqrt(2 / f) * torch.cos(z @ omega.double() / 0.7 + phase)
        errors.append((phi[0] @ phi[0].mT - kernel_matrix(z, kernel, 0.7)).square().mean().sqrt())
    assert errors[1] < 0.01 and 2.5 < errors[0] / errors[1] < 6.5  # 4 in expectation


def test_features_are_a_function_of_seed_step_and_draw_and_over_steps_give_the_loss_of_the_kernel():
    keys = list(itertools.product((0, 1), repeat=3))
    omegas = [hsic.sample_features(8, 16, "imq", a, b, draw=c)[0] for a, b, c in keys + keys]
    zs = normal(64, 16) + 0.3 * normal(2, 64, 16, seed=1)
    losses = [hsic.hsic_loss(zs, 0.7, f=64, step=step)[0] for step in range(400)]
    assert len(torch.stack(omegas).unique(dim=0)) == 8 and losses[0] != losses[1]
    assert_near(sum(losses) / 400, hsic.hsic_loss(zs, 0.7, f=0)[0], 0.01)


def test_gradient_of_128_draws_is_near_that_of_the_kernel_and_of_one_draw_is_not():
    zs = (normal(256, 256) + 0.5 * normal(4, 256, 256, seed=1)).float().requires_grad_()
    exact, one, many = [
        gradient(hsic.hsic_loss(zs, 0.8, f=f, draws=draws)[0], zs)
        for f, draws in ((0, 1), (512, 1), (512, 128))
    ]
    assert (many - exact).norm() < 0.22 * exact.norm() and (one - exact).norm() > exact.norm()


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
    rest = []
    for tau in (0.2, 0.1):
        k = tau * kernel_matrix(zs, "imq", 1.0)
        minus_infonce = k.diagonal(64).mean() - k.exp().mean(1).log().mean()
        second_order = tau * hsic.hsic_loss(zs, f=0)[1]["dependence"] - k.var(1, correction=0).mean() / 2
        rest.append((minus_infonce - second_order).abs())
    assert 6 < rest[0] / rest[1] < 10


@pytest.mark.parametrize("kernel", ["imq", "gaussian"])
def test_adaptive_scale_is_of_pairs_of_all_views_and_images_and_adam_goes_there(kernel):
    angle = torch.linspace(0, math.pi, 150).view(3, 50)
    half_circle = torch.stack([angle.cos(), angle.sin()], 2)
    scale = hsic.KernelScale(kernel, "adaptive")
    c = scale(half_circle, 0, 0)
    r2 = scale.squared_distances(half_circle, 0, 0)
    assert len(r2) == 1024 and abs(r2.mean() - (2 - 8 / math.pi**2)) < 0.1
    assert kernel == "gaussian" or abs(3 * (c**2 / (c**2 + r2)).mean() - 1) < 0.01
    adam = hsic.KernelScale(kernel, "adam")
    adam.optimizer.param_groups[0]["lr"] = 0.02
    for step in range(200):
        moved = adam(half_circle, 0, step)
        adam.optimizer.step()
    assert_near(moved, c, 0.03)


def test_corinfomax_prefers_a_round_covariance_of_the_same_trace():
    z = normal(40, 5)
    ball = torch.linalg.qr(z - z.mean(0))[0]
    ellipsoids = [F.normalize(ball @ A, dim=(0, 1)) for A in (torch.eye(5).double(), *normal(20, 5, 5))]
    losses = [new_corinfomax(5, 0.0)(z, z, 0.0)[0] for z in ellipsoids]
    assert losses[0] < min(losses[1:])


def test_corinfomax_survives_a_long_time_near_collapse_with_fewer_images_than_dimensions():
    criterion = new_corinfomax(32, 0.1)
    for step in range(300):
        zs = F.normalize(1 + 1e-5 * normal(2, 8, 32, seed=step).float(), dim=2).requires_grad_()
        loss, _ = criterion(*zs, 1.0)
        loss.backward()  # as in training: the graph of the step before is gone
        assert loss.isfinite() and zs.grad.isfinite().all()


def test_music_reaches_its_bound_on_a_full_factorial_design_and_collapse_is_worse():
    codes = torch.tensor(list(itertools.product(range(3), repeat=3)))
    design = 60 * F.one_hot(codes, 3).double().flatten(1)  # so confident that the softmax is one-hot
    embeddings = (design, torch.zeros(27, 9), design[:1].expand(27, 9), 5 * normal(27, 9))
    losses = [music.music_loss(z, z, 3)[0] for z in embeddings]
    assert_near(losses[:3], [-3 * math.log(3), -5 / 3 * math.log(3), 0], 1e-6)
    assert losses[0] < losses[3]


def test_legendre_polynomials_are_the_closed_forms_and_orthogonal_on_the_sphere():
    t = torch.linspace(-1, 1, 4001).double()
    for k in range(5):
        assert_near(mmd_sphere.legendre(t, 2, 4)[k], torch.cos(k * t.arccos()))
        assert_near(mmd_sphere.legendre(t, 3, 4)[k], torch.special.legendre_polynomial_p(t, k))
    P = torch.stack(mmd_sphere.legendre(t, 5, 4))
    density = (1 - t**2) / (1 - t**2).sum()  # of a coordinate of uniform points of the sphere in R^5
    assert_near(P * density @ P.mT, (1 / torch.tensor([1, 5, 14, 30, 55])).diag(), 1e-6)


def test_hsic_of_spread_and_of_collapsed_embeddings_has_its_known_values():
    assert_near(LOSSES["hsic"](normal(256, 256).expand(2, 256, 256)), -1.33, 0.01)
    assert_near(LOSSES["hsic"](torch.ones(2, 256, 256)), -1, 1e-6)

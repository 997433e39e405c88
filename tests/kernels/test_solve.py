"""Solvers next to scikit-learn, scipy, brute force, and their own equations."""

import functools
import math

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, mean_squared_error

from jaxlm.kernels import logistic, lssvm, ridge, solve
from tests.helpers.sentences import refused

N, M = 10, 7
LABELS = np.array([0, 1, 2, 0, 1, 2, 2, 1, 0, 1])
BINARY = LABELS % 2


def features(count=N, outputs=1, width=60, seed=0):
    """Gradients [count, C, width] of random functions; `width` above N * C: a regular kernel."""
    return np.random.default_rng(seed).normal(size=(count, outputs, width))


def kernel(first, second):
    return np.einsum("icp,jdp->icjd", first, second)


def data(outputs):
    first, other = features(N, outputs), features(M, outputs, seed=1)
    labels = BINARY if outputs == 1 else LABELS
    f0 = np.random.default_rng(2).normal(size=(N, outputs))
    return kernel(first, first), kernel(other, first), labels, f0


# --- ridge


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("lam", [1e-3, 1.0])
def test_ridge_is_scikit_learns(outputs, lam):
    K, K_other, labels, _ = data(outputs)
    y = solve.targets(labels, outputs)
    path = ridge.ridge_path(K, y, ridges=[lam])
    flat = K.reshape(N * outputs, -1)
    wanted = KernelRidge(alpha=lam * np.linalg.norm(flat, 2), kernel="precomputed")
    wanted.fit(flat, y.ravel())
    predicted = wanted.predict(K_other.reshape(M * outputs, -1)).reshape(M, outputs)
    np.testing.assert_allclose(path.predict(K_other)[0, 0], predicted, rtol=1e-9)


def test_traced_outputs_share_one_kernel():
    K, K_other, _, f0 = data(1)
    y = solve.targets(LABELS, 3)
    traced, other = K[:, 0, :, 0], K_other[:, 0, :, 0]
    f0 = np.tile(f0, 3)
    path = ridge.ridge_path(traced, y, ridges=[0.1], f0=f0, f0_scales=[10.0])
    wanted = KernelRidge(alpha=0.1 * np.linalg.norm(traced, 2), kernel="precomputed")
    predicted = wanted.fit(traced, y - f0 / 10).predict(other)
    values = path.predict(other, f0[:M])[0, 0]
    np.testing.assert_allclose(values, predicted + f0[:M] / 10, rtol=1e-9)
    full = np.einsum("ij,cd->icjd", traced, np.eye(3))
    same = ridge.ridge_path(full, y, ridges=[0.1], f0=f0, f0_scales=[10.0])
    np.testing.assert_allclose(same.coefficients, path.coefficients, rtol=1e-9)
    np.testing.assert_allclose(same.leave_one_out, path.leave_one_out, rtol=1e-9)


@pytest.mark.parametrize("outputs", [1, 3])
def test_leaving_one_out_is_fitting_without_it(outputs):
    K, _, labels, f0 = data(outputs)
    y = solve.targets(labels, outputs)
    lams, scales = [0.0, 1e-2, 1.0], [3.0, math.inf]
    path = ridge.ridge_path(K, y, ridges=lams, f0=f0, f0_scales=scales)
    top = np.linalg.norm(K.reshape(N * outputs, -1), 2)
    for i in range(N):
        rest = np.delete(np.arange(N), i)
        flat = K[np.ix_(rest, range(outputs), rest, range(outputs))].reshape(
            len(rest) * outputs, -1
        )
        toward = K[i][:, rest].reshape(outputs, -1)
        for r, lam in enumerate(lams):
            for s, scale in enumerate(scales):
                left = (y - f0 / scale)[rest].ravel()
                alpha = np.linalg.solve(flat + lam * top * np.eye(len(flat)), left)
                wanted = toward @ alpha + f0[i] / scale
                np.testing.assert_allclose(path.leave_one_out[r, s, i], wanted, rtol=1e-7)


def test_a_ridge_path_states_its_spectrum():
    K, _, labels, _ = data(1)
    path = ridge.ridge_path(K, solve.targets(labels, 1))
    wanted = np.linalg.eigvalsh(K[:, 0, :, 0])[::-1]
    np.testing.assert_allclose(path.eigenvalues, wanted, rtol=1e-9)
    assert (path.rank, path.singular, path.duplicates) == (N, False, ())
    assert (path.ridges, path.f0_scales) == (ridge.RIDGES, (math.inf,))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("outputs", [1, 3])
def test_duplicates_are_stated_and_solved_by_ridge(outputs, dtype):
    rows = features(N, outputs)
    rows[7] = rows[2]  # and another label
    K = kernel(rows, rows).astype(dtype)
    y = solve.targets(BINARY if outputs == 1 else LABELS, outputs)
    path = ridge.ridge_path(K, y, ridges=[0.0, 0.1])
    assert (path.singular, path.rank, path.duplicates) == (True, (N - 1) * outputs, ((2, 7),))
    least = np.finfo(dtype).eps ** 0.5
    assert path.ridges == (least, 0.1)
    # The limit of small ridges is the mean label of the two.
    values, tolerance = path.predict(K)[0, 0], 50 * least
    np.testing.assert_allclose(values[2], (y[2] + y[7]) / 2, atol=tolerance)
    others = np.delete(np.arange(N), [2, 7])
    np.testing.assert_allclose(values[others], y[others], atol=tolerance)
    # Held out, each has the label of the other.
    np.testing.assert_allclose(path.leave_one_out[0, 0, 2], y[7], atol=tolerance)


def test_an_infinite_scale_leaves_f0_out():
    K, K_other, labels, f0 = data(1)
    y = solve.targets(labels, 1)
    path = ridge.ridge_path(K, y, ridges=[0.1], f0=f0, f0_scales=[math.inf])
    plain = ridge.ridge_path(K, y, ridges=[0.1])
    np.testing.assert_array_equal(path.coefficients, plain.coefficients)
    np.testing.assert_array_equal(path.predict(K_other, f0[:M]), plain.predict(K_other))


# --- logistic and softmax


def by_scipy(K, labels, outputs, strength, first):
    """Minimum over α of the loss as its docstring has it."""
    flat = K.reshape(N * outputs, -1)

    def objective(alpha):
        F = first + (flat @ alpha).reshape(N, outputs)
        if outputs == 1:
            signs = 2 * labels - 1
            loss = np.logaddexp(0, -signs * F[:, 0]).sum()
        else:
            loss = (np.logaddexp.reduce(F, axis=1) - F[np.arange(N), labels]).sum()
        return loss + strength / 2 * alpha @ flat @ alpha

    # In the basis of the kernel's root the problem is well scaled.
    values, vectors = np.linalg.eigh(flat)
    root = vectors / np.sqrt(values)
    found = minimize(lambda z: objective(root @ z), np.zeros(len(flat)), tol=1e-12)
    return (root @ found.x).reshape(N, outputs), found.fun


@pytest.mark.parametrize("scale", [2.0, math.inf])
@pytest.mark.parametrize("outputs", [1, 3])
def test_logistic_is_the_minimum_that_scipy_finds(outputs, scale):
    K, K_other, labels, f0 = data(outputs)
    solver = logistic.kernel_logistic if outputs == 1 else logistic.kernel_softmax
    fit = solver(K, labels, penalty=1e-2, f0=f0, f0_scale=scale)
    strength = 1e-2 * np.linalg.norm(K.reshape(N * outputs, -1), 2)
    alpha, loss = by_scipy(K, labels, outputs, strength, f0 / scale)
    assert fit.residual <= 1e-10
    assert fit.iterations < 20
    np.testing.assert_allclose(fit.loss, loss, rtol=1e-9)
    values = np.einsum("mcnd,nd->mc", K_other, alpha) + f0[:M] / scale
    np.testing.assert_allclose(fit.predict(K_other, f0[:M]), values, atol=1e-4)


@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_of_a_linear_kernel_is_scikit_learns(classes):
    x, other = features(width=4)[:, 0], features(M, width=4, seed=1)[:, 0]
    K, penalty = x @ x.T, 0.05
    C = 1 / (penalty * np.linalg.norm(K, 2))
    model = LogisticRegression(C=C, fit_intercept=False, tol=1e-10, max_iter=10000)
    if classes == 2:
        wanted = model.fit(x, BINARY).decision_function(other)[:, None]
        fit = logistic.kernel_logistic(K, BINARY, penalty=penalty)
    else:
        wanted = model.fit(x, LABELS).decision_function(other)
        fit = logistic.kernel_softmax(K, LABELS, penalty=penalty)
    # The kernel has rank 4 of 10: singular kernels are solved too.
    np.testing.assert_allclose(fit.predict(other @ x.T), wanted, atol=1e-5)


def test_newton_reaches_separable_data_with_little_penalty():
    K, _, labels, f0 = data(3)
    fit = logistic.kernel_softmax(K * 1e4, labels, penalty=1e-6, f0=100 * f0)
    assert fit.residual <= 1e-10
    assert (solve.classes(fit.predict(K * 1e4, 100 * f0)) == labels).all()


# --- asymmetric machines


def asymmetric(outputs, seed=0):
    rng = np.random.default_rng(seed)
    phi = rng.normal(size=(N, outputs, 40))
    return kernel(phi, np.sign(phi)), phi


@pytest.mark.parametrize("bias", [False, True])
def test_the_equations_with_labels_are_those_of_the_literature(bias):
    """He et al. 2022, equation of AsK-LS, with H_ij = y_i K_ij y_j and right-hand side 1."""
    K, _ = asymmetric(1)
    gamma, y = 0.3, solve.targets(BINARY, 1)[:, 0]
    Z, I = np.diag(y), np.eye(N) / gamma
    H = Z @ K[:, 0, :, 0] @ Z
    A, b = np.block([[I, H], [H.T, I]]), np.ones(2 * N)
    if bias:
        zeros = np.zeros(N)
        top = np.array([[0, 0, *y, *zeros], [0, 0, *zeros, *y]])
        A = np.block([[top], [top[:, 2:].T, A]])
        b = np.concatenate([[0, 0], b])
    wanted = np.linalg.solve(A, b)
    function = lssvm.asymmetric_svm_with_bias if bias else lssvm.asymmetric_svm
    fit = function(K, y[:, None], gamma=gamma)
    alpha, beta = wanted[-2 * N : -N] * y, wanted[-N:] * y
    np.testing.assert_allclose(fit.flipped_coefficients[:, 0], alpha, rtol=1e-8)
    np.testing.assert_allclose(fit.coefficients[:, 0], beta, rtol=1e-8)
    if bias:
        np.testing.assert_allclose([fit.bias[0], fit.flipped_bias[0]], wanted[:2], rtol=1e-8)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_stationary_in_the_primal(bias, outputs):
    """The gradient of w·v + γ/2 Σ (e² + h²) in w, v and the constants is zero, by hand."""
    K, phi = asymmetric(outputs)
    psi, gamma = np.sign(phi), 0.7
    y = solve.targets(BINARY if outputs == 1 else LABELS, outputs)
    f0 = np.random.default_rng(5).normal(size=y.shape)
    function = lssvm.asymmetric_svm_with_bias if bias else lssvm.asymmetric_svm
    fit = function(K, y, gamma=gamma, f0=f0, f0_scale=4.0)
    w = np.einsum("nc,ncp->p", fit.coefficients, psi)
    v = np.einsum("nc,ncp->p", fit.flipped_coefficients, phi)
    e = y - f0 / 4 - phi @ w - fit.bias
    h = y - f0 / 4 - psi @ v - fit.flipped_bias
    np.testing.assert_allclose(v, gamma * np.einsum("nc,ncp->p", e, phi), atol=1e-9)
    np.testing.assert_allclose(w, gamma * np.einsum("nc,ncp->p", h, psi), atol=1e-9)
    if bias:
        np.testing.assert_allclose([e.sum(0), h.sum(0)], 0, atol=1e-9)
    # Values of other examples are φ(x)·w + b, mixed with ψ(x)·v + b'.
    other = features(M, outputs, 40, seed=9)
    first, second = other @ w + fit.bias, np.sign(other) @ v + fit.flipped_bias
    values = fit.predict(kernel(other, psi), kernel(phi, np.sign(other)), weight=0.25, f0=f0[:M])
    np.testing.assert_allclose(values, 0.25 * first + 0.75 * second + f0[:M] / 4, atol=1e-9)


def test_of_a_symmetric_kernel_it_is_ridge_regression():
    K, K_other, labels, _ = data(3)
    y, gamma = solve.targets(labels, 3), 0.02
    fit = lssvm.asymmetric_svm(K, y, gamma=gamma)
    flat = K.reshape(N * 3, -1)
    wanted = KernelRidge(alpha=1 / gamma, kernel="precomputed").fit(flat, y.ravel())
    predicted = wanted.predict(K_other.reshape(M * 3, -1)).reshape(M, 3)
    np.testing.assert_allclose(fit.predict(K_other), predicted, rtol=1e-8)
    np.testing.assert_allclose(fit.coefficients, fit.flipped_coefficients, rtol=1e-8)


@pytest.mark.parametrize("bias", [False, True])
def test_traced_outputs_of_an_asymmetric_kernel(bias):
    K, _ = asymmetric(1)
    traced, y = K[:, 0, :, 0], solve.targets(LABELS, 3)
    function = lssvm.asymmetric_svm_with_bias if bias else lssvm.asymmetric_svm
    fit = function(traced, y, gamma=0.3)
    full = function(np.einsum("ij,cd->icjd", traced, np.eye(3)), y, gamma=0.3)
    np.testing.assert_allclose(fit.coefficients, full.coefficients, rtol=1e-8)
    np.testing.assert_allclose(fit.predict(traced), full.predict(full_of(traced)), rtol=1e-8)


def full_of(traced):
    return np.einsum("ij,cd->icjd", traced, np.eye(3))


def test_a_gamma_at_a_singular_value_is_named():
    # Singular values 2 and 1, of an antisymmetric part that y excites.
    K = np.array([[0.0, 2.0], [1.0, 0.0]])
    with refused("gamma", "singular value", "got 0.5"):
        lssvm.asymmetric_svm(K, [[1.0], [-1.0]], gamma=0.5)


# --- choosing


def splits(outputs, seed=0):
    """A task that a kernel solves, with a direction of the features for each class."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(3, 20))
    labels = np.arange(60) % (2 if outputs == 1 else 3)
    x = directions[labels] + rng.normal(size=(60, 20))
    maps = rng.normal(size=(outputs, 20, 30)) / 5
    grads = np.einsum("np,cpq->ncq", x, maps)
    f0 = rng.normal(size=(60, outputs))
    parts = [slice(0, 20), slice(20, 40), slice(40, 60)]
    train = grads[parts[0]]
    return [
        solve.Examples(
            kernel(grads[part], np.sign(train)),
            labels[part],
            f0[part],
            kernel(train, np.sign(grads[part])),
        )
        for part in parts
    ], [solve.Examples(kernel(grads[part], train), labels[part], f0[part]) for part in parts]


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize(
    ("solver", "points"),
    [
        (solve.Ridge(), 25),
        (solve.Logistic(), 12),
        (solve.AsymmetricSvm(weights=(1.0, 0.5)), 80),
        (solve.AsymmetricSvm(bias=True), 40),
    ],
)
def test_validation_chooses(solver, points, outputs):
    signed, plain = splits(outputs)
    train, validation, test = signed if isinstance(solver, solve.AsymmetricSvm) else plain
    fit = solve.fit(train, validation, solver)
    assert (len(fit.tried), fit.chosen_by) == (points, "validation")
    best = max(accuracy for _, accuracy, _ in fit.tried)
    losses = [loss for _, accuracy, loss in fit.tried if accuracy == best]
    assert (fit.settings, best, min(losses)) in fit.tried
    assert fit.accuracy_chosen == best == fit.accuracy(validation)
    assert fit.accuracy(test) > 0.6


def test_without_validation_leaving_one_out_chooses():
    _, (train, _, test) = splits(3)
    fit = solve.fit(train, None)
    path = ridge.ridge_path(train.kernel, solve.targets(train.labels, 3), f0=train.f0)
    hits = solve.classes(path.leave_one_out) == train.labels
    assert fit.chosen_by == "leave-one-out"
    assert fit.accuracy_chosen == hits.mean(axis=-1).max()
    assert fit.accuracy(test) > 0.6
    with refused("validation", "Logistic"):
        solve.fit(train, None, solve.Logistic())


def test_losses_decide_between_equals():
    scores, labels = np.random.default_rng(0).normal(size=(9, 3)), np.arange(9) % 3
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    wanted = log_loss(labels, probabilities)
    np.testing.assert_allclose(solve.Logistic().loss(scores, labels), wanted)
    margins, signs = scores[:, :1], np.array([-1, 1])[labels % 2]
    wanted = np.log1p(np.exp(-signs * margins[:, 0])).mean()
    np.testing.assert_allclose(solve.Logistic().loss(margins, labels % 2), wanted)
    wanted = 3 * mean_squared_error(np.eye(3)[labels], scores)
    np.testing.assert_allclose(solve.Ridge().loss(scores, labels), wanted)
    wanted = mean_squared_error(signs, margins[:, 0])
    np.testing.assert_allclose(solve.AsymmetricSvm().loss(margins, labels % 2), wanted)


def test_gammas_without_a_solution_are_left_out():
    K = np.array([[0.0, 2.0], [1.0, 0.0]])
    split = solve.Examples(K, np.array([0, 1]))
    fit = solve.fit(split, split, solve.AsymmetricSvm(gammas=(0.5, 3.0), ridges=()))
    assert [settings["gamma"] for settings, _, _ in fit.tried] == [3.0]
    with refused("solver", "no setting has a solution"):
        solve.fit(split, split, solve.AsymmetricSvm(gammas=(0.5,), ridges=()))


# --- mistakes

K3 = np.eye(3)
Y3 = [[-1.0], [1.0], [1.0]]


def broken(i, j, value=np.nan):
    K = np.eye(3).reshape(3, 1, 3, 1).copy()
    K[i, 0, j, 0] = value
    return K


FULL, ONE = np.ones((2, 2, 2, 2)), np.ones((3, 1, 3, 1))
FIT = functools.partial(lssvm.asymmetric_svm, 2 * K3, Y3, gamma=1.0)


@pytest.mark.parametrize(
    ("call", "key", "part"),
    [
        (lambda: ridge.ridge_path(broken(1, 2), Y3), "kernel", "nan at examples 1 and 2"),
        (lambda: ridge.ridge_path(broken(2, 0, np.inf), Y3), "kernel", "inf at examples 2 and 0"),
        (lambda: ridge.ridge_path(np.eye(1), [[1.0]]), "kernel", "at least two"),
        (lambda: ridge.ridge_path(np.ones((2, 3)), Y3), "kernel", "got 2 and 3 examples"),
        (lambda: ridge.ridge_path(np.ones(3), Y3), "kernel", "got [3]"),
        (lambda: ridge.ridge_path(np.zeros((3, 3)), Y3), "kernel", "zeros"),
        (lambda: ridge.ridge_path(np.triu(np.ones((3, 3))), Y3), "kernel", "asymmetric_svm"),
        (lambda: ridge.ridge_path(-K3, Y3), "kernel", "got -1, the largest -1"),
        (lambda: ridge.ridge_path(K3, Y3, ridges=[-1.0]), "ridges", "got -1"),
        (lambda: ridge.ridge_path(K3, Y3, ridges=[]), "ridges", "empty"),
        (lambda: ridge.ridge_path(K3, Y3[:2]), "targets", "got [2, 1]"),
        (lambda: ridge.ridge_path(K3, [*Y3[:2], [np.nan]]), "targets", "example 2"),
        (lambda: ridge.ridge_path(K3, Y3, f0=[[0.0]] * 2), "f0", "must be [3, 1] (got [2, 1])"),
        (lambda: ridge.ridge_path(K3, Y3, f0=[*Y3[:2], [np.inf]]), "f0", "example 2"),
        (lambda: ridge.ridge_path(K3, Y3, f0=Y3, f0_scales=[0.0]), "f0_scale", "got 0"),
        (lambda: ridge.ridge_path(K3, Y3).predict(np.eye(2)), "kernel", "3 training examples"),
        (lambda: solve.targets([1, 1, 1], 1), "labels", "got 1 alone"),
        (lambda: solve.targets([0, 3, 1], 3), "labels", "got 3 for example 1"),
        (lambda: solve.targets([0.0, 1.0], 1), "labels", "whole numbers"),
        (lambda: logistic.kernel_logistic(K3, [0, 1, 1], penalty=0.0), "penalty", "got 0"),
        (lambda: logistic.kernel_logistic(K3, [0, 0, 0], penalty=1.0), "labels", "got 0 alone"),
        (lambda: logistic.kernel_logistic(K3, [0, 1], penalty=1.0), "labels", "got 2"),
        (lambda: logistic.kernel_logistic(FULL, [0, 1], penalty=1.0), "kernel", "kernel_softmax"),
        (lambda: logistic.kernel_softmax(ONE, [0, 1, 1], penalty=1.0), "kernel", "kernel_logistic"),
        (lambda: logistic.kernel_softmax(np.eye(2), [0.5, 1], penalty=1.0), "labels", "whole"),
        (lambda: lssvm.asymmetric_svm(K3, Y3, gamma=0.0), "gamma", "got 0"),
        (lambda: lssvm.asymmetric_svm(broken(0, 1), Y3, gamma=1.0), "kernel", "examples 0 and 1"),
        (lambda: FIT().predict(K3, weight=0.5), "flipped", "got None for 0.5"),
        (lambda: FIT().predict(K3, weight=1.5), "weight", "got 1.5"),
    ],
)
def test_mistakes_name_the_argument(call, key, part):
    with refused(key, part):
        call()


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_fit_with_f0_predicts_with_f0(outputs):
    K, K_other, labels, f0 = data(outputs)
    y = solve.targets(labels, outputs)
    solver = logistic.kernel_logistic if outputs == 1 else logistic.kernel_softmax
    for fit in (
        ridge.ridge_path(K, y, f0=f0),
        solver(K, labels, penalty=0.1, f0=f0),
        lssvm.asymmetric_svm(K, y, gamma=0.3, f0=f0),
        lssvm.asymmetric_svm_with_bias(K, y, gamma=0.3, f0=f0),
    ):
        with refused("f0", "missing, though the fit used it divided by 1"):
            fit.predict(K_other)
    plain = solver(K, labels, penalty=0.1)
    wanted = np.einsum("mcnd,nd->mc", K_other, plain.coefficients)
    np.testing.assert_allclose(plain.predict(K_other), wanted, rtol=1e-12)
    with refused("f0", "got one of them"):
        solve.fit(solve.Examples(K, labels, f0), solve.Examples(K_other, labels[:M]))


def test_a_class_that_training_has_not_is_a_class():
    """Of traced outputs; a kernel with outputs has their number of classes."""
    rows = np.random.default_rng(0).normal(size=(8, 20))
    K, labels = rows @ rows.T, np.array([0, 1, 0, 1, 1])
    train, seen = solve.Examples(K[:5, :5], labels), np.array([0, 1, 2])
    for solver in (solve.Ridge(), solve.Logistic(), solve.AsymmetricSvm()):
        fit = solve.fit(train, solve.Examples(K[5:, :5], seen), solver)
        assert fit.scores(train).shape == (5, 3)
        assert fit.accuracy_chosen <= 2 / 3
    full = solve.Examples(K[:5, None, :5, None], labels)
    for wrong, part in (
        (seen, "from 0 to 1 (got 2 for example 2)"),
        (-seen, "got -1 for example 1"),
        (seen[:2], "3 examples (got 2)"),
    ):
        with refused("validation.labels", part):
            solve.fit(full, solve.Examples(K[5:, None, :5, None], wrong))

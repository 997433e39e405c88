"""What is drawn, read back from the pictures' own data."""

import sys

import numpy as np
import pytest

from jaxlm.core.errors import UserError
from jaxlm.studies import kernel_plots
from tests.studies.test_kernel_behaviour import made

G = np.random.default_rng(0).normal(size=(6, 2, 9))
LABELS = [1, 0, 1, 0, 1, 1]


def kernel():
    return np.einsum("icp,jdp->icjd", G, G)


def test_a_heat_map_has_cosines_in_the_order_of_classes():
    axes = kernel_plots.heat_map(kernel(), LABELS, names=("no", "yes"))
    flat = G.reshape(6, -1)
    flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    order = [1, 3, 0, 2, 4, 5]
    np.testing.assert_allclose(axes.images[0].get_array(), (flat @ flat.T)[np.ix_(order, order)])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["no", "yes"]
    assert [line.get_ydata()[0] for line in axes.lines[::2]] == [1.5]


def test_a_spectrum_is_relative_to_its_largest_value():
    axes = kernel_plots.spectrum({"a": kernel(), "b": np.diag([4.0, 1.0])})
    values = np.linalg.eigvalsh(kernel().reshape(12, 12))[::-1]
    # G has 12 rows of 9 numbers: the last three values are rounding.
    np.testing.assert_allclose(axes.lines[0].get_ydata()[:9], values[:9] / values[0])
    np.testing.assert_allclose(axes.lines[1].get_ydata(), [1.0, 0.25])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_accuracies_are_points_of_rows():
    records = [made(0, 0.5, 0.8, 0.7, 0.75, 1.0), made(1, 0.5, 0.9, 0.7, 0.85, 1.0)]
    axes = kernel_plots.accuracies(records)
    (points,) = axes.containers
    np.testing.assert_allclose(np.ravel(points[0].get_data()).astype(float), [85, 80])
    assert points.get_label() == "K-SGD"


def test_axes_that_are_given_are_drawn_on():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    assert kernel_plots.spectrum({"a": np.eye(2)}, axes=axes) is axes


def test_without_matplotlib_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"plots: need matplotlib\. pip install 'jaxlm\[plots\]'"):
        kernel_plots.spectrum({"a": np.eye(2)})

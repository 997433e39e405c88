"""Empirical neural tangent kernels of any function, for SGD, SignGD and Adam."""

from jaxlm.kernels._ntk import NTKInfo, dropped_fraction, ntk, ntk_with_info
from jaxlm.kernels.jacobian import jacobian_contraction
from jaxlm.kernels.vector_products import kernel_vector_product, ntk_vector_products

__all__ = [
    "NTKInfo",
    "dropped_fraction",
    "jacobian_contraction",
    "kernel_vector_product",
    "ntk",
    "ntk_vector_products",
    "ntk_with_info",
]

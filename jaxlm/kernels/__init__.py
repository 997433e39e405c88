"""Empirical neural tangent kernels of any function, for SGD, SignGD and Adam."""

from jaxlm.artifacts.arrays import fingerprint
from jaxlm.kernels._ntk import NTKInfo, dropped_fraction, ntk, ntk_with_info
from jaxlm.kernels._projected import projected, projected_features
from jaxlm.kernels.jacobian import jacobian_contraction
from jaxlm.kernels.saved import (
    Manifest,
    describe,
    load_kernel,
    read_manifest,
    save_kernel,
    saved_ntk,
)
from jaxlm.kernels.vector_products import kernel_vector_product, ntk_vector_products

__all__ = [
    "Manifest",
    "NTKInfo",
    "describe",
    "dropped_fraction",
    "fingerprint",
    "jacobian_contraction",
    "kernel_vector_product",
    "load_kernel",
    "ntk",
    "ntk_vector_products",
    "ntk_with_info",
    "projected",
    "projected_features",
    "read_manifest",
    "save_kernel",
    "saved_ntk",
]

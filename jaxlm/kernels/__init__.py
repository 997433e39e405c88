"""Empirical neural tangent kernels of any function, and kernel methods that solve tasks with them.

`ntk` computes a kernel of the gradients of f: for SGD, SignGD or Adam, by several methods, in
blocks and over a mesh; `saved_ntk` keeps it on disk. `solve` fits a task with a kernel (`ridge`,
`logistic` and `lssvm` hold the solvers), `behaviour` says whether training is like a kernel method,
and `subspaces` has the kernels of low-rank adapters and the error of projections.
"""

from jaxlm.kernels import behaviour, solve, subspaces
from jaxlm.kernels.blocks import KernelOptions
from jaxlm.kernels.empirical import NTKInfo, ntk, ntk_with_info
from jaxlm.kernels.kinds import SGD, Adam, AsymmetricSignGD, SignGD
from jaxlm.kernels.saved import describe, load_kernel, save_kernel, saved_ntk
from jaxlm.kernels.solve import logistic, lssvm, ridge
from jaxlm.kernels.vector_products import kernel_vector_product

__all__ = [
    "SGD",
    "Adam",
    "AsymmetricSignGD",
    "KernelOptions",
    "NTKInfo",
    "SignGD",
    "behaviour",
    "describe",
    "kernel_vector_product",
    "load_kernel",
    "logistic",
    "lssvm",
    "ntk",
    "ntk_with_info",
    "ridge",
    "save_kernel",
    "saved_ntk",
    "solve",
    "subspaces",
]

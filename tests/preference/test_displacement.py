"""Likelihood displacement in a language model of 40 thousand parameters, which CHES predicts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy

from jaxlm import preference
from jaxlm.models import LanguageModel, init_params
from jaxlm.preference import PairScores
from tests.models.reference import CASES

VOCABULARY, PROMPT, RESPONSE, GROUP = 32, 4, 8, 16

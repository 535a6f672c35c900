"""Fused operators for max-min preference learning; torch and triton only.

* :func:`reward_heads_min`: rewards of K linear heads with their minimum, argmin and soft minimum;
  :func:`min_over_heads` the same for rewards that are given.
* :func:`em_responsibilities`: E-step of a Bradley-Terry mixture over users, with
  :func:`plan_users` once per data set.
* :func:`vector_gae`: generalised advantage estimation with a vector reward; :func:`token_gae` the same over
  the tokens of responses that are scored as a whole.
* :func:`token_log_probs`: log-probability and entropy from hidden states, never the full logits.

Every function works on CPU (PyTorch) and CUDA (Triton), under ``torch.compile(fullgraph=True)`` and
``torch.vmap``, takes float32, bfloat16 and float16 and returns float32; float64 is kept and computed in
PyTorch. ``backend="torch"`` selects the plain PyTorch reference, which also lies beside each operator in
``naive.py``. An operator is differentiable once, in reverse mode: forward mode (``jvp``), second derivatives
and ``torch.func.grad`` raise an error that names ``backend="torch"``, through which all of them go. With
``TRITON_INTERPRET=1`` set before the first import of Triton, CPU tensors run the Triton kernels in the
interpreter.
"""

from .em import UserPlan, em_responsibilities, em_responsibilities_naive, plan_users
from .gae import token_gae, token_gae_naive, vector_gae, vector_gae_naive
from .heads import min_over_heads, min_over_heads_naive, reward_heads_min, reward_heads_min_naive
from .log_probs import token_log_probs, token_log_probs_naive

__all__ = [
    "UserPlan",
    "em_responsibilities",
    "em_responsibilities_naive",
    "min_over_heads",
    "min_over_heads_naive",
    "plan_users",
    "reward_heads_min",
    "reward_heads_min_naive",
    "token_gae",
    "token_gae_naive",
    "token_log_probs",
    "token_log_probs_naive",
    "vector_gae",
    "vector_gae_naive",
]

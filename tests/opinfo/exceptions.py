"""The one table of what is not held to equality with eager, or may run on aten, and why."""

from __future__ import annotations

from tests.compiling import OLD_TORCH

NO_GRAPH = "Dynamo hands no graph over"

# Operators whose results are drawn, or are memory nobody has written: shapes and dtypes only.
RANDOM: frozenset[str] = frozenset(
    {
        "bernoulli", "cauchy", "empty", "empty_like", "empty_permuted", "empty_strided",
        "exponential", "geometric", "log_normal", "multinomial", "new_empty", "new_empty_strided",
        "normal", "rand_like", "randint", "randint_like", "randn", "randn_like", "uniform",
        "nn.functional.alpha_dropout", "nn.functional.dropout", "nn.functional.dropout2d",
        "nn.functional.dropout3d", "nn.functional.feature_alpha_dropout",
        "nn.functional.fractional_max_pool2d", "nn.functional.fractional_max_pool3d",
        "nn.functional.rrelu", "pca_lowrank", "svd_lowrank",
        "torch.ops.aten._efficient_attention_forward",  # its seed and offset, where none is drawn
    }
)  # fmt: skip

_ONE_ELEMENT = "a norm of one element: its gradient, 0, is what a fused multiply-add leaves of it"

# Calls (the beginning of their label) that may differ from eager, or are not compiled, and why.
EXCEPTIONS: dict[str, str] = {
    "native_layer_norm bfloat16": "statistics stay float32, as in aten's CUDA kernel",
    "native_layer_norm float16": "statistics stay float32, as in aten's CUDA kernel",
    "corrcoef": "Dynamo does not trace it",
    "cov": "Dynamo does not trace it",
    "allclose": "gives a Python bool: Dynamo breaks the graph at its only operator",
    "equal": "gives a Python bool: Dynamo breaks the graph at its only operator",
    "item complex64": "a complex number: Dynamo breaks the graph at its only operator",
    "linalg.lstsq": "Dynamo breaks the graph at its only operator",
    "resize_": "resizes its input: Dynamo breaks the graph at its only operator",
    "nn.functional.one_hot": "Dynamo does not trace it where it counts the classes itself",
    "sparse.": "sparse tensors: Dynamo breaks the graph",
    "nn.GaussianNLLLoss": "looks at the values of the variance: Dynamo breaks the graph",
    "nn.functional.gaussian_nll_loss": "looks at the values of the variance: Dynamo breaks",
    "nn.CTCLoss": "Dynamo does not trace it",
    "nn.functional.ctc_loss": "Dynamo does not trace it",
    "to_sparse": "sparse tensors: Dynamo breaks the graph",
    "jiterator_": "compiles CUDA itself: Dynamo breaks the graph at its only operator",
    "native_layer_norm float32 sample 8 on cuda": _ONE_ELEMENT,
    "nn.functional.layer_norm float32 sample 2 on cuda": _ONE_ELEMENT,
}

# Causes for which a graph runs on aten, as written by the backend, and why that is right.
FALLBACKS: dict[str, str] = {
    "with_effects": "an operator with an effect token (torch.linalg's check of its errors)",
    "DataDependentOutputException": "sizes read from values: AOTAutograd has none to trace with",
    "sizes that only a run finds": "a slice between numbers read from tensors",
    "GuardOnDataDependentSymNode": "a decomposition of torch asks for a size that only a run finds",
    "DynamicOutputShapeException": "sizes read from values: AOTAutograd has none to trace with",
}
if OLD_TORCH:
    FALLBACKS[NO_GRAPH] = "operators called as functions of the class, as torch.Tensor.__radd__"


def excepted(label: str) -> bool:
    """Whether a call is in the table of exceptions."""
    return any(label.startswith(known) for known in EXCEPTIONS)


def expected(cause: str) -> bool:
    """Whether the cause of a fallback is in the table."""
    return any(known in cause for known in FALLBACKS)

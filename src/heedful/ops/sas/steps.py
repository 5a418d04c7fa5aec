"""The three steps of SAS, Simulated Attention Score (Zheng et al., arXiv 2507.07694), as functions."""

import torch
from torch import Tensor
from torch.nn import functional as F

from heedful.ops.checks import check_device, check_divides, check_float, check_same, check_shape, check_tensor


def simulate_heads(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None
) -> Tensor:
    """Simulate more heads: heads are the channels of a convolution that slides over the features.

    `x1 = conv1(x)` maps H heads to Ĥ, then `x1 + conv2(relu(x1))` refines them; "same" padding.

    Args:
        x: (B, H, T, D).
        weight1: (Ĥ, H, W) with W odd; W = 1 is the "MLP over heads" of the paper.
        bias1: (Ĥ,) or None.
        weight2: (Ĥ, Ĥ, W).
        bias2: (Ĥ,) or None.

    Returns:
        (B, Ĥ, T, D).

    Raises:
        ValueError: if W is even or a shape does not fit.
    """
    check_head_weights(x, weight1, bias1, weight2, bias2)
    sim_heads, _, width = weight1.shape
    batch, heads, length, size = x.shape
    # One row per token, heads in the last (dense) axis: "channels last" is what oneDNN and cuDNN like.
    rows = x.permute(0, 2, 3, 1).reshape(batch * length, 1, size, heads).permute(0, 3, 1, 2)
    padding = (0, width // 2)
    wide = F.conv2d(rows, weight1[:, :, None], bias1, padding=padding)
    wide = wide + F.conv2d(F.relu(wide), weight2[:, :, None], bias2, padding=padding)
    return wide.reshape(batch, length, sim_heads, size).transpose(1, 2)


def simulate_features(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None
) -> Tensor:
    """Simulate wider heads: one small residual MLP over the features, shared by all heads.

    `x1 = lin1(x)` maps D features to D̂, then `x1 + lin2(relu(x1))` refines them.

    Args:
        x: (B, Ĥ, T, D).
        weight1: (D̂, D).
        bias1: (D̂,) or None.
        weight2: (D̂, D̂).
        bias2: (D̂,) or None.

    Returns:
        (B, Ĥ, T, D̂).

    Raises:
        ValueError: if a shape does not fit.
    """
    check_feature_weights(x, weight1, bias1, weight2, bias2)
    wide = F.linear(x, weight1, bias1)
    return wide + F.linear(F.relu(wide), weight2, bias2)


def aggregate_heads(x: Tensor, n_heads: int, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """PEAA, parameter-efficient attention aggregation: average groups of heads, project once.

    The Ĥ outputs are Ĥ/H consecutive groups of H heads. The paper projects every group with the same
    matrix and averages the results; averaging first gives the same numbers Ĥ/H times cheaper.

    Args:
        x: (B, Ĥ, T, E), the outputs of the heads.
        n_heads: H, the heads of one group.
        weight: (C, H * E).
        bias: (C,) or None.

    Returns:
        (B, T, C).

    Raises:
        ValueError: if Ĥ is no multiple of H or a shape does not fit.
    """
    merged = average_heads(x, n_heads)
    expected = (check_tensor("weight", weight, "(C, H*E)").shape[0], n_heads * x.shape[-1])
    check_shape("weight", weight, expected, "(C, H*E)")
    _check_parameters(x, expected[0], weight=weight, bias=bias)
    return F.linear(merged, weight, bias)


def average_heads(x: Tensor, n_heads: int) -> Tensor:
    """PEAA before its projection: the mean over Ĥ/H consecutive groups of H heads.

    Args:
        x: (B, Ĥ, T, E), the outputs of the heads.
        n_heads: H, the heads of one group.

    Returns:
        (B, T, H * E).

    Raises:
        ValueError: if Ĥ is no multiple of H.
    """
    check_float("x", check_tensor("x", x, "(B, Ĥ, T, E)"))
    batch, sim_heads, length, size = x.shape
    check_divides("the number of heads Ĥ", sim_heads, "n_heads", n_heads)
    groups = x.reshape(batch, sim_heads // n_heads, n_heads, length, size)
    return groups.mean(1).transpose(1, 2).reshape(batch, length, n_heads * size)


def check_head_weights(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None
) -> None:
    """Raise unless the weights of `simulate_heads` fit x (B, H, T, D)."""
    check_float("x", check_tensor("x", x, "(B, H, T, D)"))
    sim_heads, _, width = check_tensor("weight1", weight1, "(Ĥ, H, W)").shape
    if width % 2 == 0:
        raise ValueError(
            f"the kernel size W must be odd, so that it has a centre, got {width}; "
            f"use {width - 1} or {width + 1}"
        )
    check_shape("weight1", weight1, (sim_heads, x.shape[1], width), "(Ĥ, H, W)")
    check_shape("weight2", weight2, (sim_heads, sim_heads, width), "(Ĥ, Ĥ, W)")
    _check_parameters(x, sim_heads, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2)


def check_feature_weights(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None
) -> None:
    """Raise unless the weights of `simulate_features` fit x (B, Ĥ, T, D)."""
    check_float("x", check_tensor("x", x, "(B, Ĥ, T, D)"))
    sim_dim = check_tensor("weight1", weight1, "(D̂, D)").shape[0]
    check_shape("weight1", weight1, (sim_dim, x.shape[-1]), "(D̂, D)")
    check_shape("weight2", weight2, (sim_dim, sim_dim), "(D̂, D̂)")
    _check_parameters(x, sim_dim, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2)


def _check_parameters(x: Tensor, rows: int, **parameters: Tensor | None) -> None:
    """Raise unless all are on the device of `x`, in its dtype (autocast may differ), biases (rows,)."""
    for name, value in parameters.items():
        if value is None:
            continue
        if name.startswith("bias"):
            check_shape(name, value, (rows,), "(rows of the weight,)")
        if torch.is_autocast_enabled(x.device.type if x.device.type != "meta" else "cpu"):
            check_device(name, value, "x", x)
        else:
            check_same(name, value, "x", x)

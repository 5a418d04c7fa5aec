"""MLA against transformers' DeepSeek attention, and decoding without keys."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from heedful.attention import LatentAttention, LayerCache, build, configure

H, D, P, R, C = 3, 8, 6, 10, 20  # heads, features without and with positions, latent, width


def deepseeks(q_lora_rank: int | None) -> DeepseekV3Attention:
    """Theirs, in float64 throughout: its own norms, and its eager softmax, compute in float32."""
    config = DeepseekV3Config(
        hidden_size=C,
        num_attention_heads=H,
        num_key_value_heads=H,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=R,
        qk_rope_head_dim=P,
        qk_nope_head_dim=D,
        v_head_dim=D,
        attn_implementation="sdpa",
    )
    theirs = DeepseekV3Attention(config, 0)
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        norm = getattr(theirs, name)
        if norm is not None:
            setattr(theirs, name, nn.RMSNorm(norm.weight.shape[0], eps=1e-6))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    return theirs.double()


def copied(theirs: DeepseekV3Attention, q_lora_rank: int | None) -> LatentAttention:
    """Ours with their weights: their pairs of rotated features are neighbours, ours are halves."""
    halves = torch.cat((torch.arange(0, P, 2), torch.arange(1, P, 2)))
    within = torch.cat((torch.arange(D), D + halves))
    ours = build(
        "mla", d_model=C, n_heads=H, head_dim=D, kv_lora_rank=R, rope_head_dim=P, q_lora_rank=q_lora_rank
    )
    by_head = theirs.kv_b_proj.weight.unflatten(0, (H, 2 * D))
    weights = {
        "kv_down.weight": theirs.kv_a_proj_with_mqa.weight[torch.cat((torch.arange(R), R + halves))],
        "kv_latent_norm.weight": theirs.kv_a_layernorm.weight,
        "k_up.weight": by_head[:, :D].flatten(0, 1),
        "v_up.weight": by_head[:, D:].flatten(0, 1),
        "o_proj.weight": theirs.o_proj.weight,
    }
    queries = theirs.q_proj if q_lora_rank is None else theirs.q_b_proj
    weights["q_proj.weight" if q_lora_rank is None else "q_up.weight"] = queries.weight.unflatten(
        0, (H, D + P)
    )[:, within].flatten(0, 1)
    if q_lora_rank is not None:
        weights |= {
            "q_down.weight": theirs.q_a_proj.weight,
            "q_latent_norm.weight": theirs.q_a_layernorm.weight,
        }
    ours.load_state_dict(weights)
    return ours.double()


@pytest.mark.parametrize("q_lora_rank", [None, 7])
def test_equals_transformers_deepseek(q_lora_rank: int | None):
    torch.manual_seed(0)
    theirs = deepseeks(q_lora_rank)
    ours = copied(theirs, q_lora_rank)
    x, length = torch.randn(2, 9, C, dtype=torch.float64), 9
    angles = torch.arange(length).double()[:, None] * 10000.0 ** (-torch.arange(0, P, 2).double() / P)
    angles = torch.cat((angles, angles), -1)[None]
    future = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)[None, None]

    def outputs_and_gradients(run) -> list[Tensor]:
        given = x.clone().requires_grad_()
        out = run(given)
        (gradient,) = torch.autograd.grad(out.square().sum(), given)
        return [out, gradient]

    got = outputs_and_gradients(ours)
    expected = outputs_and_gradients(lambda x: theirs(x, (angles.cos(), angles.sin()), future)[0])
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    with torch.no_grad():  # and token by token, from the latents
        cache = LayerCache()
        decoded = torch.cat([ours(token, cache=cache) for token in x.split(1, 1)], 1)
    torch.testing.assert_close(decoded, expected[0].detach(), rtol=1e-11, atol=1e-11)


def test_default_sizes_and_costs():
    """At 12 heads of 64: 288 values per token, of 1536."""
    config = configure("mla", "selective", d_model=768, n_heads=12)
    assert (config.latent, config.rotated_dim, config.qk_dim, config.v_dim) == (256, 32, 96, 64)
    assert config.cache_bytes_per_token(2) == (256 + 32) * 2 + 4
    assert config.qk_norm is False
    assert configure("mla", d_model=768, n_heads=12, head_dim=6).rotated_dim == 4  # 3, made even


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_norm": True}, "attention 'mla' has no QK-norm: the norm of a key is not linear in the latent"),
        ({"rope_head_dim": 3}, "an even rope_head_dim, got 3; use 2 or 4, or rope=False"),
        ({"kv_lora_rank": 0}, "kv_lora_rank must be a whole number >= 1, got 0"),
        ({"q_lora_rank": 1.5}, "q_lora_rank must be a whole number >= 1, got 1.5"),
        ({"n_kv_heads": 2}, "attention 'mla' has 4 key/value heads by definition, got n_kv_heads=2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        configure("mla", d_model=32, n_heads=4, **options)

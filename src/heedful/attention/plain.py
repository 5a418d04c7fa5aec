"""May a layer's parameters be read instead of calling the layer?"""

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def is_plain(*layers: nn.Module) -> bool:
    """Whether reading the parameters of these layers gives what calling them gives.

    A fused operation reads parameters. That is right for PyTorch's own layers as they were built, and wrong as soon
    as somebody has put something around them: an adapter, a quantised or parametrized layer, a hook (pruning and
    the old weight norm are hooks), a `forward` of the instance's own. Then the layer has to be called.

    Args:
        *layers: of any class; plain are `nn.Linear`, `nn.Conv1d` as `Expansion` builds it, `nn.RMSNorm` with gains.
    """
    return not _has_any_global_hook() and all(map(_one_is_plain, layers))


def _one_is_plain(layer: nn.Module) -> bool:
    kind = type(layer)  # a parametrized layer has a class of its own
    if kind not in (nn.Linear, nn.Conv1d, nn.RMSNorm):
        return False
    if any(getattr(layer, hooks) for hooks in _HOOKS) or "forward" in vars(layer):
        return False
    # quantised and sharded tensors; a norm without gains
    if type(layer.weight) not in (nn.Parameter, Tensor):
        return False
    if isinstance(layer, nn.RMSNorm):
        return layer.eps is not None
    if isinstance(layer, nn.Conv1d):
        same = (layer.kernel_size[0] // 2,)
        shape = layer.padding, layer.stride, layer.dilation, layer.groups, layer.padding_mode
        return shape == (same, (1,), (1,), 1, "zeros")
    return True

"""May a layer's parameters be read instead of calling the layer?"""

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


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
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    # a `forward` of its own; quantised and sharded tensors; a norm without gains
    if "forward" in vars(layer) or type(layer._parameters["weight"]) not in (nn.Parameter, Tensor):
        return False
    if kind is nn.RMSNorm:
        return layer.eps is not None
    if kind is nn.Linear:
        return True
    shape = layer.padding, layer.stride, layer.dilation, layer.groups, layer.padding_mode
    return shape == ((layer.kernel_size[0] // 2,), (1,), (1,), 1, "zeros")  # type: ignore[index]

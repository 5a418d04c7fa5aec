"""Forms whose keys and values are linear maps of what is cached: one new token attends without making them."""

from collections.abc import Callable

from torch import Tensor, nn

from heedful.attention.base import Attention
from heedful.attention.cache import KVCache
from heedful.attention.plain import is_plain
from heedful.attention.score import LayerLoss, Score
from heedful.attention.tokens import Tokens


class Folding(Attention):
    """A form with k = A m and v = B m of a smaller memory m, which all heads share.

    Then q . k = (A^T q) . m and sum w v = B (sum w m): for one new token the maps are applied to its query and to
    its output, not to every cached token, and the cache is read as one key head. For many queries (training, a
    prompt) it is cheaper to make keys and values. They are made, too, where folding would not be the same: under
    a score that is not `bilinear`, for a cache that measures keys, and where reading the weights of the maps is
    not calling them (adapters, hooks, quantised layers; see `is_plain`).
    """

    # What such a form writes, beside what every form does.

    def folded_layers(self) -> list[nn.Module]:
        """The layers whose weights `fold_queries` and `unfold` read."""
        raise NotImplementedError

    def fold_queries(self, q: Tensor) -> Tensor:
        """(B, H, 1, D) -> (B, H, 1, M), queries that meet the memory itself."""
        raise NotImplementedError

    def read_memory(self, memory: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The memory as one key head: (B, 1, S, M), and what its values are made of, (B, 1, S, N)."""
        raise NotImplementedError

    def unfold(self, out: Tensor) -> Tensor:
        """(B, H, 1, N) -> (B, H, 1, E), the outputs from what `read_memory` gave as values."""
        raise NotImplementedError

    # What they share.

    def attend(self, tokens: Tokens, cache: KVCache | None, losses: list[LayerLoss] | None) -> Tensor:
        """One token after those in a cache reads the memory; all others read keys and values."""
        if cache is None or tokens.length != 1 or not self._may_fold(cache):
            return super().attend(tokens, cache, losses)
        folded = FoldedLayer(self.score, self.scale, self.read_memory)
        return self.unfold(cache.attend(folded, tokens._replace(q=self.fold_queries(tokens.q))))

    def _may_fold(self, cache: KVCache) -> bool:
        return self.score.bilinear and not cache.measures_keys and is_plain(*self.folded_layers())


class FoldedLayer:
    """A layer as a cache sees it for one token whose query is folded."""

    def __init__(
        self, score: Score, scale: float, read: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]
    ) -> None:
        self.score, self.scale, self._read = score, scale, read

    def keys_values(self, memory: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The memory itself, (B, 1, S, M) and (B, 1, S, N)."""
        return self._read(memory)

    def logit_sizes(self, q: Tensor, k: Tensor, real_q: Tensor, real_k: Tensor) -> Tensor:
        """Not to be had: the norms of a memory do not go with those of the keys of a prompt.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a cache that asks for the sizes of logits must say that it measures_keys")

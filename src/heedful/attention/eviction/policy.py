"""What an eviction policy is: a score per held token; the token with the highest score goes first."""

from typing import ClassVar

from torch import Tensor

from heedful.ops.checks import did_you_mean


class Policy:
    """Which token to evict. A new policy is one small file: a subclass, registered by its name.

    The engine never evicts the first real token of a row nor the newest one, and among equal scores the
    oldest goes.
    """

    name: ClassVar[str]
    ranks_by: ClassVar[str | None] = None
    """The score's per-token state that it ranks by, such as F; None: it keeps scores of its own."""
    needs_weights: ClassVar[bool] = False
    """Scores depend on attention weights after earlier evictions: it looks at one query after the other."""
    needs_keys: ClassVar[bool] = False
    """Scores depend on the keys that are held, and are made anew before every eviction."""

    @property
    def observes(self) -> bool:
        """Whether it has to see what each query did before it knows who goes next."""
        return self.needs_weights or self.needs_keys

    def start(self, positions: Tensor) -> Tensor:
        """The scores of new tokens.

        Args:
            positions: (B, T) position of each token in its row.

        Returns:
            (B, T) float32, or (B, N, T), for a policy that remembers N numbers of a token; the cache of a float64
            layer keeps them in float64.
        """
        return positions.new_zeros(positions.shape).float()

    def update(self, scores: Tensor, weights: Tensor, newest: Tensor) -> Tensor:
        """The scores after a query attended; called only if `needs_weights`.

        Args:
            scores: (B, S), or (B, N, S).
            weights: (B, H, S) attention weights of the query; 0 for what it does not see.
            newest: (B, 1) position of the query; -1 = padding, whose scores are not taken.

        Returns:
            As `scores`.
        """
        return scores

    def rate(self, keys: Tensor, held: Tensor) -> Tensor:
        """The scores of the tokens that are held when another one comes; called only if `needs_keys`.

        Args:
            keys: (B, G, S, D), as queries meet them.
            held: (B, S) bool; what is not held does not matter.

        Returns:
            (B, S) float32, or float64 for keys of it.
        """
        raise NotImplementedError

    def priority(self, scores: Tensor, positions: Tensor, newest: Tensor, budget: int) -> Tensor:
        """What the engine takes the maximum of; the scores, unless a policy also protects by age.

        Args:
            scores: (B, S), or (B, N, S).
            positions: (B, S), -1 where no token is held.
            newest: (B, 1) position of the token that just arrived.
            budget: tokens that may be held.

        Returns:
            (B, S).
        """
        return scores


POLICIES: dict[str, type[Policy]] = {}


def register_policy(cls: type[Policy]) -> type[Policy]:
    """Decorator: make a policy available under its `name`."""
    POLICIES[cls.name] = cls
    return cls


def get_policy(name: str) -> Policy:
    """The policy called `name`.

    Raises:
        ValueError: for an unknown name, saying what it could have been.
    """
    if name not in POLICIES:
        hint = did_you_mean(name, POLICIES)
        raise ValueError(f"unknown eviction policy {name!r}; {hint}available: {', '.join(POLICIES)}")
    return POLICIES[name]()

"""A form of your own, in one file: one projection serves as key and as value.

heedful --forms examples/shared_kv.py ls
heedful --forms examples/shared_kv.py compare --attention mha,shared_kv --score softmax --steps 50
PYTHONPATH=examples python -c "import shared_kv, heedful.testing as t; t.check_form('shared_kv')"
"""

from torch import nn

import heedful


@heedful.register_attention("shared_kv")
class SharedKV(heedful.Attention):
    """Keys double as values: half the cache of multi-head attention."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        width = self.config.n_heads * self.config.size
        self.q_proj = nn.Linear(self.config.d_model, width, bias=False)
        self.kv_proj = nn.Linear(self.config.d_model, width, bias=False)
        self.reset_parameters()

    def logit_projections(self):
        return [self.q_proj]  # a smaller kv_proj would make the values smaller, too

    def project(self, x, positions):
        q = self.split_heads(self.q_proj(x), self.config.n_heads)
        kv = self.split_heads(self.kv_proj(x), self.config.n_heads)
        # Values must not rotate with their position, so only the unrotated tensor is remembered.
        memory = {"kv": kv, "positions": positions.expand(x.shape[0], -1)}
        return self.place_queries(q, positions), memory

    def keys_values(self, memory):
        return self.place_keys(memory["kv"], memory["positions"]), memory["kv"]

"""LoRA on every linear layer of a heedful model with PEFT, then merged into it. Offline, some seconds on a CPU.

pip install peft
python examples/lora_peft.py
"""

import torch
from peft import LoraConfig, get_peft_model

from heedful.hf import HeedfulConfig, HeedfulForCausalLM

# A tiny, untrained model stands in for yours: HeedfulForCausalLM.from_pretrained("path/to/a/run").
torch.manual_seed(0)
base = HeedfulForCausalLM(
    HeedfulConfig(vocab_size=257, hidden_size=64, num_hidden_layers=2, attention="sas", score="selective")
)
model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
model.print_trainable_parameters()

ids = torch.tensor([list(b"Selective attention forgets what it no longer needs.")])
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
for step in range(5):
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")

model.eval()
with torch.no_grad():
    adapted = model(ids).logits
    merged = model.merge_and_unload()  # a HeedfulForCausalLM again, adapters inside its weights
    torch.testing.assert_close(merged(ids).logits, adapted, atol=1e-3, rtol=1e-3)
print("merged: the same logits without adapters")

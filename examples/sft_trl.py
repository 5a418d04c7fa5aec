"""Fine-tune a heedful model with TRL, packed documents kept apart. Offline, some seconds on a CPU.

pip install trl
python examples/sft_trl.py
"""

import tempfile

from datasets import Dataset
from transformers import pipeline
from trl import SFTConfig, SFTTrainer

from heedful.data import byte_tokenizer
from heedful.hf import HeedfulConfig, HeedfulForCausalLM

# A tiny, untrained model stands in for yours; "path/to/a/run" can be given to SFTTrainer instead of it.
tokenizer = byte_tokenizer()
special = tokenizer.eos_token_id
config = HeedfulConfig(
    vocab_size=len(tokenizer),
    hidden_size=64,
    num_hidden_layers=2,
    attention="mha",
    score="selective",
    bos_token_id=special,
    eos_token_id=special,
    pad_token_id=special,
)
texts = ["The cat sat on the mat.", "Selective attention forgets what it no longer needs.", "So it goes."]
# Ids, not texts: TRL would write the end as "<|endoftext|>", which heedful's tokenizers spell out as plain text.
rows = [[special, *tokenizer(text)["input_ids"], special] for text in texts * 8]

with tempfile.TemporaryDirectory() as folder:
    trainer = SFTTrainer(
        model=HeedfulForCausalLM(config),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        args=SFTConfig(
            output_dir=folder,
            max_length=128,
            packing=True,  # several texts share a row; attention stays inside each
            per_device_train_batch_size=2,
            max_steps=3,
            learning_rate=1e-3,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
        ),
    )
    print(f"loss {trainer.train().training_loss:.3f}")
    trainer.save_model(folder)  # model, tokenizer, card, and the module that loads it anywhere
    pipe = pipeline("text-generation", model=folder, trust_remote_code=True)
    print(pipe("The cat", max_new_tokens=8, do_sample=False)[0]["generated_text"])

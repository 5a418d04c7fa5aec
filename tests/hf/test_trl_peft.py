"""TRL and PEFT: the examples run, and SFTTrainer takes the model, its path, and packed documents."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from heedful.data.tokenizer import byte_tokenizer
from heedful.hf import HeedfulConfig, HeedfulForCausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXTS = ["It is a truth universally acknowledged.", "Emma Woodhouse.", "No one who had ever seen Catherine"]
ROWS = [[256, *text.encode(), 256] for text in TEXTS]  # TRL would spell the end of a text


def make_model() -> HeedfulForCausalLM:
    torch.manual_seed(0)
    config = HeedfulConfig(
        vocab_size=257,
        hidden_size=32,
        num_hidden_layers=2,
        score="selective",
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=256,
    )
    return HeedfulForCausalLM(config)


def sft_trainer(model: Any, folder: Path, **more: Any) -> Any:
    """Two steps of two rows on the CPU."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    options: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 64}
    options |= {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(folder), learning_rate=1e-2, **options | more),
        train_dataset=datasets.Dataset.from_dict({"input_ids": ROWS * 4}),
        processing_class=byte_tokenizer(),
    )


def test_sft_trains_the_object_and_the_path_alike(tmp_path: Path):
    make_model().save_pretrained(tmp_path / "model")
    trainers = [sft_trainer(model, tmp_path) for model in (make_model(), str(tmp_path / "model"))]
    before = make_model().state_dict()
    for trainer in trainers:
        trainer.train()
    first, second = (trainer.model.state_dict() for trainer in trainers)
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name])
    assert any(not torch.equal(weight, before[name]) for name, weight in first.items())


def test_sft_learns_the_end_of_text(tmp_path: Path):
    """Padding has the same id as the end, and yet only padding is left out of the loss."""
    batch = next(iter(sft_trainer(make_model(), tmp_path).get_train_dataloader()))
    real = batch["attention_mask"].bool()
    assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(~real, -100))
    assert (batch["labels"] == 256).sum(1).tolist() == [2, 2]  # before and after each text


def test_sft_packs_documents_that_stay_apart(tmp_path: Path):
    trainer = sft_trainer(make_model(), tmp_path, packing=True, per_device_train_batch_size=3)
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.eval()
    ids, positions = batch["input_ids"], batch["position_ids"]
    starts = (positions[0] == 0).nonzero().flatten().tolist() + [ids.shape[1]]
    assert len(starts) > 3  # more documents than rows: they were packed
    marks = {name: batch[name] for name in batch if name not in ("input_ids", "labels")}
    with torch.no_grad():
        apart = [model(ids[:, a:b]).logits for a, b in itertools.pairwise(starts)]
        torch.testing.assert_close(model(ids, **marks).logits, torch.cat(apart, 1), atol=1e-5, rtol=1e-4)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "needs"), [("sft_trl", "trl"), ("lora_peft", "peft")])
def test_examples_run(name: str, needs: str):
    pytest.importorskip(needs)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stdout

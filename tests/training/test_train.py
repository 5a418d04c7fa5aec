"""One run: the files it leaves, what it promises about seeds and order, what it refuses."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import heedful.training.run as run_module
from heedful.data import TokenDataset, byte_tokenizer
from heedful.decoder import DecoderConfig
from heedful.evaluation import evaluate
from heedful.hf import HeedfulForCausalLM
from heedful.hf.generation import continue_text
from heedful.hf.load import load_model, load_tokenizer
from heedful.training import ModelSettings, RunResult, TrainSettings, held_out
from heedful.training.checkpoint import last_checkpoint
from heedful.training.run import LanguageModelTrainer, curve_rows, load_settings_data

Settings = Callable[..., TrainSettings]
Train = Callable[..., RunResult]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(out).state_dict()


def test_files(settings: Settings, quiet_train: Train, tmp_path: Path):
    out = tmp_path / "new" / "run"
    s = settings(attention="sas", score="selective", attention_options={"sim_heads": 4})
    result = quiet_train(s, out)
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "log.jsonl",
        "model.safetensors",
        "result.json",
        "README.md",
        "modeling_heedful.py",
        "tokenizer.json",
        "tokenizer_config.json",
        "train.json",
    }
    assert RunResult.load(out / "result.json") == result
    assert TrainSettings.load(out / "train.json") == s

    model = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(model, HeedfulForCausalLM)
    assert (model.config.attention, model.config.score) == ("sas", "selective")
    assert model.config.attention_options == {"sim_heads": 4}
    assert model.config.use_cache
    assert AutoTokenizer.from_pretrained(out)("cat")["input_ids"] == list(b"cat")

    data = load_settings_data(s)
    again = evaluate(model, data.validation)
    assert again.loss == pytest.approx(result.val_loss, abs=1e-6)

    card = (out / "README.md").read_text()
    assert f"| data | {Path(s.data).name}, tokenizer bytes |" in card
    assert str(Path(s.data).parent) not in card
    assert f"{result.val_loss:.3f} nats per token, {result.val_bpb:.3f} bits per byte" in card
    assert "16 steps of 8 rows of 32 tokens" in card


def test_result(settings: Settings, quiet_train: Train, tmp_path: Path):
    s = settings(attention="sas", score="selective", seed=3)
    result = quiet_train(s, tmp_path / "run")
    decoder = s.to_config(257, 32).to_decoder_config()
    assert (result.attention, result.score, result.seed, result.lr) == ("sas", "selective", 3, 1e-2)
    assert result.params == decoder.parameter_count() == load_model(tmp_path / "run").num_parameters()
    assert result.flops_per_token == decoder.flops_per_token(32)
    assert result.cache_bytes_per_token == decoder.cache_bytes_per_token()
    assert result.tokens == 16 * 8 * 32
    assert 0 < result.val_loss < result.curve[0][1] < 5.6  # it learns
    assert result.val_bpb == pytest.approx(result.val_loss / 0.6931472, rel=0.02)  # a byte is a token
    assert 0 < result.val_accuracy < 1
    assert result.tokens_per_second == pytest.approx(8 * 32 / result.seconds_per_step)
    assert [tokens for tokens, _, _ in result.curve] == [8 * 32 * step for step in (4, 8, 12, 16)]
    assert result.config["train"] == s.to_dict()
    assert result.config["model"]["hidden_size"] == 16
    assert result.config["model"]["init_logit_std"] == 0.2  # defaults too: they may change


def test_synthetic_task(settings: Settings, quiet_train: Train, tmp_path: Path):
    s = settings(data="synthetic:variable-assignment", context=16, steps=2, batch_size=2)
    result = quiet_train(s, tmp_path / "run")
    assert result.val_bpb is None
    assert not (tmp_path / "run" / "tokenizer.json").exists()
    with pytest.raises(FileNotFoundError, match="its model was not trained on text"):
        load_tokenizer(tmp_path / "run")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_seeds(settings: Settings, quiet_train: Train, tmp_path: Path, precision: str):
    s = settings(score="selective", precision=precision, steps=4)
    quiet_train(s, tmp_path / "a")
    torch.randn(3)  # what happened before does not matter
    quiet_train(s, tmp_path / "b")
    quiet_train(dataclasses.replace(s, seed=1), tmp_path / "c")
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])


def test_every_form_sees_the_same_rows(
    settings: Settings, quiet_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: dict[str, list[torch.Tensor]] = {}

    class Spy(LanguageModelTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.setdefault(f"{model.config.attention}-{self.args.seed}", []).append(inputs["input_ids"])
            return super().compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(run_module, "LanguageModelTrainer", Spy)
    for attention, seed in (("mha", 0), ("sas", 0), ("mqa", 0), ("mha", 1)):
        quiet_train(settings(attention=attention, seed=seed), tmp_path / f"{attention}-{seed}")
    order = {name: torch.cat(batches) for name, batches in seen.items()}
    assert torch.equal(order["mha-0"], order["sas-0"])
    assert torch.equal(order["mha-0"], order["mqa-0"])
    assert not torch.equal(order["mha-0"], order["mha-1"])


def test_weight_decay_groups(
    settings: Settings, quiet_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In the optimizer that trains: no decay on norms, biases and the taps of the identity start."""
    groups: dict[float, set[str]] = {}

    class Spy(LanguageModelTrainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            optimizer = super().create_optimizer(*args, **kwargs)
            name_of = {id(p): n for n, p in self.model.named_parameters()}
            for group in optimizer.param_groups:
                groups.setdefault(group["weight_decay"], set()).update(
                    name_of[id(p)] for p in group["params"]
                )
            return optimizer

    monkeypatch.setattr(run_module, "LanguageModelTrainer", Spy)
    s = settings(attention="sas", attention_options={"init": "identity"}, weight_decay=0.3, steps=1)
    quiet_train(s, tmp_path / "run")
    attention = "model.layers.0.attention."
    expands = [f"{attention}{part}_expand." for part in "qkv"]
    taps = {f"{e}conv1.weight" for e in expands} | {f"{e}lin1.weight" for e in expands[:2]}
    assert set(groups) == {0.3, 0.0}
    assert taps <= groups[0.0]
    assert all("norm" in name or "bias" in name or name in taps for name in groups[0.0])
    assert {f"{e}conv2.weight" for e in expands} <= groups[0.3]
    assert {"model.embed_tokens.weight", f"{attention}q_proj.weight", f"{attention}o_proj.weight"} <= groups[
        0.3
    ]
    named = {name for name, _ in load_model(tmp_path / "run").named_parameters()}
    assert groups[0.3] | groups[0.0] == named


def test_curve_rows():
    def data(n: int) -> TokenDataset:
        return TokenDataset({"input_ids": torch.arange(n)[:, None]})

    assert len(curve_rows(data(5))) == 5
    assert len(curve_rows(data(100))) == 100
    assert curve_rows(data(640)).tensors["input_ids"].flatten().tolist() == list(range(0, 640, 10))


MEMORY = {"score": "selective"}
DIVERGES = {
    "lr": ({"lr": 1e30, "qk_norm": False}, r"at step \d+: .* is nan; try a lower --lr than 1e"),
    "weight-decay": (
        {"weight_decay": 1e6},
        r"at step \d+: .*; try a lower --weight-decay than 1e\+06: times --lr 0.01 it takes away more",
    ),
    "memory-loss": (
        {**MEMORY, "score_options": {"memory_loss": 1e38}, "n_layers": 4},
        r"at step 1: the memory loss is inf; try a smaller --score.memory-loss than 1e\+38 or a larger",
    ),
    "gradients": (
        {**MEMORY, "score_options": {"memory_loss": 1e30}},
        r"at step 1: the norm of the gradients is inf; try a smaller --score.memory-loss than 1e\+30 or a larger",
    ),
    "memory-tau": (
        {**MEMORY, "score_options": {"memory_loss": 1.0, "memory_tau": 1e-40}},
        r"at step \d+: .*; try a smaller --score.memory-loss than 1 or a larger --score.memory-tau than 1e-40",
    ),
}


@pytest.mark.parametrize("why", DIVERGES)
def test_divergence(settings: Settings, quiet_train: Train, tmp_path: Path, why: str):
    """Training stops at the first loss that is not finite, and says what does it."""
    options, message = DIVERGES[why]
    with pytest.raises(ValueError, match=f"training diverged {message}") as error:
        quiet_train(settings(**options), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_the_last_good_checkpoint_stays(
    settings: Settings, quiet_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A loss that is lost at step 11, weights that are lost in step 12: what was saved before can be read."""
    plain = LanguageModelTrainer.training_step

    def lose(self: LanguageModelTrainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = plain(self, model, *args, **kwargs)
        if self.state.global_step == last - 1:
            with torch.no_grad():
                model.lm_head.weight.fill_(float("nan"))
        return loss

    monkeypatch.setattr(LanguageModelTrainer, "training_step", lose)
    for last, kept, where in ((10, 8, "at step 11: the task loss is nan"), (12, 8, "at step 12: ")):
        run = tmp_path / f"run-{last}"
        with pytest.raises(
            ValueError, match=rf"diverged {where}.*checkpoint-{kept} holds the weights before"
        ):
            quiet_train(settings(), run)
        found = last_checkpoint(run / "checkpoints")
        assert found is not None
        assert found.endswith(f"checkpoint-{kept}")
        assert all(t.isfinite().all() for t in load_file(Path(found) / "model.safetensors").values())


def test_tensorboard(settings: Settings, quiet_train: Train, tmp_path: Path):
    pytest.importorskip("tensorboard")
    quiet_train(settings(track="tensorboard"), tmp_path / "run")
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_folder_is_never_overwritten(settings: Settings, quiet_train: Train, tmp_path: Path):
    file, run, other = tmp_path / "file", tmp_path / "run", tmp_path / "other"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="file is a file, expected a folder for the run"):
        quiet_train(settings(), file)
    assert file.read_text() == "mine"

    quiet_train(settings(), run)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    with pytest.raises(
        FileExistsError, match="already holds a run; use --resume to go on with it, or another"
    ):
        quiet_train(settings(), run)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before

    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty; use"):
        quiet_train(settings(), other)
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]


def test_bad_data_leaves_nothing(settings: Settings, quiet_train: Train, tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        quiet_train(settings(data=str(tmp_path / "nowhere.txt")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"steps": -5}, "--steps must be 1 or more, got -5"),
    "batch": ({"batch_size": 0}, "--batch-size must be 1 or more, got 0"),
    "rows without end": ({"batch_size": 10**20}, f"--batch-size must be at most 2,147,483,648, got {10**20}"),
    "layers without end": ({"n_layers": 10**20 - 1}, f"n_layers must be at most 1,024, got {10**20 - 1}"),
    "a width without end": ({"d_ff": 10**20}, f"d_ff must be at most 268,435,456, got {10**20}"),
    "heads without end": ({"n_heads": 10**20}, f"n_heads must be at most 268,435,456, got {10**20}"),
    "a task without end": (
        {"data": "synthetic:mqar", "task_options": {"pairs": 10**20}},
        f"--task.pairs must be at most 1,048,576, got {10**20}",
    ),
    "context": ({"context": 1}, "--context must be 2 or more, got 1"),
    "lr": ({"lr": 0.0}, r"--lr must be greater than 0 and finite, got 0\.0"),
    "lr-nan": ({"lr": float("nan")}, "--lr must be greater than 0 and finite, got nan"),
    "lr-inf": ({"lr": float("inf")}, "--lr must be greater than 0 and finite, got inf"),
    "warmup": ({"warmup": 1.0}, r"--warmup must be at least 0 and below 1, got 1\.0"),
    "decay": ({"weight_decay": -0.1}, r"--weight-decay must be 0 or more and finite, got -0\.1"),
    "form": ({"attention": "sass"}, "unknown attention 'sass'; did you mean 'sas'?"),
    "option": ({"attention": "sas", "attention_options": {"sim_heads": 3}}, "sim_heads must be a multiple"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG.keys())
def test_unsound_settings(settings: Settings, wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        settings(**wrong)


def test_a_model_larger_than_the_memory(settings: Settings, quiet_train: Train, tmp_path: Path):
    """Refused before any data is read."""
    large = settings(data=str(tmp_path / "missing.txt"), d_model=2**20, d_ff=2**24, n_layers=1000)
    with pytest.raises(
        ValueError, match=r"a model of [\d,]+ parameters needs .* bytes, more than this machine's"
    ):
        quiet_train(large, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_damaged_settings_file(tmp_path: Path):
    for damage in ("", "{", '{"stepz": 3}', "[]", "{}", "null", "3"):
        (tmp_path / "train.json").write_text(damage)
        with pytest.raises(ValueError, match=r"train\.json is damaged .*; start again with another --out"):
            TrainSettings.load(tmp_path / "train.json")
    (tmp_path / "train.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is damaged"):
        TrainSettings.load(tmp_path / "train.json")


def test_a_missing_setting_is_damage_unless_it_is_newer(
    settings: Settings, quiet_train: Train, tmp_path: Path
):
    """The default would stand in for what the run was told: `data` would be Austen."""
    path, s = tmp_path / "train.json", settings()
    newer = {"dropout", "text_column", "trainer", "task_options", "head_dim", "block"}
    for name in s.to_dict():
        path.write_text(json.dumps({key: value for key, value in s.to_dict().items() if key != name}))
        if name in newer:
            assert TrainSettings.load(path) == s
            continue
        with pytest.raises(ValueError, match=rf"is damaged \(no {name}\)"):
            TrainSettings.load(path)
        with pytest.raises(ValueError, match=rf"is damaged \(no {name}\)"):
            quiet_train(s, tmp_path, resume=True)
        with pytest.raises(ValueError, match=rf"is damaged \(no {name}\)"):
            held_out(tmp_path, byte_tokenizer())


def test_continue_text(settings: Settings, quiet_train: Train, tmp_path: Path):
    quiet_train(settings(), tmp_path / "run")
    model, tokenizer = load_model(tmp_path / "run"), load_tokenizer(tmp_path / "run")
    for prompt in ("the cat", "", "naïve — 猫 🐈 <|endoftext|>"):
        text, cache = continue_text(model, tokenizer, prompt, max_new_tokens=6, temperature=0)
        assert text.startswith(prompt)
        assert text == continue_text(model, tokenizer, prompt, max_new_tokens=6, temperature=0)[0]
        assert cache.seen <= 1 + len(prompt.encode()) + 6
    drawn = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        drawn.add(continue_text(model, tokenizer, "the", max_new_tokens=12, temperature=5.0, top_k=0)[0])
    assert len(drawn) == 2


def test_options_of_the_model_are_declared_once():
    """Settings say again the type of an option of the decoder, never its help or its default."""
    decoder = {f.name: f for f in dataclasses.fields(DecoderConfig)}
    own_default = {"d_model", "n_layers", "n_heads"}  # required there
    one_form = {"attention", "score", "attention_options", "score_options"}  # one for all layers here
    for field in dataclasses.fields(ModelSettings):
        there = decoder[field.name]
        if field.name not in own_default:
            assert (field.default, field.default_factory) == (there.default, there.default_factory), (
                field.name
            )
        if field.name not in one_form:
            assert field.metadata["help"] == there.metadata["help"], field.name
            assert field.type == there.type, field.name

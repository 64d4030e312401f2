"""LoRA checkpoints as verl writes them become plain weights that compute what model and adapters computed."""

import json
from pathlib import Path

import pytest

from services.trainer.adapters import META, merged, merged_checkpoint
from services.trainer.publish import copy_weights
from shared.files import ArtifactError

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft", reason="verl brings peft")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(("shard", "dtype"), [("5GB", "auto"), ("10KB", "float32"), ("10KB", "bfloat16")])
def test_merged_weights_load_as_the_plain_model_and_give_the_same_logits(
    tmp_path: Path, shard: str, dtype: str
) -> None:
    from safetensors.torch import load_file

    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    trained = peft.get_peft_model(transformers.Qwen2ForCausalLM(config), lora).eval()
    for name, weight in trained.named_parameters():
        if "lora_B" in name:  # zero until trained
            torch.nn.init.normal_(weight)
    tokens = torch.arange(8)[None]
    expected = trained(input_ids=tokens).logits

    actor, folder = tmp_path / "actor", tmp_path / "weights"
    actor.mkdir()
    folder.mkdir()
    (actor / META).write_text(json.dumps({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}))
    state = {name: weight for name, weight in trained.state_dict().items() if "lm_head" not in name}
    source = actor / "huggingface"
    transformers.Qwen2ForCausalLM(config).save_pretrained(source, state_dict=state, max_shard_size=shard)
    copy_weights(tmp_path, folder, dtype=dtype)

    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert all("lora" not in name for name in load_file(folder / "model.safetensors"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert plain.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    close = 2e-2 if dtype == "bfloat16" else 1e-4
    torch.testing.assert_close(plain(input_ids=tokens).logits.float(), expected, rtol=close, atol=close)


def test_a_merged_weight_is_rounded_once_after_its_adapter_was_added(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    layer = "base_model.model.q_proj"
    base, down, up = (torch.full((1, 1), value) for value in (1.0, 0.0625, 0.0625))  # 1.00390625 is a tie, to even: 1
    base += 1e-5  # which decides it, and which rounding the base first would lose
    source = tmp_path / "actor" / "huggingface"
    source.mkdir(parents=True)
    names = (f"{layer}.base_layer.weight", f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight")
    save_file(dict(zip(names, (base, down, up), strict=True)), source / "model.safetensors")
    (source / "config.json").write_text("{}")
    (tmp_path / "actor" / META).write_text(json.dumps({"r": 1, "lora_alpha": 1}))
    copy_weights(tmp_path, tmp_path, dtype="bfloat16")
    assert load_file(tmp_path / "model.safetensors")["q_proj.weight"].item() == 1.0078125


def test_a_checkpoint_without_lora_has_nothing_to_merge(tmp_path: Path) -> None:
    assert merged_checkpoint(tmp_path / "actor") is None


def test_a_layer_without_its_adapter_is_refused() -> None:
    with pytest.raises(ArtifactError, match="expected LoRA adapters for base_model"):
        merged({"base_model.model.q_proj.base_layer.weight": torch.zeros(2, 2)}, 1.0)

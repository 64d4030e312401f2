"""LoRA checkpoints as verl writes them become plain weights that compute what model and adapters computed."""

import json
from pathlib import Path

import pytest

from services.trainer.adapters import META, merge_adapters, merged
from shared.files import ArtifactError

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft", reason="verl brings peft")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_merged_weights_load_as_the_plain_model_and_give_the_same_logits(tmp_path: Path, shard: str) -> None:
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
    (actor / META).write_text(json.dumps({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}))
    state = {name: weight for name, weight in trained.state_dict().items() if "lm_head" not in name}
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder, state_dict=state, max_shard_size=shard)
    merge_adapters(actor, folder)

    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert all("lora" not in name for name in load_file(folder / "model.safetensors"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(plain(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_without_lora_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"as it is")
    merge_adapters(tmp_path / "actor", tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"as it is"


def test_a_layer_without_its_adapter_is_refused() -> None:
    with pytest.raises(ArtifactError, match="expected LoRA adapters for base_model"):
        merged({"base_model.model.q_proj.base_layer.weight": torch.zeros(2, 2)}, 1.0)

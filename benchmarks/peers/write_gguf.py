"""Writes a Mixtral folder as a float32 GGUF file for llama.cpp, without a vocabulary.

Run in an environment with gguf, safetensors and torch: python write_gguf.py FOLDER OUT.gguf
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import torch
from safetensors import safe_open


def main(folder: Path, out: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    def read(name: str) -> torch.Tensor:
        with safe_open(folder / weight_map[name], framework="pt") as shard:
            tensor: torch.Tensor = shard.get_tensor(name)
            return tensor.float()

    writer = gguf.GGUFWriter(out, "llama", use_temp_file=True)
    write_config(writer, config)
    writer.add_tensor("token_embd.weight", read("model.embed_tokens.weight").numpy())
    writer.add_tensor("output_norm.weight", read("model.norm.weight").numpy())
    writer.add_tensor("output.weight", read("lm_head.weight").numpy())
    for layer in range(config["num_hidden_layers"]):
        write_layer(
            writer, config, layer, lambda name, layer=layer: read(f"model.layers.{layer}.{name}.weight")
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_config(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


def write_layer(writer: gguf.GGUFWriter, config: dict, layer: int, read) -> None:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    tensors = {
        "attn_norm": read("input_layernorm"),
        "attn_q": interleave(read("self_attn.q_proj"), heads),
        "attn_k": interleave(read("self_attn.k_proj"), kv_heads),
        "attn_v": read("self_attn.v_proj"),
        "attn_output": read("self_attn.o_proj"),
        "ffn_norm": read("post_attention_layernorm"),
        "ffn_gate_inp": read("block_sparse_moe.gate"),
    }
    for ours, theirs in (("w1", "ffn_gate_exps"), ("w3", "ffn_up_exps"), ("w2", "ffn_down_exps")):
        experts = range(config["num_local_experts"])
        tensors[theirs] = torch.stack([read(f"block_sparse_moe.experts.{slot}.{ours}") for slot in experts])
    for name, tensor in tensors.items():
        writer.add_tensor(f"blk.{layer}.{name}.weight", tensor.contiguous().numpy())


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorders the rows of each head from rotated halves to rotated pairs."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

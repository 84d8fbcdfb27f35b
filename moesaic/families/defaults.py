"""What the keys of a config mean where a file leaves them out: the values of the family's config class in transformers 5.23.

Only keys that a description reads are listed. The sizes that every config states, such as the hidden size, have no default
here, and neither have keys whose default transformers computes from others; the families do that themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "afmoe": {
        "global_attn_every_n_layers": 4,
        "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 16384,
        "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 6, "sliding_window": 1024,
        "tie_word_embeddings": False,
    },
    "cohere2_moe": {
        "prefix_dense_sliding_window_pattern": 1,
        "sliding_window_pattern": 4,
        "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 8192,
        "num_attention_heads": 64, "num_experts": 8, "num_experts_per_tok": 2, "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
    "deepseek_v2": {
        "attention_bias": False, "first_k_dense_replace": 0, "hidden_act": "silu",
        "intermediate_size": 11008, "kv_lora_rank": 512, "max_position_embeddings": 2048,
        "mlp_bias": False, "moe_intermediate_size": 1407, "n_routed_experts": 64, "n_shared_experts": 2,
        "norm_topk_prob": False, "num_attention_heads": 32, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "routed_scaling_factor": 1.0, "tie_word_embeddings": False,
        "topk_method": "greedy", "v_head_dim": 128,
    },
    "deepseek_v3": {
        "attention_bias": False, "first_k_dense_replace": 3, "hidden_act": "silu",
        "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 4096,
        "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
        "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "routed_scaling_factor": 2.5, "tie_word_embeddings": False, "topk_group": 4, "v_head_dim": 128,
    },
    "dots1": {
        "hidden_act": "silu", "max_position_embeddings": 2048, "max_window_layers": 62, "n_group": 1,
        "num_attention_heads": 32, "num_key_value_heads": 32, "sliding_window": 4096,
        "tie_word_embeddings": False, "topk_group": 1,
    },
    "ernie4_5_moe": {
        "hidden_act": "silu", "max_position_embeddings": 131072, "moe_k": 6, "moe_num_experts": 64,
        "num_attention_heads": 20, "num_key_value_heads": 4, "tie_word_embeddings": True,
    },
    "exaone_moe": {
        "sliding_window_pattern": 4,
        "hidden_act": "silu", "max_position_embeddings": 2048, "n_group": 1, "num_attention_heads": 32,
        "num_experts": 64, "num_experts_per_tok": 8, "num_key_value_heads": 32, "sliding_window": 4096,
        "tie_word_embeddings": False, "topk_group": 1,
    },
    "flex_olmo": {
        "attention_bias": False, "hidden_act": "silu", "intermediate_size": 11008,
        "max_position_embeddings": 4096, "norm_topk_prob": False, "num_attention_heads": 32,
        "num_experts": 7, "num_experts_per_tok": 5, "tie_word_embeddings": False,
    },
    "flint": {
        "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 262144,
        "num_attention_heads": 32, "num_experts": 256, "num_experts_per_tok": 6,
        "num_key_value_heads": 4, "sliding_window": 513, "tie_word_embeddings": False,
    },
    "glm4_moe": {
        "attention_bias": False, "first_k_dense_replace": 1, "hidden_act": "silu",
        "intermediate_size": 10944, "max_position_embeddings": 131072, "moe_intermediate_size": 1408,
        "n_group": 1, "n_routed_experts": 128, "n_shared_experts": 1, "norm_topk_prob": True,
        "num_attention_heads": 96, "num_experts_per_tok": 8, "num_key_value_heads": 8,
        "routed_scaling_factor": 1.0, "tie_word_embeddings": False, "topk_group": 1,
        "use_qk_norm": False,
    },
    "glm4_moe_lite": {
        "hidden_act": "silu", "kv_lora_rank": 512, "max_position_embeddings": 202752, "n_group": 1,
        "n_routed_experts": 64, "num_attention_heads": 20, "num_experts_per_tok": 4,
        "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "tie_word_embeddings": False, "topk_group": 1,
        "v_head_dim": 256,
    },
    "gpt_oss": {
        "attention_bias": True, "head_dim": 64, "hidden_act": "silu", "intermediate_size": 2880,
        "max_position_embeddings": 131072, "num_attention_heads": 64, "num_experts_per_tok": 4,
        "num_key_value_heads": 8, "num_local_experts": 128, "sliding_window": 128, "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0, "tie_word_embeddings": False,
    },
    "granitemoe": {
        "attention_bias": False, "hidden_act": "silu", "intermediate_size": 11008,
        "max_position_embeddings": 2048, "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_local_experts": 8, "tie_word_embeddings": False,
    },
    "granitemoe_swa": {
        "hidden_act": "silu", "max_position_embeddings": 2048, "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_local_experts": 8, "sliding_window": 128,
        "tie_word_embeddings": False,
    },
    "granitemoeshared": {
        "hidden_act": "silu", "max_position_embeddings": 2048, "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_local_experts": 8, "tie_word_embeddings": False,
    },
    "hunyuan_v1_moe": {
        "hidden_act": "silu", "max_position_embeddings": 2048, "moe_topk": 1, "num_attention_heads": 32,
        "num_experts": 1, "tie_word_embeddings": False,
    },
    "hy_v3": {
        "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 131072,
        "num_attention_heads": 64, "num_experts": 192, "num_experts_per_tok": 8,
        "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "kolibri1": {
        "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 262144,
        "num_attention_heads": 48, "num_experts": 384, "num_experts_per_tok": 6,
        "num_key_value_heads": 4, "sliding_window": 513, "tie_word_embeddings": False,
    },
    "llama": {
        "attention_bias": False, "hidden_act": "silu", "intermediate_size": 11008,
        "max_position_embeddings": 2048, "mlp_bias": False, "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "llama4_text": {
        "attention_bias": False, "attention_chunk_size": 8192, "head_dim": 128, "hidden_act": "silu",
        "interleave_moe_layer_step": 1, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
        "max_position_embeddings": 131072, "num_attention_heads": 40, "num_experts_per_tok": 1,
        "num_key_value_heads": 8, "num_local_experts": 16, "tie_word_embeddings": False,
    },
    "mellum": {
        "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 131072,
        "num_attention_heads": 32, "num_experts": 64, "num_experts_per_tok": 8, "num_key_value_heads": 4,
        "sliding_window": 1024, "tie_word_embeddings": False,
    },
    "minimax_m2": {
        "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 196608,
        "num_attention_heads": 48, "num_experts_per_tok": 8, "num_key_value_heads": 8,
        "num_local_experts": 256, "tie_word_embeddings": False,
    },
    "ministral": {
        "hidden_act": "silu", "intermediate_size": 14336, "max_position_embeddings": 131072,
        "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
    "mistral": {
        "hidden_act": "silu", "intermediate_size": 14336, "max_position_embeddings": 131072,
        "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
    "mixtral": {
        "hidden_act": "silu", "intermediate_size": 14336, "max_position_embeddings": 131072,
        "num_attention_heads": 32, "num_experts_per_tok": 2, "num_key_value_heads": 8,
        "num_local_experts": 8, "tie_word_embeddings": False,
    },
    "nllb-moe": {
        "activation_function": "relu", "batch_prioritized_routing": False, "decoder_attention_heads": 16,
        "decoder_ffn_dim": 4096, "decoder_sparse_step": 4, "decoder_start_token_id": 2,
        "encoder_attention_heads": 16, "encoder_ffn_dim": 4096, "encoder_sparse_step": 4,
        "expert_capacity": 64,
        "max_position_embeddings": 1024, "moe_eval_capacity_token_fraction": 1.0,
        "moe_token_dropout": 0.2, "normalize_router_prob_before_dropping": False, "num_experts": 128,
        "pad_token_id": 1, "router_bias": False, "router_dtype": "float32", "scale_embedding": True,
        "second_expert_policy": "all", "tie_word_embeddings": True,
    },
    "olmoe": {
        "attention_bias": False, "hidden_act": "silu", "intermediate_size": 2048,
        "max_position_embeddings": 4096, "norm_topk_prob": False, "num_attention_heads": 16,
        "num_experts": 64, "num_experts_per_tok": 8, "tie_word_embeddings": False,
    },
    "phi": {
        "hidden_act": "gelu_new", "intermediate_size": 8192, "max_position_embeddings": 2048,
        "num_attention_heads": 32, "qk_layernorm": False, "tie_word_embeddings": False,
    },
    "phimoe": {
        "attention_bias": False, "hidden_act": "silu", "intermediate_size": 6400, "lm_head_bias": False,
        "max_position_embeddings": 131072, "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_key_value_heads": 8, "num_local_experts": 16, "router_jitter_noise": 0.01,
        "tie_word_embeddings": False,
    },
    "qwen2_moe": {
        "decoder_sparse_step": 1, "hidden_act": "silu", "intermediate_size": 5632,
        "max_position_embeddings": 32768, "max_window_layers": 28, "moe_intermediate_size": 1408,
        "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
        "num_key_value_heads": 16, "qkv_bias": True, "shared_expert_intermediate_size": 5632,
        "sliding_window": 4096, "tie_word_embeddings": False, "use_sliding_window": False,
    },
    "qwen3_moe": {
        "attention_bias": False, "decoder_sparse_step": 1, "hidden_act": "silu",
        "intermediate_size": 6144, "max_position_embeddings": 32768, "moe_intermediate_size": 768,
        "norm_topk_prob": False, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_key_value_heads": 4, "sliding_window": 4096, "tie_word_embeddings": False,
        "use_sliding_window": False,
    },
    "solar_open": {
        "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 131072, "n_group": 1,
        "n_routed_experts": 128, "num_attention_heads": 64, "num_experts_per_tok": 8,
        "num_key_value_heads": 8, "tie_word_embeddings": False, "topk_group": 1,
    },
    "switch_transformers": {
        "d_ff": 2048, "d_kv": 64, "dense_act_fn": "relu", "expert_capacity": 64,
        "layer_norm_epsilon": 1e-06, "num_decoder_layers": 12, "num_experts": 8, "num_heads": 12,
        "num_sparse_decoder_layers": 3, "num_sparse_encoder_layers": 3, "pad_token_id": 0,
        "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
        "router_bias": False, "router_dtype": "float32", "tie_word_embeddings": True,
    },
}  # fmt: skip

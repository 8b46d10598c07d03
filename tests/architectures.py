"""One tiny random model of each architecture whose head or cache is out of the ordinary. Shared by the tests of heads,
prefixes and teachers.
"""

from __future__ import annotations

import warnings

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 96

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT = {**{key: _COMMON[key] for key in ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id")}}
_GPT |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "pad_token_id": 0}
_DROPOUT_FREE = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

_SPECIAL = {
    "llama": {},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 1.5, "sliding_window": 8, "query_pre_attn_scalar": 8, "head_dim": 8},
    "gemma3_text": {"final_logit_softcapping": 1.5, "sliding_window": 8, "query_pre_attn_scalar": 8, "head_dim": 8},
    "falcon_h1": {
        "lm_head_multiplier": 3.0,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
    "minicpm3": {
        "dim_model_base": 8,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "hyperclovax": {"logits_scaling": 4.0},
    "mistral": {"sliding_window": 8},
    "phi": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {},
    "mamba": {"state_size": 8},
    "recurrent_gemma": {"logits_soft_cap": 1.5, "attention_window_size": 8, "lru_width": 32, "num_hidden_layers": 3},
}


def tiny(model_type: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A random model in float32 and eval mode; its biases and norms are random too, so that forgetting one shows.

    Args:
        model_type: A model type of transformers.
        seed: Of the weights.
        **overrides: Settings of the configuration.
    """
    settings = {**_GPT, **_DROPOUT_FREE} if model_type in ("gpt2", "gptj") else {**_COMMON, **_SPECIAL[model_type]}
    if model_type == "gptj":
        settings |= {"rotary_dim": 4}
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unused settings of some configurations
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**settings, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    torch.set_rng_state(state)
    return model

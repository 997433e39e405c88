"""What transformers computes: random small models of every family, inputs and outputs."""

import numpy as np

DECODER = {"vocab_size": 37, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
GPT2 = {**DECODER, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 16}
LLAMA = {
    **DECODER,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
}
OPT = {
    **DECODER,
    "hidden_size": 24,
    "word_embed_proj_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "ffn_dim": 20,
    "max_position_embeddings": 16,
}
BERT = {
    "vocab_size": 37,
    "pad_token_id": 0,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
}
ROBERTA = {**BERT, "pad_token_id": 1, "max_position_embeddings": 18, "type_vocab_size": 1}
NEOX = {
    **DECODER,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
}
GEMMA = {**LLAMA, "head_dim": 6, "num_key_value_heads": 2}
GEMMA2 = {**GEMMA, "query_pre_attn_scalar": 12, "sliding_window": 4, "num_hidden_layers": 3}
GROUPED = {**LLAMA, "num_key_value_heads": 2}
QWEN3 = {**GROUPED, "head_dim": 10}
PROJECTED = {"do_layer_norm_before": False, "word_embed_proj_dim": 10}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 40,
}
LONG = {"max_position_embeddings": 160}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
GEMMA3 = {**GEMMA2, "sliding_window_pattern": 3}
LOCAL = {"rope_type": "default", "rope_theta": 50.0}
GEMMA3_ROPE = {"full_attention": LINEAR, "sliding_attention": LOCAL}
OLMO3 = {**GROUPED, "sliding_window": 4, "num_hidden_layers": 4}
OLMO3_ROPE = {"full_attention": YARN, "sliding_attention": LOCAL}
FACTORS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.22, "logits_scaling": 0.7}
PARTIAL = {"rope_type": "default", "partial_rotary_factor": 0.5}
DISTILBERT = {
    "vocab_size": 37,
    "pad_token_id": 0,
    "dim": 24,
    "n_layers": 2,
    "n_heads": 3,
    "hidden_dim": 20,
    "max_position_embeddings": 16,
}
MODERNBERT = {
    **BERT,
    "num_hidden_layers": 4,
    "local_attention": 4,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": LOCAL},
}
BIASES = {"attention_bias": True, "mlp_bias": True}
ALL_BIASES = {**BIASES, "norm_bias": True, "classifier_bias": True}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}

# name -> class in transformers, its configuration.
CASES: dict[str, tuple[str, dict]] = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2-untied": ("GPT2LMHeadModel", {**GPT2, "tie_word_embeddings": False}),
    "gpt2-relu": ("GPT2LMHeadModel", {**GPT2, "activation_function": "relu", "n_inner": 20}),
    "llama": ("LlamaForCausalLM", {**LLAMA, "num_key_value_heads": 2, "head_dim": 10, **ROPE}),
    "llama-odd": ("LlamaForCausalLM", {**LLAMA, "num_attention_heads": 3}),
    "llama-one-kv-head": ("LlamaForCausalLM", {**LLAMA, "num_key_value_heads": 1}),
    "llama-tied": ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "llama-biases": ("LlamaForCausalLM", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama-gelu": ("LlamaForCausalLM", {**LLAMA, "hidden_act": "gelu", "rms_norm_eps": 1e-2}),
    "llama-rope-linear": ("LlamaForCausalLM", {**LLAMA, "rope_parameters": LINEAR}),
    "llama-rope-llama3": ("LlamaForCausalLM", {**LLAMA, "rope_parameters": LLAMA3}),
    "llama-rope-yarn": (
        "LlamaForCausalLM",
        {**LLAMA, **LONG, "head_dim": 16, "rope_parameters": YARN},
    ),
    "llama-classifier": ("LlamaForSequenceClassification", {**GROUPED, "num_labels": 3}),
    "gemma2-classifier": ("Gemma2ForSequenceClassification", {**GEMMA2, "num_labels": 2}),
    "qwen3-classifier": ("Qwen3ForSequenceClassification", {**QWEN3, "num_labels": 4}),
    "llama-tokens": ("LlamaForTokenClassification", {**GROUPED, "num_labels": 3}),
    "mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": 4}),
    "mistral-no-window": ("MistralForCausalLM", {**GROUPED, "sliding_window": None}),
    "mistral-head-size": ("MistralForCausalLM", {**GROUPED, "head_dim": 10, "sliding_window": 1}),
    "qwen2": ("Qwen2ForCausalLM", {**GROUPED, **ROPE}),
    "qwen2-tied": ("Qwen2ForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2ForCausalLM", {**GROUPED, **WINDOW}),
    "qwen2-yarn": ("Qwen2ForCausalLM", {**GROUPED, **LONG, "rope_parameters": YARN}),
    "qwen3": ("Qwen3ForCausalLM", {**QWEN3, **ROPE}),
    "qwen3-biases": ("Qwen3ForCausalLM", {**QWEN3, "attention_bias": True}),
    "qwen3-window-tied": ("Qwen3ForCausalLM", {**QWEN3, **WINDOW, "tie_word_embeddings": True}),
    "olmo": ("OlmoForCausalLM", GROUPED),
    "olmo-clipped": ("OlmoForCausalLM", {**LLAMA, "clip_qkv": 0.5}),
    "olmo2": ("Olmo2ForCausalLM", GROUPED),
    "olmo2-biases": ("Olmo2ForCausalLM", {**LLAMA, "attention_bias": True, **ROPE}),
    "olmo3": ("Olmo3ForCausalLM", {**OLMO3, "attention_bias": True}),
    "olmo3-yarn": ("Olmo3ForCausalLM", {**OLMO3, **LONG, "rope_parameters": OLMO3_ROPE}),
    "granite": ("GraniteForCausalLM", {**GROUPED, **FACTORS, "attention_multiplier": 0.3}),
    "granite-biases": ("GraniteForCausalLM", {**LLAMA, **BIASES, "attention_multiplier": 0.3}),
    "phi3": ("Phi3ForCausalLM", {**GROUPED, "sliding_window": 4}),
    "phi3-tied": ("Phi3ForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "phi3-partial-rotary": (
        "Phi3ForCausalLM",
        {**LLAMA, "hidden_size": 32, "rope_parameters": PARTIAL},
    ),
    "smollm3": ("SmolLM3ForCausalLM", {**GROUPED, "no_rope_layer_interval": 2}),
    "smollm3-window": (
        "SmolLM3ForCausalLM",
        {**GROUPED, **WINDOW, **BIASES, "no_rope_layers": [0, 1], "tie_word_embeddings": False},
    ),
    "smollm3-rotated": ("SmolLM3ForCausalLM", {**GROUPED, "no_rope_layers": [1, 1]}),
    "gemma": ("GemmaForCausalLM", GEMMA),
    "gemma-head-size": ("GemmaForCausalLM", {**GEMMA, "head_dim": 10, "num_key_value_heads": 1}),
    "gemma-untied": ("GemmaForCausalLM", {**GEMMA, "tie_word_embeddings": False}),
    "gemma2": ("Gemma2ForCausalLM", GEMMA2),
    "gemma2-no-caps": (
        "Gemma2ForCausalLM",
        {**GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma2-small-caps": (
        "Gemma2ForCausalLM",
        {**GEMMA2, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0},
    ),
    "gemma2-biases": ("Gemma2ForCausalLM", {**GEMMA2, "attention_bias": True}),
    "gemma3_text": ("Gemma3ForCausalLM", GEMMA3),
    "gemma3_text-long": ("Gemma3ForCausalLM", {**GEMMA3, "rope_parameters": GEMMA3_ROPE}),
    "gemma3_text-cap": (
        "Gemma3ForCausalLM",
        {**GEMMA3, "final_logit_softcapping": 2.0, "attention_bias": True},
    ),
    "gemma3_text-no-window": (
        "Gemma3ForCausalLM",
        {**GEMMA3, "layer_types": ["full_attention"] * 3},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", NEOX),
    "gpt_neox-sequential": ("GPTNeoXForCausalLM", {**NEOX, "use_parallel_residual": False}),
    "gpt_neox-half-rotary": (
        "GPTNeoXForCausalLM",
        {**NEOX, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "gpt_neox-no-bias-tied": (
        "GPTNeoXForCausalLM",
        {**NEOX, "attention_bias": False, "tie_word_embeddings": True},
    ),
    "opt": ("OPTForCausalLM", OPT),
    "opt-post-norm": ("OPTForCausalLM", {**OPT, "do_layer_norm_before": False}),
    "opt-projected": ("OPTForCausalLM", {**OPT, **PROJECTED}),
    "opt-untied": ("OPTForCausalLM", {**OPT, **PROJECTED, "tie_word_embeddings": False}),
    "opt-no-bias": ("OPTForCausalLM", {**OPT, "enable_bias": False}),
    "opt-no-affine": ("OPTForCausalLM", {**OPT, "layer_norm_elementwise_affine": False}),
    "opt-no-final-norm": ("OPTForCausalLM", {**OPT, "_remove_final_layer_norm": True}),
    "bert": ("BertForMaskedLM", BERT),
    "bert-untied": ("BertForMaskedLM", {**BERT, "tie_word_embeddings": False}),
    "bert-three-types": ("BertForMaskedLM", {**BERT, "type_vocab_size": 3, "hidden_act": "relu"}),
    "bert-pretraining": ("BertForPreTraining", BERT),
    "bert-base": ("BertModel", BERT),
    "bert-classifier": ("BertForSequenceClassification", {**BERT, "num_labels": 3}),
    "bert-tokens": ("BertForTokenClassification", {**BERT, "num_labels": 5}),
    "roberta": ("RobertaForMaskedLM", ROBERTA),
    "roberta-untied": ("RobertaForMaskedLM", {**ROBERTA, "tie_word_embeddings": False}),
    "roberta-pad-3": ("RobertaForMaskedLM", {**ROBERTA, "pad_token_id": 3}),
    "roberta-base": ("RobertaModel", {**ROBERTA, "type_vocab_size": 2}),
    "roberta-classifier": ("RobertaForSequenceClassification", {**ROBERTA, "num_labels": 4}),
    "roberta-tokens": ("RobertaForTokenClassification", {**ROBERTA, "num_labels": 2}),
    "distilbert": ("DistilBertForMaskedLM", DISTILBERT),
    "distilbert-untied": ("DistilBertForMaskedLM", {**DISTILBERT, "tie_word_embeddings": False}),
    "distilbert-base": ("DistilBertModel", {**DISTILBERT, "activation": "relu"}),
    "distilbert-classifier": (
        "DistilBertForSequenceClassification",
        {**DISTILBERT, "num_labels": 3},
    ),
    "distilbert-tokens": ("DistilBertForTokenClassification", {**DISTILBERT, "num_labels": 3}),
    "modernbert": ("ModernBertForMaskedLM", MODERNBERT),
    "modernbert-untied": (
        "ModernBertForMaskedLM",
        {**MODERNBERT, **ALL_BIASES, "tie_word_embeddings": False},
    ),
    "modernbert-base": ("ModernBertModel", {**MODERNBERT, "num_hidden_layers": 1}),
    "modernbert-classifier": (
        "ModernBertForSequenceClassification",
        {**MODERNBERT, "num_labels": 3},
    ),
    "modernbert-tokens": ("ModernBertForTokenClassification", {**MODERNBERT, "num_labels": 3}),
    "modernbert-mean": (
        "ModernBertForSequenceClassification",
        {**MODERNBERT, **ALL_BIASES, "num_labels": 4, "classifier_pooling": "mean"},
    ),
}


def make_model(name: str, **changes):
    """The model of a case, with changes of its configuration.

    Every parameter is random: a bias of zero would hide a mistake.
    """
    import torch
    import transformers

    architecture, options = CASES[name]
    options = options | changes
    cls = getattr(transformers, architecture)
    torch.manual_seed(len(name))
    model = cls(cls.config_class(**options, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.ndim == 1 and parameter.mean() == 1
            parameter.normal_(float(scale), 0.3)
    return model


def make_inputs(model) -> dict[str, np.ndarray]:
    """Four rows: whole, padded on the right, padded on the left, a single token."""
    config = model.config
    rng = np.random.default_rng(0)
    mask = np.ones((4, 9), np.int32)
    mask[1, 6:] = mask[2, :4] = mask[3, 1:] = 0
    ids = rng.integers(4, config.vocab_size, mask.shape)
    inputs = {"input_ids": np.where(mask, ids, config.pad_token_id), "attention_mask": mask}
    types = getattr(config, "type_vocab_size", 1)
    if types > 1:
        inputs["token_type_ids"] = rng.integers(0, types, mask.shape)
    return {key: value.astype(np.int32) for key, value in inputs.items()}


def outputs(model, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Logits, or the last hidden states of a model without a head, at float32.

    OPT and RoBERTa derive positions from the padding themselves; the others are told.
    """
    import torch

    tensors = {key: torch.from_numpy(value).long() for key, value in inputs.items()}
    if model.config.model_type not in ("opt", "roberta"):
        tensors["position_ids"] = (tensors["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(**tensors)
    for key in ("logits", "prediction_logits", "last_hidden_state"):
        if key in out:
            return out[key].float().numpy()
    raise KeyError(f"{type(model).__name__} gives {list(out)}")

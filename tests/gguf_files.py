"""GGUF files of tiny models, as llama.cpp's converter writes them."""

import json

import gguf

from kinds import EOS, TEMPLATE


def _paired(weight, heads):
    """Rows in llama.cpp's order, as its converter permutes Llama's queries and keys."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _add_gemma(writer, kind, config):
    """What a Gemma says beside the others."""
    writer.add_value_length(config.head_dim)
    if kind != "gemma":
        writer.add_sliding_window(config.sliding_window)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if value := getattr(config, name, None):
            writer.add_float32(f"{kind}.{name}", value)


def write(path, kind, model, tokenizer, *, quantized=None, without=(), more=(), **fields):
    """A GGUF file of a tiny model; `kind` is what llama.cpp calls it."""
    config, writer = model.config, gguf.GGUFWriter(str(path), kind)
    if kind.startswith("gemma"):
        _add_gemma(writer, kind, config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = [" ".join(merge) for merge in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields.pop("pre", "gpt-2"))
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(vocab))])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)
    for name, value in fields.items():
        writer.add_uint32(f"{kind}.{name}", value)
    names = gguf.get_tensor_name_map(
        next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == kind), config.num_hidden_layers
    )
    tied = config.tie_word_embeddings
    for name, weight in model.state_dict().items():
        if name in without or (tied and name == "lm_head.weight"):
            continue
        values = weight.float().numpy()
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        if kind == "llama" and (".q_proj." in name or ".k_proj." in name):
            values = _paired(values, config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        if quantized is not None and values.ndim > 1:
            writer.add_tensor(stored, gguf.quants.quantize(values, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(stored, values)
    for name, values in more:
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

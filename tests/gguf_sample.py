"""A tiny GGUF, made in code."""

import pytest


def write_gguf(file, model, tokenizer, facts=None, tensors=None):
    """A llama GGUF in float32, with the row order llama.cpp gives q and k.

    `facts` are more metadata, `tensors` more tensors.
    """
    gguf = pytest.importorskip("gguf")
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    # old readers want a list of merges, not one: the last two bytes make room for them
    merged = {254: "ab", 255: "ba"}
    writer.add_token_list([merged.get(i, token) for token, i in vocab])
    writer.add_token_types([3 if i > 255 else 1 for _, i in vocab])
    writer.add_token_merges(["a b", "b a"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "mlp.up_proj": "ffn_up"}
    names |= {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    names |= {"mlp.gate_proj": "ffn_gate", "mlp.down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    for i in range(config.num_hidden_layers):
        for name, short in names.items():
            tensor = state[f"model.layers.{i}.{name}.weight"]
            if short in ("attn_q", "attn_k"):
                heads = (
                    config.num_attention_heads if short == "attn_q" else config.num_key_value_heads
                )
                tensor = (
                    tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
                )
            writer.add_tensor(f"blk.{i}.{short}.weight", tensor.contiguous().numpy())
    for name, value in (facts or {}).items():
        kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
        getattr(writer, f"add_{kinds[type(value)]}")(name, value)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file

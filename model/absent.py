"""Public methods of transformers' classes that are not here, and what is in their place; docs/python.md shows them."""

from __future__ import annotations

TRAINING = "this library does not train"
CHANGED = "weights and network stay as they are loaded"
HUB = "give the saved folder to huggingface_hub's `upload_folder`"
INNER = "an inner step of transformers"
NO_CODE = "code of others is never run"
ADAPTER = "`from_pretrained(..., adapter=FOLDER)`"
ENCODED = 'call the tokenizer: `tokenizer(texts, padding=True, return_tensors="pt")`'
NAMED = "`tokenizer.special_tokens`, from spellings to ids; `encode` and `decode` for text"
FIXED = "a vocabulary is fixed when it is loaded"

# Our class, names of its counterpart in transformers (4.57.6 and 5.24.0), and what to do instead.
ABSENT = (
    ("DbrxConfig", "to_diff_dict", "`to_dict`, which leaves nothing out"),
    ("DbrxConfig", "update update_from_string", "`dataclasses.replace(config, n_layers=2)`"),
    ("DbrxConfig", "get_text_config get_mtp_config", "the configuration itself: it has no parts of other kinds"),
    ("DbrxConfig", "get_config_dict default_config_fields", "`DbrxConfig.from_pretrained(...).to_dict()`"),
    ("DbrxConfig", "push_to_hub", HUB),
    ("DbrxConfig", "register_for_auto_class is_custom_code is_remote_code", NO_CODE),
    (
        "DbrxConfig",
        "validate validate_architecture validate_layer_type validate_output_attentions validate_rope "
        "validate_token_ids",
        "nothing: a configuration is checked when it is made",
    ),
    (
        "DbrxConfig",
        "dict_dtype_to_str from_text_audio_configs from_text_vision_configs convert_rope_params_to_dict "
        "nested_rope_parameter_keys standardize_rope_params",
        INNER,
    ),
    ("DbrxForCausalLM", "push_to_hub add_model_tags", HUB),
    ("DbrxForCausalLM", "get_decoder get_encoder", "`network.transformer`"),
    ("DbrxForCausalLM", "can_generate", "nothing: it always can"),
    ("DbrxForCausalLM", "get_memory_footprint estimate_tokens floating_point_ops", "`dbrx plan`"),
    ("DbrxForCausalLM", "compute_transition_scores", "`network(ids).logits.log_softmax(-1)`, or `--logprobs`"),
    ("DbrxForCausalLM", "get_compiled_call", "nothing: its kernels are compiled"),
    ("DbrxForCausalLM", "dequantize", "`dbrx convert FOLDER OUT --to bfloat16`"),
    (
        "DbrxForCausalLM",
        "generate_batch init_continuous_batching continuous_batching_context_manager "
        "destroy_cached_continuous_batching_manager",
        "`model.scheduler.Scheduler`, or `generate` with rows padded on the left",
    ),
    (
        "DbrxForCausalLM",
        "active_adapters add_adapter delete_adapter disable_adapters enable_adapters enable_peft_hotswap "
        "get_adapter_state_dict load_adapter set_adapter",
        ADAPTER,
    ),
    (
        "DbrxForCausalLM",
        "disable_input_require_grads enable_input_require_grads gradient_checkpointing_disable "
        "gradient_checkpointing_enable activation_checkpointing_disable activation_checkpointing_enable "
        "add_memory_hooks reset_memory_hooks_state",
        TRAINING,
    ),
    (
        "DbrxForCausalLM",
        "resize_token_embeddings resize_position_embeddings get_position_embeddings set_input_embeddings "
        "set_output_embeddings set_decoder set_encoder prune_heads to_bettertransformer reverse_bettertransformer "
        "kernelize set_use_kernels set_experts_implementation get_experts_implementation",
        CHANGED,
    ),
    ("DbrxForCausalLM", "register_for_auto_class is_custom_code is_remote_code load_custom_generate", NO_CODE),
    (
        "DbrxForCausalLM",
        "adjust_generation_fn barrier_after_gathered_checkpoint_save create_extended_attention_mask_for_decoder "
        "gather_sharded_state_dict_for_save get_correct_attn_implementation get_correct_experts_implementation "
        "get_expanded_tied_weights_keys get_extended_attention_mask get_head_mask get_init_context "
        "get_parameter_or_buffer heal_tokens init_parallel_plans init_weights initialize_weights "
        "invert_attention_mask is_backend_compatible mark_tied_weights_as_initialized maybe_distribute_model "
        "named_non_persistent_buffers post_init prepare_distribute_model prepare_inputs_for_generation "
        "retrieve_modules_from_names save_distributed_checkpoint should_save_on_this_rank "
        "tie_embeddings_and_encoder_decoder warn_if_padding_and_no_attention_mask",
        INNER,
    ),
    (
        "Tokenizer",
        "batch_encode_plus encode_plus pad prepare_for_model prepare_seq2seq_batch set_truncation_and_padding "
        "truncate_sequences as_target_tokenizer",
        ENCODED,
    ),
    (
        "Tokenizer",
        "convert_tokens_to_ids convert_ids_to_tokens convert_tokens_to_string tokenize get_vocab get_added_vocab",
        NAMED,
    ),
    (
        "Tokenizer",
        "add_tokens add_special_tokens convert_added_tokens sanitize_special_tokens train_new_from_iterator "
        "update_post_processor convert_to_native_format",
        FIXED,
    ),
    ("Tokenizer", "get_chat_template", "`tokenizer.chat_template.text`"),
    ("Tokenizer", "save_vocabulary save_chat_templates", "`save_pretrained`, which writes all files"),
    (
        "Tokenizer",
        "build_inputs_with_special_tokens create_token_type_ids_from_sequences get_special_tokens_mask "
        "num_special_tokens_to_add",
        "nothing: DBRX adds no special tokens to a text",
    ),
    ("Tokenizer", "clean_up_tokenization", "nothing: text is never cleaned up, which would spoil code"),
    ("Tokenizer", "encode_message_with_chat_template", "`apply_chat_template`"),
    ("Tokenizer", "parse_response get_response_parser", "`decode`: DBRX's replies are plain text"),
    ("Tokenizer", "push_to_hub", HUB),
    ("Tokenizer", "register_for_auto_class", NO_CODE),
)


def absent(kind: str, name: str) -> AttributeError:
    """The error for an attribute that the class `kind` lacks; of a method of transformers it says what to do."""
    instead = next((text for of, names, text in ABSENT if of == kind and name in names.split()), None)
    return AttributeError(f"{kind} has no {name!r}" + (f"; instead: {instead.replace('`', '')}" if instead else ""))

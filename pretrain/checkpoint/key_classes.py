"""May this key of a run's configuration change when the run goes on from a checkpoint?

Every key stands here once, by its full name, so that a new field of `Run` that nobody has thought
about is missed by a test and is not a silent change of the model. What each class means for whoever
starts the run: `CLASSES`. `python -m pretrain.checkpoint.key_classes` prints the table of
docs/reliability_resume.md. No torch.

Source: our choice, docs/decisions/0023.
"""

from collections.abc import Mapping
from typing import Literal

KeyClass = Literal["identity", "schedule", "ledger", "run-time"]

CLASSES: Mapping[KeyClass, str] = {
    "identity": "another value is another model, or other numbers than anybody would think they"
    " are: refused",
    "schedule": "the same model is trained on differently: refused without"
    " `change.allow=[key]` and `change.reason`",
    "ledger": "what is read in which order: the run's ledger compares digests, and wants"
    " `change.reason`",
    "run-time": "where, how fast, what is shown and kept: free",
}
"""What a start with another value than the checkpoint's meets with."""

_TABLE: Mapping[KeyClass, Mapping[str, str]] = {
    "identity": {
        # what the run began from: another path would look as if the run had begun there
        "": "seed initial_weights",
        "model": "num_layers num_dense_layers hidden_size dense_ffn_size num_routed_experts"
        " num_experts_per_token num_shared_experts expert_ffn_size num_expert_groups"
        " num_groups_per_token routed_scaling num_heads q_lora_rank kv_lora_rank"
        " qk_nope_head_size qk_rope_head_size v_head_size vocab_size max_context_tokens"
        " num_mtp_layers dual_norm rms_norm_eps init_std",
        "model.rope": "base scaling_factor original_context_tokens beta_fast beta_slow mscale"
        " mscale_all_dim",
        "precision": "kind fp8_recipe fp8_format fp8_margin fp8_amax_history fp8_amax_algorithm"
        " fp8_accumulation high_precision num_first_high_layers num_last_high_layers",
        "load_balance": "kind",
        "data": "document_attention",
    },
    "schedule": {
        "": "mtp_loss_weight",
        "load_balance": "aux_loss_coefficient bias_update_rate",
        "optimizer": "lr beta1 beta2 eps weight_decay clip_norm clip"
        " zclip_alpha zclip_z zclip_warmup_steps adagc_ratio adagc_beta adagc_warmup_steps",
        "lr_schedule": "warmup_tokens decay_tokens final_ratio",
    },
    "ledger": {
        "curriculum": "stages max_epochs max_epochs_by_domain optional_domains",
        "data": "corpus train",
        "change": "reason skip",
    },
    "run-time": {
        "": "name output_root micro_batch_tokens resume when_finished on_other_environment",
        "alarms": "slow_share slow_for_s late_commits load_max_over_mean load_steps"
        " attention_logit_max mixture_error fp8_gradient_underflow fp8_overflow fp8_sqnr_drop_db"
        " fp8_sqnr_steps repeat_s",
        "change": "allow",
        "checkpoints": "interval_steps keep read_back",
        "checkpoints.local": "folder interval_steps",
        "cluster": "name num_nodes gpus_per_node gpu_memory_bytes node_link_bytes_per_s"
        " network_bytes_per_s other_num_nodes time_limit_s time_margin_s environment",
        "data.reading": "depth timeout_s on_damage max_replaced",
        "data.storage": "local_limit_s remote_limit_s num_retries cache_folder cache_bytes",
        "evaluation": "interval_steps windows_per_domain final_windows_per_domain",
        "exchange": "dispatcher overlap_all_to_all overlap_shared_expert",
        "layout": "num_ranks tp cp pp vp ep etp",
        "optimizer": "overlap bucket_parameters",
        "precision": "shadow_interval_steps",
        "recompute": "kind modules method num_layers loss_chunk_tokens",
        "kernels": "dual_norm router swiglu permute combine",
        "prediction": "calibrate allow_misfit expert_imbalance reserved_bytes",
        "recheck": "max_left_out memory_interval_steps replicas_interval_steps"
        " sample_interval_steps",
        "recovery": "policy max_skips margin_steps max_skipped_batches slow_batches max_rewinds"
        " max_bundles",
        "recovery.rule": "window_steps min_steps near far loss_floor norm_floor smoothing excess"
        " recover_steps high_excess high_steps",
        "restarts": "in_job without_progress lease_s",
        "stragglers": "window_steps late_share excess_share repeat_steps",
        "telemetry": "wandb project entity console_interval_steps page_interval_s"
        " wandb_queue_records wandb_init_timeout_s wandb_close_timeout_s",
        "watch": "interval_s hang_s slow_hang_s",
    },
}
"""Class -> group -> its keys."""


def keys_of(which: KeyClass) -> tuple[str, ...]:
    """Return the full names of a class's keys, in the order of the table."""
    return tuple(
        f"{group}.{name}".lstrip(".")
        for group, names in _TABLE[which].items()
        for name in names.split()
    )


KEY_CLASS: Mapping[str, KeyClass] = {key: which for which in _TABLE for key in keys_of(which)}
"""Full name -> class, of every key of `Run` that holds a value."""


def as_markdown() -> str:
    """Return the table of all classes for the documentation, a newline at the end."""
    rows = ["| class | another value than the checkpoint's | keys |", "|---|---|---|"]
    for which, meaning in CLASSES.items():
        groups = [
            f"{group}{'.' if group else ''}{_braced(names.split())}"
            for group, names in _TABLE[which].items()
        ]
        rows.append(f"| {which} | {meaning} | {', '.join(f'`{text}`' for text in groups)} |")
    return "\n".join(rows) + "\n"


def _braced(names: list[str]) -> str:
    return names[0] if len(names) == 1 else "{" + ", ".join(names) + "}"


if __name__ == "__main__":
    print(as_markdown(), end="")

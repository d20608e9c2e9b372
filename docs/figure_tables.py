"""Which rows does each table of figures have? JSON as a benchmark wrote it, to Markdown."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from planner_tables import planner_memory_rows  # beside this file, as this file is


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the first the header, as an aligned Markdown table."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def demo_table(record: Mapping[str, Any]) -> str:
    """Return the demo run's losses beside gzip and xz."""
    rows = [("text", "nats/token", "of ln(V)", "bits/byte", "gzip -9", "xz -9e")]
    ln_v = math.log(record["vocabulary_size"])
    for score in (record["validation"], *record["domains"]):
        name = "validation" if score["name"] == "all" else score["name"]
        rows.append(
            (
                name,
                f"{score['loss']:.3f}",
                f"{score['loss'] / ln_v:.3f}",
                f"{score['bits_per_byte']:.3f}",
                f"{score['gzip_bits_per_byte']:.3f}",
                f"{score['xz_bits_per_byte']:.3f}",
            )
        )
    return markdown_table(rows)


def bench_step_table(record: Mapping[str, Any]) -> str:
    """Return the step times beside transformers' and the bare matrix products'."""
    rows = [("training step", "dtype", "threads", "tokens", "parameters", "ms, minimum", "ratio")]
    rows += [
        (
            row["name"],
            row["dtype"],
            str(row["threads"]),
            f"{row['step_tokens']:,}",
            f"{row['num_parameters']:,}",
            f"{row['min_ms']:.0f}",
            f"{row['ratio']:.2f}",
        )
        for row in record["rows"]
    ]
    return markdown_table(rows)


def bench_export_table(record: Mapping[str, Any]) -> str:
    """Return the times and memory of an export beside those of a plain copy."""
    full = 518_983_052_288 / record["num_parameters"]
    rows = [("job", "GB", "s", "GB/s", "peak MiB", "519B: hours")]
    rows += [
        (
            row["name"],
            f"{row['gigabytes']:.2f}",
            f"{row['seconds']:.1f}",
            f"{row['gigabytes'] / row['seconds']:.2f}",
            f"{row['peak_mib']:.0f}",
            f"{row['seconds'] * full / 3600:.1f}",
        )
        for row in record["rows"]
    ]
    return markdown_table(rows)


def verify_table(record: Mapping[str, Any]) -> str:
    """Return what was verified: how many cases of each kind, and the worst of each difference."""
    rows: list[tuple[str, ...]] = [
        ("cases", "number", "same as one rank", "loss", "norm", "gradient", "weight", "experts")
    ]
    verdicts: Sequence[Mapping[str, Any]] = record["verdicts"]
    for kind in sorted({_kind(v) for v in verdicts}):
        mine = [v for v in verdicts if _kind(v) == kind]
        ran = [v for v in mine if v["verdict"] == "ok"]
        keys = ("loss", "norm", "gradient", "weight", "other_experts")
        worst = [f"{max(v[key] for v in ran):.1e}" for key in keys]
        rows.append((kind, str(len(mine)), str(len(ran)), *worst))
    return markdown_table(rows)


def _kind(verdict: Mapping[str, Any]) -> str:
    if verdict["options"]:
        return "options, bf16" if "bf16" in verdict["options"] else "options, fp32"
    stages = next(word[2:] for word in verdict["layout"].split() if word.startswith("pp"))
    return f"layouts, {stages} pipeline rank{'s' if stages != '1' else ''}"


def bench_stream_table(record: Mapping[str, Any]) -> str:
    """Return how soon the stream is ready, beside megatron-core's, and how fast it reads."""
    start = [("a run of 10T tokens, from nothing to", "s", "peak MiB")]
    start += [
        (
            f"the addresses of batch {part['batch']:,} of {part['num_batches']:,}",
            f"{part['total_s']:.2f}",
            f"{part['peak_mib']:.0f}",
        )
        for part in record["start"].values()
    ]
    builds = [("documents", "megatron-core: s", "MiB", "ours: ms", "MiB", "ratio", "whole batch")]
    builds += [
        (
            f"{build['documents']:,}",
            f"{build['megatron']['cpu_s']:.2f}",
            f"{build['megatron']['peak_mib']:,.0f}",
            f"{1e3 * build['ours']['best_cpu']['first_sample_s']:.2f}",
            f"{build['ours']['peak_mib']:.0f}",
            f"{build['ratio_first_sample']:,.0f}",
            f"{build['ratio_first_batch']:,.0f}",
        )
        for build in record["builds"]
    ]
    names = ("ours", "ours_unchecked", "gpt_dataset", "bare_pread_int64")
    reading = [
        ("window", "ours", "unchecked", "GPTDataset", "pread and int64", "ratio", "unchecked")
    ]
    reading += [
        (
            f"{row['window_tokens']:,}",
            *(f"{row['tokens_per_s'][name] / 1e6:.0f}" for name in names),
            f"{row['ratio_checked']:.1f}",
            f"{row['ratio_unchecked']:.1f}",
        )
        for row in record["reading"]
    ]
    return "\n\n".join(markdown_table(rows).rstrip() for rows in (start, builds, reading)) + "\n"


def slurm_check_table(record: Mapping[str, Any]) -> str:
    """Return what a real SLURM was expected to do and did."""
    rows = [("what happens", "expected", "found", "s", "holds")]
    rows += [
        (
            row["check"],
            row["expected"],
            row["found"],
            f"{row['seconds']:.0f}",
            "yes" if row["holds"] else "NO",
        )
        for row in record["rows"]
    ]
    return markdown_table(rows)


def goodput_table(record: Mapping[str, Any]) -> str:
    """Return where the seconds come from, and the ratio under each rate of failures."""
    parts = [("part", "seconds", "origin", "key")]
    parts += [
        (part["name"], f"{part['seconds']:.2f}", part["origin"], f"`goodput.{part['key']}`")
        for part in record["times"]["parts"]
    ]
    rows = [
        (
            "failures as",
            "MTBF",
            "closed form",
            "simulated",
            "if it waited",
            "best interval",
            "Young",
        )
    ]
    rows += [
        (
            row["name"],
            f"{row['mtbf_s'] / 3600:.1f} h",
            f"{row['closed_form']:.4f}",
            f"{row['simulated']['ettr']:.4f} +- {row['simulated']['standard_error']:.4f}",
            f"{row['waiting']:.4f}",
            f"{row['best_interval_s'] / 60:.1f} min",
            f"{row['young_interval_s'] / 60:.1f} min",
        )
        for row in record["rows"]
    ]
    saves = (
        f"{record['state_bytes'] / 1e12:.2f} TB every {record['interval_steps']} steps ="
        f" {record['times']['interval_s'] / 60:.1f} min; training waits {record['blocking_s']:.1f}"
        f" s, {record['persist_s']:.0f} s go on beside it; {record['detection_s']:.0f} s to the"
        f" discovery of a failure, {record['restart_s']:.0f} s to the first new step. 1 % is"
        f" {record['gpu_hours_of_a_percent']:,.0f} GPU-hours."
    )
    tables = [markdown_table(cells).rstrip() for cells in (parts, rows)]
    return "\n\n".join([saves, *tables]) + "\n"


def bench_checkpoint_table(record: Mapping[str, Any]) -> str:
    """Return how long training waits for saves of both kinds."""
    rows = [("save", "number", "training waits, ms", "until committed, s", "steps beside it")]
    rows += [
        (
            row["kind"],
            str(row["number"]),
            f"{row['blocking_s'] * 1e3:,.0f}",
            f"{row['total_s']:.2f}",
            str(row["steps_beside"]),
        )
        for row in sorted(record["rows"], key=lambda row: (row["kind"], row["number"]))
    ]
    note = (
        f"{record['num_parameters']:,} parameters, {record['num_bytes'] / 1e9:.2f} GB. From the"
        f" second save on: {record['ratio_of_medians']:.3f} of the synchronous one (medians),"
        f" {record['longest_over_shortest']:.3f} (longest over shortest). On these two cores a step"
        f" beside a save takes {record['step_beside_over_alone']:.2f} times as long."
    )
    return f"{markdown_table(rows)}\n{note}\n"


def chaos_table(record: Mapping[str, Any]) -> str:
    """Return how many faults of which kind struck, and how many runs were not themselves."""
    kinds = [("fault", "struck")]
    by_count = sorted(record["by_kind"].items(), key=lambda item: (-item[1], item[0]))
    kinds += [(kind, str(count)) for kind, count in by_count]
    layouts = ", ".join(f"{name} {count}" for name, count in sorted(record["by_layout"].items()))
    note = (
        f"{record['num_faults']} faults in {record['num_runs']} runs, {record['minutes']:.0f}"
        f" minutes, {record['num_violated']} runs with a violated oracle. Runs by layout:"
        f" {layouts}."
    )
    return f"{note}\n\n{markdown_table(kinds)}"


def stops_table(record: Mapping[str, Any]) -> str:
    """Return how many stopped ranks were found."""
    return (
        f"{len(record['trials'])} ranks stopped at random: the right one named"
        f" {record['num_right']} times, and within two intervals of {record['interval_s']:g} s,"
        f" with exit code 85 and no process left, {record['num_good']} times; found after"
        f" {record['median_s']:.2f} s (median), {record['longest_s']:.2f} s (longest).\n"
    )


def kills_table(record: Mapping[str, Any]) -> str:
    """Return the effective training time of a run that was killed at random."""
    return (
        f"Killed {record['num_kills']} times in {record['total_s']:.0f} s: effective training time"
        f" {record['ettr']:.3f}, by the planner's simulation {record['simulated_ettr']:.3f}; from a"
        f" kill to the next step {record['measured']['init_s']:.2f} s, a save costs"
        f" {record['measured']['blocking_s'] * 1e3:.0f} ms.\n"
    )


def metrics_table(record: Mapping[str, Any]) -> str:
    """Return what the metrics of a step cost."""
    return (
        f"A step of {record['step_ms']:.0f} ms takes {record['off_ms']:+.2f} ms with all hooks"
        f" switched off, and {record['on_ms']:+.1f} ms where everything is measured and reduced;"
        f" read every {record['interval_steps']} steps, as the demo does, that is"
        f" {record['price_ms']:.2f} ms or {record['share']:.2%} of a step (medians of"
        f" {record['repeats']} pairs).\n"
    )


def dual_norm_table(record: Mapping[str, Any]) -> str:
    """Return what became of two runs, with and without the second norm."""
    rows = [
        ("", "last loss", "largest gradient norm", "steps flagged", "spikes",
         "largest attention score", "largest residual"),
    ]  # fmt: skip
    rows += [
        (
            f"{'with' if side['dual_norm'] else 'without'} the second norm",
            f"{side['last_loss']:.3f}",
            f"{side['largest_gradient_norm']:.1f}",
            str(side["num_flagged"]),
            str(side["num_spikes"]),
            f"{side['largest_attention_logit']:.0f}",
            f"{side['largest_residual']:.1f}",
        )
        for side in record["sides"]
    ]
    note = (
        f"One seed, {record['num_steps']} steps at a learning rate of {record['lr']:g}; the"
        " gradient norm from step 21 on.\n"
    )
    return markdown_table(rows) + "\n" + note


def loss_spikes_table(record: Mapping[str, Any]) -> str:
    """Return what three rules find of planted spikes, and flag of clean steps."""
    rows = [("rule", "found within a step", "of the longest held", "normal noise", "Student's t")]
    rows += [
        (
            row["rule"],
            f"{row['found']} of {row['planted']}",
            f"{row['held_least']:.0%} at least",
            f"{row['false_normal_mean']:.1f}, at most {row['false_normal_most']}",
            f"{row['false_t5_mean']:.1f}, at most {row['false_t5_most']}",
        )
        for row in record["rows"]
    ]
    note = (
        f"{len(record['seeds'])} curves of {record['num_steps']:,} steps on seeds that were drawn"
        " for it; the last two columns are flagged steps of such a curve without spikes."
    )
    return f"{markdown_table(rows)}\n{note}\n"


def aot_table(record: Mapping[str, Any]) -> str:
    """Return what the machine code of every shipped kernel says."""
    names = ("num_warps", "registers", "spills", "stack_bytes", "shared_bytes", "wide", "narrow")
    rows = [("what", "kernel", *(name.replace("_", " ") for name in (*names, "saturating")))]
    rows += [
        (row["name"], f"`{row['kernel']}`", *(f"{row[name]:,}" for name in (*names, "saturating")))
        for row in record["rows"]
    ]
    return f"{markdown_table(rows)}\nTriton {record['triton']}, {record['target']}.\n"


def bench_loss_table(record: Mapping[str, Any]) -> str:
    """Return memory and time of the loss, with and without all logits at once."""
    rows = [("way", "peak MiB", "ratio", "ms, minimum", "ratio", "loss differs by")]
    rows += [
        (
            row["way"],
            f"{row['peak_mib']:,.0f}",
            f"{row['memory_ratio']:.3f}",
            f"{row['demo_min_ms']:.1f}",
            f"{row['time_ratio']:.3f}",
            f"{row['loss_error']:.0e}",
        )
        for row in record["rows"]
    ]
    note = (
        f"Memory with {record['num_words']:,} words, {record['num_tokens']:,} tokens, hidden"
        f" {record['hidden_size']}; time with the words of conf/model/axk1_20m.yaml and"
        f" {record['demo_tokens']:,} tokens; {record['threads']} thread."
    )
    return f"{markdown_table(rows)}\n{note}\n"


def fp8_table(record: Mapping[str, Any]) -> str:
    """Return the losses of one run in several precisions, and what FP8 lost."""
    sides = record["sides"]
    rows: list[tuple[str, ...]] = [
        (
            f"{record['num_steps']} steps",
            "last loss",
            "beside bf16",
            "validation",
            "gradients: became 0",
            "saturated",
            "signal over noise",
            "gradient error",
        )
    ]
    for side in sides:
        lost = [side["gradient_underflow"], side["gradient_overflow"]]
        rows.append(
            (
                side["precision"],
                f"{side['last_loss']:.4f}",
                f"{side['last_loss'] / sides[0]['last_loss'] - 1:+.2%}",
                f"{side['validation_loss']:.4f}",
                *("-" if share is None else f"{share:.2%}" for share in lost),
                "-" if side["gradient_sqnr_db"] is None else f"{side['gradient_sqnr_db']:.1f} dB",
                "-" if side["gradient_error"] is None else f"{side['gradient_error']:.1%}",
            )
        )
    return markdown_table(rows)


TABLES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "aot": aot_table,
    "chaos": chaos_table,
    "demo": demo_table,
    "dual_norm": dual_norm_table,
    "bench_checkpoint": bench_checkpoint_table,
    "bench_loss": bench_loss_table,
    "bench_step": bench_step_table,
    "bench_export": bench_export_table,
    "bench_stream": bench_stream_table,
    "fp8": fp8_table,
    "goodput": goodput_table,
    "planner_memory": lambda record: markdown_table(planner_memory_rows(record)),
    "loss_spikes": loss_spikes_table,
    "kills": kills_table,
    "metrics": metrics_table,
    "slurm_check": slurm_check_table,
    "stops": stops_table,
    "verify_2": verify_table,
    "verify_8": verify_table,
}

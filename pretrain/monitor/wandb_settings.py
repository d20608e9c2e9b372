"""What does wandb record by itself, beside what a run hands to it?

Left to itself wandb keeps the command line, paths of the program and of the machine, the state of
git with its differences, installed packages and what the terminal shows. A run writes those of
these that it wants in its own files, without secrets; wandb gets metrics and the scrubbed
configuration, and measures the machine. Nothing of this can be turned on by an environment
variable: what stands here goes before them.

No wandb is imported.
"""

from collections.abc import Callable

PRIVATE: dict[str, object] = {
    "console": "off",  # what the terminal shows, and so every line of the log
    "save_code": False,
    "disable_code": True,
    "disable_git": True,  # remote, commit, and the diff of what is not committed
    "disable_job_creation": True,
    "x_disable_meta": True,  # host, user, program, command line, git
    "x_save_requirements": False,
    "x_extra_http_headers": {},
    # the tracked figures of the machine stay, without endpoints that an environment could name
    "x_stats_open_metrics_endpoints": {},
    "x_stats_open_metrics_http_headers": {},
}


def wandb_settings(
    *, init_timeout_s: float, finish_timeout_s: float, stop: Callable[[], None]
) -> dict[str, object]:
    """Return the settings of `wandb.init`, for wandb 0.31.

    Args:
        init_timeout_s: how long a server may take to answer.
        finish_timeout_s: of the last upload; it also bounds the hook by which wandb holds up the
            exit of the interpreter.
        stop: called where the web page asks for a stop.
    """
    return {
        **PRIVATE,
        "silent": True,
        "init_timeout": init_timeout_s,
        "finish_timeout": finish_timeout_s,
        "stop_fn": stop,
    }

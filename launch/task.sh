# --- what one element does: one command that finds what is done already ----------------------------
# The settings above are all that differs between tasks; launch/slurm_script.py has written them.

set -u
umask 027
unset PYTHONPATH PYTHONHOME LD_PRELOAD

task=${SLURM_ARRAY_TASK_ID:-0}
words=("${WORDS[@]:FIRST_WORDS[task]:FIRST_WORDS[task + 1]-FIRST_WORDS[task]}")
exec "$PYTHON" "$ROOT/${words[0]}" "${words[@]:1}"

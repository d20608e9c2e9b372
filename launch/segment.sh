# --- what one element does: trains one run until it is finished or the time is nearly over ---------
# The settings above are all that differs between runs; launch/slurm_script.py has written them.

set -u -o pipefail
umask 027
unset PYTHONPATH PYTHONHOME LD_PRELOAD
# --export=NONE is meant for the batch script; the ranks shall see what it sees
unset SLURM_EXPORT_ENV
# Ranks that torchrun 2.13 starts again find the addresses of the dead in its agent's store, and none
# of them joins; with this rank 0 keeps a new store at each start.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

say() { printf '[%s] %s\n' "$(date -u '+%F %T')" "$*"; }

run=0
if ((${#RUN_FOLDERS[@]} > 1)); then run=$SLURM_ARRAY_TASK_ID; fi
folder=${RUN_FOLDERS[run]}
words=("${WORDS[@]:FIRST_WORDS[run]:FIRST_WORDS[run + 1]-FIRST_WORDS[run]}")

# A signal to torchrun would kill it and leave its ranks behind, so a signal becomes a file that the
# trainer looks for: it saves, says 75 in exit.json, and ends.
# shellcheck disable=SC2317  # traps call it
request_stop() {
    say "asking the run to stop: $1"
    printf '%s\n' "$1" >"$folder/stop.request" ||
        say "warning: $folder/stop.request cannot be written; the deadline is left"
}
mkdir -p "$folder"
# What an earlier element left says nothing of this one.
rm -f "$folder/stop.request" "$folder/exit.json"
trap 'request_stop "SLURM warns of the time limit (USR1)"' USR1
trap 'request_stop "the batch script was sent TERM"' TERM

worst_nodes() { # at most $1 of the nodes named on standard input, with commas
    (cd "$ROOT" && "$PYTHON" -m pretrain.monitor.node_faults "$OUTPUT_ROOT" \
        --policy "$FAULT_POLICY" --at-most "$1")
}

is_one_of() { # whether $1 is among the others
    local wanted=$1 other
    shift
    for other in "$@"; do
        if [[ $other == "$wanted" ]]; then return 0; fi
    done
    return 1
}

# The spare nodes of this job take the place of those that have failed most by now.
choose_nodes() {
    local allocated=() name bad=()
    nodes=()
    mapfile -t allocated < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    if ((${#allocated[@]} > NUM_NODES)); then
        IFS=, read -r -a bad < <(printf '%s\n' "${allocated[@]}" |
            worst_nodes $((${#allocated[@]} - NUM_NODES)))
    fi
    for name in "${allocated[@]}"; do
        if ((${#nodes[@]} < NUM_NODES)) && ! is_one_of "$name" "${bad[@]}"; then nodes+=("$name"); fi
    done
}

# Counted from the start of the job, so that ranks that torchrun starts again do not count anew.
set_deadline() {
    local end=${SLURM_JOB_END_TIME:-}
    if [[ -z $end ]]; then
        end=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e) && end=$(date -d "$end" +%s) || end=''
    fi
    if [[ $end =~ ^[0-9]+$ ]]; then
        export RUN_DEADLINE_UNIX_S=$((end - LEAD_S))
    else
        say "warning: SLURM does not say when this job ends; the run has its warning alone"
    fi
}

verdict() { # the code in exit.json; fails if there is none
    local text
    text=$(cat "$folder/exit.json" 2>/dev/null) || return 1
    # a start by hand beside this job has written its own
    [[ $text =~ \"job\":[[:space:]]*\"([^\"]*)\" && ${BASH_REMATCH[1]} != "${SLURM_JOB_ID:-}" ]] && return 1
    [[ $text =~ \"code\":[[:space:]]*([0-9]+) ]] && printf '%s' "${BASH_REMATCH[1]}"
}

# Waits for the step. Bash runs a trap only when `wait` returns, so it waits again after each.
# A run that has said its last word and does not end (a rank waits for one that is gone) is ended.
wait_for_step() {
    local pause said since=''
    while kill -0 "$step" 2>/dev/null; do
        sleep "$POLL_S" &
        pause=$!
        wait -n "$step" "$pause"
        kill "$pause" 2>/dev/null
        wait "$pause" 2>/dev/null
        if said=$(verdict) && is_one_of "$said" "${ENDS_JOB[@]}"; then
            since=${since:-$SECONDS}
            if ((SECONDS - since >= VERDICT_GRACE_S)); then
                say "the run said $said $VERDICT_GRACE_S s ago and is still there; ending it"
                kill -TERM "$step"
                break
            fi
        else
            since=''
        fi
    done
}

# sbatch fixed the nodes to leave out when the chain was submitted; the next element gets today's.
exclude_for_next() {
    local next="${SLURM_ARRAY_JOB_ID}_$((SLURM_ARRAY_TASK_ID + 1))" bad
    if [[ -z $(squeue --noheader --array --states=PENDING --jobs="$next" --format=%i 2>/dev/null) ]]; then
        say "no further element: submit the chain again to go on"
        return
    fi
    bad=$(sinfo --noheader --Node --format=%N | sort -u | worst_nodes "$MAX_EXCLUDED") || {
        say "warning: the nodes to leave out are not known; the next element keeps its list"
        return
    }
    bad=$EXCLUDED${EXCLUDED:+${bad:+,}}$bad
    if scontrol update JobId="$next" ExcNodeList="$bad"; then
        say "the next element leaves out: ${bad:-no node}"
    else
        say "warning: SLURM did not take the nodes to leave out ($bad) for $next"
    fi
}

choose_nodes
if ((${#nodes[@]} < NUM_NODES)); then
    say "SLURM names ${#nodes[@]} nodes of this job ($SLURM_JOB_NODELIST), $NUM_NODES are needed"
    exit "$INFRASTRUCTURE"
fi
set_deadline
say "job $SLURM_JOB_ID, element ${SLURM_ARRAY_TASK_ID:-0} of $folder on ${nodes[*]}"
# Since SLURM 22.05 a step has one CPU for each task unless it asks for more.
# A port of its own for each job, below those that the kernel gives away.
port=$((15000 + SLURM_JOB_ID % 15000))
srun --nodes="$NUM_NODES" --ntasks="$NUM_NODES" --ntasks-per-node=1 \
    --nodelist="$(IFS=, && printf '%s' "${nodes[*]}")" --kill-on-bad-exit=1 \
    --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none \
    "$PYTHON" -m torch.distributed.run --nnodes="$NUM_NODES" --nproc-per-node="$RANKS_PER_NODE" \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="${nodes[0]}:$port" \
    --max-restarts="$MAX_RESTARTS" --shutdown-timeout="$LEAD_S" \
    "$ROOT/launch/pretrain.py" "${words[@]}" &
step=$!
wait_for_step
trap '' USR1 TERM

# Without a word the machine is to blame: had the program failed, it would have said so.
code=$(verdict) || code=$INFRASTRUCTURE
say "the run ended with $code"
if ((IS_CHAIN)); then
    if is_one_of "$code" "${STOPS_CHAIN[@]}"; then
        scancel --user="$(id -un)" --name="$SLURM_JOB_NAME" --state=PENDING ||
            say "warning: the elements that wait could not be cancelled"
        say "nothing is left to do for this chain: elements that waited are cancelled"
    else
        exclude_for_next
    fi
fi
exit "$code"

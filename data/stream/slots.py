"""Which slots of a batch does a replica take, and how many at once?"""


def micro_sequences(micro_batch_tokens: int, *, window_tokens: int) -> int:
    """Return the sequences of one forward pass: as many as fit into its tokens, at least one.

    Args:
        micro_batch_tokens: of one forward pass on one replica.
        window_tokens: S.
    """
    return max(1, micro_batch_tokens // window_tokens)


def local_slots(size: int, *, micro_sequences: int, dp: int, data_rank: int) -> list[range]:
    """Return a replica's micro-batches of a batch, as ranges of slots in it.

    Micro-batch m of replica r holds slots [(m dp + r) micro, + micro): neighbours in the order of
    the data go to different replicas.

    Args:
        size: sequences in the batch.
        micro_sequences: sequences in a micro-batch.
        dp: replicas.
        data_rank: which of them, 0 <= data_rank < dp.

    Raises:
        ValueError: if micro_sequences * dp does not divide the batch.
    """
    share = micro_sequences * dp
    if size % share:
        raise ValueError(
            f"a batch of {size} sequences, but dp={dp} * micro_sequences={micro_sequences} ="
            f" {share} must divide it"
        )
    return [
        range(start + data_rank * micro_sequences, start + (data_rank + 1) * micro_sequences)
        for start in range(0, size, share)
    ]


def check_divides(size: int, *, step: int, ranks: int, micro_batch: int) -> None:
    """Refuse ranks that cannot share a batch.

    Args:
        size: sequences of the batch.
        step: that trains on it.
        ranks: replicas.
        micro_batch: sequences of a micro-batch.

    Raises:
        ValueError: if ranks * micro_batch does not divide it.
    """
    if size % (ranks * micro_batch):
        raise ValueError(
            f"step {step} has {size} sequences, but ranks={ranks} * micro_batch={micro_batch} must"
            " divide them: change one of the two"
        )

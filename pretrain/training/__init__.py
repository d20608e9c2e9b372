"""Training: configuration of a run, the step, the loop.

`trainer.py` holds the loop and its four verbs: next batch, train step, monitor, checkpoint.
`run.py` is the whole configuration of a run and the checks across its parts; it and the files of
pure arithmetic import no torch.
"""

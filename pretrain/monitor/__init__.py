"""What a run says about itself: metrics, sinks, throughput, plots and the summary at the end.

Here live the registry of metrics (`metrics`), the files and services that receive them (`records`,
`console`, `telemetry`), the clock (`throughput`) and what a person looks at afterwards (`plots`,
`summary`). Nothing here may hold up a training step, open a process group, or import torch.
"""

"""Where a rank is and how ranks talk: layout, devices, groups, schedules, seeds.

Here lives every line that knows about processes. Imports `kernels` and nothing else of ours. `cuda`
and `nccl` are words of device.py alone; megatron's parallel_state is touched in groups.py alone.
"""

"""What would a run need, before there is one: closed forms and simulations over integers and rates.

`goodput.py` how much of the time trains the model; `failure_rates.py` how often something breaks;
`simulation.py` the same time, failure by failure; `scale.py` seconds of a save and of a restart on
a cluster; `goodput_table.py` all of it on a screen. Numpy at most: no torch, no ranks, no files.
"""

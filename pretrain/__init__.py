"""The pretraining system: model, checkpoint, monitor, planner, training, serving.

Rooms import downwards only: serving > training > planner, monitor > model, checkpoint.
    tests/test_floors.py enforces it.
"""

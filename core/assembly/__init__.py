"""A preset in, a ready trainer out: the only package that knows models, losses, data and trainer.

start.py     where a run starts from: a checkpoint, other weights, or nothing
network.py   model, losses, heads and optimizer
reading.py   corpus, budget, and the loader of rows
session.py   all of it together: build_training
"""

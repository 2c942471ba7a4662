"""A training batch as the tuner computes it: without padding, with the head at labeled positions only.

`trainer` answers transformers' Trainer, `trl` the fused head of TRL's trainers, `objective` an objective, which may run
a `second_pass`; `labeled` and `packing` are what they have in common.
"""

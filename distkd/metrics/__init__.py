"""Numbers about a run: metrics of predictions, levels of aggregation, meters, and how others get to see them.

Nothing is imported here: `distkd.metrics.targets` has to do without torch.
"""

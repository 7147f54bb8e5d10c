"""Evaluation: features → statistics → metrics, then intervals, stress tests, plots and a report.

Import the module you need (`ot_diffusers.evaluation.metrics`, `.pixels`, `.evaluate`, `.report`, …); this file stays
empty so that a metric does not pull in matplotlib.
"""

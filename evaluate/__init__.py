"""Evaluation of stored features: zero-shot classification, linear probes, retrieval. Never sees a model."""

from mmkd.evaluate.runner import RunReport, run_suite
from mmkd.evaluate.suite import Suite, load_suite
from mmkd.evaluate.table import ResultTable, result_table
from mmkd.evaluate.tasks import TASKS

__all__ = ["TASKS", "ResultTable", "RunReport", "Suite", "load_suite", "result_table", "run_suite"]

"""Evaluation of stored features: zero-shot classification, linear probes, retrieval. Never sees a model.

Example:

    from mmkd.evaluate import load_suite, result_table, run_suite
    report = run_suite(load_suite("suite.yaml"), Path("results"))
    print(result_table(report.out, "zero_shot").markdown())
"""

from __future__ import annotations

from mmkd.evaluate.runner import RunReport, run_suite
from mmkd.evaluate.suite import Suite, load_suite
from mmkd.evaluate.table import ResultTable, result_table
from mmkd.evaluate.tasks import TASKS

__all__ = ["TASKS", "ResultTable", "RunReport", "Suite", "load_suite", "result_table", "run_suite"]

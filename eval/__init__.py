"""Accuracy against size: perplexity, agreement with the original, tasks, bytes, speed, and the report that shows them.

``evaluate`` measures, ``Report`` saves (report.json, report.md, report.html), loads and merges.
"""

from mambacompress.eval.report import Report, merged
from mambacompress.eval.runner import Candidate, evaluate
from mambacompress.eval.tasks import local_tasks

__all__ = ["Candidate", "Report", "evaluate", "local_tasks", "merged"]

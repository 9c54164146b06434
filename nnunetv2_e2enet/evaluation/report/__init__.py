"""One HTML page that needs nothing else: no network, no script, no other file."""

from nnunetv2_e2enet.evaluation.report.page import report_html

__all__ = ["report_html"]

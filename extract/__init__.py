"""Corpus to features: index once, decode once, every teacher, on a Dask cluster. The only folder that imports dask."""

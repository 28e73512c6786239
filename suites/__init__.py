"""Suites that come with mmkd, as YAML: `quick` on material of the demo, `biomed` on public data sets.

There is no code here: `mmkd evaluate check biomed` finds them by name, a suite of one's own by `${suites}/biomed/...`.
"""

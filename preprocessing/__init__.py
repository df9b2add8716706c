"""Raw cohorts to slices (paper sec. 4.1.2): find the scans, strip the skull, standardise, store.

Every input file is accounted for in ``scans.tsv``, whatever became of it.
"""

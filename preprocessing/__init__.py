"""Raw cohorts to slices: find the scans, strip the skull, standardise, store, and account for every input file (paper sec. 4.1.2)."""

"""Simulated cohorts in BIDS: anatomy, tumours, contrasts and site protocols, on the MNI152 maps of nilearn."""

"""Simulated cohorts in BIDS: anatomy, tumours, contrasts and site protocols, made from the MNI152 maps that nilearn ships."""

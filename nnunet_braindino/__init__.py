"""BrainDINO in stock nnU-Net v2: a frozen encoder, a 1x1 fusion of the sequences, a light decoder (paper sec. 4.3.1).

Kept empty on purpose: Python's start-up imports ``nnunet_braindino._startup`` through this file, so nothing heavy may
live here.
"""

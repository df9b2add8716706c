"""Volume encoders behind one contract: BrainDINO, DINOv3, BrainMVP, BM-MAE, BrainIAC, timm models, and the floors.

``load_volume_encoder`` in ``braindino.encoders.catalogue`` is the one door; ``braindino.encoders.contract`` says what
every encoder does.
"""

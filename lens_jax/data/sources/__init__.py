"""Where examples come from: `openmoji` (pictograms named in fourteen languages) and `folder` (your own images)."""

"""The page for looking at scans: what an encoder holds to be alike, at a click, on this machine alone."""

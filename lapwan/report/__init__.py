"""Drawing from plain data: `plots` (charts, intervals and matrices by matplotlib), `contact_sheet` (frames of videos in
one image)."""

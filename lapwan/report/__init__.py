"""Drawing from plain data: `canvas` (line charts, heat maps), `contact_sheet` (frames of videos in one image)."""

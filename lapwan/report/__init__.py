"""Drawing from plain data: `plots` (charts, intervals and matrices by matplotlib), `contact_sheet` (frames of videos in
one image), `dataset_sheet` (the clips of a dataset, as a page or an image), `page` (videos that play in step, tables
and plots in one self-contained file)."""

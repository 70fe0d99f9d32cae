"""Settings, guides, and research programs that use lapwan as a library. Run them from the root of a checkout."""
